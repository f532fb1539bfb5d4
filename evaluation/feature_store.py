"""Frozen features of images on disk, so that an encoder reads each image once."""

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
    Features in the half precision in which they are kept. A channel that hardly varies in the images of the statistics may be thousands of
    deviations away in others: it is clamped, since inf gives a NaN loss.
    """
    return features.clamp(-_HALF_MAX, _HALF_MAX).half()


class FeatureStore:
    """
    Features of images in half precision, one after the other in a memory-mapped file that disappears with the process.

    Args:
        limit: bytes. What goes beyond is not kept; nor is what the disk has no room for.
    """

    def __init__(self, limit: float):
        self.limit, self.places, self.file, self.memory = limit, {}, None, None
        self.folder = os.environ.get("POODLE_SCRATCH") or tempfile.gettempdir()

    def fill(self, features: Iterable[tuple[str, Tensor]]) -> int:
        """
        Keep (name, features (C, h, w)) as long as there is room.

        Returns:
            How many are kept.
        """
        offset = 0
        try:
            # A tenth of the disk is left to others, among them the checkpoints of this very fit; the machine's processes share the rest.
            here = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
            limit = min(self.limit, 0.9 * shutil.disk_usage(self.folder).free / here)
            # Without a name: one that has a name stays, with all its gigabytes, where the process is killed.
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
        except OSError as error:  # the disk is full after all, or memory that stands for one
            logger.warning("features are not kept in %s: %s", self.folder, error)
            if self.file is not None:
                # Closing writes what is buffered, for which there is no room either; then it removes the file.
                with contextlib.suppress(OSError):
                    self.file.close()
            self.file, self.memory, self.places = None, None, {}
        return len(self.places)

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def __getitem__(self, name: str) -> Tensor:
        """(C, h, w) float16."""
        offset, shape = self.places[name]
        begin = offset // 2
        return torch.from_numpy(self.memory[begin : begin + int(np.prod(shape))].reshape(shape).copy())
