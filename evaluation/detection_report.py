"""Output of a detection readout for people: a table, and report.html with true and detected boxes."""

import html
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from evaluation.boxes import BoxExample
from evaluation.report import bars, curve, page, palette, percent, picture

COLUMNS = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "small", "ap_medium": "medium", "ap_large": "large"}
SHOWN_SCORE = 0.5  # least score of the boxes in the report's pictures


def detection_table(results: Sequence[dict]) -> str:
    """Return the results as a text table with one line a model, in percent."""
    width = max(12, *(len(r["model"]) + 2 for r in results))
    lines = [f"{'model':{width}}" + "".join(f"{title:>8}" for title in COLUMNS.values())]
    lines += [f"{r['model']:{width}}" + "".join(f"{percent(r[key]):>8}" for key in COLUMNS) for r in results]
    return "\n".join(lines)


def draw_boxes(image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """
    Draw boxes with their class names on an image.

    Args:
        image: (H, W, 3) uint8.
        boxes: (N, 4), xyxy pixels of the given image.
        labels: (N,) class ids.

    Returns:
        (H', W', 3) uint8, enlarged by a whole number to a width of at least 640.
    """
    scale = max(1, -(-640 // image.shape[1]))
    picture = Image.fromarray(image).resize((image.shape[1] * scale, image.shape[0] * scale))
    pen, colours = ImageDraw.Draw(picture), palette(len(classes))
    for box, label in zip(boxes, labels):
        colour = tuple(int(v) for v in colours[label])
        x0, y0, x1, y1 = (float(v) * scale for v in box)
        pen.rectangle((x0, y0, x1, y1), outline=colour, width=2)
        if (x1 - x0) >= 40:  # the name would hide a narrower box
            pen.text((x0 + 3, y0 + 1), classes[label], fill=colour)
    return np.asarray(picture)


def pair(image: np.ndarray, example: BoxExample, found: dict[str, np.ndarray], classes: Sequence[str]) -> np.ndarray:
    """Draw the true boxes, and below them the boxes detected with a score of at least `SHOWN_SCORE`."""
    kept = found["scores"] >= SHOWN_SCORE
    truth = draw_boxes(image, example.boxes, example.labels, classes)
    return np.concatenate([truth, draw_boxes(image, found["boxes"][kept], found["labels"][kept], classes)])


def write_detection_html(
    results: Sequence[dict], curves: dict[str, list], pairs: dict[str, list[tuple[str, np.ndarray]]]
) -> str:
    """
    Return the report as one HTML text. Every name from outside (models, classes, files) is escaped.

    Args:
        results: as in evaluation.json.
        curves: loss curve by model.
        pairs: (caption, picture) pairs by model.
    """
    first = results[0]
    parts = [
        f"<pre>{html.escape(detection_table(results))}</pre>",
        f"<p>{first['num_test_images']} test images, {first['num_train_images']} training images, {first['steps']} steps, "
        f"{first['train_images_seen']} images seen in training, seed {first['seed']}.</p>",
    ]
    for result in results:
        name = result["model"]
        parts += [
            f"<h2>{html.escape(name)}</h2><p>Images at {html.escape(result['inference'])}.</p><h3>Loss</h3>",
            curve(curves.get(name, [])),
            "<h3>AP by size</h3>",
            bars({title: result[key] for key, title in list(COLUMNS.items())[3:]}),
            "<h3>AP by class</h3>",
            bars(result["per_class"], coloured=True),
            f"<h3>Images: true boxes above, detected ones (score at least {SHOWN_SCORE}) below</h3>",
        ]
        parts += [f"<p>{html.escape(caption)}</p>{picture(array)}" for caption, array in pairs.get(name, [])]
    return page(f"Faster R-CNN, {first['detector']}, on {first['dataset']}", parts, first["command"])
