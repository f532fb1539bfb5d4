"""
A linear readout of a ResNet-50 on CamVid: how long it takes, and what makes it fast.

    python benchmarks/readout.py --data_dir path/to/camvid                         # all 367 training images, 30 epochs
    python benchmarks/readout.py --data_dir path/to/camvid --images 16 --epochs 2  # a few minutes; the whole is extrapolated

Two choices are compared: frozen features computed once and kept in a memory-mapped file, or computed anew in each step; the loss at some
pixels of each image, drawn anew each step, or at all pixels. The encoder is untrained (time does not depend on weights). The variant that
evaluation/ uses is fitted and tested in full. Both losses also run --compare_steps steps, after which their mIoU is compared, and the fit
with features computed anew runs 3.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetModel

from evaluation.data import load_dataset
from evaluation.encoders import CALIBRATION_IMAGES, Encoder, build, calibrate_batch_norm
from evaluation.engine import evaluate, fit
from evaluation.feature_store import FeatureStore
from evaluation.labelled_images import IGNORE, LabelledImages
from evaluation.outputs import make_accelerator
from evaluation.readouts import LinearReadout, upsample
from evaluation.recipe import EvaluationRecipe
from modeling_poodle.recipe_files import run_script

ANEW_STEPS = 3  # steps whose features are computed anew; a few are enough, since each is slow and all are alike


class AllPixels(LinearReadout):
    """The linear readout with its loss at all pixels."""

    def batch(self, read: list[tuple], generator: torch.Generator) -> dict:
        labels = [torch.from_numpy(label.astype(np.int64)) for _, label in read]
        return {"features": [features.float() for features, _ in read], "labels": labels}

    def forward(self, features: list[Tensor], labels: list[Tensor]) -> Tensor:
        scores = [
            upsample(self.classifier(feature[None]), label.shape).flatten(2)[0]
            for feature, label in zip(features, labels)
        ]
        return F.cross_entropy(
            torch.cat(scores, dim=1).t(), torch.cat([x.flatten() for x in labels]), ignore_index=IGNORE
        )


class Timer:
    """Measures wall seconds, and CPU seconds of all threads. The latter hardly depend on other load on the machine."""

    def __enter__(self):
        self.began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_):
        self.wall, self.cpu = time.perf_counter() - self.began[0], time.process_time() - self.began[1]


def fitted(
    accelerator: Accelerator, kind: type, steps: int, like: LinearReadout, kept: bool = True
) -> tuple[nn.Module, Timer]:
    """
    Fit a new readout to the features that `like` has prepared.

    Args:
        kind: class of the readout.
        steps: steps of the fit.
        like: readout whose data, statistics and features are used.
        kept: whether the kept features are used; False computes them anew in each step.

    Returns:
        The fitted readout, and the time that the fit took.
    """
    torch.manual_seed(0)
    readout = kind(like.encoder, like.data, like.recipe)
    readout.mean, readout.std, readout.store = like.mean, like.std, like.store if kept else FeatureStore(0)
    readout.keep = lambda examples: None
    like.recipe.max_steps = steps
    with Timer() as timer, tempfile.TemporaryDirectory() as folder:
        fit(accelerator, readout, like.recipe, list(like.data.train), Path(folder), "", resume=False)
    return readout, timer


def untrained(data: LabelledImages) -> Encoder:
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        ResNetModel(ResNetConfig()).save_pretrained(folder)
        encoder = build(f"random:{folder}", len(data.classes), data.classes)
    calibrate_batch_norm(encoder, map(data.image, data.train[:CALIBRATION_IMAGES]))
    return encoder


def miou(accelerator: Accelerator, readout: nn.Module, data: LabelledImages) -> float:
    return evaluate(accelerator, readout.predict, data)[0].compute()["miou"]


def measure(accelerator: Accelerator, readout: LinearReadout, steps: int, few: int) -> tuple[dict, dict]:
    """
    Measure all parts. Returns {part: (timer, number of repetitions)}, and the mIoU of each variant.

    All variants use the classifier of one encoder, so each is tested before the next is fitted.
    """
    data, small = readout.data, readout.data.limit(None, 8)
    times, scores = {}, {}
    with Timer() as times["features"]:
        readout.prepare()
        readout.keep(list(data.train))
    if len(readout.store.places) < len(data.train):
        raise ValueError(f"the features pass feature_cache_gb = {readout.recipe.feature_cache_gb}: nothing to compare")
    for name, kind in (("points", LinearReadout), ("all pixels", AllPixels)):
        fit_few, times[name] = fitted(accelerator, kind, few, readout)
        scores[name] = miou(accelerator, fit_few, small)
    times["anew"] = fitted(accelerator, LinearReadout, min(few, ANEW_STEPS), readout, kept=False)[1]
    final, times["fit"] = fitted(accelerator, LinearReadout, steps, readout)
    with Timer() as times["test"]:
        scores["final"] = miou(accelerator, final, data)
    counts = {"features": 1, "points": few, "all pixels": few, "anew": min(few, ANEW_STEPS), "fit": 1, "test": 1}
    return {name: (timer, counts[name]) for name, timer in times.items()}, scores


def estimates(times: dict, data: LabelledImages, whole: LabelledImages, steps: int, full_steps: int) -> dict:
    """Estimate minutes for the whole data set by variant: wall time, and CPU time divided by the threads ("cpu", as on idle cores)."""
    # The statistics read up to 32 images, then each image is read once. All other costs are proportional to steps or images.
    read, full_read = (min(32, len(d.train)) + len(d.train) for d in (data, whole))
    found: dict = {}
    for key, share in (("wall", 1), ("cpu", torch.get_num_threads())):
        took = {name: getattr(timer, key) / count / 60 / share for name, (timer, count) in times.items()}
        features, test = took["features"] * full_read / read, took["test"] * len(whole.test) / len(data.test)
        for name, minutes in (
            ("features kept, points", features + took["fit"] / steps * full_steps + test),
            ("features kept, all pixels", features + took["all pixels"] * full_steps + test),
            ("features anew, points", took["anew"] * full_steps + test),
        ):
            found.setdefault(name, {})[key] = minutes
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="folder of CamVid")
    parser.add_argument("--images", type=int, help="training images, and test images at most; all without it")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--compare_steps", type=int, default=20, help="steps of the losses that are compared")
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    accelerator = make_accelerator()
    whole = load_dataset("camvid", options.data_dir)
    data = whole.limit(options.images, options.images).with_groups()
    data.check()
    recipe = EvaluationRecipe(model=["ResNet-50"], dataset="camvid", data_dir=options.data_dir)
    batch = recipe.per_device_train_batch_size
    steps, full_steps = (max(1, round(options.epochs * len(d.train) / batch)) for d in (data, whole))
    readout = LinearReadout(untrained(data), data, recipe)
    times, scores = measure(accelerator, readout, steps, min(options.compare_steps, steps))
    print(
        f"ResNet-50, stage4, {len(data.train)} training and {len(data.test)} test images, {options.epochs} epochs ({steps} steps of "
        f"{batch}), {torch.get_num_threads()} threads\n{'':38}{'seconds':>9}{'CPU s':>9}"
    )
    titles = {
        "features": f"features, once ({readout.store.memory.nbytes / 1e6:.0f} MB kept)",
        "points": "a step: features kept, points",
        "all pixels": "a step: features kept, all pixels",
        "anew": "a step: features anew, points",
        "fit": f"the fit, {steps} steps",
        "test": f"the test, {len(data.test)} images",
    }
    for name, (timer, count) in times.items():
        print(f"{titles[name]:38}{timer.wall / count:9.3f}{timer.cpu / count:9.3f}")
    total = [sum(getattr(times[name][0], key) for name in ("features", "fit", "test")) for key in ("wall", "cpu")]
    print(f"{'the readout, as measured':38}{total[0]:9.1f}{total[1]:9.1f}")
    found = estimates(times, data, whole, steps, full_steps)
    print(f"minutes for {len(whole.train)} training and {len(whole.test)} test images, {full_steps} steps, estimated:")
    print(f"{'':38}{'wall':>9}{'idle':>9}   (idle: CPU seconds over the threads)")
    for name, minutes in found.items():
        print(f"{name:38}{minutes['wall']:9.1f}{minutes['cpu']:9.1f}")
    for name, value in scores.items():
        print(f"mIoU, {name + (' (few steps)' if name != 'final' else ''):32}{100 * value:9.2f}")
    if options.json:
        figures = {name: {"wall": t.wall / count, "cpu": t.cpu / count} for name, (t, count) in times.items()}
        figures |= {"total": dict(zip(("wall", "cpu"), total)), "estimated_minutes": found, "miou": scores}
        Path(options.json).write_text(json.dumps({"options": vars(options), **figures}, indent=1))


if __name__ == "__main__":
    run_script(main)
