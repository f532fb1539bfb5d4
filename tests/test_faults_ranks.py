"""Faults of runs on two processes, started by torchrun or forked: every process ends in bounded time and gives the reason."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import REPOSITORY
from forked_scripts import forked
from safetensors.torch import load_file
from small_runs import assert_goes_on_exactly, flags, metrics, names, opened, train, without_timings

from training.checkpoint_files import damage, finish, list_checkpoints

# Lets each rank act at its own steps, and record the results and errors it gets.
SCRIPT = """
import dataclasses, json, os, resource, signal, sys, time
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from safetensors import SafetensorError
from modeling_poodle import processes
from modeling_poodle.processes import main_first, on_all, on_main, same_on_all
from modeling_poodle.recipe_files import run_script
from accelerate.utils import gather_object
from training import health, pretrain, run, video_sources

rank, told = int(os.environ["RANK"]), {}

def note(name, action):
    try:
        told[name] = repr(action())
    except (ValueError, OSError, SafetensorError) as error:
        told[name] = f"{type(error).__name__}: {error}"

def fail(number, error):
    def action():
        if rank == number:
            raise error
    return action

at_step = {}
original = pretrain.Run.next_batch
def next_batch(own, batches):
    at_step.get((rank, own.step + 1), lambda: None)()
    return original(own, batches)
pretrain.Run.next_batch = next_batch
"""


def two_ranks(tmp_path, script: str) -> Path:
    """Write a script for two ranks that can use `note`, `fail` and `at_step` above."""
    file = tmp_path / "two_ranks.py"
    file.write_text(SCRIPT + script)
    return file


def torchrun(file: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(file), *arguments],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=400,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_ranks_share_errors_and_stop_at_the_same_step(drives, tmp_path, monkeypatch):
    """Two ranks of two workers share one video. Rank 1 is slow and gets the SIGTERM. A single process resumes the run."""
    script = """
accelerator = Accelerator(cpu=True)
note("main", lambda: on_main(accelerator, lambda: rank + 7))
note("main error", lambda: on_main(accelerator, fail(0, ValueError("no such folder"))))
note("all error", lambda: on_all(accelerator, fail(1, OSError(28, "No space left on device", "x"))))
note("full disk", lambda: on_all(accelerator, fail(1, SafetensorError("No space left on device"))))
note("first", lambda: main_first(accelerator, lambda: "here"))
note("first error", lambda: main_first(accelerator, fail(0, ValueError("no such data"))))
note("same", lambda: same_on_all(accelerator, "videos", 3))
note("other", lambda: same_on_all(accelerator, "videos", f"{3 + rank} videos"))

# Rank 1 sees other videos, then none; then its disk takes no byte.
recipe = pretrain.parse_recipe(sys.argv[1:])
def videos(*of_rank):
    mine = dataclasses.replace(recipe, videos=[of_rank[rank]], output_dir=recipe.output_dir + "-failing")
    return lambda: pretrain.resolve_videos(accelerator, mine)
(video,) = recipe.videos
note("other videos", videos(os.path.dirname(video), video))
note("no videos", videos(video, "/nowhere"))
# Rank 1 had a loss that is none.
def not_finite():
    watcher = health.Health(accelerator)
    watcher.watch(torch.tensor(float("nan") if rank else 0.5), 4, [f"of-{rank}.mp4"])
    try:
        watcher.stop_if_not_finite()
    except FloatingPointError as error:
        raise ValueError(str(error)) from error
note("not finite", not_finite)

# Rank 1 was started with other flags, and knows the folder by another path.
processes._SECONDS_TO_BE_SEEN = 1
of_rank = [f"{recipe.output_dir}-{number}" for number in (0, 1)]
if rank:
    os.symlink(of_rank[0], of_rank[1])
def given(output_dir=of_rank[rank], **of_second):
    mine = dataclasses.replace(recipe, output_dir=output_dir, **of_second if rank else {})
    return lambda: pretrain.prepare_output_dir(accelerator, mine)
note("other rate", given(learning_rate=0.25))
note("other saves", given(save_steps=4))
note("other places", given(init_encoder="elsewhere"))
note("not shared", given(f"{recipe.output_dir}-own-{rank}"))
# Servers are asked by rank 0 alone.
asked = []
video_sources._expand_remote = lambda source: (asked.append(source), ([video], "a URL"))[1]
note("remote videos", videos("https://example.org/a.mp4", "https://example.org/a.mp4"))
note("asked", lambda: gather_object([len(asked)]))
failing = dataclasses.replace(recipe, output_dir=recipe.output_dir + "-failing")
model = pretrain.build_model(accelerator, failing)
optimizer = pretrain.build_optimizer(failing, model)
def save(step):
    return run.save_checkpoint(accelerator, failing, step, model, optimizer, {"sums": torch.ones(3)}).name
note("saved", lambda: save(1))
elsewhere = failing.output_dir + rank * "-elsewhere"
if rank:
    os.symlink(failing.output_dir, elsewhere)
at = dataclasses.replace(recipe, output_dir=elsewhere, resume_from_checkpoint="latest")
note("latest", lambda: str(pretrain.prepare_output_dir(accelerator, at)) == f"{elsewhere}/checkpoints/step-1")
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (soft if rank == 0 else 0, hard))
note("not saved", lambda: save(2))
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

def keeping_buffers(accelerator, recipe, step, model, *more, **kwargs):
    save_file(dict(model.named_buffers()), f"{recipe.output_dir}/buffers-{step}-{rank}.safetensors")
    return save_checkpoint(accelerator, recipe, step, model, *more, **kwargs)
save_checkpoint, run.save_checkpoint = run.save_checkpoint, keeping_buffers
print("told", json.dumps(told), flush=True)
at_step[1, 2] = lambda: time.sleep(3)
at_step[1, 3] = lambda: os.kill(os.getpid(), signal.SIGTERM)
run_script(lambda: pretrain.main(sys.argv[1:]))
"""
    video = next(drives.glob("*.mp4"))
    run = tmp_path / "run"
    common = ("--save_total_limit", "9", "--save_steps", "3", "--logging_steps", "2")
    workers = (*common, "--dataloader_num_workers", "2")
    arguments = flags(video, run, *workers, "--per_device_train_batch_size", "1", steps=7)
    done = forked(two_ranks(tmp_path, script), *arguments, ranks=2, PYTHONPATH=str(REPOSITORY))
    told = [json.loads(text) for text in re.findall(r"told (\{.*\})", done.stdout)]
    assert len(told) == 2 and told[0] == told[1], done.stderr
    seen = r"ValueError: .* the same videos, got rank 0: 2 videos, checksum \w{8}; rank 1: 1 videos, checksum \w{8}"
    assert re.fullmatch(seen, told[0].pop("other videos"))
    assert re.match(r"ValueError: no videos found; tried\s+/nowhere", told[0].pop("no videos"))
    assert "not finite at step 4; videos of that batch on the ranks that had it: of-1.mp4. The" in told[0].pop(
        "not finite"
    )
    failed = told[0].pop("not saved")
    assert re.match(
        r"OSError: the checkpoint of step 2 could not be written \(.*rank-1.safetensors: .*too large", failed
    )
    assert os.listdir(tmp_path / "run-failing" / "checkpoints") == ["step-1"]
    assert damage(tmp_path / "run-failing" / "checkpoints" / "step-1") is None
    unseen = r"ValueError: output_dir .*run-own-1 is not one folder for all processes: .*not seen by rank 1 on \S+. Give a folder"
    assert re.match(unseen, told[0].pop("not shared"))
    assert told[0].pop("remote videos") == repr([str(video)])
    assert told[0] == {
        "asked": "[1, 0]",
        "main": "7",
        "main error": "ValueError: no such folder",
        "all error": "OSError: [Errno 28] No space left on device: 'x'",
        "full disk": "SafetensorError: No space left on device",
        "first": "'here'",
        "first error": "ValueError: no such data",
        "same": "None",
        "other": "ValueError: all processes must have the same videos, got rank 0: 3 videos; rank 1: 4 videos",
        "other rate": "ValueError: all processes must have the same learning_rate, got rank 0: 0.001; rank 1: 0.25",
        "other saves": "ValueError: all processes must have the same save_steps, got rank 0: 3; rank 1: 4",
        "other places": "None",
        "saved": "'step-1'",
        "latest": "True",
    }
    assert done.returncode == 75 and "SIGTERM: saved at step" in done.stderr, done.stderr
    # The signal came in step 3. Step 3 also has a regular checkpoint, in the middle of a log window.
    stopped = int(names(run)[-1].removeprefix("step-"))
    assert 3 <= stopped <= 5 and names(run) == [f"step-{step}" for step in sorted({3, stopped})]
    assert [line["step"] for line in metrics(run)] == list(range(2, stopped + 1, 2))
    checkpoint = run / "checkpoints" / "step-3"
    # A checkpoint without the files of a rank is damaged, even if its checksums fit the files it has.
    partial = tmp_path / "partial"
    shutil.copytree(checkpoint, partial / "step-3")
    for path in (*(partial / "step-3").glob("rank-1.*"), partial / "step-3" / "SHA256SUMS"):
        path.unlink()
    finish(partial / "step-3", partial / "sealed")
    assert damage(partial / "sealed") == "it is of 2 processes, and has no rank-1.json"
    assert damage(checkpoint) is None and damage(run / "checkpoints" / names(run)[-1]) is None
    before, third = metrics(run)[:1], ("--resume_from_checkpoint", str(checkpoint))
    AcceleratorState._reset_state(True)
    with pytest.raises(
        ValueError,
        match=r"run on 2 processes, this one has 1: .*\(torchrun --standalone --nproc_per_node 2\), or .*inexact true",
    ):
        train(video, run, *third, *workers, "--per_device_train_batch_size", "1", steps=7)
    AcceleratorState._reset_state(True)
    held = opened(monkeypatch)
    # Two pairs on one process are as many as one pair on each of two processes.
    more = ("--resume_inexact", "true", "--per_device_train_batch_size", "2")
    after = train(video, run, *third, *common, *more, steps=7)
    assert [line["step"] for line in after] == [2, 4, 6, 7] and without_timings(after)[:1] == before
    assert_goes_on_exactly(held, checkpoint)
    first, second = (load_file(checkpoint / f"rank-{rank}.safetensors")["sums"] for rank in (0, 1))
    assert first[0] > 0 and not torch.equal(first, second)
    torch.testing.assert_close(held["sums"], (first + second) / 2)
    own, other = (load_file(run / f"buffers-3-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(held["model"][name], buffer) for name, buffer in own.items())
    means = [name for name in own if name.endswith("running_mean")]
    assert means and not any(torch.equal(own[name], other[name]) for name in means)  # each rank has its own


def test_a_killed_rank_ends_the_other_with_the_reason(drives, tmp_path):
    script = """
at_step[1, 2] = lambda: (open(sys.argv[1], "w").close(), os.kill(os.getpid(), signal.SIGKILL))
run_script(lambda: pretrain.main(sys.argv[2:]))
"""
    killed = tmp_path / "killed"
    arguments = flags(drives, tmp_path / "run", "--save_steps", "1", steps=40)
    done = torchrun(two_ranks(tmp_path, script), str(killed), *arguments)
    assert done.returncode != 0 and time.time() - killed.stat().st_mtime < 60
    assert "error: another process of the run is gone" in done.stderr, done.stderr
    assert "Signal 9 (SIGKILL)" in done.stderr  # torchrun's own summary
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    assert damage(checkpoint) is None
    # If a rank cannot read its part of the checkpoint, the run removes none of the later lines of the log.
    log = tmp_path / "run" / "metrics.jsonl"
    with log.open("a") as file:
        file.write('{"step": 9}\n')
    before = log.read_text()
    script = two_ranks(
        tmp_path,
        """
if rank:
    run.load_checkpoint = lambda *_: fail(1, OSError(5, "Input/output error"))()
run_script(lambda: pretrain.main(sys.argv[1:]))
""",
    )
    done = forked(script, *arguments, "--resume_from_checkpoint", "latest", ranks=2, PYTHONPATH=str(REPOSITORY))
    assert done.returncode == 1 and done.stderr.count("[Errno 5] Input/output error") == 2, done.stderr
    assert log.read_text() == before
    # Ranks with different checkpoints do not start either.
    other = shutil.copytree(checkpoint, tmp_path / "elsewhere" / "checkpoints" / checkpoint.name)
    with (other / "SHA256SUMS").open("a") as file:
        file.write("\n")
    script = two_ranks(
        tmp_path,
        'run_script(lambda: pretrain.main([*sys.argv[3:], "--resume_from_checkpoint", sys.argv[1 + rank]]))\n',
    )
    anew = flags(drives, tmp_path / "new", "--save_steps", "1", steps=40)
    done = forked(script, checkpoint, other, *anew, ranks=2, PYTHONPATH=str(REPOSITORY))
    assert done.returncode == 1 and "all processes must have the same checkpoint, got rank 0: step" in done.stderr, (
        done.stderr
    )
    assert not (tmp_path / "new" / "config.yaml").exists()
