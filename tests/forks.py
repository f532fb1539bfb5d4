"""Forks of a test's process that are waited for, or killed."""

import os
import signal
import time


def in_child(action) -> int:
    """Pid of a fork that runs `action()` and then waits for its end."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            signal.pause()
        finally:
            os._exit(9)
    return pid


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)
