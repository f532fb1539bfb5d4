"""Forks of the test process, and a wait for a condition."""

import os
import signal
import time


def in_child(action) -> int:
    """Fork a child that runs `action()` and then waits to be killed; returns its pid."""
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
