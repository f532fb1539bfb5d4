"""COCO's average precision, computed by pycocotools."""

import contextlib
import io
from collections.abc import Sequence

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from evaluation.boxes import BoxExample

SUMMARY = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")  # the first six figures of COCOeval


def coco_scores(
    examples: Sequence[BoxExample], predictions: Sequence[dict[str, np.ndarray]], classes: Sequence[str]
) -> dict:
    """
    Compute COCO's figures over all images at once.

    Args:
        examples: the true boxes.
        predictions: for the same images in the same order, each `boxes` (M, 4) in xyxy pixels, `scores` (M,) and `labels` (M,),
            class ids from 0.

    Returns:
        `ap` (mean over IoU 0.50 to 0.95), `ap50`, `ap75`, `ap_small` (area below 32²), `ap_medium`, `ap_large` (above 96²), and
        `per_class`, the AP by name. All are from 0 to 1, or `None` if there is no true box of that size or class.

    Raises:
        ValueError: the numbers of examples and predictions differ.
    """
    if len(examples) != len(predictions):
        raise ValueError(f"{len(examples)} images, but predictions for {len(predictions)}")
    truths, found = [], []
    for number, (example, prediction) in enumerate(zip(examples, predictions)):
        for box, label, crowd, area in zip(example.boxes, example.labels, example.crowd, example.areas):
            truths.append(_annotation(len(truths), number, box, label) | {"iscrowd": int(crowd), "area": float(area)})
        for box, label, score in zip(prediction["boxes"], prediction["labels"], prediction["scores"]):
            found.append(_annotation(len(found), number, box, label) | {"iscrowd": 0, "score": float(score)})
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        evaluator = COCOeval(_coco(truths, len(examples), classes), _coco(found, len(examples), classes), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    # (thresholds, recalls, classes), for all areas and 100 boxes an image.
    precision = evaluator.eval["precision"][..., 0, -1]
    per_class = {name: _mean(precision[..., index]) for index, name in enumerate(classes)}
    return {**{key: _or_none(value) for key, value in zip(SUMMARY, evaluator.stats)}, "per_class": per_class}


def _annotation(index: int, image: int, box: np.ndarray, label: int) -> dict:
    x0, y0, x1, y1 = (float(v) for v in box)
    area = (x1 - x0) * (y1 - y0)
    # Ids start at 1, because COCOeval treats a match with the id 0 as no match.
    return {
        "id": index + 1,
        "image_id": image,
        "category_id": int(label),
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": area,
    }


def _coco(annotations: list[dict], num_images: int, classes: Sequence[str]) -> COCO:
    """Build the COCO index of some annotations. (`COCO.loadRes` fails if a detector found nothing.)"""
    coco = COCO()
    coco.dataset = {
        "images": [{"id": number} for number in range(num_images)],
        "annotations": annotations,
        "categories": [{"id": index, "name": name} for index, name in enumerate(classes)],
    }
    coco.createIndex()
    return coco


def _mean(precision: np.ndarray) -> float | None:
    kept = precision[precision > -1]
    return float(kept.mean()) if kept.size else None


def _or_none(value: float) -> float | None:
    return None if value < 0 else float(value)
