"""
Handle SIGTERM, SIGINT and SIGHUP outside of a run's steps: while the run starts, and while it closes.

This module imports only the standard library, because the handlers must be set before torch and transformers are imported. Importing them
is the longest part of a start.
"""

import ctypes
import os
import signal
import stat
import sys
from contextlib import suppress

# EX_TEMPFAIL of sysexits.h ("try again later"): a signal stopped the run. It can be resumed or, if it had not begun yet, started again.
RESUMABLE_EXIT_CODE = 75
# A closed terminal or a dropped ssh connection sends SIGHUP. Under nohup it is ignored from the start, and stays so. (torchrun catches it even
# under nohup, and passes it on.)
_HANGUP = tuple(
    number for number in signal.Signals if number.name == "SIGHUP" and signal.getsignal(number) != signal.SIG_IGN
)
# SIGTERM is last, so that all handlers are set once SIGTERM is caught. SIGINT would not show this, because Python catches it by default.
SIGNALS = (signal.SIGINT, *_HANGUP, signal.SIGTERM)


def _ends_with_terminal(output: int) -> bool:
    """Whether an output is a terminal, or a pipe, as to `tee`, which gets SIGHUP too."""
    try:
        return os.isatty(output) or stat.S_ISFIFO(os.fstat(output).st_mode)
    except OSError:  # closed from the start
        return False


_SHOWN = [output for output in (1, 2) if _ends_with_terminal(output)]  # asked now: a terminal that is gone is none
_begun, _process = False, None


def end_on_signals() -> None:
    """Make signals end this process at once with RESUMABLE_EXIT_CODE. During the steps, `StopSignals` handles them instead."""
    global _process
    _process = os.getpid()
    for number in SIGNALS:
        signal.signal(number, _end)
    stop_with_the_launcher()


def mark_begun() -> None:
    """
    Record that config.yaml is about to be written to the run's folder.

    From now on, the message printed on a signal says to resume with `latest`, because repeating the first command would be refused.
    """
    global _begun
    _begun = True


def say(number: int, what: str) -> None:
    """Write a line about a signal to standard error, if that still exists. `os.write` is safe even if a handler interrupts `print` or a logger."""
    with suppress(OSError):
        os.write(2, f"\n{signal.Signals(number).name}: {what}\n".encode())


def leave_terminal(number: int) -> None:
    """
    After SIGHUP, discard what would be written to the terminal, or to a pipe.

    They are gone, or soon will be, and the error would end the run before it has saved.
    """
    if number in _HANGUP:
        nothing = os.open(os.devnull, os.O_WRONLY)
        for output in _SHOWN:
            os.dup2(nothing, output)
        os.close(nothing)


def _end(number: int, _) -> None:
    if os.getpid() != _process:  # a forked child: use the system's default
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    if os.environ.get("RANK", "0") == "0":
        again = "go on with --resume_from_checkpoint latest" if _begun else "nothing is done yet, repeat the command"
        say(number, f"the run stops outside of its steps; {again}")
    leave_terminal(number)
    # Kill the worker processes now, so that none outlives this one. (Those that render the street also watch for their parent's end.)
    processes = sys.modules.get("multiprocessing.process")
    for child in getattr(processes, "active_children", list)():
        child.kill()
    # Exit without an exception, which a destructor or an import could swallow. No file of value is left incomplete, since these are written
    # under a temporary name and then renamed.
    os._exit(RESUMABLE_EXIT_CODE)


def stop_with_the_launcher() -> None:
    """
    On Linux, have the system send SIGTERM to this process when `accelerate launch` ends.

    With a single process, `accelerate launch` itself forwards no signals.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        if sys.platform == "linux":
            set_parent_death_signal = 1
            ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
