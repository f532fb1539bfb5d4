"""When the processes of a run stop on a signal: all at the same step."""

import os
import signal
import threading
import time
from datetime import timedelta

import torch
from accelerate import Accelerator
from torch import distributed

from training.stopping import SIGNALS, stop_with_the_launcher

# Seconds: a SIGINT to all processes of a job comes from the scheduler, and once more from torchrun.
SENT_ON_WITHIN = 5.0


class StopSignals:
    """
    SIGTERM and SIGINT as a request to stop after the step at hand. A second SIGINT ends the process at once, by the system; under torchrun,
    which sends on what it gets, only if it comes at least SENT_ON_WITHIN seconds after the first.

    A context manager. All ranks learn of a signal that any of them got, at the same step: each step starts a reduction of one
    number between the hosts and reads that of the step before, so that neither the device nor (in step) the host waits.
    """

    def __init__(self, accelerator: Accelerator, timeout: timedelta):
        self.received, self.name, self._work, self._group = 0, None, None, None
        self._speaks = accelerator.is_main_process
        self._interrupted, self._sent_on = 0.0, "TORCHELASTIC_RUN_ID" in os.environ
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
        if number == signal.SIGINT:
            before, self._interrupted = self._interrupted, self._interrupted or time.monotonic()
            if self._sent_on and before and time.monotonic() - before < SENT_ON_WITHIN:
                return
            if before or not self._sent_on:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
            if before:
                os.kill(os.getpid(), signal.SIGINT)
                return
        self.received = number
        if self._speaks:  # not print or a logger, which this handler may be interrupting
            when = f", {SENT_ON_WITHIN:.0f} s from now or later," if self._sent_on else ""
            again = f"; once more{when} ends it at once, unsaved" if number == signal.SIGINT else ""
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
