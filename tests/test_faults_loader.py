"""Loader workers that die, and torch's error messages reworded for users."""

import errno
import multiprocessing
import multiprocessing.connection
import os
import re
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
from forks import in_child, wait_for

from training.faults import fault_of, faults_in_words
from training.pair_plans import PairSampling
from training.recipe import Recipe
from training.video_sources import find_videos
from training.video_stream import PairLoader
from training.workers import Workers

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


# --- the loader's workers ---


def crash(sample: dict) -> None:
    if sample["repeat"] == 1:
        os.kill(os.getpid(), signal.SIGSEGV)


def fill_memory(sample: dict) -> None:
    if sample["repeat"] == 1:  # as with a full /dev/shm, no file of shared memory can grow
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def stand_still(sample: dict) -> None:
    if sample["repeat"] == 1:
        time.sleep(3600)


def test_a_worker_ends_with_its_run_in_the_midst_of_a_batch():
    """The run may end by a second Ctrl-C or a SIGKILL. torch's own workers check for their parent only between batches."""

    def work(sender):
        Workers(1).start(0)
        sender.send(os.getpid())
        time.sleep(600)

    def run(sender):
        fork.Process(target=work, args=(sender,)).start()

    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe()
    parent = in_child(lambda: run(sender))
    worker = receiver.recv()
    assert os.path.exists(f"/proc/{worker}")
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    wait_for(
        lambda: not os.path.exists(f"/proc/{worker}") or "State:\tZ" in Path(f"/proc/{worker}/status").read_text()
    )


def loader_of(drives, pair_flow=None, workers=1):
    sampling = PairSampling(crop_size=(32, 32), pairs_per_video=2)
    return PairLoader(find_videos([str(drives)], None)[:1], sampling, 1, workers, pair_flow=pair_flow)


def read_all(loader) -> None:
    with faults_in_words(Recipe(), loader.workers):
        try:
            for _ in loader:
                pass
        finally:
            loader.close()


def test_a_worker_that_crashes_is_named_with_its_video(drives):
    (video,) = loader_of(drives).paths
    with pytest.raises(
        ChildProcessError,
        match=r"(exited unexpectedly|was killed by signal).*an empty file in its place.*--resume_from_checkpoint",
    ) as error:
        read_all(loader_of(drives, crash))
    assert f"while it read {video} (SIGSEGV)" in str(error.value)


def test_a_death_that_torch_reports_while_workers_are_ended_is_named_too(drives, monkeypatch):
    loader, said, wait = loader_of(drives, crash), [], multiprocessing.connection.wait

    def interrupted(*arguments, **options):  # as torch's handler of SIGCHLD, which raises at any point of the code
        if sys._getframe(1).f_code.co_name == "_end" and not said:
            said.append(True)
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Segmentation fault. ")
        return wait(*arguments, **options)

    monkeypatch.setattr(multiprocessing.connection, "wait", interrupted)
    with pytest.raises(ChildProcessError, match=rf"while it read {re.escape(loader.paths[0])} \(SIGSEGV\)"):
        read_all(loader)
    assert said


def test_a_worker_without_shared_memory_is_named(drives):
    with pytest.raises(MemoryError, match=r"out of shared memory \(/dev/shm\): .*--shm-size"):
        read_all(loader_of(drives, fill_memory))


def test_workers_that_cannot_be_found_are_an_error_rather_than_left_running(drives):
    loader = loader_of(drives)
    next(iter(loader))
    (worker,), kept = multiprocessing.active_children(), loader._iterator
    loader._iterator = iter([])  # as if torch kept its workers under another name
    with pytest.raises(AttributeError, match="_workers"):
        loader.close()
    loader._iterator = kept
    loader.close()
    assert not worker.is_alive() and not multiprocessing.active_children()
    loader.close()  # a second call has nothing to end
    loader_of(drives, workers=0).close()


def test_workers_outlive_a_signal_to_the_group_and_end_with_the_run(drives):
    loader = loader_of(drives, stand_still)
    batches = iter(loader)
    next(batches)
    (worker,) = loader._iterator._workers
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker.pid, number)
    time.sleep(0.1)
    assert worker.is_alive()
    began = time.monotonic()
    loader.close()  # although the worker ignores SIGTERM and would read for an hour
    assert not worker.is_alive() and time.monotonic() - began < 15


@pytest.mark.parametrize(
    ("message", "kind", "said"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", ChildProcessError, "was killed by signal: Killed while it read a.mp4"),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", ChildProcessError, "worker exited unexpectedly while"),
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that", MemoryError, "--shm-size"),
        ("unable to allocate shared memory(shm) for file </torch_1>: No space left", MemoryError, "--shm-size"),
        ("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:9", ConnectionError, "process of the run is gone"),
        ("[gloo/transport/tcp/unbound_buffer.cc:80] Timed out waiting 9000ms for recv", ConnectionError, "did not answer for 9 s"),
        ("NCCL communicator was aborted on rank 1.", ConnectionError, "process of the run is gone"),
        ("NCCL error in: x.cpp:3, unhandled cuda error\nCuda failure 2 'out of memory'", ConnectionError, "cuda error Cuda failure 2 'out of memory'"),
        ("ImportError: /tmp/torchinductor_me/v5/x.main.so: file too short", OSError, "x.main.so is not a whole library, since"),
        ("mat1 and mat2 shapes cannot be multiplied", None, ""),
        ("out of resource: shared memory, Required: 262144, Hardware limit: 232448", None, ""),
    ],
)  # fmt: skip
def test_messages_of_torch_in_words(message, kind, said):
    fault = fault_of(RuntimeError(message), ["a.mp4"], 9)
    assert type(fault) is (type(None) if kind is None else kind) and (kind is None or said in str(fault))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "^the program that read this run's output has ended"),
        (OSError(errno.ENOSPC, "No space left on device"), "^output_dir runs/mine: .*No space left"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/mine/metrics.jsonl"), "^output_dir runs/mine: .*No space"),
        (OSError(errno.EIO, "Input/output error", "/data/labels.json"), r"^\[Errno 5\] Input/output error: '/data/labels.json'\."),
    ],
)  # fmt: skip
def test_faults_of_files_name_the_folder_where_it_is_in_it(error, said):
    with pytest.raises(OSError, match=f"{said}.*--resume_from_checkpoint latest"):
        with faults_in_words(Recipe(output_dir="runs/mine"), None):
            raise error
