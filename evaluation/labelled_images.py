"""Labelled images: the representation of a data set, whatever its layout, and the reading of its files."""

import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import EpsImagePlugin, Image

from evaluation.metrics import class_groups
from modeling_poodle.cpu import usable_cores
from modeling_poodle.folders import spread

logger = logging.getLogger("poodle")
IGNORE = 255
STATISTICS = 200  # number of training labels from which the groups of classes are derived
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# Formats that are opened, recognised by a file's content, not its name. PIL knows 40 more, one of which, PostScript, Ghostscript would run.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
# Formats of labels, which must be lossless: JPEG and WebP would change ids.
LABEL_FORMATS = ("PNG", "BMP")
EpsImagePlugin.gs_binary = False  # also for images that a library opens by itself
# Errors of PIL for a file that is no image, is damaged, or has more pixels than PIL opens (a decompression bomb).
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Example:
    """One labelled image. `image` and `label` are paths, or functions that return arrays."""

    name: str
    image: Path | Callable[[], np.ndarray]
    label: Path | Callable[[], np.ndarray]


@dataclass(frozen=True)
class LabelledImages:
    """
    A labelled data set.

    Args:
        name: shown in tables.
        classes: names by id.
        train, test: examples.
        table: (256,) uint8, maps stored labels to class ids or 255; `None` if stored labels are ids already.
        groups: the paper's groups of classes; `None` until [`with_groups`] derives them from the training labels.
        absent: classes that [`with_groups`] found in no training label.
    """

    name: str
    classes: tuple[str, ...]
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    table: np.ndarray | None = None
    groups: dict[str, Sequence[str]] | None = None
    absent: tuple[str, ...] = ()

    def image(self, example: Example) -> np.ndarray:
        """Read an example's image, (H, W, 3) uint8 RGB."""
        if callable(example.image):
            return example.image()
        return read_image(example.image)

    def label(self, example: Example) -> np.ndarray:
        """
        Read an example's label, (H, W) uint8 class ids; 255 is not counted.

        Raises:
            ValueError: an id is outside the classes; the message names the file and the id.
        """
        stored = example.label() if callable(example.label) else read_label(example.label)
        label = stored if self.table is None else self.table[stored]
        outside = [index for index in ids_in(label) if len(self.classes) <= index < IGNORE]
        if outside:
            where = example.name if callable(example.label) else example.label
            found = stored[label == outside[0]][0]  # the id in the file
            told = found if found == outside[0] else f"{found} (class {outside[0]})"
            raise ValueError(f"{where} has the label {told}, but there are classes 0 to {len(self.classes) - 1}")
        return label

    def both(self, example: Example) -> tuple[np.ndarray, np.ndarray]:
        """
        Read an example's image and label.

        Raises:
            ValueError: they differ in size. `check` finds this early in files; rows of the Hub are read only when they are needed.
        """
        image, label = self.image(example), self.label(example)
        if image.shape[:2] != label.shape:
            raise ValueError(f"{example.name}: image {image.shape[:2]} and label {label.shape} differ in size")
        return image, label

    def check(self) -> None:
        """
        Check the data before a fit.

        This reads the first and last training image, the sizes of all images and labels that are files, and the whole test set, which is
        otherwise first read after the fit, perhaps hours later. Both splits must have a labelled pixel.

        Raises:
            ValueError: an image or label cannot be read, an image and its label differ in size, a split has no labelled pixel, or there are
                fewer than two classes.
        """
        if len(self.classes) < 2:
            raise ValueError(
                f"{self.name} has {len(self.classes)} class, with which all figures would be 100 %: what is not {self.classes[0]!r} needs a class too"
            )
        for example in (*self.train, *self.test):
            if isinstance(example.image, Path) and isinstance(example.label, Path):
                image, label = file_size(example.image), file_size(example.label)
                if image != label:
                    raise ValueError(
                        f"{example.label} is {label[0]}x{label[1]}, its image {example.image.name} {image[0]}x{image[1]}"
                    )
        some = (self.train[0], self.train[-1], *self.test)
        labelled = [(label != IGNORE).any() for _, label in read_ahead(self.both, some)]
        if not any((self.label(example) != IGNORE).any() for example in self.train):
            raise ValueError(
                f"{self.name}: none of the {len(self.train)} training images has a labelled pixel; a readout needs some"
            )
        if not any(labelled[2:]):
            raise ValueError(
                f"{self.name}: none of the {len(self.test)} test images has a labelled pixel; there would be no figure"
            )
        if self.absent:
            names = f"{', '.join(self.absent[:8])}{', ...' if len(self.absent) > 8 else ''}"
            told = f"{self.name}: no training label has a pixel of {names} ({len(self.absent)} of {len(self.classes)} classes)"
            if len(self.classes) - len(self.absent) < 2:
                raise ValueError(
                    f"{told}, and with one class alone all figures would be 100 %. {IGNORE} is not counted: are the masks 0 and 255? Ids are the places "
                    "in the list of classes, or set ignore_index"
                )
            logger.info(told)

    def limit(self, max_train_images: int | None, max_test_images: int | None) -> "LabelledImages":
        """Return the data set with fewer images, spread evenly over each split."""
        return dataclasses.replace(
            self, train=spread(self.train, max_train_images), test=spread(self.test, max_test_images)
        )

    def with_groups(self) -> "LabelledImages":
        """
        Return the data set with groups of classes, derived from statistics of up to 200 training labels.

        The rarest classes may occur in none of these labels. For them the other labels are read too, until each class has been seen.
        """
        if self.groups is not None:
            return self
        counts = np.zeros((3, len(self.classes)))

        def count(label: np.ndarray, indices) -> None:
            for index in indices:
                mask = (label == index).astype(np.uint8)
                regions = cv2.connectedComponents(mask, connectivity=8)[0] - 1
                counts[:, index] += mask.sum(), regions, mask.mean()

        first = spread(self.train, STATISTICS)
        for label in read_ahead(self.label, first):
            count(label, (index for index in ids_in(label) if index != IGNORE))
        unseen, read = {index for index in range(len(self.classes)) if not counts[0, index]}, len(first)
        if unseen and read < len(self.train):
            known, seen = {example.name for example in first}, set()
            for label in read_ahead(self.label, (example for example in self.train if example.name not in known)):
                read += 1
                here = unseen.intersection(ids_in(label))
                count(label, here)
                seen |= here
                if seen == unseen:
                    break
            counts[0, sorted(unseen)] *= len(first) / read  # scaled to the number of images in the sample
        absent = tuple(name for name, pixels in zip(self.classes, counts[0]) if not pixels)
        return dataclasses.replace(self, groups=class_groups(*counts, self.classes), absent=absent)


def ids_in(label: np.ndarray) -> list[int]:
    """Return the ids that occur in a uint8 label."""
    # 0.4 ms at 1280x720; np.unique, which sorts the pixels, takes 2.5 ms.
    return np.flatnonzero(cv2.calcHist([np.ascontiguousarray(label)], [0], None, [256], [0, 256])).tolist()


def read_ahead(read: Callable, items: Iterable, ahead: int = 16) -> Iterator:
    """Yield `read(item)` of each item in order, while threads read the next `ahead` items; PIL decodes without the GIL."""
    waiting: deque = deque()
    pool = ThreadPoolExecutor(max(1, min(4, usable_cores())), thread_name_prefix="read-ahead")
    try:
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def file_size(path: Path) -> tuple[int, int]:
    """Return an image's width and height, read from the file's header alone."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except UNREADABLE as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_image(path: Path) -> np.ndarray:
    try:
        with Image.open(path, formats=FORMATS) as image:
            return as_rgb(image)
    except UNREADABLE as error:
        raise ValueError(f"image {path} cannot be read: {error}") from error


def as_rgb(image: Image.Image) -> np.ndarray:
    """Convert an image of any mode to (H, W, 3) uint8. The EXIF orientation is not applied."""
    if image.mode[0] not in "IF":
        return np.asarray(image.convert("RGB"))
    # 16-bit grey, in some versions of PIL of mode I: PIL's own conversion would turn all values above 255 white.
    grey = np.asarray(image)
    if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
        raise ValueError(f"its pixels are of 32 bits (mode {image.mode}); save it with 8 or 16")
    return np.repeat(((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)


def read_label(path: Path) -> np.ndarray:
    """
    Read a label as it is stored, (H, W) uint8.

    Raises:
        ValueError: the file is no label.
    """
    return label_of(path, path)


def label_of(file, where, formats: Sequence[str] = LABEL_FORMATS) -> np.ndarray:
    """Read the label in `file`, a path or an open file. `where` names it in errors, which are those of [`read_label`]."""
    try:
        with Image.open(file, formats=formats) as image:
            # PIL scales 2-bit and 4-bit grey to a byte; this is undone below.
            stored = image.tile[0][3] if image.tile else None
            factor = {"L;2": 85, "L;4": 17}.get(stored[0] if isinstance(stored, tuple) else stored, 1)
            label = np.asarray(image)
    except UNREADABLE as error:
        raise ValueError(
            f"label {where} cannot be read: {error} (expected {' or '.join(formats)}; JPEG and WebP change ids)"
        ) from error
    return as_ids(label // factor if factor > 1 else label, where)


def as_ids(label: np.ndarray, where) -> np.ndarray:
    """
    Convert a stored label to (H, W) uint8.

    Args:
        where: names the label in errors.

    Raises:
        ValueError: the label is no map of ids from 0 to 255.
    """
    if label.ndim != 2:
        colours = "; colours must become ids first" if label.ndim == 3 and label.shape[2] in (3, 4) else ""
        raise ValueError(f"label {where} must hold one class id a pixel, got an array of shape {label.shape}{colours}")
    if label.dtype != bool and (label.max(initial=0) > 255 or label.min(initial=0) < 0):
        raise ValueError(f"label {where} must hold ids from 0 to 255, got {label.dtype} up to {label.max()}")
    return label.astype(np.uint8)
