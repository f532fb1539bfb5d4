"""An error of one process is the error of all."""

from collections.abc import Callable

from torch import distributed


def on_all(accelerator, action: Callable):
    """
    Run `action` on this process. A ValueError, OSError or FloatingPointError of any process is raised on all, so that none waits for another.

    Args:
        accelerator: Accelerate's, of a run that all processes take part in; None: this process is alone.

    Returns:
        The result of `action` on this process.
    """
    result = error = None
    try:
        result = action()
    except (ValueError, OSError, FloatingPointError) as caught:
        error = caught
    if accelerator is not None and accelerator.num_processes > 1:
        errors = [None] * accelerator.num_processes
        distributed.all_gather_object(errors, error)
        error = next((found for found in errors if found is not None), None)
    if error is not None:
        raise error
    return result
