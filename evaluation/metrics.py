"""Segmentation metrics on a streaming confusion matrix, as an `evaluate.Metric` that needs no internet."""

from collections.abc import Mapping, Sequence
from tempfile import TemporaryDirectory

import cv2
import datasets
import evaluate
import numpy as np

# The paper's groups of BDD100K's classes (arXiv 2408.11208). The published means fit only 7 small / 12 large and 6 rare / 13 common
# classes. Small are the thin and little things; rare are the six classes with less than 0.3 % of the pixels.
BDD100K_GROUPS = {
    "small": ("pole", "traffic light", "traffic sign", "person", "rider", "motorcycle", "bicycle"),
    "large": (
        "road", "sidewalk", "building", "wall", "fence", "vegetation", "terrain", "sky", "car", "truck", "bus", "train",
    ),
    "rare": ("traffic light", "person", "rider", "train", "motorcycle", "bicycle"),
    "common": (
        "road", "sidewalk", "building", "wall", "fence", "pole", "traffic sign", "vegetation", "terrain", "sky", "car", "truck",
        "bus",
    ),
}  # fmt: skip
GROUPS = ("small", "large", "rare", "common")
RARE_BELOW = 0.003  # share of all labelled pixels
SMALL_BELOW = 0.005  # mean share of the image that a connected region of the class covers


def confusion_matrix(
    prediction: np.ndarray, truth: np.ndarray, num_classes: int, ignore_index: int = 255
) -> np.ndarray:
    """
    Count the pairs (truth, prediction) of all pixels whose truth is not `ignore_index`, (num_classes, num_classes).

    Args:
        prediction, truth: integer maps of equal shape.

    Raises:
        ValueError: the shapes differ, or an id is outside the classes.
    """
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction {prediction.shape} and truth {truth.shape} must have one shape")
    if num_classes <= 256 and 0 <= ignore_index < 256:
        prediction_bytes, truth_bytes = _as_bytes(prediction), _as_bytes(truth)
        if prediction_bytes is not None and truth_bytes is not None:
            return _confusion_of_bytes(prediction_bytes, truth_bytes, num_classes, ignore_index)
    kept = truth != ignore_index
    truth, prediction = truth[kept].astype(np.int64), prediction[kept].astype(np.int64)
    _refuse_outside(truth, "truth", num_classes)
    _refuse_outside(prediction, "prediction", num_classes)
    counts = np.bincount(truth * num_classes + prediction, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def _as_bytes(ids: np.ndarray) -> np.ndarray | None:
    """Return ids as a flat uint8 array; `None` if they do not fit."""
    if ids.dtype != np.uint8:
        # One pass over all ids: a negative id, or one above 255, sets a bit beyond the eighth.
        if ids.dtype.kind not in "iu" or not 0 <= np.bitwise_or.reduce(ids, axis=None) < 256:
            return None
        ids = ids.astype(np.uint8)
    return np.ascontiguousarray(ids).reshape(-1)


# Pixels counted at once: OpenCV counts in float32, in which integers are exact up to this number.
CHUNK = 1 << 24


def _confusion_of_bytes(prediction: np.ndarray, truth: np.ndarray, num_classes: int, ignore_index: int) -> np.ndarray:
    """Count all 256 x 256 pairs in one pass over both maps; the counts also show ids outside the classes (see benchmarks/metrics.py)."""
    counts = np.zeros((num_classes, num_classes), dtype=np.int64)
    for begin in range(0, truth.size, CHUNK):
        pair = [ids[begin : begin + CHUNK].reshape(1, -1) for ids in (truth, prediction)]
        pairs = cv2.calcHist(pair, [0, 1], None, [256, 256], [0, 256, 0, 256])
        pairs[ignore_index] = 0
        for name, outside in (("truth", pairs[num_classes:]), ("prediction", pairs.T[num_classes:])):
            if outside.any():
                _raise_outside(name, num_classes + int(np.argmax(outside.any(axis=1))), num_classes)
        counts += pairs[:num_classes, :num_classes].astype(np.int64)
    return counts


def _refuse_outside(ids: np.ndarray, name: str, num_classes: int) -> None:
    if ids.size and (ids.min() < 0 or ids.max() >= num_classes):
        _raise_outside(name, int(ids[(ids < 0) | (ids >= num_classes)][0]), num_classes)


def _raise_outside(name: str, value: int, num_classes: int) -> None:
    raise ValueError(f"{name} has the id {value}, which is outside the {num_classes} classes (0 to {num_classes - 1})")


def scores(
    confusion: np.ndarray,
    classes: Sequence[str] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    of_truth: bool = False,
) -> dict:
    """
    Compute the figures of a confusion matrix (truth, prediction).

    A class that occurs in neither truth nor prediction has no IoU (`None`) and is left out of every mean. The mean accuracy also leaves out
    classes that do not occur in the truth.

    Args:
        of_truth: a class that does not occur in the truth has no IoU either, so that the mean is over the same classes for any prediction.
            If false, as in torchmetrics and the Hub's mean_iou, a single pixel predicted as such a class adds a 0 to the mean.

    Returns:
        miou, accuracy, mean_accuracy (floats from 0 to 1, or `None` without a single pixel), per_class {name: IoU or None}, groups
        {name: mean IoU or None}.
    """
    confusion = np.asarray(confusion, dtype=np.float64)
    names = [str(k) for k in range(len(confusion))] if classes is None else list(classes)
    hits, truth, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    union = truth + predicted - hits
    if of_truth:
        union[truth == 0] = 0
    with np.errstate(invalid="ignore", divide="ignore"):
        iou, recall = hits / union, hits / truth
    per_class = {name: None if np.isnan(value) else float(value) for name, value in zip(names, iou)}
    return {
        "miou": _mean(iou),
        "accuracy": float(hits.sum() / truth.sum()) if truth.sum() else None,
        "mean_accuracy": _mean(recall),
        "per_class": per_class,
        "groups": {
            group: _mean(np.array([np.nan if per_class[name] is None else per_class[name] for name in members]))
            for group, members in (groups or {}).items()
        },
    }


def _mean(values: np.ndarray) -> float | None:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None


def class_groups(
    pixels: np.ndarray, regions: np.ndarray, region_share: np.ndarray, classes: Sequence[str]
) -> dict[str, list[str]]:
    """
    Derive the paper's groups for a data set from its own statistics.

    A class is `rare` below 0.3 % of the labelled pixels, else `common`. It is `small` if its connected regions cover less than 0.5 % of
    their image on average, else `large`. Classes that do not occur are in no group.

    Args:
        pixels: (C,) number of labelled pixels of each class.
        regions: (C,) number of connected regions of each class.
        region_share: (C,) sum of the shares of the image that the regions cover.
    """
    share = pixels / max(pixels.sum(), 1)
    size = region_share / np.maximum(regions, 1)
    groups: dict[str, list[str]] = {name: [] for name in GROUPS}
    for index, name in enumerate(classes):
        if pixels[index]:
            groups["small" if size[index] < SMALL_BELOW else "large"].append(name)
            groups["rare" if share[index] < RARE_BELOW else "common"].append(name)
    return groups


class MeanIoU(evaluate.Metric):
    """
    Mean IoU, pixel accuracy, mean accuracy, and IoU by class and by group, computed from a confusion matrix.

    Memory does not grow with the number of images, and maps may have any size.

        metric = MeanIoU(classes=["road", "sky"], ignore_index=255)
        metric.add_batch(predictions=[map_a, map_b], references=[truth_a, truth_b])
        metric.compute()["miou"]

    With several processes, each adds its own images; the sum of their `confusion` attributes gives the exact result.

    Args:
        classes: names of all classes.
        ignore_index: id in the references that is not counted.
        groups: {name: members}.
        of_truth: average only over classes that occur in the references; see [`scores`].
    """

    def __init__(self, classes: Sequence[str], ignore_index: int = 255, groups=None, of_truth=False, **kwargs):
        if not classes:
            raise ValueError("MeanIoU needs at least one class, got none")
        for name, members in (groups or {}).items():
            unknown = [member for member in members if member not in classes]
            if unknown:
                raise ValueError(f"group {name!r} has members that are no classes: {', '.join(unknown)}")
        # Every metric of `evaluate` makes a folder for its data, in the user's home folder. The counts here need none, and an evaluation must
        # not end after its fit because that folder cannot be written.
        with TemporaryDirectory() as unused:
            super().__init__(**{"cache_dir": unused, **kwargs})
        self.classes, self.ignore_index, self.groups = list(classes), ignore_index, dict(groups or {})
        self.of_truth = of_truth
        self.confusion = np.zeros((len(self.classes),) * 2, dtype=np.int64)

    def _info(self) -> evaluate.MetricInfo:
        feature = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
        return evaluate.MetricInfo(
            description="Mean intersection over union on a streaming confusion matrix.",
            citation="",
            inputs_description="predictions and references: lists of integer maps, one shape a pair.",
            features=datasets.Features({"predictions": feature, "references": feature}),
        )

    def add(self, *, prediction=None, reference=None, **kwargs) -> None:
        """Count one map against its reference."""
        self.confusion += confusion_matrix(prediction, reference, len(self.classes), self.ignore_index)

    def add_batch(self, *, predictions=None, references=None, **kwargs) -> None:
        """Count several maps, which may differ in shape."""
        for prediction, reference in zip(predictions, references, strict=True):
            self.add(prediction=prediction, reference=reference)

    def compute(self, *, predictions=None, references=None, **kwargs) -> dict:
        """Return the figures of all maps added so far (see [`scores`]) and reset the counts, as `evaluate` metrics do."""
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        result = scores(self.confusion, self.classes, self.groups, self.of_truth)
        self.confusion = np.zeros_like(self.confusion)
        return result
