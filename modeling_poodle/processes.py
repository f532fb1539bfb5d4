"""What all processes of a script do alike: an error of one is the error of all."""

import logging
from collections.abc import Callable
from functools import partial

import transformers
from safetensors import SafetensorError
from torch import distributed


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


def log_plainly(accelerator) -> None:
    """A script's log: sentences of the main process, errors of all, and nothing that libraries tell of each request and file."""
    logging.basicConfig(format="%(message)s", level=logging.INFO if accelerator.is_main_process else logging.ERROR)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own: each line would come twice
    for name in ("httpx", "httpx2", "datasets"):  # the first two are the Hub client's, by its version
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
