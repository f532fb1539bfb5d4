"""How folders of the street are rendered: by one command at a time, over processes that end with it."""

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
    Make `folder`, and hold it while it is rendered: whoever wants the same at that time waits, and then finds it whole. False where the file
    system has no locks: as safe as its users are apart.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        # The import of the caller's own script in a process that is to render for it: it would wait for its parent, and that for it.
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
    """As of modeling_poodle.cpu, whose import brings torch and transformers: 8 s, of which rendering needs nothing."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def over_processes(function: Callable, jobs: list[tuple], num_processes: int | None) -> Iterator:
    """The results of function(*job) in the order of the jobs."""
    workers = min(num_processes or _usable_cores(), len(jobs))
    if workers == 1:  # to start a process takes longer than to render a short drive
        yield from (function(*job) for job in jobs)
        return
    # spawn: the caller may hold threads (torch, CUDA) that a fork would leave locked.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
        yield from pool.map(function, *zip(*jobs))


def end_with_parent() -> None:
    """In a worker: once its parent is gone, killed perhaps, nobody waits for what it does (and of the street, the folder's lock is gone)."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
