"""Labelled images: what a data set is here, whatever its layout, and how its files are read."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import EpsImagePlugin, Image

from evaluation.metrics import class_groups

IGNORE = 255
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# By what is in a file, whatever its name: PIL knows 40 formats more, and hands one of them, PostScript, to Ghostscript, which runs it.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
EpsImagePlugin.gs_binary = False  # for images that `datasets` opens
# A file that is none, is damaged, or would be more pixels than PIL opens (a decompression bomb).
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Example:
    """One labelled image. `image` and `label` are paths, or functions that give arrays."""

    name: str
    image: Path | Callable[[], np.ndarray]
    label: Path | Callable[[], np.ndarray]


@dataclass(frozen=True)
class LabelledImages:
    """
    A labelled data set.

    Args:
        name: for tables. classes: names by id. train, test: examples.
        table: (256,) uint8, stored label -> class id or 255; `None` where stored labels are ids already.
        groups: the paper's groups of classes, or `None`: made from the training labels when they are first read.
    """

    name: str
    classes: tuple[str, ...]
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    table: np.ndarray | None = None
    groups: dict[str, Sequence[str]] | None = None

    def image(self, example: Example) -> np.ndarray:
        """(H, W, 3) uint8 RGB."""
        if callable(example.image):
            return example.image()
        return read_image(example.image)

    def label(self, example: Example) -> np.ndarray:
        """
        (H, W) uint8 class ids; 255 is not counted.

        Raises:
            ValueError: an id outside the classes; names the file and the id.
        """
        stored = example.label() if callable(example.label) else read_label(example.label)
        label = stored if self.table is None else self.table[stored]
        outside = np.setdiff1d(np.unique(label), [*range(len(self.classes)), IGNORE])
        if len(outside):
            where = example.name if callable(example.label) else example.label
            raise ValueError(f"{where} has the label {outside[0]}, but there are classes 0 to {len(self.classes) - 1}")
        return label

    def check(self) -> None:
        """
        Read the first and last example of each split, and the sizes of all that are files, before anything costly; and
        look for a labelled pixel to learn from.
        """
        for split in (self.train, self.test):
            for example in {split[0].name: split[0], split[-1].name: split[-1]}.values():
                image, label = self.image(example), self.label(example)
                if image.shape[:2] != label.shape:
                    raise ValueError(f"{example.name}: image {image.shape[:2]} and label {label.shape} differ in size")
            for example in split:
                if isinstance(example.image, Path) and isinstance(example.label, Path):
                    image, label = file_size(example.image), file_size(example.label)
                    if image != label:
                        raise ValueError(
                            f"{example.label} is {label[0]}x{label[1]}, its image {example.image.name} {image[0]}x{image[1]}"
                        )
        if not any((self.label(example) != IGNORE).any() for example in self.train):
            raise ValueError(
                f"{self.name}: none of the {len(self.train)} training images has a labelled pixel; a readout needs some"
            )

    def limit(self, max_train_images: int | None, max_test_images: int | None) -> "LabelledImages":
        """The same with fewer images, spread evenly over each split."""
        return dataclasses.replace(
            self, train=spread(self.train, max_train_images), test=spread(self.test, max_test_images)
        )

    def with_groups(self) -> "LabelledImages":
        """The same with groups from the statistics of (up to 200 of) the training labels."""
        if self.groups is not None:
            return self
        counts = np.zeros((3, len(self.classes)))
        for example in spread(self.train, 200):
            label = self.label(example)
            for index in np.setdiff1d(np.unique(label), [IGNORE]):
                mask = (label == index).astype(np.uint8)
                regions = cv2.connectedComponents(mask, connectivity=8)[0] - 1
                counts[:, index] += mask.sum(), regions, mask.mean()
        return dataclasses.replace(self, groups=class_groups(*counts, self.classes))


def spread(examples: Sequence, count: int | None) -> tuple:
    """`count` of the examples, spread evenly; all where there are no more, or `None` is asked for."""
    if count is None or count >= len(examples):
        return tuple(examples)
    return tuple(examples[i] for i in np.linspace(0, len(examples) - 1, count).round().astype(int))


def file_size(path: Path) -> tuple[int, int]:
    """Width and height, from the file's head alone."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except UNREADABLE as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_image(path: Path) -> np.ndarray:
    try:
        with Image.open(path, formats=FORMATS) as image:
            return np.asarray(image.convert("RGB"))
    except UNREADABLE as error:
        raise ValueError(f"image {path} cannot be read: {error}") from error


def read_label(path: Path) -> np.ndarray:
    try:
        with Image.open(path, formats=FORMATS) as image:
            label = np.asarray(image)
    except UNREADABLE as error:
        raise ValueError(f"label {path} cannot be read: {error}") from error
    return as_ids(label, path)


def as_ids(label: np.ndarray, where) -> np.ndarray:
    """A stored label as (H, W) uint8; raises ValueError, which names `where` it is from, for what are no ids of a byte."""
    if label.ndim != 2:
        raise ValueError(f"label {where} must hold one class id a pixel, got an array of shape {label.shape}")
    if label.dtype == bool or label.max(initial=0) > 255 or label.min(initial=0) < 0:
        raise ValueError(f"label {where} must hold ids from 0 to 255, got {label.dtype} up to {label.max()}")
    return label.astype(np.uint8)
