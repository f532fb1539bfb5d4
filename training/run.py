"""The training loop that all models share: steps, logs, checkpoints, signals, and exact resumption."""

import dataclasses
import json
import logging
import math
import sys
import time
from abc import ABC, abstractmethod
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from modeling_poodle.folders import sha256_of, sweep_aside, write_aside
from modeling_poodle.locks import still_held
from modeling_poodle.processes import on_all, on_main, same_on_all
from training import stopping
from training.addresses import public_value
from training.assembly import compile_modules, prepared
from training.checkpoint_files import CHECKSUMS, leave_later, sync_file
from training.checkpoints import load_checkpoint, save_checkpoint
from training.faults import faults_in_words
from training.health import Health
from training.publish import BackgroundPublisher
from training.ranks import StopSignals
from training.resume import cut_metrics, drop_later_panels
from training.schedules import learning_rate

logger = logging.getLogger("poodle")


class Run(ABC):
    """
    One training run of a model on videos: the loop, the state stored in checkpoints, and the logs.

    Subclasses define the objective, and what is logged and exported.
    """

    METRICS: tuple[str, ...]  # names of scalars that are averaged over a log window
    LOGS = ("metrics.jsonl",)  # files whose lines each belong to a step; cut back when a run is resumed
    WRITTEN: str  # what `output_dir` holds at the end, as the final log message lists it
    LINE: str  # format of the line that is printed for each logged step

    def __init__(self, accelerator, recipe, model, optimizer, loader, max_steps):
        self.accelerator, self.recipe, self.loader, self.max_steps = accelerator, recipe, loader, max_steps
        # Keep the model without DDP's wrapper, which would hide update_teacher.
        self.model, self.optimizer = model, optimizer
        self.compiled = [model]  # modules to compile if the recipe sets torch_compile
        self.warmup = recipe.warmup_steps if recipe.warmup_steps >= 1 else round(recipe.warmup_steps * max_steps)
        self.step, self.output_dir, self.publisher = 0, Path(recipe.output_dir), None
        self.sums = torch.zeros(len(self.METRICS), device=accelerator.device)
        self.health = Health(accelerator)
        self.signals = StopSignals(accelerator, timedelta(seconds=recipe.ddp_timeout))
        self.generator = torch.Generator(device=accelerator.device)
        self.skipped: dict[str, str] = {}  # path of each skipped file: the first reason why it was skipped
        self.restart_clock()

    @abstractmethod
    def objective(self, batch: dict) -> tuple[Any, dict, dict]:
        """
        Compute the loss of a batch.

        Returns:
            The model's output, which holds the loss; the model's inputs, for the panel; and those METRICS that are not in the output.
        """

    @abstractmethod
    def after_update(self) -> None:
        """Called after each optimizer step, for example to update a teacher."""

    @abstractmethod
    def figures(self, output) -> dict:
        """Return the subclass's own fields for a line of metrics.jsonl, averaged over this log window and all ranks."""

    @abstractmethod
    def measure(self, last: bool) -> None:
        """
        Measure the model. Called after each step; the subclass chooses the intervals.

        Args:
            last: whether this was the run's last step.
        """

    @abstractmethod
    def export(self) -> None:
        """Write the folders of weights. Called on the first process only."""

    @abstractmethod
    def save_panel(self, batch: dict, inputs: dict, output) -> None:
        """Write a picture of this step. Called on the first process only."""

    def run(self, checkpoint: Path | None) -> None:
        """
        Train to the end, from `checkpoint` or, if it is `None`, from the first step.

        Raises:
            SystemExit: a signal stopped the run; the exit code is RESUMABLE_EXIT_CODE.
        """
        with faults_in_words(self.recipe, self.loader.workers):
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

    def load(self, checkpoint: Path) -> None:
        """
        Restore this rank's state from a checkpoint.

        Raises:
            ValueError: the checkpoint cannot be read.
        """
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

    def open(self, checkpoint: Path | None) -> None:
        if checkpoint is not None:
            # All ranks load before rank 0 cuts back later files. So if one rank cannot read its part, the folder stays unchanged.
            on_all(self.accelerator, lambda: self.load(checkpoint))
            which = sha256_of([checkpoint / CHECKSUMS])[:12]  # not the path, which may differ between machines
            same_on_all(self.accelerator, "checkpoint", f"step {self.step}, checksums {which}")
            logger.info("resuming from %s", checkpoint)
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            sweep_aside(self.output_dir)
            stopping.mark_begun()
            write_aside(self.output_dir / "config.yaml", self.recipe.to_yaml(), sync=True)
            for name in self.LOGS:
                cut_metrics(self.output_dir / name, self.step)
            drop_later_panels(self.output_dir / "panels", self.step)
            leave_later(self.output_dir, self.step)
            if self.recipe.push_to_hub:
                self.publisher = BackgroundPublisher(
                    self.output_dir,
                    self.recipe.hub_model_id,
                    self.recipe.hub_private_repo,
                    panel=self.recipe.panel_steps > 0,
                )
        compile_modules(self.recipe, *self.compiled)
        self.wrapped = prepared(self.accelerator, self.model)
        if self.recipe.report_to != "none":
            shown = dataclasses.replace(self.recipe, videos=public_value(self.recipe.videos))
            self.accelerator.init_trackers("poodle", config=shown.flat())
        if self.recipe.warmup_steps > self.max_steps:
            logger.warning(
                "the learning rate rises over warmup_steps = %d, of which the run has %d: it ends at %.1e instead of learning_rate = %.1e",
                *(self.recipe.warmup_steps, self.max_steps),
                *(self.recipe.learning_rate * self.max_steps / self.recipe.warmup_steps, self.recipe.learning_rate),
            )
        encoder = getattr(self.model.config, "backbone_config", None)
        logger.info(
            "%s of %.1f million parameters, %d steps of %d pairs on %d process(es), %s; %d videos",
            type(self.model).__name__ if encoder is None else f"{encoder.model_type} encoder and heads",
            sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad) / 1e6,
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
        self.restart_clock()
        # If no step is left, the run was killed after its last checkpoint, perhaps before it exported the weights.
        if self.step >= self.max_steps:
            self.export_and_push()
        while self.step < self.max_steps:
            last = self.step + 1 == self.max_steps
            output, inputs, batch = self.train_step(batches)
            self.step += 1
            self.timed_steps += 1
            progress.update()
            if self.step % recipe.logging_steps == 0 or last:
                self.log(output, progress)
            if recipe.panel_steps and self.accelerator.is_main_process:
                if self.step % recipe.panel_steps == 0 or self.step == 1 or last:
                    self.save_panel(batch, inputs, output)
            self.measure(last)
            del output, inputs, batch  # free their memory before the next step
            stop = self.signals.agreed()
            if self.step % recipe.save_steps == 0 or last or stop:
                self.save()
            if stop:
                break
        progress.close()

    def train_step(self, batches):
        """Take one optimizer step. Returns the output, inputs and batch of its last micro-step."""
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
            if micro_step + 1 < micro_steps:  # free their memory before the next micro-step
                del output, inputs, batch
        self.grad_norm = self.health.guard(self.model, self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.after_update()
        return output, inputs, batch

    def next_batch(self, batches) -> dict:
        began = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - began
        return batch

    def restart_clock(self) -> None:
        """Begin a window of steps, of which the rates in metrics.jsonl are."""
        self.started, self.waited, self.timed_steps = time.perf_counter(), 0.0, 0

    def seed(self, micro_step: int) -> None:
        """Seed the random numbers of this micro-step and rank, so that a resumed run draws the same ones as an uninterrupted run."""
        number = self.step * self.recipe.gradient_accumulation_steps + micro_step
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        seed = (self.recipe.seed * 1_000_003 + number) * ranks + rank
        self.generator.manual_seed(seed)
        # Encoders with stochastic depth (Swin, ConvNeXt) draw from the GPU's global generator, whose state is not in the checkpoints.
        if self.accelerator.device.type != "cpu":
            # Use another seed here. With the same seed, the dropped paths would depend on the photometric augmentation.
            torch.get_device_module(self.accelerator.device).manual_seed(seed + (1 << 62))

    @torch.no_grad()
    def accumulate(self, output, batch, **more) -> None:
        """Add METRICS, taken from `output` and `more`, to the sums of this log window, without making the host wait for the device."""
        zero = output.loss.new_zeros(())
        found = {**vars(output), **more}
        values = [found[name] for name in self.METRICS]
        values = torch.stack([zero if value is None else value.detach().float() for value in values])
        self.sums += values / self.recipe.gradient_accumulation_steps
        self.health.watch(output.loss.detach(), self.step + 1, batch["video"])
        self.name_skipped(batch["skipped"])

    def name_skipped(self, found: list[tuple[str, str]]) -> None:
        """Log each skipped file once a run, with the first reason. (Other frames of the file may fail for other reasons.)"""
        for path, reason in found:
            if path not in self.skipped:
                self.skipped[path] = reason
                if self.accelerator.is_main_process:
                    logger.warning("skipped %s: %s", path, reason)

    def share_skipped(self) -> None:
        """Tell every rank which files the other ranks' workers have skipped."""
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
        self.restart_clock()
        self.report(metrics, progress)
        self.health.judge(metrics)

    def report(self, metrics: dict, progress) -> None:
        if not self.accelerator.is_main_process:
            return
        with open(self.output_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        if progress.disable:
            print(self.LINE.format(of=self.max_steps, **metrics), flush=True)
        else:
            progress.set_postfix_str(f"loss {metrics['loss']:.3f}, {metrics['pairs_per_second']:.1f} pairs/s")
        if self.recipe.report_to != "none":
            numbers = {name: value for name, value in metrics.items() if value is not None and name != "step"}
            self.accelerator.log(numbers, step=self.step)

    def window_means(self, *more: torch.Tensor) -> list[float]:
        """Return the means of METRICS over this log window and all ranks, followed by the means of `more` over the ranks."""
        window = (self.step - 1) % self.recipe.logging_steps + 1
        sums = self.sums / window
        return self.accelerator.reduce(torch.cat([sums, *(value[None] for value in more)]), reduction="mean").tolist()

    def epoch(self) -> float:
        return self.step * self.recipe.pairs_per_process * self.accelerator.num_processes / self.loader.pairs_per_epoch

    def save(self) -> None:
        self.health.stop_if_not_finite()
        on_main(self.accelerator, self.before_saving)
        self.share_skipped()  # a resumed run does not log skipped files again if the checkpoint lists them
        state, doubtful = self.rank_state(), self.health.doubtful
        save_checkpoint(self.accelerator, self.recipe, self.step, self.model, self.optimizer, state, keep_all=doubtful)
        self.export_and_push()

    def rank_state(self) -> dict:
        """Return what this rank needs to resume, apart from the weights and the optimizer's moments."""
        state = {"loader": self.loader.state_dict(), "sums": self.sums, "rng": torch.get_rng_state()}
        return state | {"skipped": self.skipped, **self.health.state_dict()}

    def before_saving(self) -> None:
        still_held(self.output_dir)
        self.health.refuse_bad_weights(self.model, self.optimizer)
        for log in (self.output_dir / name for name in self.LOGS):
            if log.exists():
                sync_file(log)  # if a checkpoint survives a power cut, so must the log lines up to it

    def export_and_push(self) -> None:
        """Export the weights, and push them to the Hub if the recipe sets push_to_hub."""
        on_main(self.accelerator, self.export)
        if self.publisher is not None:
            self.publisher.submit(self.step)

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
                written = self.WRITTEN if self.recipe.panel_steps else self.WRITTEN.replace("panels/, ", "")
                logger.info("%s: %s are there", self.output_dir, written)
            for path, reason in sorted(self.skipped.items()):
                logger.warning("skipped %s: %s", path, reason)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
