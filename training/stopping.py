"""
SIGTERM and SIGINT outside of the steps of a run: while it starts, and while it closes.

Nothing but the standard library: the import of torch and transformers is the longest part of a start, and this is in place before it.
"""

import ctypes
import os
import signal
import sys

# EX_TEMPFAIL of sysexits.h, "try again later": the run was asked to stop, what it has done is saved, and it can be resumed.
RESUMABLE_EXIT_CODE = 75
# SIGTERM last: Python catches SIGINT by default, so whoever sees SIGTERM caught knows that both are.
SIGNALS = (signal.SIGINT, signal.SIGTERM)
_begun, _process = False, None


def end_on_signals() -> None:
    """From now on, but for the steps (see `StopSignals`), a signal ends this process at once with RESUMABLE_EXIT_CODE."""
    global _process
    _process = os.getpid()
    for number in SIGNALS:
        signal.signal(number, _end)
    stop_with_the_launcher()


def mark_begun() -> None:
    """The run's folder holds its config.yaml from here on: the command that started it no longer does, `latest` goes on."""
    global _begun
    _begun = True


def _end(number: int, _) -> None:
    if os.getpid() != _process:  # a fork, for which this is not meant
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    if os.environ.get("RANK", "0") == "0":  # os.write: a handler may interrupt print or a logger
        again = "go on with --resume_from_checkpoint latest" if _begun else "nothing is done yet, repeat the command"
        os.write(2, f"\n{signal.Signals(number).name}: the run stops outside of its steps; {again}\n".encode())
    # Processes that render the street would wait for work for ever.
    processes = sys.modules.get("multiprocessing.process")
    for child in getattr(processes, "active_children", list)():
        child.kill()
    # Not an exception, which a destructor or an import would drop. What counts is written aside and renamed: none is left half.
    os._exit(RESUMABLE_EXIT_CODE)


def stop_with_the_launcher() -> None:
    """`accelerate launch` forwards no signal to its one process: let Linux send SIGTERM when the launcher ends."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        if sys.platform == "linux":
            set_parent_death_signal = 1
            ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
