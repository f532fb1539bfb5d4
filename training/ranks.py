"""Stop all processes of a run at the same step when any of them gets a signal."""

import os
import signal
import threading
import time
from datetime import timedelta

import torch
from accelerate import Accelerator
from torch import distributed

from training.stopping import SIGNALS, leave_terminal, say, stop_with_the_launcher

# Seconds. A scheduler that sends SIGINT to all processes of a job also reaches torchrun, which passes it on: each process gets it twice.
SENT_ON_WITHIN = 5.0


class StopSignals:
    """
    A context manager that turns SIGTERM, SIGINT and SIGHUP into a request to stop after the current step.

    A second SIGINT ends the process at once. Under torchrun, which passes on the signals that it gets, the second SIGINT counts only if it
    comes at least SENT_ON_WITHIN seconds after the first.

    If any rank gets a signal, all ranks learn of it at the same step. Each step starts a reduction of one number between the hosts, and
    reads the result of the previous step's reduction. So the device never waits, and neither does the host while the ranks keep pace.
    """

    def __init__(self, accelerator: Accelerator, timeout: timedelta):
        self.received, self.name, self._work, self._group = 0, None, None, None
        self._speaks = accelerator.is_main_process
        self._interrupted, self._sent_on = 0.0, "TORCHELASTIC_RUN_ID" in os.environ
        if accelerator.num_processes > 1:
            self._group = distributed.new_group(backend="gloo", timeout=timeout)

    def __enter__(self):
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # Python allows setting handlers only in this thread
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
            stop_with_the_launcher()
        return self

    def __exit__(self, kind, *_):
        for number, handler in self._before.items():
            # When one rank ends, the launcher sends SIGTERM to the others. After an error, keep catching SIGTERM, so that each rank can
            # still report its own error.
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
        if self._speaks:
            when = f", {SENT_ON_WITHIN:.0f} s from now or later," if self._sent_on else ""
            again = f"; once more{when} ends it at once, unsaved" if number == signal.SIGINT else ""
            say(number, f"the run saves and stops after this step{again}")
        leave_terminal(number)

    def agreed(self) -> bool:
        """Return True, on all ranks at the same step, once any rank was asked to stop. All ranks must call this once a step."""
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
