"""One fit loop and one evaluate loop for all readouts, on any number of processes."""

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
    """Hash of all parameters and buffers: equal only where they are byte for byte."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Readout(nn.Module, ABC):
    """What the scripts measure: a network on an encoder."""

    trains_encoder = False
    """Whether a fit trains the encoder too; if not, it stays in evaluation mode, BatchNorm's statistics included."""

    def prepare(self, accelerator: Accelerator | None = None) -> None:
        """Once, before a fit, on all processes: what is taken of the training images beforehand."""

    @abstractmethod
    def predict(self, image: np.ndarray):
        """(H, W, 3) uint8 RGB -> (H, W) uint8 class ids; of a detector, boxes with their scores and labels."""


class FittedReadout(Readout):
    """
    A readout that [`fit`] fits. Its `forward` takes what `batch` gives, and is the loss: a scalar.

    `data` holds the examples, as [`LabelledImages`] or [`BoxImages`].
    """

    data: Any

    def keep(self, examples: list) -> None:
        """Once, before the steps of a fit: what is kept of this process' `examples`."""

    @abstractmethod
    def read(self, example) -> tuple:
        """What a step needs of an example. By several threads, ahead of the steps."""

    @abstractmethod
    def batch(self, read: list[tuple], generator: torch.Generator) -> dict:
        """The arguments of `forward`, on its device, of what was `read`; all that is drawn is drawn from `generator`, on the CPU."""

    @abstractmethod
    def trained(self) -> list[nn.Parameter]:
        """The parameters that are fitted."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write it where others load it from."""

    def moving(self) -> dict[str, torch.Tensor]:
        """The buffers that a fit changes: BatchNorm's statistics, unless the encoder is frozen."""
        return dict(self.named_buffers()) if self.trains_encoder else {}


def fit(
    accelerator: Accelerator, readout: FittedReadout, recipe, examples: list, folder: Path, identity: str, resume: bool
) -> list[dict]:
    """
    Fit a readout with AdamW, warm-up and cosine.

    Args:
        examples: of this rank. folder: where the state is kept, so that an interrupted fit goes on bit for bit. identity: fingerprint of the
            encoder as it was given; the fit of another is not resumed.

    Returns:
        The loss curve, [{"step", "loss", "lr"}].
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
        # A process that begins earlier than another would wait for it for ever.
        same_on_all(accelerator, f"{state.path}, in an output_dir that they share", f"{begin} steps")
    wrapped = accelerator.prepare_model(readout)
    if begin < steps:
        readout.keep(examples)
    order = (examples[i] for step in range(begin, steps) for i in draw(len(examples), batch, step, recipe.seed))
    reads = read_ahead(readout.read, order, ahead=2 * batch)
    readout.train(readout.trains_encoder)  # frozen means frozen: BatchNorm's statistics too
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
        # Also the last: an evaluation that is interrupted after its fit does not fit again.
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
    # DistributedDataParallel copies the first process' statistics to all when a step begins. After the last step each process has its own, and
    # would predict its share of the test images with these instead of the saved ones.
    for buffer in readout.moving().values():
        broadcast(buffer, from_process=0)
    readout.eval()
    return curve


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first twentieth, then a cosine to 0. Args: step: steps already taken."""
    warmup = max(1, round(0.05 * steps))
    done = max(0, step - warmup) / max(1, steps - warmup)
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * done))


def draw(count: int, batch: int, step: int, seed: int) -> list[int]:
    """Indices of a step's examples: every epoch in an order of its own, batches running on over its end."""
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
    The state of a fit, kept in a file so that one that is interrupted goes on bit for bit.

    Args:
        identity: fingerprint of the encoder. steps, processes: of the whole fit; its schedule, and what is drawn in a step, follow from both.
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
        """Written aside, then renamed: a half one is never read."""
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
        except SafetensorError as error:  # which hides the system's error in its text
            raise OSError(f"{partial} cannot be written: {error}") from error
        os.replace(partial, self.path)

    def load(self) -> tuple[int, list[dict]]:
        """
        Take up what the file holds.

        Returns:
            The steps that were taken, and the loss curve; 0 and none where there is no file.

        Raises:
            ValueError: the file is damaged, or of another fit.
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
    `measure(*read(example))` of every test example, in their order: each on exactly one process, gathered on all. Threads read ahead. An image
    that one process cannot read is every process' error.
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
        predict: (H, W, 3) uint8 -> (H, W) uint8 class ids.

    Returns:
        The metric over all images and processes, and per image its name, index and mean IoU (where it has labelled pixels).
    """
    # Models are compared in one table: a class that no test image shows must not lower the mean of only those models that predict it.
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
