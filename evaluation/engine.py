"""The fit loop and the evaluation loop of all readouts, on any number of processes."""

import hashlib
import itertools
import json
import math
import os
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from evaluation.labelled_images import LabelledImages, read_ahead
from evaluation.metrics import MeanIoU, confusion_matrix, scores
from modeling_poodle.processes import on_all, same_on_all


def fingerprint(module: nn.Module) -> str:
    """Return a hash of all parameters and buffers; equal only if they are equal byte for byte."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Readout(nn.Module, ABC):
    """A network on an encoder, as the scripts measure it."""

    trains_encoder = False
    """Whether a fit trains the encoder too; if not, it stays in evaluation mode, BatchNorm's statistics included."""

    def prepare(self, accelerator: Accelerator | None = None) -> None:
        """Compute what is needed from the training images. Called once on all processes, before a fit."""

    @abstractmethod
    def predict(self, image: np.ndarray):
        """Map an image (H, W, 3) uint8 RGB to class ids (H, W) uint8; a detector returns boxes with scores and labels."""


class FittedReadout(Readout):
    """
    A readout that [`fit`] fits. Its `forward` takes the arguments that `batch` returns and returns the loss, a scalar.

    `data` holds the examples: [`LabelledImages`] or [`BoxImages`].
    """

    data: Any

    def keep(self, examples: list) -> None:
        """Store what can be reused of this process' `examples`. Called once, before the steps of a fit."""

    @abstractmethod
    def read(self, example) -> tuple:
        """Read what a step needs of an example. Called by several threads, ahead of the steps."""

    @abstractmethod
    def batch(self, read: list[tuple], generator: torch.Generator) -> dict:
        """Return the arguments of `forward`, on its device, for what was `read`. All random draws use `generator`, on the CPU."""

    @abstractmethod
    def trained(self) -> list[nn.Parameter]:
        """Return the parameters that are fitted."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Save the readout to a folder from which others can load it."""

    def moving(self) -> dict[str, torch.Tensor]:
        """Return the buffers that a fit changes: BatchNorm's statistics, unless the encoder is frozen."""
        return dict(self.named_buffers()) if self.trains_encoder else {}


def refuse_idle_processes(accelerator: Accelerator, data) -> None:
    """Raises ValueError if there are more processes than training images, of which each process needs one."""
    if len(data.train) < accelerator.num_processes:
        raise ValueError(
            f"{accelerator.num_processes} processes have {len(data.train)} training images, and each needs one: start fewer processes"
        )


def fit(
    accelerator: Accelerator, readout: FittedReadout, recipe, examples: list, folder: Path, identity: str, resume: bool
) -> list[dict]:
    """
    Fit a readout with AdamW, warm-up and a cosine schedule.

    Args:
        examples: the examples of this rank.
        folder: where the state is saved, so that an interrupted fit resumes bit for bit.
        identity: fingerprint of the encoder before the fit; the fit of another encoder is not resumed.
        resume: whether to continue from a saved state, if there is one.

    Returns:
        The loss curve, [{"step", "loss", "lr"}].

    Raises:
        ValueError: the saved state is damaged or of another fit, or the processes found different states.
        FloatingPointError: the loss is not finite.
    """
    batch = recipe.per_device_train_batch_size
    total = len(readout.data.train)
    steps = recipe.max_steps
    if steps < 1:
        steps = max(1, round(recipe.num_train_epochs * total / (batch * accelerator.num_processes)))
    parameters = readout.trained()
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    state = FitState(
        folder / "fit.safetensors", identity, steps, accelerator.num_processes, parameters, readout.moving(), optimizer
    )
    begin, curve = 0, []
    if resume:
        begin, curve = on_all(accelerator, state.load)
        # Processes that begin at different steps would wait for each other for ever.
        same_on_all(accelerator, f"{state.path}, in an output_dir that they share", f"{begin} steps")
    wrapped = accelerator.prepare_model(readout)
    if begin < steps:
        readout.keep(examples)
    order = (examples[i] for step in range(begin, steps) for i in draw(len(examples), batch, step, recipe.seed))
    reads = read_ahead(readout.read, order, ahead=2 * batch)
    readout.train(readout.trains_encoder)  # a frozen encoder also keeps its BatchNorm statistics
    losses: list[torch.Tensor] = []
    shown = accelerator.is_main_process and sys.stderr.isatty()
    for step in tqdm(range(begin, steps), initial=begin, total=steps, desc="fitting", disable=not shown):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, recipe.learning_rate)
        generator = torch.Generator().manual_seed(
            (recipe.seed * 1_000_003 + step) * accelerator.num_processes + accelerator.process_index
        )
        loss = wrapped(**readout.batch(list(itertools.islice(reads, batch)), generator))
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        last = step + 1 == steps
        # The last step is saved too, so that an evaluation interrupted after its fit does not fit again.
        saving = (step + 1) % recipe.save_steps == 0 or last
        # The first is a point as well: the curve of a short fit has a beginning.
        if step == 0 or (step + 1) % recipe.logging_steps == 0 or last or saving:
            value = accelerator.reduce(torch.stack(losses).mean(), reduction="mean").item()
            losses.clear()
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss is not finite at step {step + 1}; lower learning_rate")
            curve.append({"step": step + 1, "loss": value, "lr": optimizer.param_groups[0]["lr"]})
        if saving and accelerator.is_main_process:
            state.save(step + 1, curve)
    # DistributedDataParallel copies the first process' statistics to all processes at the beginning of each step. After the last step each
    # process has its own, and without this would predict its share of the test images with these instead of the saved ones.
    for buffer in readout.moving().values():
        broadcast(buffer, from_process=0)
    readout.eval()
    return curve


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the learning rate after `step` steps: linear warm-up over the first twentieth, then a cosine to 0."""
    warmup = max(1, round(0.05 * steps))
    done = max(0, step - warmup) / max(1, steps - warmup)
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * done))


def draw(count: int, batch: int, step: int, seed: int) -> list[int]:
    """Return the indices of a step's examples. Each epoch has its own order, and a batch may continue into the next epoch."""
    indices = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, count)
        indices.append(int(_order(count, seed, epoch)[place]))
    return indices


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


@dataclass
class FitState:
    """
    The state of a fit, saved to a file so that an interrupted fit resumes bit for bit.

    Args:
        path: the file.
        identity: fingerprint of the encoder.
        steps, processes: numbers of the whole fit, which determine its schedule and its random draws.
        parameters, buffers, optimizer: what changes in a fit.
    """

    path: Path
    identity: str
    steps: int
    processes: int
    parameters: list[nn.Parameter]
    buffers: dict[str, torch.Tensor]
    optimizer: torch.optim.Optimizer

    def save(self, step: int, curve: list[dict]) -> None:
        """Save the state to a partial file and rename it, so that a half-written file is never read."""
        tensors = {f"buffer.{name}": value.detach().cpu().clone() for name, value in self.buffers.items()}
        for index, parameter in enumerate(self.parameters):
            tensors[f"parameter.{index}"] = parameter.detach().cpu().contiguous()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}.{index}"] = value.detach().cpu().contiguous()
        partial = self.path.with_suffix(".partial")
        of = f"{self.steps} {self.processes}"
        metadata = {"step": str(step), "curve": json.dumps(curve), "encoder": self.identity, "of": of}
        try:
            save_file(tensors, partial, metadata=metadata)
        except SafetensorError as error:  # its text holds the system's error
            raise OSError(f"{partial} cannot be written: {error}") from error
        os.replace(partial, self.path)

    def load(self) -> tuple[int, list[dict]]:
        """
        Restore the state from the file, if there is one.

        Returns:
            The number of steps taken and the loss curve; 0 and an empty list if there is no file.

        Raises:
            ValueError: the file is damaged or belongs to another fit.
        """
        if not self.path.is_file():
            return 0, []
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{self.path} is damaged ({error}); remove it, and the fit begins anew") from error
        if metadata.get("encoder") != self.identity:
            raise ValueError(
                f"{self.path} is the fit of other weights of this encoder; remove it, or choose another output_dir"
            )
        then = metadata["of"].split()
        if then != [str(self.steps), str(self.processes)]:
            raise ValueError(
                f"{self.path} is the fit of {then[0]} steps on {then[1]} process(es), this one is of {self.steps} on {self.processes}: go on "
                f"with {then[1]} (on CPUs by torchrun --nproc_per_node {then[1]}), or remove it and begin anew"
            )
        tensors = load_file(self.path)
        with torch.no_grad():
            for name, value in self.buffers.items():
                value.copy_(tensors[f"buffer.{name}"])
            for index, parameter in enumerate(self.parameters):
                parameter.copy_(tensors[f"parameter.{index}"])
                state = {k: tensors[f"{k}.{index}"] for k in ("step", "exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {
                    k: v.to(parameter.device) if k != "step" else v.clone() for k, v in state.items()
                }
        return int(metadata["step"]), json.loads(metadata["curve"])


def over_test_images(accelerator: Accelerator, data, read, measure, title: str) -> list:
    """
    Return `measure(*read(example))` for every test example, in order.

    Each example is measured on exactly one process, and the results are gathered on all. Threads call `read` ahead. If one process cannot
    read an image, the error is raised on all processes.
    """
    mine = range(accelerator.process_index, len(data.test), accelerator.num_processes)
    shown = accelerator.is_main_process and sys.stderr.isatty()
    reads = read_ahead(read, (data.test[index] for index in mine))
    shares = zip(tqdm(mine, desc=title, disable=not shown), reads)
    found = on_all(accelerator, lambda: [(index, measure(*reads_of)) for index, reads_of in shares])
    if accelerator.num_processes > 1:
        found = gather_object(found)
    return [value for _, value in sorted(found, key=lambda entry: entry[0])]


def evaluate(accelerator: Accelerator, predict, data: LabelledImages) -> tuple[MeanIoU, list[dict]]:
    """
    Predict every test image once, on exactly one process.

    Args:
        predict: maps an image (H, W, 3) uint8 to class ids (H, W) uint8.

    Returns:
        The metric over all images and processes, and for each image its index, name and mean IoU (`None` without labelled pixels).
    """
    # of_truth: models are compared in one table, so a class that no test image shows must not lower the mean of the models that predict it.
    metric = MeanIoU(data.classes, groups=data.groups, of_truth=True)

    def measure(example, image: np.ndarray, truth: np.ndarray) -> dict:
        prediction = predict(image)
        if prediction.shape != truth.shape:
            raise ValueError(f"{example.name}: image {prediction.shape} and label {truth.shape} differ in size")
        confusion = confusion_matrix(prediction, truth, len(data.classes))
        metric.confusion += confusion
        return {"name": example.name, "miou": scores(confusion)["miou"]}

    images = over_test_images(accelerator, data, lambda example: (example, *data.both(example)), measure, "evaluating")
    total = torch.from_numpy(metric.confusion).to(accelerator.device)
    metric.confusion = accelerator.reduce(total, reduction="sum").cpu().numpy()
    return metric, [{"index": index, **image} for index, image in enumerate(images)]
