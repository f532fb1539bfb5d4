"""Steps that are compared: each in a process of its own, timed in turns."""

import multiprocessing
import signal
from collections.abc import Callable
from contextlib import suppress

import torch

from benchmarks.common import OurStep, ceiling, memory_bytes, reset_peak, step_flops, timed_steps
from benchmarks.counting import counted_step, counted_work
from benchmarks.profiling import kernel_seconds
from training.recipe import Recipe


def _serve(connection, make, recipe) -> None:
    try:
        _answer(connection, make(recipe), recipe)
    except torch.OutOfMemoryError as error:
        connection.send(TooLarge(str(error)))
        raise


def _answer(connection, step, recipe) -> None:
    base = memory_bytes(step.device)
    reset_peak(step.device)
    actions = {
        "run": lambda steps: timed_steps(step, steps),
        "exact": lambda steps: _exact(step, steps),
        "without_flow": lambda steps: timed_steps(step, steps, {"frames": step.frames, "flow": step.estimate_flow()}),
        "reset": lambda _: reset_peak(step.device),
        "memory": lambda _: {"built_bytes": base, "peak_bytes": memory_bytes(step.device, peak=True)},
        "flops": lambda _: step_flops(step),
        "count": lambda _: counted_step(step),
        "work": lambda _: counted_work(step),
        "kernels": lambda steps: kernel_seconds(step, steps),
        "ceiling": lambda _: ceiling(step.device, recipe.bf16),
        "about": lambda _: {"device": _name(step.device), "threads": torch.get_num_threads()},
    }
    while (request := connection.recv()) is not None:
        name, argument = request
        answer = actions[name](argument)
        if step.device.type == "cuda":
            torch.cuda.empty_cache()  # the other contender needs the memory now
        connection.send(answer)


def _name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _exact(step, steps: int) -> list[dict[str, float]]:
    step.clock.exact = True
    if isinstance(step, OurStep) and not step.recipe.torch_compile:
        step.time_the_teacher()
    rows = timed_steps(step, steps)
    step.clock.exact = False
    return rows


class TooLarge(RuntimeError):
    """Raised for a step that does not fit into memory."""


class Contender:
    """Runs a step in its own process, so that its peak memory can be measured separately. The process sleeps until asked."""

    def __init__(self, make: Callable[[Recipe], object], recipe: Recipe):
        # fork, so that imported modules are shared. This process must not have used the GPU before.
        context = multiprocessing.get_context("fork")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, make, recipe), daemon=True)
        self.process.start()
        other.close()

    def ask(self, name: str, argument=None):
        """
        Send a request to the process and return its answer.

        Args:
            name: one of the actions in `_answer`.
            argument: the action's argument, such as the number of steps.

        Raises:
            TooLarge: the GPU's memory is full, or the system killed the process, as it does when the machine's memory is full.
            RuntimeError: the process ended with another error, which it has printed.
        """
        with suppress(ConnectionError):  # the process has ended; it may have sent the reason
            self.connection.send((name, argument))
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()  # its memory may only be free for the next process after it has ended
            kind = TooLarge if self.process.exitcode == -signal.SIGKILL else RuntimeError
            raise kind(f"the process of this contender ended at {name!r}; its error is above") from None
        if isinstance(answer, TooLarge):
            self.process.join()
            raise answer
        return answer

    def close(self) -> None:
        self.connection.send(None)
        self.process.join()


def interleave(contenders: dict[str, Contender], steps: int, warmup: int, rounds: int = 5) -> dict[str, list[dict]]:
    """
    Time `steps` steps of each contender, in turns, so that a temporary disturbance of the machine affects all of them.

    Before the first round each contender runs `warmup` steps, and each turn begins with a further step; none of these count. The order is
    reversed each round.
    """
    rows = {name: [] for name in contenders}
    for contender in contenders.values():
        contender.ask("run", warmup)
        contender.ask("reset")  # the peak must not include the memory of the compilation
    for number in range(rounds):
        share = (number + 1) * steps // rounds - number * steps // rounds
        for name in list(contenders)[:: 1 if number % 2 == 0 else -1]:
            rows[name] += contenders[name].ask("run", share + 1)[1:]
    return rows
