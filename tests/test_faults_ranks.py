"""Faults of runs on two processes, started by torchrun: all of them end, in bounded time, with the reason."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
from accelerate.state import AcceleratorState
from conftest import REPOSITORY
from small_runs import flags, metrics, names, train, without_timings

from training.checkpoint_files import damage, list_checkpoints

# What a rank does at its own time, and what it was told.
SCRIPT = """
import os, signal, sys, time
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from modeling_poodle.recipe_files import run_script
from training import pretrain
from training.ranks import on_all, on_main, same_on_all

rank, told = int(os.environ["RANK"]), {}

def note(name, action):
    try:
        told[name] = repr(action())
    except (ValueError, OSError) as error:
        told[name] = f"{type(error).__name__}: {error}"

def fail(number, error):
    def action():
        if rank == number:
            raise error
    return action

at_step = {}
original = pretrain.Run.next_batch
def next_batch(run, batches):
    at_step.get((rank, run.step + 1), lambda: None)()
    return original(run, batches)
pretrain.Run.next_batch = next_batch
"""


def two_ranks(tmp_path, script: str, *arguments: str) -> subprocess.CompletedProcess:
    file = tmp_path / "two_ranks.py"
    file.write_text(SCRIPT + script)
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(file), *arguments],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=400,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_ranks_share_errors_and_stop_at_the_same_step(drives, tmp_path):
    """One video for two ranks of two workers; rank 1 is slow, and gets the SIGTERM; one process goes on with the rest."""
    script = """
accelerator = Accelerator(cpu=True)
note("main", lambda: on_main(accelerator, lambda: rank + 7))
note("main error", lambda: on_main(accelerator, fail(0, ValueError("no such folder"))))
note("all error", lambda: on_all(accelerator, fail(1, OSError(28, "No space left on device", "x"))))
note("same", lambda: same_on_all(accelerator, "videos", 3))
note("other", lambda: same_on_all(accelerator, "videos", f"{3 + rank} videos"))
import json
print("told", json.dumps(told), flush=True)
at_step[1, 2] = lambda: time.sleep(3)
at_step[1, 3] = lambda: os.kill(os.getpid(), signal.SIGTERM)
run_script(lambda: pretrain.main(sys.argv[1:]))
"""
    video = next(drives.glob("*.mp4"))
    run, workers = tmp_path / "run", ("--dataloader_num_workers", "2", "--save_total_limit", "9")
    done = two_ranks(tmp_path, script, *flags(video, run, *workers, "--per_device_train_batch_size", "1", steps=7))
    told = [json.loads(text) for text in re.findall(r"told (\{.*\})", done.stdout)]
    assert told == 2 * [
        {
            "main": "7",
            "main error": "ValueError: no such folder",
            "all error": "OSError: [Errno 28] No space left on device: 'x'",
            "same": "None",
            "other": "ValueError: all processes must have the same videos, got rank 0: 3 videos; rank 1: 4 videos",
        }
    ]
    assert len(re.findall(r"exitcode *: 75", done.stderr)) >= 1 and "SIGTERM: saved at step" in done.stderr, (
        done.stderr
    )
    (name,) = names(run)
    stopped = int(name.removeprefix("step-"))
    assert 3 <= stopped <= 5 and [line["step"] for line in metrics(run)] == list(range(1, stopped + 1))
    assert damage(run / "checkpoints" / name) is None
    before, latest = metrics(run), ("--resume_from_checkpoint", "latest", "--save_total_limit", "9")
    AcceleratorState._reset_state(True)
    with pytest.raises(
        ValueError, match=r"run on 2 processes, this one has 1: .*--num_processes 2\), or .*inexact true"
    ):
        train(video, run, *latest, *workers, "--per_device_train_batch_size", "1", steps=7)
    AcceleratorState._reset_state(True)
    # Two pairs on one process are as many as one on each of two.
    after = train(video, run, *latest, "--resume_inexact", "true", "--per_device_train_batch_size", "2", steps=7)
    assert [line["step"] for line in after] == list(range(1, 8)) and without_timings(after)[:stopped] == before


def test_a_killed_rank_ends_the_other_with_the_reason(drives, tmp_path):
    script = """
at_step[1, 2] = lambda: (open(sys.argv[1], "w").close(), os.kill(os.getpid(), signal.SIGKILL))
run_script(lambda: pretrain.main(sys.argv[2:]))
"""
    killed = tmp_path / "killed"
    done = two_ranks(tmp_path, script, str(killed), *flags(drives, tmp_path / "run", "--save_steps", "1", steps=40))
    assert done.returncode != 0 and time.time() - killed.stat().st_mtime < 60
    assert "error: another process of the run is gone" in done.stderr, done.stderr
    assert "Signal 9 (SIGKILL)" in done.stderr  # torchrun's own summary
    assert [damage(checkpoint) for checkpoint in list_checkpoints(tmp_path / "run")] == [None]
