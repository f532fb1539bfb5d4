"""The objects of a frame, and which of them subcrops hit; for `subcrop_study`."""

from dataclasses import dataclass

import cv2
import numpy as np

from training.subcrop_table import MIN_PIXELS

HIT_SHARE = 0.1
VOID = 255  # of unlabelled pixels


@dataclass(frozen=True)
class Objects:
    """
    The objects of one frame.

    Args:
        index: (H, W) int64, number of the object that each pixel belongs to, from 1 to n; 0 if none.
        classes: (n + 1,) class of each object; -1 for object 0.
        sizes: (n + 1,) number of pixels of each object; 0 for object 0.
        keys: (n + 1,) int64, identifies an object (one class of one instance) across frames; -1 if the object has no identity.
    """

    index: np.ndarray
    classes: np.ndarray
    sizes: np.ndarray
    keys: np.ndarray

    @property
    def groups(self) -> np.ndarray:
        """(n + 1,) int64 group numbers. The objects of one instance share a number; each object without identity has its own."""
        whole = np.where(self.keys < 0, -1 - np.arange(len(self.keys)), self.keys // 256)
        return np.unique(whole, return_inverse=True)[1]


def find_objects(labels: np.ndarray, instances: np.ndarray | None = None) -> Objects:
    """
    Find the objects of a frame. Objects of fewer than `MIN_PIXELS` pixels are left out.

    An object consists of the pixels of one class in one instance (a cyclist is two objects, rider and bicycle). Pixels without an instance
    form one object for each connected component (8 neighbours) of a class.

    Args:
        labels: (H, W) uint8 classes; 255 for unlabelled pixels.
        instances: (H, W) instance numbers, 0 for stuff; `None` if the data set has no instances.
    """
    instances = np.zeros(labels.shape, np.int64) if instances is None else instances.astype(np.int64)
    index, found = np.zeros(labels.shape, np.int64), [(-1, 0, -1)]

    def add(mask: np.ndarray, label: int, key: int) -> None:
        if (size := int(mask.sum())) >= MIN_PIXELS:
            index[mask] = len(found)
            found.append((label, size, key))

    for label in np.setdiff1d(np.unique(labels), [VOID]):
        mask = labels == label
        for instance in np.unique(instances[mask & (instances > 0)]):
            add(mask & (instances == instance), int(label), int(instance) * 256 + int(label))
        count, parts = cv2.connectedComponents((mask & (instances == 0)).astype(np.uint8), connectivity=8)
        for part in range(1, count):
            add(parts == part, int(label), -1)
    return Objects(index, *np.array(found, np.int64).T)


def covered(objects: Objects, boxes: np.ndarray) -> np.ndarray:
    """
    Count the pixels of each object that each box covers with their centres.

    Args:
        boxes: (N, 4) xyxy pixels.

    Returns:
        (N, n + 1) int64; column 0 counts pixels of no object.
    """
    inside = np.zeros((len(boxes), len(objects.sizes)), np.int64)
    for row, (x0, y0, x1, y1) in enumerate(np.ceil(np.maximum(boxes, 0) - 0.5).astype(int)):
        inside[row] = np.bincount(objects.index[y0:y1, x0:x1].ravel(), minlength=len(objects.sizes))
    return inside


def hits(objects: Objects, inside: np.ndarray) -> np.ndarray:
    """
    Return which objects each box hits, that is, covers by at least 10 % of their pixels.

    `inside` is from [`covered`]. The result is (N, n + 1) bool; column 0 is `False`.
    """
    hit = inside >= HIT_SHARE * objects.sizes
    hit[:, 0] = False
    return hit


def alone(objects: Objects, hit: np.ndarray, inside: np.ndarray, least: float) -> np.ndarray:
    """
    Return which objects each box hits alone: it hits no other instance that takes up a share of `least` or more of the box's pixels.

    Args:
        hit: (N, n + 1), from [`hits`], with things only.
        inside: (N, n + 1), from [`covered`].

    Returns:
        (N, n + 1) bool.
    """
    groups = objects.groups
    of_group = groups[:, None] == np.arange(groups.max() + 1)  # (n + 1, groups)
    taken = (hit * inside) @ of_group
    large = (taken > 0) & (taken >= least * inside.sum(axis=1, keepdims=True))  # (N, groups)
    return hit & (large.sum(axis=1, keepdims=True) == large[:, groups])


def same_instance(
    hit: np.ndarray, objects: Objects, teacher_hit: np.ndarray, teacher_objects: Objects
) -> tuple[np.ndarray, np.ndarray]:
    """
    Return which objects hit by the student's subcrops the teacher's frame shows, and which of them the teacher's subcrops hit.

    Args:
        hit, teacher_hit: (N, n + 1) and (N, m + 1), from [`hits`], for the student's and the teacher's subcrops of N pairs.

    Returns:
        shown, held: (N, n + 1) bool; `False` for objects that the student's subcrop does not hit, and for objects without identity.
    """
    where = {key: column for column, key in enumerate(teacher_objects.keys) if key >= 0}
    columns = np.array([where.get(key, 0) for key in objects.keys])  # column 0 is never hit
    return hit & (columns > 0), hit & teacher_hit[:, columns]
