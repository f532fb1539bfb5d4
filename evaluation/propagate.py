"""
Measure encoders by video label propagation, without any training.

    python -m evaluation.propagate --model ID_OR_DIR [--model ...] --dataset davis|street [--data_dir DIR] [--features stage3]

The masks of a video's first frame are propagated from frame to frame by the similarity of features. As in the DAVIS 2017 toolkit, the
propagated masks are measured by J (region similarity), F (contour accuracy) and their mean J&F. Writes evaluation.json and report.html.
"""

import html
import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evaluation.encoders import CALIBRATION_IMAGES, Encoder, build, calibrate_batch_norm
from evaluation.labelled_images import read_image
from evaluation.outputs import begin_output_dir, check_output_dir, make_accelerator, provenance
from evaluation.recipe import models, read_with_models
from evaluation.report import page, palette, percent, picture
from evaluation.video_masks import (
    VIDEO_DATASETS,
    Sequence,
    contour,
    contour_accuracy,
    load_sequences,
    region_similarity,
    statistics,
)
from modeling_poodle.folders import spread, write_aside
from modeling_poodle.recipe_files import (
    CheckedRecipe,
    described,
    did_you_mean,
    is_finite,
    run_script,
)

TILE = 8  # side, in cells, of a tile compared at once; the tile's window is little larger than that of one cell
SHOWN = 4  # frames in a strip of the report


@dataclass
class PropagationRecipe(CheckedRecipe):
    """Recipe of a label propagation. The defaults are those of DINO (Caron et al. 2021), at the stride of the SDM's features."""

    model: list[str] = models("Several give one table.")
    dataset: str = described("street", f"One of {', '.join(VIDEO_DATASETS)}.")
    data_dir: str | None = described(None, "Folder of the data set.")
    features: str | None = described(
        None,
        "Map to read: decoder, or a stage (stage1 to stage4; of ViTs one a layer); unset: the SDM's, else the last stage's.",
    )
    output_dir: str = described("runs/propagation", "Folder for evaluation.json and report.html.")
    max_sequences: int | None = described(None, "Use at most this many sequences, evenly spread.")
    stride: int = described(8, "Size in pixels of the cells at which features and labels are read.")
    top_k: int = described(5, "Number of most similar cells that vote on a cell's label.")
    context_frames: int = described(7, "Previous frames to look at, besides the first.")
    radius: int = described(12, "Search radius, in cells.")
    temperature: float = described(0.1, "Weights are exp(cosine / temperature).")
    seed: int = described(0, "Seed of an untrained model's weights.")

    def __post_init__(self):
        self.need_declared()
        self.need_models()
        self.need_output_dir()
        known = f"one of {', '.join(VIDEO_DATASETS)}{did_you_mean(self.dataset, VIDEO_DATASETS)}"
        self.need(self.dataset in VIDEO_DATASETS, "dataset", known)
        self.need_integers("stride", "top_k", "context_frames", "radius")
        count = self.max_sequences
        self.need(count is None or count >= 1, "max_sequences", "an integer of at least 1")
        self.need(is_finite(self.temperature) and self.temperature > 0, "temperature", "a finite number above 0")
        self.need_integers("seed", low=0)


def parse_propagation(arguments: list[str] | None = None) -> PropagationRecipe:
    return read_with_models(PropagationRecipe, arguments, "Measure encoders by label propagation.")


def main(arguments: list[str] | None = None) -> list[dict]:
    recipe = parse_propagation(arguments)
    check_output_dir(recipe)
    output_dir = Path(recipe.output_dir)
    accelerator = make_accelerator()
    if accelerator.num_processes > 1:
        raise ValueError(f"propagation runs on one process, not {accelerator.num_processes}; start it with python -m")
    for name in recipe.model:  # a wrong name is reported before anything is rendered or measured
        build(name, 1, features=recipe.features, seed=recipe.seed)
    sequences = load_sequences(recipe.dataset, recipe.data_dir, recipe.max_sequences)
    begin_output_dir(recipe, output_dir)
    results, strips = [], {}
    for name in recipe.model:
        result, strips[name] = measure(accelerator.device, recipe, sequences, name)
        results.append(result)
        # Written after each model, so that its result is not lost if the next one fails.
        written = results[0] if len(recipe.model) == 1 else {"results": results}
        write_aside(output_dir / "evaluation.json", json.dumps(written, indent=1))
    write_aside(output_dir / "report.html", write_html(results, strips))
    print(f"\nlabel propagation on {recipe.dataset}, {len(sequences)} sequences\n{table(results)}\n")
    print(f"{output_dir}: evaluation.json, report.html")
    return results


def measure(
    device: torch.device, recipe: PropagationRecipe, sequences: list[Sequence], name: str
) -> tuple[dict, list[tuple[str, np.ndarray]]]:
    """Measure one model on all sequences. Return its result and the strips of its best, median and worst sequence."""
    began = time.perf_counter()
    encoder = build(name, 1, features=recipe.features, seed=recipe.seed).to(device)
    if name.startswith("random:"):
        frames = [path for sequence in sequences for path in sequence.frames]
        calibrate_batch_norm(encoder, map(read_image, spread(frames, CALIBRATION_IMAGES)))

    def cells(image: np.ndarray) -> Tensor:
        return grid_features(encoder, image, recipe.stride)

    per_sequence, shown = {}, {}
    for sequence in sequences:
        per_sequence[sequence.name], shown[sequence.name] = measure_sequence(sequence, cells, recipe)
        scores = [values["j_and_f"] for values in per_sequence[sequence.name].values()]
        print(f"{name}: {sequence.name}, {len(scores)} objects, J&F {percent(float(np.mean(scores)))}", flush=True)
    objects = [values for found in per_sequence.values() for values in found.values()]
    seconds = time.perf_counter() - began
    result = {
        "model": name,
        # As in the toolkit, the means are over all objects of all sequences, not over sequences.
        **{key: float(np.mean([values[key] for values in objects])) for key in objects[0]},
        "dataset": recipe.dataset,
        "features": encoder.features_name,
        "inference": encoder.inference,
        **encoder.preprocessing,
        "protocol": {
            key: getattr(recipe, key) for key in ("stride", "top_k", "context_frames", "radius", "temperature")
        },
        "num_sequences": len(sequences),
        "num_objects": len(objects),
        "sequences": per_sequence,
        "seed": recipe.seed,
        "seconds": round(seconds, 1),
        "seconds_per_frame": round(seconds / sum(len(sequence.frames) for sequence in sequences), 3),
        **provenance(),
    }
    ranked = sorted(shown, key=lambda key: -np.mean([values["j_and_f"] for values in per_sequence[key].values()]))
    chosen = {"best": ranked[0], "median": ranked[len(ranked) // 2], "worst": ranked[-1]}
    return result, [(f"{title}: {key}", shown[key]) for title, key in chosen.items()]


def measure_sequence(
    sequence: Sequence, cells: Callable[[np.ndarray], Tensor], recipe: PropagationRecipe
) -> tuple[dict[str, dict[str, float]], np.ndarray]:
    """
    Propagate and measure one sequence.

    Args:
        cells: maps an image (H, W, 3) uint8 to unit features (C, h, w).

    Returns:
        The measures {object: {j_and_f, j_mean, …, f_decay}}, and a strip of some of the frames.
    """
    objects, last = sequence.objects(), len(sequence.frames) - 1
    values = np.zeros((len(objects), 2, last - 1))
    shown = np.linspace(0, last, SHOWN).round().astype(int).tolist()
    parts = []
    for index, (image, prediction) in enumerate(propagated(sequence, objects, cells, recipe)):
        truth = sequence.mask(index)
        if 0 < index < last:  # the first frame is given, and the toolkit leaves out the last
            for number, key in enumerate(objects):
                ours, theirs = prediction == key, truth == key
                values[number, :, index - 1] = region_similarity(ours, theirs), contour_accuracy(ours, theirs)
        if index in shown:
            parts.append(overlay(image, prediction, np.where(np.isin(truth, objects), truth, 0)))
    measures = {}
    for key, (j, f) in zip(objects, values):
        named = {
            f"{name}_{k}": v for name, per_frame in (("j", j), ("f", f)) for k, v in statistics(per_frame).items()
        }
        measures[str(key)] = {"j_and_f": (named["j_mean"] + named["f_mean"]) / 2, **named}
    return measures, np.concatenate(parts, axis=1)


def propagated(sequence: Sequence, objects: list[int], cells: Callable, recipe: PropagationRecipe):
    """Yield (image, mask of object ids) frame by frame; the first mask is the given one."""
    image, given = read_image(sequence.frames[0]), sequence.mask(0)
    ids = np.array([0, *objects], np.uint8)
    yield image, np.where(np.isin(given, ids), given, 0)
    first = cells(image)
    one_hot = torch.from_numpy(given[None] == ids[:, None, None]).float().to(first.device)
    # Labels are the share of each cell that an object covers; a cell's majority label would lose objects thinner than half a cell.
    labels = F.adaptive_avg_pool2d(one_hot, first.shape[1:])
    context: deque = deque(maxlen=recipe.context_frames)
    for path in sequence.frames[1:]:
        image = read_image(path)
        target = cells(image)
        features, known = (torch.stack(part) for part in zip((first, labels), *context))
        soft = propagate(target, features, known, recipe.top_k, recipe.radius, recipe.temperature)
        context.append((target, soft))
        scores = F.interpolate(soft[None], size=given.shape, mode="bilinear", align_corners=False)[0]
        yield image, ids[full_range(scores).argmax(dim=0).cpu().numpy()]


def full_range(scores: Tensor) -> Tensor:
    """
    Stretch each of the maps (K, H, W) to [0, 1], as DINO's protocol does before the argmax.

    Otherwise an object of few cells, blurred by the propagation, loses to the background. J&F on the street's 12 drives: 32.9 without and
    53.5 with it for stage1 of an untrained ResNet-18; 86.6 and 87.8 for features that are exact instance codes.
    """
    low, high = (bound.view(-1, 1, 1) for bound in torch.aminmax(scores.flatten(1), dim=1))
    return (scores - low) / (high - low).clamp(min=1e-12)


def propagate(target: Tensor, context: Tensor, labels: Tensor, top_k: int, radius: int, temperature: float) -> Tensor:
    """
    Propagate labels from the context frames to the cells of a frame.

    Each cell gets the labels of the `top_k` most similar context cells within a square window around it, weighted by the softmax of their
    cosines divided by the temperature (Jabri et al. 2020, Caron et al. 2021). Cells are compared tile by tile, so that memory is that of one
    tile's window, not of all pairs of cells.

    Args:
        target: (C, h, w) unit features of the frame.
        context: (N, C, h, w) unit features of the context frames.
        labels: (N, K, h, w) labels of the context frames.
        radius: cells from the window's centre to its edge.

    Returns:
        (K, h, w) labels of the frame.
    """
    height, width = target.shape[1:]
    y, x = torch.arange(height, device=target.device), torch.arange(width, device=target.device)
    result = labels.new_empty(labels.shape[1:])
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            own = slice(top, min(top + TILE, height)), slice(left, min(left + TILE, width))
            seen = tuple(slice(max(part.start - radius, 0), part.stop + radius) for part in own)
            sources = context[:, :, *seen].flatten(2)  # (N, C, S)
            similarity = target[:, *own].flatten(1).t() @ sources  # (N, Q, S)
            rows = (y[own[0], None] - y[seen[0]]).abs() <= radius
            columns = (x[own[1], None] - x[seen[1]]).abs() <= radius
            near = (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)  # (Q, S)
            similarity = similarity.masked_fill_(~near, -torch.inf).transpose(0, 1).flatten(1)  # (Q, N S)
            value, index = similarity.topk(min(top_k, similarity.shape[1]), dim=1)
            weight = (value / temperature).softmax(dim=1)
            found = labels[:, :, *seen].flatten(2).transpose(0, 1).flatten(1)[:, index]  # (K, Q, k)
            result[:, *own] = (found * weight).sum(dim=2).view(-1, *(part.stop - part.start for part in own))
    return result


@torch.no_grad()
def grid_features(encoder: Encoder, image: np.ndarray, stride: int) -> Tensor:
    """Return unit features (C, h, w), resized to a grid of `stride` pixels whatever the encoder's own stride is."""
    size = [max(round(side / stride), 1) for side in image.shape[:2]]
    features = encoder(encoder.normalise(image)).float()
    return F.normalize(F.interpolate(features, size=size, mode="bilinear", align_corners=False)[0], dim=0)


def table(results: list[dict]) -> str:
    """Return the results as a text table with one line a model, in percent."""
    keys = ("j_and_f", "j_mean", "j_recall", "j_decay", "f_mean", "f_recall", "f_decay")
    titles = ("J&F", "J mean", "recall", "decay", "F mean", "recall", "decay")
    width = max(12, *(len(r["model"]) + 2 for r in results))
    lines = [f"{'model':{width}}" + "".join(f"{title:>8}" for title in titles) + f"{'s/frame':>9}"]
    for r in results:
        values = "".join(f"{percent(r[key]):>8}" for key in keys)
        lines.append(f"{r['model']:{width}}{values}{r['seconds_per_frame']:9.3f}")
    return "\n".join(lines)


def overlay(image: np.ndarray, prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Tint the image by the predicted objects and draw the true objects' contours in white; (H, W, 3) uint8."""
    colours = np.roll(palette(255), 1, axis=0)
    tinted = np.where((prediction > 0)[..., None], 0.5 * image + 0.5 * colours[prediction], image)
    tinted[cv2.dilate(contour(truth), np.ones((2, 2), np.uint8)) > 0] = 255
    return tinted.astype(np.uint8)


def write_html(results: list[dict], strips: dict[str, list[tuple[str, np.ndarray]]]) -> str:
    """
    Return the report as one HTML text. Names from outside are escaped.

    Args:
        results: as in evaluation.json.
        strips: (caption, picture) pairs by model.
    """
    first = results[0]
    parts = [
        f"<pre>{html.escape(table(results))}</pre>",
        f"<p>{first['num_sequences']} sequences, {first['num_objects']} objects, percent. Seed {first['seed']}; "
        + html.escape(", ".join(f"{key} {value}" for key, value in first["protocol"].items()))
        + ".</p>",
    ]
    for result in results:
        rows = [
            f"<tr><td>{html.escape(name)}</td><td>{key}</td>"
            + "".join(f"<td>{percent(values[k])}</td>" for k in ("j_and_f", "j_mean", "f_mean"))
            for name, found in result["sequences"].items()
            for key, values in found.items()
        ]
        parts += [
            f"<h2>{html.escape(result['model'])}</h2>",
            f"<p>Features: {html.escape(result['features'])}; read by {html.escape(result['inference'])}. Colours: what was propagated; "
            "white: the true contours. The first frame is given.</p>",
            *(f"<p>{html.escape(caption)}</p>{picture(array)}" for caption, array in strips[result["model"]]),
            "<table><tr><th>sequence<th>object<th>J&amp;F<th>J<th>F</tr>" + "".join(rows) + "</table>",
        ]
    return page(f"Label propagation on {first['dataset']}", parts, first["command"])


if __name__ == "__main__":
    run_script(main)
