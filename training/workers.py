"""A loader's worker processes: how they start, which video each is reading, and how they end."""

import multiprocessing
import multiprocessing.connection
import signal
import sys
from collections.abc import Iterator

import torch

from training.addresses import printable, video_name
from training.stopping import SIGNALS
from training.street_processes import end_with_parent

NOTE_BYTES = 1024
# How the processes that read videos start. A forked one starts at once; a spawned one first imports torch, which takes seconds. On macOS,
# Apple's libraries may crash in forked processes, for example where they look up a server, so Python's own default there is spawn too.
START_METHOD = "spawn" if sys.platform == "darwin" else "fork"
_NOTES: list = []  # in a worker: one shared array that names the video being read, in case reading it kills the worker


def note(path: str) -> None:
    """Note which video this worker reads from now on. Does nothing outside of a worker."""
    if _NOTES:
        _NOTES[0].value = video_name(path).encode(errors="surrogateescape")[-NOTE_BYTES + 1 :]


class Workers:
    """
    The workers of one loader. Give the loader `start` as its `worker_init_fn` and `start_method`, and call `end` with its iterator.

    Args:
        number: number of workers.
    """

    def __init__(self, number: int):
        self._notes = [multiprocessing.RawArray("c", NOTE_BYTES) for _ in range(number)]
        self.died_at: list[str] = []

    @property
    def start_method(self) -> str | None:
        """How the workers start; the loader's `multiprocessing_context`."""
        return START_METHOD if self._notes else None

    def start(self, worker: int) -> None:
        # One thread for decoding and flow, because more would compete with the training process for the cores.
        import cv2

        cv2.setNumThreads(0)
        torch.set_num_threads(1)
        _NOTES[:] = self._notes[worker : worker + 1]
        # A signal to the process group asks the run to stop, but the training process still needs its workers to finish its step.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        # torch's workers check for their parent only between batches, and a batch can take minutes.
        end_with_parent()

    def end(self, batches: Iterator | None) -> None:
        """
        Stop the workers of a loader's iterator. Workers that do not end when asked are killed, because they ignore SIGTERM.

        Afterwards `died_at` holds "video (signal)" for each worker that a signal had killed before.
        """
        for _ in range(3):
            try:
                return self._end(batches)
            except RuntimeError:
                continue  # torch's SIGCHLD handler can raise the death of a worker at any point of `_end`
        self._end(batches)

    def _end(self, batches: Iterator | None) -> None:
        # `_workers` is private to torch. If a version renames it, this line must fail: otherwise workers would be left running unnoticed.
        workers = batches._workers if self._notes and batches is not None else []
        # A worker that has just crashed closes its connections, then its sentinel, and only then gets an exit code. `join` waits for it.
        sentinels = [worker.sentinel for worker in workers]
        for sentinel in multiprocessing.connection.wait(sentinels, timeout=0.3) if workers else ():
            next(worker for worker in workers if worker.sentinel == sentinel).join()
        ended = [worker.exitcode is not None for worker in workers]
        if workers:
            batches._shutdown_workers()
        for worker in workers:
            worker.kill()
            worker.join()
        # On a busy machine, a crash can take longer than that. Its exit code is still the crash's own signal, whatever is sent afterwards.
        ours = (-signal.SIGTERM, -signal.SIGKILL)
        self.died_at = [
            f"{printable(noted.value.decode(errors='replace'))} ({signal.Signals(-worker.exitcode).name})"
            for worker, before, noted in zip(workers, ended, self._notes)
            if worker.exitcode < 0 and (before or worker.exitcode not in ours) and noted.value
        ]
