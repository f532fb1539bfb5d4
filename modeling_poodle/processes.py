"""What all processes of a script do alike: an error of one is the error of all."""

import logging
import socket
import time
import uuid
from collections.abc import Callable, Container
from functools import partial
from pathlib import Path

import transformers
from safetensors import SafetensorError
from torch import distributed

_SECONDS_TO_BE_SEEN = 10


def on_all(accelerator, action: Callable):
    """
    Run `action` on this process. A ValueError, OSError, FloatingPointError or SafetensorError (a full disk) of any process is raised on all, so that none waits for another.

    Args:
        accelerator: Accelerate's, of a run that all processes take part in; None: this process is alone.

    Returns:
        The result of `action` on this process.
    """
    result = error = None
    try:
        result = action()
    except (ValueError, OSError, FloatingPointError, SafetensorError) as caught:
        error = caught
    if accelerator is not None and accelerator.num_processes > 1:
        errors = [None] * accelerator.num_processes
        distributed.all_gather_object(errors, error)
        error = next((found for found in errors if found is not None), None)
    if error is not None:
        raise error
    return result


def main_first(accelerator, action: Callable):
    """The result of `action`, which the other processes run after the main one has; errors are raised as by [`on_all`]."""
    found = []

    def turn(of_main: bool):
        if accelerator.is_main_process is of_main:
            found.append(action())

    for of_main in (True, False):
        on_all(accelerator, partial(turn, of_main))
    return found[0]


def on_main(accelerator, action: Callable):
    """The result of `action` on rank 0, or its error, on all ranks."""
    outcome = [None]

    def kept():
        if accelerator.is_main_process:
            outcome[0] = action()

    on_all(accelerator, kept)
    if accelerator.num_processes > 1:
        distributed.broadcast_object_list(outcome)
    return outcome[0]


def same_on_all(accelerator, what: str, value) -> None:
    """
    Raises:
        ValueError: on all ranks, where `value` is not the same on all; it names what each has.
    """
    if accelerator.num_processes == 1:
        return
    values = [None] * accelerator.num_processes
    distributed.all_gather_object(values, value)
    if any(other != values[0] for other in values):
        found = "; ".join(f"rank {rank}: {other}" for rank, other in enumerate(values))
        raise ValueError(f"all processes must have the same {what}, got {found}")


def same_fields(accelerator, fields: dict, of_a_machine: Container[str] = ()) -> None:
    """
    Of several machines each has a command of its own. Raises as [`same_on_all`], of the first of a recipe's fields that differs.

    Args:
        of_a_machine: fields that may differ, such as places of files.
    """
    if accelerator.num_processes == 1:
        return
    of_ranks = [None] * accelerator.num_processes
    distributed.all_gather_object(of_ranks, fields)
    for name, value in of_ranks[0].items():
        if name not in of_a_machine and any(other.get(name) != value for other in of_ranks):
            same_on_all(accelerator, name, fields.get(name))


def need_shared(accelerator, folder: Path) -> None:
    """
    Raises:
        ValueError: on all ranks, where one does not see in `folder` what rank 0 writes there, though each may know it by another path.
    """
    if accelerator.num_processes == 1:
        return

    def mark() -> str:
        name = f".seen-by-all-{uuid.uuid4().hex}"
        (folder / name).touch()
        return name

    name = on_main(accelerator, mark)

    def look() -> None:
        for second in range(_SECONDS_TO_BE_SEEN + 1):  # a network file system may be late
            time.sleep(min(second, 1))
            if (folder / name).exists():
                return
        raise ValueError(
            f"output_dir {folder} is not one folder for all processes: what rank 0 writes there is not seen by rank {accelerator.process_index} "
            f"on {socket.gethostname()}. Give a folder on a file system that all machines share, by its absolute path"
        )

    try:
        on_all(accelerator, look)
    finally:
        if accelerator.is_main_process:
            (folder / name).unlink(missing_ok=True)


def launched_with(accelerator, processes: int) -> str:
    """How a script is launched on so many processes: on CPUs `accelerate launch` starts one, whatever it is told."""
    if accelerator.device.type == "cpu" and processes > 1:
        return f"torchrun --standalone --nproc_per_node {processes}"
    return f"accelerate launch --num_processes {processes}"


def sums_in_one_order(accelerator) -> bool:
    """
    Whether DistributedDataParallel must be kept from rebuilding its buckets after the first step, as `find_unused_parameters` does: a gradient's
    place decides in which order the processes' shares are added, which tells from three on, and a run that goes on would have another
    first step than the one that was never stopped. On CPUs alone: on GPUs steps are not repeated bit for bit anyway.
    """
    return accelerator.device.type == "cpu" and accelerator.num_processes > 2


def log_plainly(accelerator) -> None:
    """A script's log: sentences of the main process, errors of all, and nothing that libraries tell of each request and file."""
    logging.basicConfig(format="%(message)s", level=logging.INFO if accelerator.is_main_process else logging.ERROR)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own: each line would come twice
    for name in ("httpx", "httpx2", "datasets", "fsspec"):  # the first two are the Hub client's, by its version
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()


def refuse_sharding(accelerator) -> None:
    """
    Raises:
        ValueError: Accelerate's configuration asks for FSDP, DeepSpeed or the like, with which checkpoints, which hold whole tensors, would fail.
    """
    kind = accelerator.distributed_type.value
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise ValueError(
            f"Accelerate is configured for {kind}; here each process has the whole model, of 1 GB with ResNet-50: "
            "give a configuration without it (--config_file), as those in training/launch/"
        )
