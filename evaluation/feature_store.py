"""Frozen features of images, stored on disk so that an encoder reads each image once."""

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger("poodle")
_HALF_MAX = torch.finfo(torch.float16).max


def as_kept(features: Tensor) -> Tensor:
    """
    Convert features to the half precision in which they are stored.

    A channel that hardly varies in the images used for the statistics may be thousands of deviations away in others. It is clamped, because
    inf would give a NaN loss.
    """
    return features.clamp(-_HALF_MAX, _HALF_MAX).half()


class FeatureStore:
    """
    Features of images in half precision, one after the other in a memory-mapped file that disappears with the process.

    Args:
        limit: bytes. Features beyond the limit, or for which the disk has no room, are not stored.
    """

    def __init__(self, limit: float):
        self.limit, self.places, self.file, self.memory = limit, {}, None, None
        self.folder = os.environ.get("POODLE_SCRATCH") or tempfile.gettempdir()

    def fill(self, features: Iterable[tuple[str, Tensor]]) -> int:
        """
        Store (name, features (C, h, w)) as long as there is room.

        Returns:
            The number of images whose features are stored.
        """
        offset = 0
        try:
            # A tenth of the free space is left for other files, such as this fit's checkpoints. This machine's processes share the rest.
            here = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
            limit = min(self.limit, 0.9 * shutil.disk_usage(self.folder).free / here)
            # A file without a name: a named one would stay, with all its gigabytes, if the process is killed.
            self.file = tempfile.TemporaryFile(dir=self.folder)
            for name, values in features:
                array = as_kept(values).cpu().numpy()
                if offset + array.size * 2 > limit:
                    break
                self.file.write(array.tobytes())
                self.places[name] = (offset, array.shape)
                offset += array.size * 2
            self.file.flush()
            if offset:
                self.memory = np.memmap(self.file, dtype=np.float16, mode="r")
        except OSError as error:  # the disk, or a file system in memory, is full after all
            logger.warning("features are not kept in %s: %s", self.folder, error)
            if self.file is not None:
                # Closing first writes the buffer, for which there is no room either, and then removes the file.
                with contextlib.suppress(OSError):
                    self.file.close()
            self.file, self.memory, self.places = None, None, {}
        return len(self.places)

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def __getitem__(self, name: str) -> Tensor:
        """Return the stored features of an image, (C, h, w) float16."""
        offset, shape = self.places[name]
        begin = offset // 2
        return torch.from_numpy(self.memory[begin : begin + int(np.prod(shape))].reshape(shape).copy())
