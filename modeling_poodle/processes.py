"""Helpers for scripts on several processes: an error of one process is raised on all."""

import logging
import os
import re
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
    Run `action` on each process, and raise an error of any process on all of them, so that none waits for another.

    Args:
        accelerator: Accelerate's accelerator; all its processes must call this function. `None` if this process runs alone.

    Returns:
        The result of `action` on this process.

    Raises:
        ValueError, OSError, FloatingPointError, SafetensorError (a full disk): `action` raised it on this or on another process. Other
            errors are not shared.
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


def lost_process(error: Exception, silent: str, go_on: str) -> ConnectionError | None:
    """
    Return an error in words if an error of torch means that another process has ended or hangs, otherwise `None`.

    Args:
        silent: what a process that hangs has not done.
        go_on: what to do once the cause is fixed.
    """
    message = str(error)
    if not re.search(r"gloo|NCCL|ProcessGroup|Connection (closed|reset)|Timed out waiting|Socket Timeout", message):
        return None
    what = silent if re.search(r"[Tt]imed? ?out|[Tt]imeout", message) else "is gone"
    return ConnectionError(
        f"another process of the run {what}; the cause stands in its own output, or it was killed. Once that is mended, {go_on}. "
        f"torch says: {' '.join(message.split())[:500]}"
    )


def main_first(accelerator, action: Callable):
    """Run `action` on the main process first, then on the others, and return each one's result. Errors are raised as by [`on_all`]."""
    found = []

    def turn(of_main: bool):
        if accelerator.is_main_process is of_main:
            found.append(action())

    for of_main in (True, False):
        on_all(accelerator, partial(turn, of_main))
    return found[0]


def on_main(accelerator, action: Callable):
    """Run `action` on rank 0 and return its result, or raise its error, on all ranks."""
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
    Check that `value` is the same on all ranks.

    Args:
        what: name of the value in the error message.

    Raises:
        ValueError: on all ranks, if the values differ; the message lists the value of each rank.
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
    Check that a recipe's fields are the same on all ranks, because each machine of a run is started by its own command.

    Args:
        fields: the recipe's values by field name.
        of_a_machine: fields that may differ between machines, such as paths of files.

    Raises:
        ValueError: as [`same_on_all`], for the first field that differs.
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
    Check that `folder` is the same folder on all ranks; its path may differ between them.

    Raises:
        ValueError: on all ranks, if one does not see a file that rank 0 writes to the folder.
    """
    if accelerator.num_processes == 1:
        return

    def mark() -> str:
        name = f".seen-by-all-{uuid.uuid4().hex}"
        (folder / name).touch()
        return name

    name = on_main(accelerator, mark)

    def look() -> None:
        for second in range(_SECONDS_TO_BE_SEEN + 1):  # a network file system may show new files with a delay
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
    """The command that launches a script on `processes` processes. On CPUs `accelerate launch` starts only one, whatever its flags."""
    if accelerator.device.type == "cpu" and processes > 1:
        return f"torchrun --standalone --nproc_per_node {processes}"
    return f"accelerate launch --num_processes {processes}"


def sums_in_one_order(accelerator) -> bool:
    """
    Whether DistributedDataParallel must be kept from rebuilding its buckets after the first step, by `find_unused_parameters=True`.

    A gradient's place in the buckets decides in which order the processes' shares are added, which changes the sum from three processes
    on. With rebuilt buckets, the first step of a resumed run would differ from the same step of a run that was never stopped. This
    matters only on CPUs: on GPUs, steps are not repeated bit for bit anyway.
    """
    return accelerator.device.type == "cpu" and accelerator.num_processes > 2


def log_plainly(accelerator) -> None:
    """Log all messages of the main process and errors of every process, without library messages about single requests or files."""
    logging.basicConfig(format="%(message)s", level=logging.INFO if accelerator.is_main_process else logging.ERROR)
    logging.getLogger("huggingface_hub").propagate = False  # has its own handler: each line would be printed twice
    # httpx, httpx2: the Hub client uses one of them, depending on its version.
    for name in ("httpx", "httpx2", "datasets", "fsspec"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()


# Variables by which `accelerate launch` asks a script for more than a copy of the model in each process.
_SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DEEPSPEED",
    "ACCELERATE_USE_MEGATRON_LM": "MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}


def refuse_sharding(accelerator=None) -> None:
    """
    Refuse Accelerate configurations that shard the model: checkpoints hold whole tensors and would fail.

    Args:
        accelerator: `None` before there is one. What `accelerate launch` asks for must be refused then: the accelerator's own errors are
            about GPUs and packages that are missing, and on CPUs it ignores some of these settings.

    Raises:
        ValueError: Accelerate is configured for FSDP, DeepSpeed or the like.
    """
    if accelerator is None:
        kind = next((kind for name, kind in _SHARDING.items() if os.environ.get(name, "").lower() == "true"), "NO")
    else:
        kind = accelerator.distributed_type.value
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise ValueError(
            f"Accelerate is configured for {kind}; here each process has the whole model, of 1 GB with ResNet-50: "
            "give a configuration without it (--config_file), as those in training/launch/"
        )
