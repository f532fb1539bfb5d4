"""
Measure encoders by semantic segmentation.

    accelerate launch evaluation/segment.py --model ID_OR_DIR [--model ...] --dataset NAME [--data_dir DIR] --readout linear|knn|upernet

Writes evaluation.json, report.html and, if something is fitted, readout/ to --output_dir.
"""

import gc
import os
import sys
import time
from pathlib import Path

# `accelerate launch evaluation/segment.py` puts evaluation/ on the path; the packages lie one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    # How long idle threads spin before they sleep. The variable is read when torch is imported; see modeling_poodle/cpu.py.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    gc.disable()  # until run_script: imports leave no garbage, and searching for it takes a seventh of the import time

from accelerate import Accelerator
from accelerate.utils import set_seed

from evaluation.data import load_dataset
from evaluation.encoders import CALIBRATION_IMAGES, build, calibrate_batch_norm, look_up
from evaluation.engine import evaluate, fingerprint, fit, refuse_idle_processes
from evaluation.labelled_images import LabelledImages
from evaluation.outputs import begin_processes, finished, measure_all, provenance
from evaluation.readouts import READOUTS
from evaluation.recipe import EvaluationRecipe, parse_recipe
from evaluation.report import strip, table, write_html
from modeling_poodle.folders import folder_aside
from modeling_poodle.processes import main_first
from modeling_poodle.recipe_files import run_script


def main(arguments: list[str] | None = None) -> list[dict]:
    recipe = parse_recipe(arguments)
    accelerator = begin_processes(recipe)
    for name in recipe.model:
        look_up(name)  # reports a wrong name before anything is rendered
    # Rank 0 renders the street; the others find it rendered.
    data = main_first(accelerator, lambda: load_dataset(recipe.dataset, recipe.data_dir))
    # Groups are derived from the whole data set, so that they do not depend on the number of images that are used.
    data = data.with_groups().limit(recipe.max_train_images, recipe.max_test_images)
    data.check()
    refuse_idle_processes(accelerator, data)
    built = {}
    # A model that cannot be loaded or does not fit the readout is reported before any is measured.
    for name in recipe.model:
        encoder = build(name, len(data.classes), data.classes, recipe.features, recipe.seed)
        built[name] = fingerprint(encoder.model.poodle)
        READOUTS[recipe.readout](encoder, data, recipe)
    if (done := finished(accelerator, recipe, built)) is not None:
        return done
    return measure_all(
        accelerator,
        recipe,
        lambda name, folder: measure(accelerator, recipe, data, name, folder),
        write_html,
        lambda results: (
            f"{recipe.readout} readout on {recipe.dataset}, {len(data.test)} test images\n{table(results)}"
        ),
    )


def measure(
    accelerator: Accelerator, recipe: EvaluationRecipe, data: LabelledImages, name: str, folder: Path
) -> tuple[dict, list, list]:
    """
    Fit a readout on one model, evaluate it on the test images and save it.

    Returns:
        The result, the loss curve, and (caption, strip) pairs of the best, median and worst image (empty except on the first process).
    """
    began = time.perf_counter()
    set_seed(recipe.seed)
    encoder = build(name, len(data.classes), data.classes, recipe.features, recipe.seed)
    built = fingerprint(encoder.model.poodle)
    encoder.to(accelerator.device)
    if name.startswith("random:"):
        calibrate_batch_norm(encoder, map(data.image, data.train[:CALIBRATION_IMAGES]))
    readout = READOUTS[recipe.readout](encoder, data, recipe).to(accelerator.device)
    mine = list(data.train[accelerator.process_index :: accelerator.num_processes])
    before = fingerprint(encoder.model.poodle)
    readout.prepare(accelerator)
    curve = []
    if recipe.readout != "knn":
        curve = fit(accelerator, readout, recipe, mine, folder, before, recipe.resume_from_checkpoint is not None)
    metric, images = evaluate(accelerator, readout.predict, data)
    if not readout.trains_encoder and fingerprint(encoder.model.poodle) != before:
        raise RuntimeError("a frozen encoder has changed: the figures are not those of the model that was given")
    result = {
        "model": name,
        **metric.compute(),
        "dataset": data.name,
        "readout": recipe.readout,
        "built_sha256": built,
        "encoder_sha256": before,
        "weights_sha256": encoder.weights_sha256,
        # UperNet has its own backbone, which does not read windows.
        "features": "all stages" if recipe.readout == "upernet" else encoder.features_name,
        "inference": f"whole image{encoder.undilated}" if recipe.readout == "upernet" else encoder.inference,
        **encoder.preprocessing,
        "num_train_images": len(data.train),
        "num_test_images": len(data.test),
        "group_members": {key: list(members) for key, members in data.groups.items()},
        "protocol": protocol(recipe),
        "seed": recipe.seed,
        "steps": curve[-1]["step"] if curve else 0,
        "seconds": round(time.perf_counter() - began, 1),
        **provenance(accelerator),
    }
    strips = []
    if accelerator.is_main_process:
        if recipe.readout != "knn":
            with folder_aside(folder / "readout") as partial:
                readout.save(partial)
        for title, entry in best_median_worst(images):
            example = data.test[entry["index"]]
            image = data.image(example)
            shown = strip(image, data.label(example), readout.predict(image), len(data.classes))
            strips.append((f"{title}: {entry['name']}, mIoU {100 * entry['miou']:.1f}", shown))
    return result, curve, strips


def protocol(recipe: EvaluationRecipe) -> dict:
    """Return the settings of the readout that its figures depend on."""
    if recipe.readout == "knn":
        return {name: getattr(recipe, name) for name in ("num_neighbours", "max_reference_cells")}
    return recipe.protocol(*(["crop_size"] if recipe.readout == "upernet" else []))


def best_median_worst(images: list[dict]) -> list[tuple[str, dict]]:
    ranked = sorted((entry for entry in images if entry["miou"] is not None), key=lambda entry: -entry["miou"])
    if not ranked:
        return []
    return [("best", ranked[0]), ("median", ranked[len(ranked) // 2]), ("worst", ranked[-1])]


if __name__ == "__main__":
    run_script(main)
