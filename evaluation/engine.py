"""One fit loop and one evaluate loop for all readouts, on any number of processes."""

import hashlib
import itertools
import json
import math
import os
import sys
from pathlib import Path

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
from modeling_poodle.processes import on_all


def fingerprint(module: nn.Module) -> str:
    """Hash of all parameters and buffers: equal only where they are byte for byte."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def fit(
    accelerator: Accelerator, readout: nn.Module, recipe, examples: list, folder: Path, identity: str, resume: bool
) -> list[dict]:
    """
    Fit a readout with AdamW, warm-up and cosine. `readout.keep(examples)` may keep what it needs of them; `readout.read(example)`, by threads, ahead of
    the steps, reads one; `readout.batch([read, ...], generator)` gives the arguments of its `forward`, the loss.

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
    begin, curve = (0, [])
    if resume:
        begin, curve = load_fit(
            folder, identity, steps, accelerator.num_processes, parameters, moving(readout), optimizer
        )
    wrapped = accelerator.prepare_model(readout)
    if begin < steps:
        readout.keep(examples)
    order = (examples[i] for step in range(begin, steps) for i in draw(len(examples), batch, step, recipe.seed))
    reads = read_ahead(readout.read, order, ahead=2 * batch)
    warmup = max(1, round(0.05 * steps))
    readout.train(readout.trains_encoder)  # frozen means frozen: BatchNorm's statistics too
    losses: list[torch.Tensor] = []
    shown = accelerator.is_main_process and sys.stderr.isatty()
    for step in tqdm(range(begin, steps), initial=begin, total=steps, desc="fitting", disable=not shown):
        for group in optimizer.param_groups:
            ramp = min(1.0, (step + 1) / warmup)
            done = max(0, step - warmup) / max(1, steps - warmup)
            group["lr"] = recipe.learning_rate * ramp * 0.5 * (1 + math.cos(math.pi * done))
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
        if (step + 1) % recipe.logging_steps == 0 or last or saving:
            value = accelerator.reduce(torch.stack(losses).mean(), reduction="mean").item()
            losses.clear()
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss is not finite at step {step + 1}; lower learning_rate")
            curve.append({"step": step + 1, "loss": value, "lr": optimizer.param_groups[0]["lr"]})
        if saving and accelerator.is_main_process:
            of = (steps, accelerator.num_processes)
            save_fit(folder, identity, *of, step + 1, curve, parameters, moving(readout), optimizer)
    # DistributedDataParallel copies the first process' statistics to all when a step begins. After the last step each process has its own, and
    # would predict its share of the test images with these instead of the saved ones.
    for buffer in moving(readout).values():
        broadcast(buffer, from_process=0)
    readout.eval()
    return curve


def draw(count: int, batch: int, step: int, seed: int) -> list[int]:
    """Indices of a step's examples: every epoch in an order of its own, batches running on over its end."""
    indices = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, count)
        indices.append(int(_order(count, seed, epoch)[place]))
    return indices


_ORDERS: dict[tuple[int, int, int], np.ndarray] = {}


def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    key = (count, seed, epoch)
    if key not in _ORDERS:
        while len(_ORDERS) > 4:
            _ORDERS.pop(next(iter(_ORDERS)))
        _ORDERS[key] = np.random.default_rng([seed, epoch]).permutation(count)
    return _ORDERS[key]


def moving(readout: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that a fit changes: BatchNorm's statistics, unless the encoder is frozen."""
    return dict(readout.named_buffers()) if readout.trains_encoder else {}


def save_fit(
    folder: Path, identity: str, steps: int, processes: int, step: int, curve, parameters, buffers, optimizer
) -> None:
    """Written aside, then renamed: a half one is never read."""
    tensors = {f"buffer.{name}": value.detach().cpu().clone() for name, value in buffers.items()}
    for index, parameter in enumerate(parameters):
        tensors[f"parameter.{index}"] = parameter.detach().cpu().contiguous()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{index}"] = value.detach().cpu().contiguous()
    partial = folder / "fit.partial"
    metadata = {"step": str(step), "curve": json.dumps(curve), "encoder": identity, "of": f"{steps} {processes}"}
    save_file(tensors, partial, metadata=metadata)
    os.replace(partial, folder / "fit.safetensors")


def load_fit(
    folder: Path, identity: str, steps: int, processes: int, parameters, buffers, optimizer
) -> tuple[int, list]:
    path = folder / "fit.safetensors"
    if not path.is_file():
        return 0, []
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, and the fit begins anew") from error
    if metadata.get("encoder") != identity:
        raise ValueError(
            f"{path} is the fit of other weights of this encoder; remove it, or choose another output_dir"
        )
    if metadata.get("of") != f"{steps} {processes}":  # the schedule, and what is drawn in a step, follow from both
        if "of" not in metadata:
            raise ValueError(f"{path} is the fit of an earlier version, which did not note its steps: remove it")
        then = metadata["of"].split()
        raise ValueError(
            f"{path} is the fit of {then[0]} steps on {then[1]} process(es), this one is of {steps} on {processes}: go on with "
            f"--num_processes {then[1]}, or remove it and begin anew"
        )
    tensors = load_file(path)
    with torch.no_grad():
        for name, value in buffers.items():
            value.copy_(tensors[f"buffer.{name}"])
        for index, parameter in enumerate(parameters):
            parameter.copy_(tensors[f"parameter.{index}"])
            state = {k: tensors[f"{k}.{index}"] for k in ("step", "exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {
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
