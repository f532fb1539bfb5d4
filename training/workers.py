"""A loader's worker processes: how they begin, what each of them is reading, and how they end."""

import multiprocessing
import multiprocessing.connection
import signal
from collections.abc import Iterator

import torch

from training.addresses import printable, video_name
from training.street_processes import end_with_parent

NOTE_BYTES = 1024
_NOTES: list = []  # in a worker: shared memory for the path that is being read, should it kill the worker


def note(path: str) -> None:
    """In a worker: what it reads from here on."""
    if _NOTES:
        _NOTES[0].value = video_name(path).encode(errors="surrogateescape")[-NOTE_BYTES + 1 :]


class Workers:
    """The workers of one loader: give `start` as its `worker_init_fn`, and call `end` with its iterator."""

    def __init__(self, number: int):
        self._notes = [multiprocessing.RawArray("c", NOTE_BYTES) for _ in range(number)]
        self.died_at: list[str] = []

    def start(self, worker: int) -> None:
        # Decoding and flow run one a worker: threads of their own would fight the training process for its cores.
        import cv2

        cv2.setNumThreads(0)
        torch.set_num_threads(1)
        _NOTES[:] = self._notes[worker : worker + 1]
        # A signal to the whole group asks the run to stop: its process finishes the step, for which it needs its workers.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        # torch's workers look for their parent between batches; one can take minutes.
        end_with_parent()

    def end(self, batches: Iterator | None) -> None:
        """
        Stop the workers of a loader's iterator; those that do not end when asked are killed, for they ignore SIGTERM. Afterwards `died_at` has
        "video (signal)" of each that a signal had ended before.
        """
        for _ in range(3):
            try:
                return self._end(batches)
            except RuntimeError:
                continue  # torch's handler of SIGCHLD says that a worker died, wherever this process is by then
        self._end(batches)

    def _end(self, batches: Iterator | None) -> None:
        # torch's own name, asked for plainly: where a version has another, workers that are left running would go unseen.
        workers = batches._workers if self._notes and batches is not None else []
        # One that has just crashed closes its connections, then its sentinel, and only then has an exit code, for which `join` waits.
        sentinels = [worker.sentinel for worker in workers]
        for sentinel in multiprocessing.connection.wait(sentinels, timeout=0.3) if workers else ():
            next(worker for worker in workers if worker.sentinel == sentinel).join()
        ended = [worker.exitcode is not None for worker in workers]
        if workers:
            batches._shutdown_workers()
        for worker in workers:
            worker.kill()
            worker.join()
        # On a busy machine a crash can take longer than that; its own signal stays the exit code, whatever is sent after it.
        ours = (-signal.SIGTERM, -signal.SIGKILL)
        self.died_at = [
            f"{printable(noted.value.decode(errors='replace'))} ({signal.Signals(-worker.exitcode).name})"
            for worker, before, noted in zip(workers, ended, self._notes)
            if worker.exitcode < 0 and (before or worker.exitcode not in ours) and noted.value
        ]
