"""Faults that take minutes to test: `make test-long`. docs/reliability.md has the figures of one run of each test."""

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY
from safetensors.torch import load_file
from small_runs import flags, metrics

from training.checkpoint_files import damage, list_checkpoints

pytestmark = pytest.mark.long
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
TINY = {
    "backbone_config": {
        # At least 8 channels. On processors without AVX-512, oneDNN's backward pass of a strided 1x1 convolution writes beyond its memory
        # with fewer (torch 2.14.1).
        "model_type": "resnet", "layer_type": "basic", "depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 8, 8], "embedding_size": 8,
    },
    "num_decoder_blocks": 1, "decoder_reduction": 2, "projection_hidden_size": 4, "projection_size": 4,
}  # fmt: skip

# Imports once, then forks a run for each line of input and prints its pid. A line `wait PID` prints the exit status instead.
ZYGOTE = """
import os, sys, json
from training.pretrain import main
from modeling_poodle.recipe_files import run_script
arguments = json.loads(sys.argv[1])
for line in sys.stdin:
    if line.startswith("wait"):
        print(os.waitpid(int(line.split()[1]), 0)[1], flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        status = 1
        try:
            run_script(lambda: main(arguments + line.split()))
            status = 0
        finally:
            os._exit(status)
    print(pid, flush=True)
"""


class Zygote:
    """Starts runs of one command line without importing torch again for each."""

    def __init__(self, arguments: list[str], log: Path):
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-c", ZYGOTE, json.dumps(arguments), str(log)],
            cwd=REPOSITORY, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, line: str) -> int:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def test_killed_at_twenty_random_moments_the_run_is_the_same(drives, tmp_path):
    """A checkpoint every second step lets many kills fall into one. In the end every line and every weight is the same."""
    steps, killed, inside = 120, 0, 0
    ends = []
    for name in ("whole", "killed"):
        arguments = flags(
            drives, tmp_path / name, "--save_steps", "2", "--logging_steps", "3", "--dataloader_num_workers", "1", model=TINY, steps=steps,
        )  # fmt: skip
        zygote, rng = Zygote(arguments, tmp_path / f"{name}.txt"), random.Random(0)
        while True:
            resume = "--resume_from_checkpoint latest" if (tmp_path / name / "config.yaml").exists() else ""
            pid = zygote.ask(resume)
            if name == "whole" or killed == 20:
                assert zygote.ask(f"wait {pid}") == 0, zygote.log.read_text()[-3000:]
                break
            wait_for_a_moment(killed % 4, pid, tmp_path / name, rng)
            os.kill(pid, signal.SIGKILL)
            assert zygote.ask(f"wait {pid}") == signal.SIGKILL, zygote.log.read_text()[-3000:]
            killed += 1
            inside += bool(unfinished(tmp_path / name))
            found = list_checkpoints(tmp_path / name)
            assert [damage(checkpoint) for checkpoint in found] == [None] * len(found)
        zygote.close()
        ends.append(tmp_path / name)
    print(f"{killed} kills, {inside} of them while a checkpoint was written or deleted")
    assert inside > 0
    whole, resumed = ends
    assert metrics(resumed) == metrics(whole) and len(metrics(whole)) == steps // 3
    for folder in ("encoder", "model", f"checkpoints/step-{steps}"):
        ours, theirs = (load_file(run / folder / "model.safetensors") for run in (resumed, whole))
        assert all((ours[key] == theirs[key]).all() for key in theirs)


def wait_for_a_moment(kind: int, pid: int, run: Path, rng: random.Random) -> None:
    """Wait for a random moment while the run starts (kind 0), takes steps (1), or writes or deletes a checkpoint (2 and 3)."""
    size, left = metrics_size(run), unfinished(run)
    if kind == 0:
        sleep_while_no_line_is_added(run, size, rng.uniform(0, 2))
    elif kind == 1:
        while metrics_size(run) <= size and not ended(pid):
            time.sleep(0.001)
        sleep_while_no_line_is_added(run, metrics_size(run), rng.uniform(0, 0.4))
    else:
        while not unfinished(run) - left and not ended(pid):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))


def sleep_while_no_line_is_added(run: Path, size: int, seconds: float) -> None:
    """Sleep, but end early at a new line. Otherwise a run on a fast machine would be over before its twenty kills."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and metrics_size(run) <= size:
        time.sleep(0.001)


def unfinished(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").glob(".step-*")}


def ended(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"


def metrics_size(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0


def last_step(run: Path) -> int:
    path = run / "metrics.jsonl"
    lines = path.read_bytes()[-2000:].split(b"\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def footprint(pid: int) -> tuple[int, int, int, tuple[str, ...]]:
    """
    Return the memory in KiB, the open files and the threads of a process with its children, and the ids of the children.

    The memory leaves out pages of files, which other processes share.
    """
    memory = files = threads = 0
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for each in [str(pid), *children]:
        rollup = Path(f"/proc/{each}/smaps_rollup").read_text()
        memory += int(rollup.split("Pss_Anon:")[1].split()[0])
        files += len(os.listdir(f"/proc/{each}/fd"))
        threads += len(os.listdir(f"/proc/{each}/task"))
    return memory, files, threads, tuple(children)


# Here a span of the loader ends after 24 openings, and its workers end with it.
SHORT_SPANS = """
import sys
from modeling_poodle.recipe_files import run_script
from training import pretrain, video_stream
video_stream.OPENINGS_PER_SPAN = 24
video_stream.OPENINGS_PER_LANE = 1
run_script(lambda: pretrain.main(sys.argv[1:]))
"""


def test_twenty_thousand_steps_stay_flat(drives, tmp_path):
    steps = 20_000
    small = (
        "--crop_size", "32", "64", "--num_subcrops", "1", "--per_device_train_batch_size", "1", "--pairs_per_video", "16",
        "--logging_steps", "10", "--save_steps", "500", "--panel_steps", "5000", "--dataloader_num_workers", "1",
    )  # fmt: skip
    arguments = flags(drives, tmp_path / "run", *small, model=TINY, steps=steps)
    began = time.monotonic()
    with open(tmp_path / "log.txt", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", SHORT_SPANS, *arguments],
            cwd=REPOSITORY,
            env=ENVIRONMENT,
            stdout=log,
            stderr=log,
        )
        samples, seen = [], set()
        while process.poll() is None:
            time.sleep(1)
            if not 0 < last_step(tmp_path / "run") < steps:
                continue  # the run is starting or ending
            try:
                *figures, workers = footprint(process.pid)
            except (FileNotFoundError, ProcessLookupError, IndexError):  # the run is ending
                continue
            if workers:  # otherwise the loader is between two spans
                samples.append(figures)
                seen.update(workers)
    assert process.returncode == 0, (tmp_path / "log.txt").read_text()[-3000:]
    quarter = len(samples) // 4
    # For files and threads, take the lower quintile. Each batch on its way from a worker adds some open files, so the median is too high.
    # A worker that has just begun has fewer than usual, so the minimum is too low.
    (early, late) = (
        [statistics.median(memory), *(sorted(counts)[len(counts) // 5] for counts in (files, threads))]
        for memory, files, threads in (zip(*part) for part in (samples[quarter : 2 * quarter], samples[-quarter:]))
    )
    print(
        f"{steps} steps in {time.monotonic() - began:.0f} s, {len(samples)} samples of KiB, files, threads: {early} -> {late}; "
        f"{len(seen)} workers"
    )
    assert late[0] <= 1.02 * early[0]
    # If each span left a file or a thread behind, there would be some 26 more.
    assert all(abs(there - before) <= 2 for there, before in zip(late[1:], early[1:]))
    assert len(seen) > 50  # one worker per span, which has 24 x 16 steps
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(10, steps + 1, 10))
    assert all(0 < line["loss"] < 4 and line["skipped_updates"] == 0 for line in lines)
    assert len(list_checkpoints(tmp_path / "run")) == 2


def test_a_disk_that_is_really_full(drives, tmp_path):
    """The run has a small file system of its own. It ends with an error message, and resumes when there is room again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        arguments = flags(drives, disk / "run", "--save_steps", "1", "--save_total_limit", "99", model=TINY, steps=99)
        done = subprocess.run(
            [sys.executable, "training/pretrain.py", *arguments],
            cwd=REPOSITORY,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "error: " in done.stderr and "No space left on device" in done.stderr
        found = list_checkpoints(disk / "run")
        assert found and all(damage(checkpoint) is None for checkpoint in found)
        for checkpoint in found[:-2]:
            shutil.rmtree(checkpoint)
        arguments[arguments.index("99", arguments.index("--save_total_limit"))] = "2"
        resumed = subprocess.run(
            [sys.executable, "training/pretrain.py", *arguments, "--resume_from_checkpoint", "latest"],
            cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True,
        )  # fmt: skip
        assert resumed.returncode == 0, resumed.stderr
        assert [line["step"] for line in metrics(disk / "run")] == list(range(1, 100))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_small_shared_memory_is_named(drives, tmp_path):
    arguments = flags(drives, tmp_path / "run", "--dataloader_num_workers", "1", model=TINY, steps=2)
    inside = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    if subprocess.run(["unshare", "-m", "sh", "-c", inside, "sh", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", inside, "sh", sys.executable, "training/pretrain.py", *arguments],
        cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 1 and "error: the loader's workers are out of shared memory" in done.stderr, done.stderr


def test_a_rank_that_stands_still_ends_the_run(drives, tmp_path):
    """The run waits for ddp_timeout, 20 s. torchrun then waits 30 s from SIGTERM to SIGKILL."""
    script = tmp_path / "ranks.py"
    script.write_text(
        "import os, sys, time\n"
        "from modeling_poodle.recipe_files import run_script\n"
        "from training import pretrain\n"
        "original = pretrain.Run.next_batch\n"
        "def next_batch(run, batches):\n"
        "    if run.step == 2 and os.environ['RANK'] == '1':\n"
        "        open(sys.argv[1], 'w').close()\n"
        "        time.sleep(3600)\n"
        "    return original(run, batches)\n"
        "pretrain.Run.next_batch = next_batch\n"
        "run_script(lambda: pretrain.main(sys.argv[2:]))\n"
    )
    arguments = flags(drives, tmp_path / "run", "--ddp_timeout", "20", "--save_steps", "1", model=TINY, steps=5)
    still = tmp_path / "still"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, still, *arguments],
        cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    seconds = time.time() - still.stat().st_mtime
    print(f"ended {seconds:.0f} s after the rank stood still")
    assert done.returncode != 0 and seconds < 90
    assert "error: another process of the run did not answer for 20 s (ddp_timeout)" in done.stderr, done.stderr
    assert [damage(checkpoint) for checkpoint in list_checkpoints(tmp_path / "run")] == [None, None]
