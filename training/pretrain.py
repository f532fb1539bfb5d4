"""
Pretrain PooDLe on video.

    accelerate launch training/pretrain.py [--config RECIPE] [--videos SOURCE ...] [--output_dir DIR] [--FIELD VALUE ...]

Each step follows section 3 of the paper (arXiv 2408.11208). It draws pairs of frames, their flow, photometric augmentation, views and
subcrops, and computes both objectives. The optimizer then updates the student, and a momentum update moves the teacher.
"""

import gc
import importlib
import json
import logging
import os
import sys
import time
from pathlib import Path

# `accelerate launch training/pretrain.py` puts training/ on sys.path, but the packages are in the folder above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training import stopping

if __name__ == "__main__":  # before the imports, which take seconds
    # How long idle threads spin. Importing torch reads this variable; see share_cpu in modeling_poodle/cpu.py.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Garbage collection would take a seventh of the import time and find nothing. run_script enables it again.
    gc.disable()
    stopping.end_on_signals()

import torch
from accelerate import Accelerator

from modeling_poodle import PoodleForPreTraining, PoodleForPreTrainingOutput
from modeling_poodle.objectives_poodle import feature_std
from modeling_poodle.processes import main_first
from modeling_poodle.recipe_files import run_script
from training.assembly import build_model, build_optimizer, make_accelerator
from training.checkpoints import export
from training.flow import build_flow
from training.panels import save_panel
from training.recipe import Recipe, parse_recipe
from training.resume import prepare_output_dir
from training.run import Run
from training.schedules import count_steps, teacher_momentum
from training.video_loader import build_loader, resolve_videos
from training.views import model_inputs

logger = logging.getLogger("poodle")


def main(
    arguments: list[str] | None = None, model_class: type[PoodleForPreTraining] = PoodleForPreTraining, run_class=None
) -> None:
    """
    Train as the command line says.

    Args:
        model_class, run_class: subclasses of PoodleForPreTraining and PretrainingRun to use instead; see docs/extending.md.
    """
    recipe = parse_recipe(arguments)
    accelerator = make_accelerator(recipe)
    checkpoint = prepare_output_dir(accelerator, recipe)
    # Build flow, model and probe first, so that their errors appear early: rendering the street or listing thousands of videos takes time.
    pair_flow, flow_module = build_flow(
        recipe.flow, recipe.flow_weights, recipe.flow_updates, folder=recipe.flow_folder, model=recipe.flow_model
    )
    model = build_model(accelerator, recipe, model_class, checkpoint)
    probe = build_probe(accelerator, recipe)
    loader = build_loader(accelerator, recipe, resolve_videos(accelerator, recipe), pair_flow)
    optimizer = build_optimizer(recipe, model)
    max_steps = count_steps(recipe, accelerator.num_processes, loader.pairs_per_epoch)
    run_class = run_class or PretrainingRun
    run = run_class(accelerator, recipe, model, optimizer, loader, flow_module, max_steps, probe)
    run.run(checkpoint)


def build_probe(accelerator: Accelerator, recipe: Recipe):
    """Build the readout that the recipe's field `probe` names, or return `None`. Imported by name; evaluation/probe.py says why."""
    if recipe.probe is None:
        return None
    # Rank 0 renders the street if needed; the other ranks then find the files.
    return main_first(accelerator, lambda: importlib.import_module("evaluation.probe").Probe(recipe.probe))


class PretrainingRun(Run):
    """A run of PooDLe: student and teacher, both objectives, and a k-NN readout every `probe_steps` steps."""

    METRICS = ("loss", "dense_loss", "pooled_loss", "valid_fraction", "matched_fraction")
    LOGS = ("metrics.jsonl", "probe.jsonl")
    WRITTEN = "encoder/, model/, panels/, metrics.jsonl and checkpoints/"
    LINE = "step {step}/{of}  loss {loss:.4f}  feature_std {feature_std:.3f}  {pairs_per_second:.1f} pairs/s"

    def __init__(self, accelerator, recipe, model, optimizer, loader, flow_module, max_steps, probe):
        super().__init__(accelerator, recipe, model, optimizer, loader, max_steps)
        self.probe, self.flow_module = probe, None if flow_module is None else flow_module.to(accelerator.device)
        self.compiled.append(self.flow_module)

    def objective(self, batch: dict) -> tuple[PoodleForPreTrainingOutput, dict, dict]:
        inputs = self.model_inputs(batch)
        matched = inputs.pop("matched")
        with self.accelerator.autocast():
            output = self.wrapped(**inputs, subcrop_size=self.recipe.subcrop_size)
        return output, {**inputs, "matched": matched}, {"matched_fraction": matched.float().mean()}

    def model_inputs(self, batch: dict) -> dict[str, torch.Tensor]:
        return model_inputs(batch, self.recipe, self.generator, self.estimate_flow)

    def estimate_flow(self, frames: torch.Tensor) -> torch.Tensor:
        with self.accelerator.autocast():
            return self.flow_module(frames)

    def after_update(self) -> None:
        self.model.update_teacher(teacher_momentum(self.step, self.max_steps, self.recipe.teacher_momentum))

    def figures(self, output) -> dict:
        features = output.dense_features if output.dense_features is not None else output.pooled_features
        flat = features.transpose(0, 1).flatten(1).t()  # (samples, C)
        *means, spread = self.window_means(feature_std(flat))
        figures = dict(zip(self.METRICS, means))
        if output.dense_loss is None:
            figures["dense_loss"] = figures["valid_fraction"] = None
        if output.pooled_loss is None:
            figures["pooled_loss"] = figures["matched_fraction"] = None
        momentum = teacher_momentum(self.step - 1, self.max_steps, self.recipe.teacher_momentum)
        return {**figures, "momentum": momentum, "feature_std": spread}

    def measure(self, last: bool) -> None:
        """Append the teacher's k-NN readout to probe.jsonl. Its time is left out of the rates in metrics.jsonl."""
        if self.probe is None or not (self.step % self.recipe.probe_steps == 0 or last):
            return
        began = time.perf_counter()
        figures = {"step": self.step, **self.probe(self.accelerator, self.model.teacher)}
        self.started += time.perf_counter() - began
        if not self.accelerator.is_main_process:
            return
        with open(self.output_dir / "probe.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")
        logger.info(
            "step %d  probe: mIoU %.1f  accuracy %.1f", self.step, 100 * figures["miou"], 100 * figures["accuracy"]
        )
        if self.recipe.report_to != "none":
            self.accelerator.log({f"probe_{k}": v for k, v in figures.items() if k != "step"}, step=self.step)

    def export(self) -> None:
        """Write encoder/ and model/."""
        export(self.model, self.recipe, self.step, self.accelerator.num_processes)

    @torch.no_grad()
    def save_panel(self, batch: dict, inputs: dict, output) -> None:
        save_panel(self.output_dir / "panels" / f"step-{self.step:06d}.png", batch["frames"], inputs, output)


if __name__ == "__main__":
    run_script(main)
