"""
Learn optical flow from video without labels.

    accelerate launch training/train_flow.py [--config RECIPE] [--videos SOURCE ...] [--output_dir DIR] [--FIELD VALUE ...]

A step follows UFlow (Jonschkowski et al. 2020): flow in both directions, a photometric loss at pixels that are visible in both frames, a
smoothness loss and, later in the run, self-supervision on a crop. The run writes the same files as pretrain.py. To use the learned flow
there, pass the run's folder to `--flow unflow --flow_model`.
"""

import gc
import os
import sys
from pathlib import Path

# `accelerate launch training/train_flow.py` puts training/ on the path, but the packages are one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training import stopping

if __name__ == "__main__":  # before the imports below, which take seconds
    # How long idle threads spin before they sleep. It must be set before torch is imported; see modeling_poodle/cpu.py.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    gc.disable()  # until run_script: imports leave no garbage, and looking for some takes a seventh of the import time
    stopping.end_on_signals()

import torch
from PIL import Image
from torch.nn import functional as F

from modeling_poodle import PoodleFlowModel
from modeling_poodle.recipe_files import run_script
from training.assembly import build_optimizer, make_accelerator
from training.checkpoints import export_flow
from training.flow import flow_to_rgb
from training.flow_objectives import FlowLosses, flow_losses, known_motion_loss, visible_mask
from training.flow_recipe import parse_flow_recipe
from training.resume import prepare_output_dir
from training.run import Run
from training.schedules import count_steps
from training.video_loader import build_loader, resolve_videos
from training.views import to_device


def main(arguments: list[str] | None = None) -> None:
    recipe = parse_flow_recipe(arguments)
    accelerator = make_accelerator(recipe)
    checkpoint = prepare_output_dir(accelerator, recipe)
    # Build the model first, so that a wrong config is reported before the search for videos.
    model = PoodleFlowModel(recipe.model_config()).to(accelerator.device)
    loader = build_loader(accelerator, recipe, resolve_videos(accelerator, recipe), pair_flow=None)
    optimizer = build_optimizer(recipe, model)
    max_steps = count_steps(recipe, accelerator.num_processes, loader.pairs_per_epoch)
    run = FlowRun(accelerator, recipe, model, optimizer, loader, max_steps)
    run.run(checkpoint)


class FlowRun(Run):
    """A run that trains a flow network. It has no teacher, no views, and no other source of flow."""

    METRICS = tuple(FlowLosses.__dataclass_fields__)
    WRITTEN = "model/, panels/, metrics.jsonl and checkpoints/"
    LINE = "step {step}/{of}  loss {loss:.4f}  photometric {photometric_loss:.4f}  valid {valid_fraction:.2f}  {pairs_per_second:.1f} pairs/s"

    def objective(self, batch: dict):
        return self._losses(batch), {}, {}

    def _losses(self, batch: dict) -> FlowLosses:
        """Compute the losses. The progress of the run decides which losses are used, and whether frames are halved in size."""
        recipe, progress = self.recipe, self.step / self.max_steps
        frames = to_device(batch["frames"], self.accelerator.device).float() / 255
        if progress < recipe.half_size_share:
            frames = F.avg_pool2d(frames.flatten(0, 1), 2).unflatten(0, frames.shape[:2])
        with self.accelerator.autocast():
            if progress < recipe.known_motion_share:
                return known_motion_loss(self.wrapped, frames, self.generator)
            return flow_losses(
                self.wrapped,
                frames,
                recipe.coarse_weight,
                recipe.smoothness_weight,
                recipe.self_supervision_weight if progress >= recipe.self_supervision_start else 0.0,
                recipe.crop_border,
                occlusion=progress >= recipe.occlusion_start,
            )

    def figures(self, output) -> dict:
        return dict(zip(self.METRICS, self.window_means()))

    def after_update(self) -> None:
        """Do nothing: there is no teacher."""

    def measure(self, last: bool) -> None:
        """Do nothing: flow is not measured during a run."""

    def export(self) -> None:
        """Write model/."""
        export_flow(self.model, self.recipe, self.step, self.accelerator.num_processes)

    @torch.no_grad()
    def save_panel(self, batch: dict, inputs: dict, output) -> None:
        """Draw up to four pairs, one a row: both frames, both flows, and the earlier frame with its occluded pixels in black."""
        frames = batch["frames"][:4].to(self.accelerator.device)
        with self.accelerator.autocast():
            # `forward` of the model, not the compiled module, which would be compiled anew for this batch size.
            flow = self.model.forward(frames.float() / 255).flow
        seen = frames[:, 0] * visible_mask(flow)[:, 0, None]
        rows = [
            torch.cat([*pair, *map(flow_to_rgb, flows), rest], dim=2).cpu()
            for pair, flows, rest in zip(frames, flow, seen)
        ]
        folder = self.output_dir / "panels"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.cat(rows, dim=1).permute(1, 2, 0).numpy()).save(folder / f"step-{self.step:06d}.png")


if __name__ == "__main__":
    run_script(main)
