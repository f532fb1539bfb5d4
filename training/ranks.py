"""What the processes of a run decide together: shared outcomes, shared errors, and when to stop on a signal."""

import os
import signal
import threading
from collections.abc import Callable
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import distributed

from modeling_poodle.processes import on_all
from training.stopping import SIGNALS, stop_with_the_launcher


def on_main(accelerator: Accelerator, action: Callable):
    """The result of `action` on rank 0, or its error, on all ranks."""
    outcome = [None]

    def kept():
        if accelerator.is_main_process:
            outcome[0] = action()

    on_all(accelerator, kept)
    return broadcast_object_list(outcome)[0] if accelerator.num_processes > 1 else outcome[0]


def same_on_all(accelerator: Accelerator, what: str, value) -> None:
    """
    Raises:
        ValueError: on all ranks, where `value` is not the same on all; it names what each has.
    """
    if accelerator.num_processes == 1:
        return
    values = gather_object([value])
    if any(other != values[0] for other in values):
        found = "; ".join(f"rank {rank}: {other}" for rank, other in enumerate(values))
        raise ValueError(f"all processes must have the same {what}, got {found}")


class StopSignals:
    """
    SIGTERM and SIGINT as a request to stop after the step at hand. A second SIGINT ends the process at once, by the system.

    A context manager. All ranks learn of a signal that any of them got, at the same step: each step starts a reduction of one
    number between the hosts and reads that of the step before, so that neither the device nor (in step) the host waits.
    """

    def __init__(self, accelerator: Accelerator, timeout: timedelta):
        self.received, self.name, self._work, self._group = 0, None, None, None
        self._speaks = accelerator.is_main_process
        if accelerator.num_processes > 1:
            self._group = distributed.new_group(backend="gloo", timeout=timeout)

    def __enter__(self):
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # handlers can be set there alone
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
            stop_with_the_launcher()
        return self

    def __exit__(self, kind, *_):
        for number, handler in self._before.items():
            # After the end of one rank the launcher sends SIGTERM to the others: it stays caught, so that they can still report their error.
            if not (kind is not None and self._group is not None and number == signal.SIGTERM):
                signal.signal(number, handler)
        if self._work is not None and kind is None:
            self._work.wait()

    def _receive(self, number: int, _) -> None:
        self.received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self._speaks:  # not print or a logger, which this handler may be interrupting
            again = "; once more ends it at once, unsaved" if number == signal.SIGINT else ""
            os.write(2, f"\n{signal.Signals(number).name}: the run saves and stops after this step{again}\n".encode())

    def agreed(self) -> bool:
        """Called once a step by all ranks: True on all of them at the same step once any was asked to stop."""
        number = self.received
        if self._group is not None:
            number = 0
            if self._work is not None:
                self._work.wait()
                number = int(self._flag)
            self._flag = torch.tensor(self.received)
            self._work = distributed.all_reduce(self._flag, distributed.ReduceOp.MAX, self._group, async_op=True)
        if number:
            self.name = signal.Signals(number).name
        return number != 0
