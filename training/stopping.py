"""
Handle SIGTERM and SIGINT outside of a run's steps: while it starts, and while it closes.

Imports only the standard library: the handlers must be in place before torch and transformers are imported, the longest part of a start.
"""

import ctypes
import os
import signal
import sys

# EX_TEMPFAIL of sysexits.h, "try again later": the run was asked to stop, has saved its work, and can be resumed.
RESUMABLE_EXIT_CODE = 75
# SIGTERM last: Python catches SIGINT by default, so whoever sees that SIGTERM is caught knows that both are.
SIGNALS = (signal.SIGINT, signal.SIGTERM)
_begun, _process = False, None


def end_on_signals() -> None:
    """End this process at once with RESUMABLE_EXIT_CODE on a signal, except during the steps (see `StopSignals`)."""
    global _process
    _process = os.getpid()
    for number in SIGNALS:
        signal.signal(number, _end)
    stop_with_the_launcher()


def mark_begun() -> None:
    """
    Note that the run's folder is about to hold config.yaml.

    From then on the message on a signal says to resume with `latest`: repeating the first command would be refused.
    """
    global _begun
    _begun = True


def _end(number: int, _) -> None:
    if os.getpid() != _process:  # a forked child: use the system's default
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    if os.environ.get("RANK", "0") == "0":  # os.write: a handler may interrupt print or a logger
        again = "go on with --resume_from_checkpoint latest" if _begun else "nothing is done yet, repeat the command"
        os.write(2, f"\n{signal.Signals(number).name}: the run stops outside of its steps; {again}\n".encode())
    # Otherwise the processes that render the street would wait for work for ever.
    processes = sys.modules.get("multiprocessing.process")
    for child in getattr(processes, "active_children", list)():
        child.kill()
    # Not an exception: a destructor or an import could swallow it. Files that count are written aside and renamed: none is left incomplete.
    os._exit(RESUMABLE_EXIT_CODE)


def stop_with_the_launcher() -> None:
    """Let Linux send SIGTERM when `accelerate launch` ends: it forwards no signal to a single process."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        if sys.platform == "linux":
            set_parent_death_signal = 1
            ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
