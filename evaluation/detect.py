"""
Measure encoders by object detection with a fine-tuned Faster R-CNN.

    accelerate launch evaluation/detect.py --model ID_OR_DIR [--model ...] --detector c4|fpn --dataset NAME [--data_dir DIR]

Writes evaluation.json, report.html and detector/ to --output_dir.
"""

import gc
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

# `accelerate launch evaluation/detect.py` puts evaluation/ on the path; the packages lie one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    # How long idle threads spin before they sleep. The variable is read when torch is imported; see modeling_poodle/cpu.py.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    gc.disable()  # until run_script: imports leave no garbage, and searching for it takes a seventh of the import time

import numpy as np
from accelerate import Accelerator
from accelerate.utils import set_seed

from evaluation.boxes import BoxImages, load_boxes
from evaluation.detection import DetectionReadout
from evaluation.detection_metrics import coco_scores
from evaluation.detection_recipe import DetectionRecipe, parse_detection_recipe
from evaluation.detection_report import detection_table, pair, write_detection_html
from evaluation.encoders import CALIBRATION_IMAGES, build, calibrate_batch_norm, look_up
from evaluation.engine import fingerprint, fit, over_test_images, refuse_idle_processes
from evaluation.outputs import begin_processes, finished, measure_all, provenance
from modeling_poodle.folders import folder_aside, spread
from modeling_poodle.processes import main_first
from modeling_poodle.recipe_files import run_script


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure the models and return their results. The first process has all results; the others may return an empty list."""
    recipe = parse_detection_recipe(arguments)
    accelerator = begin_processes(recipe)
    for name in recipe.model:
        look_up(name)  # reports a wrong name before anything is rendered
    # Rank 0 renders the street; the others find it rendered.
    data = main_first(accelerator, lambda: load_boxes(recipe.dataset, recipe.data_dir))
    data = data.limit(recipe.max_train_images, recipe.max_test_images)
    data.check()
    refuse_idle_processes(accelerator, data)
    built = {}
    # A model that cannot be loaded or does not fit the detector is reported before any is measured.
    for name in recipe.model:
        encoder = build(name, len(data.classes), seed=recipe.seed)
        built[name] = fingerprint(encoder.model.poodle)
        DetectionReadout(encoder, data, recipe)
    if (done := finished(accelerator, recipe, built)) is not None:
        return done
    title = f"Faster R-CNN ({recipe.detector}) on {recipe.dataset}, {len(data.test)} test images, AP in percent"
    return measure_all(
        accelerator,
        recipe,
        lambda name, folder: measure(accelerator, recipe, data, name, folder),
        write_detection_html,
        lambda results: f"{title}\n{detection_table(results)}",
    )


def measure(
    accelerator: Accelerator, recipe: DetectionRecipe, data: BoxImages, name: str, folder: Path
) -> tuple[dict | None, list, list]:
    """
    Fine-tune a detector on one model, measure it on the test images and save it.

    Returns:
        The result (`None` except on the first process), the loss curve, and (caption, picture) pairs of a few test images.
    """
    began = time.perf_counter()
    set_seed(recipe.seed)
    encoder = build(name, len(data.classes), seed=recipe.seed)
    built = fingerprint(encoder.model.poodle)
    encoder.to(accelerator.device)
    if name.startswith("random:"):
        calibrate_batch_norm(encoder, map(data.image, data.train[:CALIBRATION_IMAGES]))
    readout = DetectionReadout(encoder, data, recipe).to(accelerator.device)
    identity, weights, undilated = fingerprint(encoder.model.poodle), encoder.weights_sha256, encoder.undilated
    preprocessing = encoder.preprocessing
    del encoder  # the readout has its own copy
    mine = list(data.train[accelerator.process_index :: accelerator.num_processes])
    curve = fit(accelerator, readout, recipe, mine, folder, identity, recipe.resume_from_checkpoint is not None)
    found = detect_all(accelerator, readout.predict, data)
    if not accelerator.is_main_process:
        return None, curve, []
    steps = curve[-1]["step"]
    size = recipe.image_size
    result = {
        "model": name,
        **coco_scores(data.test, found, data.classes),
        "dataset": data.name,
        "built_sha256": built,
        "encoder_sha256": identity,
        "weights_sha256": weights,
        "detector": recipe.detector,
        "inference": ("their own size" if size is None else f"a shorter side of {size[0]}, at most {size[1]}")
        + undilated,
        **preprocessing,
        "num_train_images": len(data.train),
        "num_test_images": len(data.test),
        "protocol": recipe.protocol("image_size", "boxes_per_image"),
        "seed": recipe.seed,
        "steps": steps,
        "train_images_seen": steps * recipe.per_device_train_batch_size * accelerator.num_processes,
        "seconds": round(time.perf_counter() - began, 1),
        **provenance(accelerator),
    }
    result["versions"] |= {package: version(package) for package in ("torchvision", "pycocotools")}
    with folder_aside(folder / "detector") as partial:
        readout.save(partial)
    shown = spread(range(len(data.test)), 4)
    pairs = [(data.test[i].name, pair(data.image(data.test[i]), data.test[i], found[i], data.classes)) for i in shown]
    return result, curve, pairs


def detect_all(accelerator: Accelerator, predict, data: BoxImages) -> list[dict[str, np.ndarray]]:
    """Return the detections of `predict` on every test image, in the order of the images."""
    return over_test_images(accelerator, data, lambda example: (data.image(example),), predict, "detecting")


if __name__ == "__main__":
    run_script(main)
