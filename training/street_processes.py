"""Helpers for rendering the street: a lock for each folder, and worker processes that end with their parent."""

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
    Create `folder` and lock it for the `with` block. Other commands that need the folder wait, and then find it complete.

    Yields `False` if the file system does not support locks. Then two commands must not render the same folder at the same time.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        # This is a worker that is importing the caller's script. If the import rendered too, worker and caller would wait for each other.
        raise RuntimeError(
            "the script would render the street again in each process that it starts: "
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
    """A copy of `usable_cores` in modeling_poodle.cpu, whose import takes 8 s (torch and transformers, which rendering does not need)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def over_processes(function: Callable, jobs: list[tuple], num_processes: int | None) -> Iterator:
    """Yield the result of `function(*job)` for each job, in the order of `jobs`, computed in worker processes."""
    workers = min(num_processes or _usable_cores(), len(jobs))
    if workers == 1:  # in this process: starting another one takes longer than rendering a short drive
        yield from (function(*job) for job in jobs)
        return
    # spawn, because the caller may have threads (torch, CUDA). After a fork, locks that they hold would stay locked in the child.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
        yield from pool.map(function, *zip(*jobs))


def end_with_parent() -> None:
    """
    End this worker process when its parent ends, for example when it is killed.

    Then nobody waits for the result any more, and a folder that is being rendered is no longer locked.
    """

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
