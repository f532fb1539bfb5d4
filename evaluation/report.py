"""Output of an evaluation for people: a table for the terminal, and report.html, a single file without scripts or links."""

import base64
import colorsys
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from evaluation.metrics import GROUPS


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def table(results: Sequence[dict]) -> str:
    """Return the results as a text table with one line a model, in percent."""
    groups = [name for name in GROUPS if any(r["groups"].get(name) is not None for r in results)]
    width = max(12, *(len(r["model"]) + 2 for r in results))
    lines = [f"{'model':{width}}{'mIoU':>8}{'accuracy':>10}{'mean acc':>10}" + "".join(f"{g:>8}" for g in groups)]
    for r in results:
        line = (
            f"{r['model']:{width}}{percent(r['miou']):>8}{percent(r['accuracy']):>10}{percent(r['mean_accuracy']):>10}"
        )
        lines.append(line + "".join(f"{percent(r['groups'].get(g)):>8}" for g in groups))
    return "\n".join(lines)


def palette(num_classes: int) -> np.ndarray:
    """Return colours (256, 3) uint8: distinct ones for the classes, black for ids that are not counted."""
    colours = np.zeros((256, 3), np.uint8)
    for index in range(num_classes):
        # The golden ratio spreads the hues evenly for any number of classes.
        rgb = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.55 + 0.4 * (index % 2), 0.95 - 0.3 * (index % 3) / 2)
        colours[index] = [round(255 * value) for value in rgb]
    return colours


def strip(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    """Draw image, truth, prediction and errors (red wrong, green right, black not counted) side by side."""
    colours = palette(num_classes)
    errors = np.where((truth == prediction)[..., None], np.uint8([40, 120, 60]), np.uint8([210, 40, 40]))
    errors[truth == 255] = 0
    shown = np.where(truth == 255, 255, prediction)
    return np.concatenate([image, colours[truth], colours[shown], errors], axis=1).astype(np.uint8)


def picture(array: np.ndarray, max_width: int = 1600) -> str:
    """Return an <img> element that contains its data."""
    image = Image.fromarray(array)
    # `thumbnail` keeps at least one row; resizing a strip of long, flat images by a ratio might leave none. JPEG allows about this height.
    image.thumbnail((max_width, 65_500))
    return f'<img src="{data_uri(image)}">'


def data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def curve(points: Sequence[dict]) -> str:
    """Draw the loss as an SVG polyline."""
    if not points:
        return "<p>Nothing was fitted.</p>"
    steps, losses = (np.array([p[key] for p in points], dtype=float) for key in ("step", "loss"))
    low, high = losses.min(), losses.max()
    x = 40 + 540 * (steps - steps[0]) / max(steps[-1] - steps[0], 1)
    y = 150 - 130 * (losses - low) / max(high - low, 1e-12)
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
    return (
        f'<svg viewBox="0 0 600 175" width="600"><polyline points="{path}" fill="none" stroke="#27c"/>'
        f'<text x="0" y="24">{high:.3g}</text><text x="0" y="154">{low:.3g}</text>'
        f'<text x="40" y="172">step {steps[0]:.0f}</text><text x="580" y="172" text-anchor="end">{steps[-1]:.0f}</text></svg>'
    )


def bars(values: dict[str, float | None], coloured: bool = False) -> str:
    """Return values from 0 to 1 as a table of bars; `coloured`: of all classes in order, each with its colour in the pictures."""
    rows = []
    colours = palette(len(values)) if coloured else None
    for index, (name, value) in enumerate(values.items()):
        bar = "" if value is None else f'<div style="width:{300 * value:.0f}px"></div>'
        colour = f'<i style="background:#{bytes(colours[index]).hex()}"></i> ' if coloured else ""
        rows.append(
            f'<tr><td>{colour}{html.escape(name)}</td><td class="bar">{bar}</td><td>{percent(value)}</td></tr>'
        )
    return f"<table>{''.join(rows)}</table>"


def page(title: str, parts: Sequence[str], command: str) -> str:
    """Return the text of an HTML file. `parts` must be escaped already; `title` and `command` are escaped here."""
    head = (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>body{{font:15px sans-serif;max-width:1000px;"
        "margin:2em auto}td,th{padding:2px 10px;text-align:left}.bar{width:300px;background:#eee}.bar div{height:12px;background:#27c}"
        "td i{display:inline-block;width:12px;height:12px}img{width:100%}pre{background:#f4f4f4;padding:1em;overflow:auto}</style>"
    )
    return "\n".join(
        [head, f"<h1>{html.escape(title)}</h1>", *parts, f"<h2>Command</h2><pre>{html.escape(command)}</pre>"]
    )


def write_html(
    results: Sequence[dict], curves: dict[str, list], strips: dict[str, list[tuple[str, np.ndarray]]]
) -> str:
    """
    Return the report as one HTML text. Every name from outside (models, classes, files) is escaped.

    Args:
        results: as in evaluation.json.
        curves: loss curve by model.
        strips: (caption, picture) pairs by model.
    """
    first = results[0]
    parts = [
        f"<pre>{html.escape(table(results))}</pre>",
        f"<p>{first['num_test_images']} test images, {first['num_train_images']} training images, seed {first['seed']}.</p>",
    ]
    for result in results:
        name = result["model"]
        groups = {key: value for key, value in result["groups"].items() if value is not None}
        parts += [
            f"<h2>{html.escape(name)}</h2>",
            f"<p>Features: {html.escape(result['features'])}; read by {html.escape(result['inference'])}.</p>",
            "<h3>Loss</h3>",
            curve(curves.get(name, [])),
            "<h3>Groups, mean IoU</h3>",
            bars(groups),
            "<h3>Classes, IoU</h3>",
            bars(result["per_class"], coloured=True),
            "<h3>Images: image, truth, prediction, errors</h3>",
            "<p>Truth and prediction are in the colours of the classes above. Of the errors, green is right, red wrong, and black not counted.</p>",
        ]
        parts += [f"<p>{html.escape(caption)}</p>{picture(array)}" for caption, array in strips.get(name, [])]
    return page(f"{first['readout']} readout on {first['dataset']}", parts, first["command"])
