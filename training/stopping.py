"""
Handle SIGTERM and SIGINT outside the steps of a run: while it starts and while it closes.

Only the standard library is imported. Importing torch and transformers is the longest part of a start, and the handlers are set before it.
"""

import ctypes
import os
import signal
import sys

# EX_TEMPFAIL of sysexits.h, "try again later": the run was asked to stop, its state is saved, and it can be resumed.
RESUMABLE_EXIT_CODE = 75
# SIGTERM is set last. Python catches SIGINT by default, so once SIGTERM is caught, both handlers are in place.
SIGNALS = (signal.SIGINT, signal.SIGTERM)
_begun, _process = False, None


def end_on_signals() -> None:
    """Let signals end this process at once with RESUMABLE_EXIT_CODE, except during the steps (see `StopSignals`)."""
    global _process
    _process = os.getpid()
    for number in SIGNALS:
        signal.signal(number, _end)
    stop_with_the_launcher()


def mark_begun() -> None:
    """Note that the run's folder now holds its config.yaml: to continue, the user must resume from `latest` instead of starting again."""
    global _begun
    _begun = True


def _end(number: int, _) -> None:
    if os.getpid() != _process:  # a forked process, for which the handler is not meant
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    if os.environ.get("RANK", "0") == "0":  # os.write, because the handler may have interrupted print or a logger
        again = "go on with --resume_from_checkpoint latest" if _begun else "nothing is done yet, repeat the command"
        os.write(2, f"\n{signal.Signals(number).name}: the run stops outside of its steps; {again}\n".encode())
    # Processes that render the street would otherwise wait for work for ever.
    processes = sys.modules.get("multiprocessing.process")
    for child in getattr(processes, "active_children", list)():
        child.kill()
    # Not an exception, which a destructor or an import could swallow. Important files are written aside and renamed, so none is left half.
    os._exit(RESUMABLE_EXIT_CODE)


def stop_with_the_launcher() -> None:
    """Let Linux send SIGTERM to this process when the launcher ends, because `accelerate launch` forwards no signals."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        if sys.platform == "linux":
            set_parent_death_signal = 1
            ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
