"""
Pretrain PooDLe on video.

    accelerate launch training/pretrain.py [--config RECIPE] [--videos SOURCE ...] [--output_dir DIR] [--FIELD VALUE ...]

The step follows section 3 of the paper (arXiv 2408.11208): a pair of frames, photometric augmentation, flow, views and subcrops,
both objectives, an optimizer step, and one of the teacher.
"""

import dataclasses
import importlib
import json
import logging
import math
import shutil
import sys
import time
import zlib
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

# `accelerate launch training/pretrain.py` puts training/ on the path; its siblings live one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training import stopping

if __name__ == "__main__":  # before the imports, which take seconds
    stopping.end_on_signals()

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from modeling_poodle.objectives_poodle import feature_std
from modeling_poodle.recipe_files import run_script
from training.addresses import public_value, video_name
from training.assembly import build_model, build_optimizer, compile_modules, make_accelerator, prepared
from training.checkpoint_files import replace_text, sync_file
from training.checkpoints import export, load_checkpoint, save_checkpoint
from training.faults import faults_in_words
from training.flow import build_flow, check_sidecars
from training.flow_files import precomputed_epochs, read_manifest
from training.health import Health
from training.panels import save_panel
from training.publish import BackgroundPublisher
from training.ranks import StopSignals, main_first, on_main, same_on_all
from training.recipe import Recipe, RunRecipe, parse_recipe
from training.resume import cut_metrics, prepare_output_dir
from training.schedules import count_steps, learning_rate, teacher_momentum
from training.street import street_videos
from training.street_cameras import CAMERAS, street_camera
from training.video_checks import check_videos
from training.video_sources import merged, videos_by_source
from training.video_stream import PairLoader, PairSampling
from training.views import model_inputs

logger = logging.getLogger("poodle")


def main(arguments: list[str] | None = None) -> None:
    recipe = parse_recipe(arguments)
    accelerator = make_accelerator(recipe)
    checkpoint = prepare_output_dir(accelerator, recipe)
    paths = resolve_videos(accelerator, recipe)
    pair_flow, flow_module = build_flow(
        recipe.flow, recipe.flow_weights, recipe.flow_updates, folder=recipe.flow_folder, model=recipe.flow_model
    )
    loader = build_loader(accelerator, recipe, paths, pair_flow)
    probe = build_probe(accelerator, recipe)
    model = build_model(accelerator, recipe)
    optimizer = build_optimizer(accelerator, recipe, model)
    max_steps = count_steps(recipe, accelerator.num_processes, loader.pairs_per_epoch)
    run = Run(accelerator, recipe, model, optimizer, loader, flow_module, max_steps, probe)
    run.run(checkpoint)


def resolve_videos(accelerator: Accelerator, recipe: RunRecipe) -> list[str]:
    """Paths of the videos: sources expanded, the street rendered where asked for, and a first look at the files."""

    def find() -> list[str]:
        paths, by_source = [], {}
        for camera in [camera for camera in CAMERAS if camera in map(street_camera, recipe.videos)]:
            by_source[f"street:{camera}"] = street_videos(camera=camera)
            paths += by_source[f"street:{camera}"]
        others = [source for source in recipe.videos if street_camera(source) is None]
        if others:
            flow_dir = getattr(recipe, "flow_folder", None)  # recipes of train_flow.py read no flow
            pins = Path(flow_dir or recipe.output_dir, "revisions.json")
            new = recipe.resume_from_checkpoint is None and flow_dir is None  # flow is that of its own commits
            if new and accelerator.is_main_process:
                pins.unlink(missing_ok=True)
            elsewhere = recipe.resume_from_checkpoint not in (None, "latest")
            if elsewhere and not (flow_dir or pins.exists()) and accelerator.is_main_process:
                # The checkpoint of another run: its stream goes on with the commits that it had.
                origin = Path(recipe.resume_from_checkpoint).parent.parent / pins.name
                if origin.is_file():
                    pins.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(origin, pins)
            found = videos_by_source(others, pins)
            by_source, paths = {**by_source, **found}, paths + merged(found)
        check_videos(paths, PairSampling.of(recipe), by_source)
        if getattr(recipe, "flow", None) == "exact":
            check_sidecars(paths)
        return paths

    # Rank 0 renders the street and writes down commits of the Hub; the others find both there.
    paths = main_first(accelerator, find)
    names = " ".join(map(video_name, paths)).encode(errors="surrogateescape")  # names of files need not be UTF-8
    same_on_all(accelerator, "videos", f"{len(paths)} videos, checksum {zlib.crc32(names):08x}")
    return paths


def build_probe(accelerator: Accelerator, recipe: Recipe):
    """The readout that `probe` asks for, taken by its name: see evaluation/probe.py for why."""
    if recipe.probe is None:
        return None
    with accelerator.main_process_first():  # rank 0 renders the street, the others find it
        return importlib.import_module("evaluation.probe").Probe(recipe.probe)


def build_loader(accelerator: Accelerator, recipe: RunRecipe, paths: list[str], pair_flow) -> PairLoader:
    loader = PairLoader(
        paths,
        PairSampling.of(recipe),
        batch_size=recipe.per_device_train_batch_size,
        num_workers=recipe.dataloader_num_workers,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        pair_flow=pair_flow,
    )
    if pair_flow is not None:
        loader.epochs = precomputed_epochs(recipe, loader)
        loader.estimator = read_manifest(recipe.flow_folder)["estimator"] if recipe.flow == "precomputed" else None
    return loader


class Run:
    """One training run: the state that a checkpoint holds, the loop, and what is written for people."""

    METRICS = ("loss", "dense_loss", "pooled_loss", "valid_fraction", "matched_fraction")
    WRITTEN = "encoder/, model/, panels/, metrics.jsonl and checkpoints/"
    LINE = "step {step}/{of}  loss {loss:.4f}  feature_std {feature_std:.3f}  {pairs_per_second:.1f} pairs/s"

    def __init__(self, accelerator, recipe, model, optimizer, loader, flow_module, max_steps, probe):
        self.accelerator, self.recipe, self.loader, self.max_steps = accelerator, recipe, loader, max_steps
        self.probe = probe
        self.model, self.optimizer = model, optimizer  # the bare model: the teacher and the files are its business
        self.flow_module = None if flow_module is None else flow_module.to(accelerator.device)
        self.warmup = recipe.warmup_steps if recipe.warmup_steps >= 1 else round(recipe.warmup_steps * max_steps)
        self.step, self.output_dir, self.publisher = 0, Path(recipe.output_dir), None
        self.sums = torch.zeros(len(self.METRICS), device=accelerator.device)
        self.health = Health(accelerator)
        self.signals = StopSignals(accelerator, timedelta(seconds=recipe.ddp_timeout))
        self.generator = torch.Generator(device=accelerator.device)
        self.skipped: dict[str, str] = {}  # path and first reason

    def run(self, checkpoint: Path | None) -> None:
        """All of it. Raises SystemExit with RESUMABLE_EXIT_CODE where a signal asked it to stop."""
        with faults_in_words(self.recipe, self.loader):
            self.accelerator.wait_for_everyone()
            self.open(checkpoint)
            try:
                with self.signals:
                    self.train()
            finally:
                self.loader.close()
            self.close()
        if self.step < self.max_steps:
            raise SystemExit(stopping.RESUMABLE_EXIT_CODE)

    def open(self, checkpoint: Path | None) -> None:
        if checkpoint is not None:
            own, inexact = self.rank_state(), self.recipe.resume_inexact
            self.step, state = load_checkpoint(self.accelerator, checkpoint, self.model, self.optimizer, own, inexact)
            self.loader.load_state_dict(state["loader"], inexact)
            self.sums.copy_(state["sums"])
            self.health.load_state_dict(state)
            try:
                torch.set_rng_state(state["rng"])
            except RuntimeError as error:
                raise ValueError(f"checkpoint {checkpoint}: rng is no state of torch's generator ({error})") from error
            self.skipped = dict(state["skipped"])
            logger.info("resuming from %s", checkpoint)
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            stopping.mark_begun()
            replace_text(self.output_dir / "config.yaml", self.recipe.to_yaml())
            for name in ("metrics.jsonl", "probe.jsonl"):
                cut_metrics(self.output_dir / name, self.step)
            if self.recipe.push_to_hub:
                self.publisher = BackgroundPublisher(
                    self.output_dir, self.recipe.hub_model_id, self.recipe.hub_private_repo
                )
        compile_modules(self.recipe, self.model, self.flow_module)
        self.wrapped = prepared(self.accelerator, self.model)
        if self.recipe.report_to != "none":
            shown = dataclasses.replace(self.recipe, videos=public_value(self.recipe.videos))
            self.accelerator.init_trackers("poodle", config={"recipe": shown.to_yaml()})
        logger.info(
            "%d steps of %d pairs on %d process(es), %s; %d videos",
            self.max_steps,
            self.recipe.pairs_per_process * self.accelerator.num_processes,
            self.accelerator.num_processes,
            self.accelerator.device,
            len(self.loader.paths),
        )

    def train(self) -> None:
        recipe, batches = self.recipe, iter(self.loader)
        self.model.train()
        shown = self.accelerator.is_main_process and sys.stderr.isatty()
        progress = tqdm(total=self.max_steps, initial=self.step, disable=not shown, unit="step")
        self.started, self.waited, self.timed_steps = time.perf_counter(), 0.0, 0
        if self.step >= self.max_steps:  # killed after its last checkpoint, perhaps before these were written
            self.hand_out()
        while self.step < self.max_steps:
            last = self.step + 1 == self.max_steps
            output, inputs, batch = self.train_step(batches)
            self.step += 1
            self.timed_steps += 1
            progress.update()
            if self.step % recipe.logging_steps == 0 or last:
                self.log(output, progress)
            if (self.step % recipe.panel_steps == 0 or self.step == 1 or last) and self.accelerator.is_main_process:
                self.save_panel(batch, inputs, output)
            if self.probe is not None and (self.step % recipe.probe_steps == 0 or last):
                self.run_probe()
            del output, inputs, batch  # or they would lie beside the next step's until it has its own
            stop = self.signals.agreed()
            if self.step % recipe.save_steps == 0 or last or stop:
                self.save()
            if stop:
                break
        progress.close()

    def train_step(self, batches):
        """One optimizer step."""
        rate = learning_rate(
            self.step, self.max_steps, self.warmup, self.recipe.learning_rate, self.recipe.min_learning_rate
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        micro_steps = self.recipe.gradient_accumulation_steps
        for micro_step in range(micro_steps):
            batch = self.next_batch(batches)
            self.seed(micro_step)
            with self.accelerator.no_sync(self.wrapped) if micro_step + 1 < micro_steps else nullcontext():
                output, inputs, more = self.objective(batch)
                self.accelerator.backward(output.loss / micro_steps)
            self.accumulate(output, batch, **more)
        self.grad_norm = self.health.guard(self.model, self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.after_update()
        return output, inputs, batch

    def objective(self, batch: dict):
        """A batch of the loader -> (output with its loss, the model's inputs for the panel, further METRICS)."""
        inputs = model_inputs(batch, self.recipe, self.generator, self.estimate_flow)
        matched = inputs.pop("matched")
        with self.accelerator.autocast():
            output = self.wrapped(**inputs, subcrop_size=self.recipe.subcrop_size)
        return output, {**inputs, "matched": matched}, {"matched_fraction": matched.float().mean()}

    def after_update(self) -> None:
        self.model.update_teacher(teacher_momentum(self.step, self.max_steps, self.recipe.teacher_momentum))

    def next_batch(self, batches) -> dict:
        began = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - began
        return batch

    def seed(self, micro_step: int) -> None:
        """A seed of its own for the draws of every micro-step and rank: a resumed run draws what an uninterrupted one would."""
        number = self.step * self.recipe.gradient_accumulation_steps + micro_step
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        seed = (self.recipe.seed * 1_000_003 + number) * ranks + rank
        self.generator.manual_seed(seed)
        # A GPU's own generator, of which checkpoints hold nothing, is drawn from by encoders that drop paths (Swin, ConvNeXt).
        if self.accelerator.device.type != "cpu":
            # Of another seed: drawn from the same numbers, what is dropped would be what is jittered.
            torch.get_device_module(self.accelerator.device).manual_seed(seed + (1 << 62))

    def estimate_flow(self, frames: torch.Tensor) -> torch.Tensor:
        with self.accelerator.autocast():
            return self.flow_module(frames)

    @torch.no_grad()
    def accumulate(self, output, batch, **more) -> None:
        """Add to the sums of this log window, on the device: the host does not wait. METRICS are of `output` and of `more`."""
        zero = output.loss.new_zeros(())
        found = {**vars(output), **more}
        values = [found[name] for name in self.METRICS]
        values = torch.stack([zero if value is None else value.detach().float() for value in values])
        self.sums += values / self.recipe.gradient_accumulation_steps
        self.health.watch(output.loss.detach(), self.step + 1, batch["video"])
        self.name_skipped(batch["skipped"])

    def name_skipped(self, found: list[tuple[str, str]]) -> None:
        """A file is named once in a run, by its first reason: other frames of it can be damaged otherwise."""
        for path, reason in found:
            if path not in self.skipped:
                self.skipped[path] = reason
                if self.accelerator.is_main_process:
                    logger.warning("skipped %s: %s", path, reason)

    def share_skipped(self) -> None:
        """Each rank's workers skip files of their own; from here on every rank knows of all."""
        if self.accelerator.num_processes > 1:
            self.name_skipped([entry for found in gather_object([self.skipped]) for entry in found.items()])

    @torch.no_grad()
    def log(self, output, progress) -> None:
        self.health.stop_if_not_finite()
        self.share_skipped()
        metrics = {"step": self.step, "epoch": self.epoch(), **self.figures(output)}
        self.sums.zero_()
        elapsed = time.perf_counter() - self.started
        pairs = self.timed_steps * self.recipe.pairs_per_process
        metrics |= {
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": norm if math.isfinite(norm := self.grad_norm.item()) else None,
            "pairs_per_second": pairs * self.accelerator.num_processes / elapsed,
            "data_wait": self.waited / elapsed,
            "skipped_videos": len(self.skipped),
            "skipped_updates": int(self.health.skipped_updates),
        }
        self.started, self.waited, self.timed_steps = time.perf_counter(), 0.0, 0
        self.report(metrics, progress)
        self.health.judge(metrics)

    def report(self, metrics: dict, progress) -> None:
        if not self.accelerator.is_main_process:
            return
        with open(self.output_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")
        if progress.disable:
            print(self.LINE.format(of=self.max_steps, **metrics), flush=True)
        else:
            progress.set_postfix_str(f"loss {metrics['loss']:.3f}, {metrics['pairs_per_second']:.1f} pairs/s")
        if self.recipe.report_to != "none":
            numbers = {name: value for name, value in metrics.items() if value is not None and name != "step"}
            self.accelerator.log(numbers, step=self.step)

    def figures(self, output) -> dict:
        """What a line of metrics.jsonl says of the method: over this log window and all ranks."""
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

    def window_means(self, *more: torch.Tensor) -> list[float]:
        """Means of METRICS over this log window and all ranks, then of `more` over the ranks."""
        window = (self.step - 1) % self.recipe.logging_steps + 1
        sums = self.sums / window
        return self.accelerator.reduce(torch.cat([sums, *(value[None] for value in more)]), reduction="mean").tolist()

    def run_probe(self) -> None:
        """A line of probe.jsonl: the teacher's k-NN readout. Its time is in no rate of metrics.jsonl."""
        began = time.perf_counter()
        figures = {"step": self.step, **self.probe(self.accelerator, self.model.teacher)}
        self.started += time.perf_counter() - began
        if not self.accelerator.is_main_process:
            return
        with open(self.output_dir / "probe.jsonl", "a") as file:
            file.write(json.dumps(figures) + "\n")
        logger.info(
            "step %d  probe: mIoU %.1f  accuracy %.1f", self.step, 100 * figures["miou"], 100 * figures["accuracy"]
        )
        if self.recipe.report_to != "none":
            self.accelerator.log({f"probe_{k}": v for k, v in figures.items() if k != "step"}, step=self.step)

    def epoch(self) -> float:
        return self.step * self.recipe.pairs_per_process * self.accelerator.num_processes / self.loader.pairs_per_epoch

    def save(self) -> None:
        self.health.stop_if_not_finite()
        on_main(self.accelerator, self.before_saving)
        self.share_skipped()  # what a checkpoint has is not named again
        state, doubtful = self.rank_state(), self.health.doubtful
        save_checkpoint(self.accelerator, self.recipe, self.step, self.model, self.optimizer, state, keep_all=doubtful)
        self.hand_out()

    def rank_state(self) -> dict:
        """What this rank needs, besides weights and moments, to go on."""
        state = {"loader": self.loader.state_dict(), "sums": self.sums, "rng": torch.get_rng_state()}
        return state | {"skipped": self.skipped, **self.health.state_dict()}

    def before_saving(self) -> None:
        self.health.refuse_bad_weights(self.model, self.optimizer)
        log = self.output_dir / "metrics.jsonl"
        if log.exists():
            sync_file(log)  # lines up to a checkpoint's step must outlive a power cut as it does

    def hand_out(self) -> None:
        """encoder/ and model/ of this step, and to the Hub where that was asked for."""
        on_main(self.accelerator, lambda: export(self.model, self.recipe, self.step, self.accelerator.num_processes))
        if self.publisher is not None:
            self.publisher.submit(self.step)

    @torch.no_grad()
    def save_panel(self, batch: dict, inputs: dict, output) -> None:
        save_panel(self.output_dir / "panels" / f"step-{self.step:06d}.png", batch["frames"], inputs, output)

    def close(self) -> None:
        self.accelerator.wait_for_everyone()
        if self.recipe.report_to != "none":
            self.accelerator.end_training()
        if self.publisher is not None:
            self.publisher.close()
        if self.accelerator.is_main_process:
            if self.step < self.max_steps:
                again = "go on with --resume_from_checkpoint latest"
                logger.info("%s: saved at step %d; %s", self.signals.name, self.step, again)
            else:
                logger.info("%s: %s are there", self.output_dir, self.WRITTEN)
            for path, reason in sorted(self.skipped.items()):
                logger.warning("skipped %s: %s", path, reason)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
