"""Render folders of the street: by one command at a time, with processes that end with the command."""

import fcntl
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """
    Make `folder` and lock it while it is rendered. Others that need the same folder wait, and then find it complete.

    Yields `False` if the file system has no locks; two commands must then not render at the same time.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        # The import of the caller's script in a process that renders for it. If the script rendered again, the two would wait for each other.
        raise RuntimeError(
            "the script that renders the street does so again when it is imported by the processes that it starts: "
            'put what it does under `if __name__ == "__main__":`'
        )
    folder.mkdir(parents=True, exist_ok=True)
    held, locked = os.open(folder, os.O_RDONLY), True
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
    except OSError:
        locked = False
    try:
        yield locked
    finally:
        os.close(held)


def _usable_cores() -> int:
    """The same as in modeling_poodle.cpu, whose import takes 8 s (torch and transformers), which rendering does not need."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def over_processes(function: Callable, jobs: list[tuple], num_processes: int | None) -> Iterator:
    """Return the results of function(*job), in the order of the jobs."""
    workers = min(num_processes or _usable_cores(), len(jobs))
    if workers == 1:  # starting a process takes longer than rendering a short drive
        yield from (function(*job) for job in jobs)
        return
    # spawn, because the caller may have threads (torch, CUDA) whose locks a fork would leave locked.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
        yield from pool.map(function, *zip(*jobs))


def end_with_parent() -> None:
    """In a worker, end when the parent is gone (for example killed): nobody waits for the result, and the lock of the folder is gone."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
