"""Faults of a run in this process: signals, locks, damaged files, disks."""

import ctypes
import json
import logging
import os
import random
import resource
import shutil
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from forks import in_child, wait_for
from safetensors.torch import load_file
from small_runs import EACH_STEP, at_step, copy_of, flags, metrics, names, train, without_timings

from modeling_poodle.locks import lock_output_dir, still_held
from training import ranks, run
from training.checkpoint_files import damage, finish, leave_later, list_checkpoints, rotate, sweep, write_text
from training.ranks import StopSignals
from training.recipe import parse_recipe
from training.resume import find_checkpoint
from training.stopping import RESUMABLE_EXIT_CODE, SIGNALS

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


# --- signals ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_the_rest_is_the_same(drives, whole, tmp_path, monkeypatch, number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: signal.raise_signal(number))
        with pytest.raises(SystemExit) as ended:
            train(drives, tmp_path / "run", steps=4)
    assert ended.value.code == RESUMABLE_EXIT_CODE == 75
    assert names(tmp_path / "run") == ["step-2"] and len(metrics(tmp_path / "run")) == 2
    assert [signal.getsignal(each) for each in SIGNALS] == before
    AcceleratorState._reset_state(True)
    resumed = train(drives, tmp_path / "run", "--resume_from_checkpoint", "latest", steps=4)
    assert without_timings(resumed) == metrics(whole)


def test_a_second_sigint_ends_the_process_at_once():
    def interrupted() -> None:
        with StopSignals(Accelerator(cpu=True), timedelta(seconds=1)) as signals:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # any number of times, because the system sends it
            signal.raise_signal(signal.SIGINT)
            assert signals.agreed() and signals.name == "SIGINT"
            signal.raise_signal(signal.SIGINT)

    _, status = os.waitpid(in_child(interrupted), 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGINT


def test_a_sigint_that_torchrun_sends_on_is_not_a_second_one(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")

    def interrupted() -> None:
        with StopSignals(Accelerator(cpu=True), timedelta(seconds=1)) as signals:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert signals.agreed() and signals.name == "SIGINT"
            ranks.SENT_ON_WITHIN = 0.0
            signal.raise_signal(signal.SIGINT)

    _, status = os.waitpid(in_child(interrupted), 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGINT


def test_the_run_is_asked_to_stop_when_accelerate_launch_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # the launcher sets this
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)

    def launch() -> None:
        if os.fork() == 0:
            with StopSignals(Accelerator(cpu=True), timedelta(seconds=1)) as signals:
                (tmp_path / "ready").touch()
                wait_for(signals.agreed)
                (tmp_path / signals.name).touch()
            os._exit(0)

    pid = in_child(launch)
    wait_for((tmp_path / "ready").exists)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    wait_for((tmp_path / "SIGTERM").exists)


# --- one run in a folder ---


def test_a_second_run_in_the_folder_is_refused_until_the_first_is_gone(tmp_path):
    output_dir = tmp_path / "new" / "run"

    def hold() -> None:
        lock_output_dir(output_dir)
        if os.fork() == 0:  # stands for a loader worker, which lives some seconds longer than its killed parent
            time.sleep(2)
            os._exit(0)
        (tmp_path / "held").touch()

    pid = in_child(hold)
    wait_for((tmp_path / "held").exists)
    with pytest.raises(ValueError, match=rf"in use by the run of process {pid} on .*choose another --output_dir"):
        lock_output_dir(output_dir)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    lock_output_dir(output_dir)
    assert json.loads((output_dir / ".lock").read_text())["pid"] == os.getpid()
    lock_output_dir(output_dir)  # a process may lock the folder again for its next run


def test_a_folder_that_was_removed_is_locked_again_unless_another_run_has_begun_in_it(tmp_path, caplog):
    own, others = tmp_path / "own", tmp_path / "others"
    for folder in (own, others):
        lock_output_dir(folder)
        still_held(folder)
        shutil.rmtree(folder)
    assert not caplog.records
    still_held(own)
    assert "was removed while this run wrote to it" in caplog.text
    still_held(own)
    assert len(caplog.records) == 1 and json.loads((own / ".lock").read_text())["pid"] == os.getpid()
    pid = in_child(lambda: lock_output_dir(others))
    wait_for(lambda: (others / ".lock").is_file() and (others / ".lock").read_text())
    for ended in (False, True):
        if ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        with pytest.raises(
            ValueError, match=f"others was removed, and another run .* \\(the run of process {pid} on "
        ):
            still_held(others)


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    with caplog.at_level(logging.WARNING, "poodle"):
        lock_output_dir(tmp_path)
    assert "cannot be locked" in caplog.text and "No locks available" in caplog.text


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    tmp_path.chmod(0o555)
    libc = ctypes.CDLL(None)
    if os.geteuid() == 0:  # root may write anywhere, so access files as nobody
        libc.setfsuid(65534)
    try:
        with pytest.raises(ValueError, match=r"cannot be written \(.*ermission denied.*choose another --output_dir"):
            lock_output_dir(tmp_path / "run")
    finally:
        libc.setfsuid(os.geteuid())
        tmp_path.chmod(0o755)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; it must be a folder"):
        lock_output_dir(tmp_path / "file")


# --- damaged checkpoints ---


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        ("model.safetensors", flip, "model.safetensors is not what was written"),
        ("optimizer.safetensors", truncate, "optimizer.safetensors is not what was written"),
        ("rank-0.json", flip, "rank-0.json is not what was written"),
        ("rank-0.safetensors", Path.unlink, "rank-0.safetensors cannot be read"),
        ("SHA256SUMS", Path.unlink, "SHA256SUMS cannot be read"),
        ("SHA256SUMS", truncate, "SHA256SUMS"),
        ("SHA256SUMS", lambda path: path.write_bytes(b"\xff\n"), "SHA256SUMS is not a list of checksums"),
    ],
)
def test_latest_goes_back_to_the_last_whole_checkpoint(drives, whole, tmp_path, caplog, name, harm, said):
    run = copy_of(whole, tmp_path)
    last = run / "checkpoints" / "step-4"
    assert damage(last) is None
    harm(last / name)
    recipe = parse_recipe(flags(drives, run, *EACH_STEP, "--resume_from_checkpoint", "latest", steps=4))
    with caplog.at_level(logging.WARNING, "poodle"):
        assert find_checkpoint(recipe) == run / "checkpoints" / "step-3"
    assert f"{last} is damaged: " in caplog.text and said in caplog.text and "going back" in caplog.text
    recipe.resume_from_checkpoint = str(last)
    with pytest.raises(ValueError, match=f"step-4 is damaged: .*{said.split()[0]}.*name another"):
        find_checkpoint(recipe)


def test_a_checkpoint_without_its_state_is_named_too(drives, whole, tmp_path, caplog):
    run = copy_of(whole, tmp_path)
    (run / "checkpoints" / "step-4" / "state.json").unlink()
    for path in (run / "checkpoints" / "step-3").iterdir():
        path.unlink()
    recipe = parse_recipe(flags(drives, run, *EACH_STEP, "--resume_from_checkpoint", "latest", steps=4))
    assert find_checkpoint(recipe) == run / "checkpoints" / "step-2"
    assert "step-4 is damaged: state.json cannot be read (No such file" in caplog.text
    assert "step-3 is damaged: SHA256SUMS cannot be read (No such file" in caplog.text


@pytest.mark.parametrize("unmounted", [False, True])  # an unmounted folder stays as an empty mount point
def test_a_run_whose_checkpoints_are_gone_is_not_started_anew(drives, whole, tmp_path, caplog, unmounted):
    run = copy_of(whole, tmp_path)
    shutil.rmtree(run / "checkpoints")
    if unmounted:
        (run / "checkpoints").mkdir()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    latest = (*EACH_STEP, "--resume_from_checkpoint", "latest")
    said = r"no checkpoint in .*checkpoints, but encoder/, model/, metrics.jsonl up to step 4 of .*: mount or restore checkpoints/"
    with pytest.raises(ValueError, match=said + ", choose another --output_dir, or remove the folder"):
        train(drives, run, *latest, steps=4)
    assert {path: path.read_bytes() for path in before} == before
    recipe = parse_recipe(flags(drives, run, *latest, steps=4))
    shutil.rmtree(run / "encoder")
    with pytest.raises(ValueError, match="but model/, metrics.jsonl"):
        find_checkpoint(recipe)
    shutil.rmtree(run / "model")
    with pytest.raises(ValueError, match="but metrics.jsonl up to step 4 of"):
        find_checkpoint(recipe)
    # The log of a run that was killed before the checkpoint of step 1 had its name: nothing was saved.
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(lines[0] + lines[1][:9])
    assert find_checkpoint(recipe) is None and "starting from the beginning" in caplog.text


def test_a_run_killed_before_its_first_checkpoint_begins_where_it_began(drives, whole, tmp_path, monkeypatch):
    def gone():
        raise KeyboardInterrupt

    latest = ("--resume_from_checkpoint", "latest")
    second = ("--resume_from_checkpoint", str(whole / "checkpoints" / "step-2"))
    for number, begin in enumerate([(), second]):
        run = tmp_path / str(number)
        for flag in (begin, latest, latest):
            AcceleratorState._reset_state(True)
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                at_step(patch, 4, gone)
                train(drives, run, *flag, "--save_steps", "6", steps=4)
            assert [line["step"] for line in metrics(run)] == ([3] if begin else [1, 2, 3])
        AcceleratorState._reset_state(True)
        ended = without_timings(train(drives, run, *latest, "--save_steps", "6", steps=4))
        assert ended == metrics(whole)[2 if begin else 0 :]
    AcceleratorState._reset_state(True)
    shutil.rmtree(tmp_path / "1" / "checkpoints")
    for name in ("encoder", "model"):
        shutil.rmtree(tmp_path / "1" / name)
    (tmp_path / "1" / "config.yaml").write_text(
        (tmp_path / "1" / "config.yaml").read_text().replace(str(whole), str(tmp_path / "nowhere"))
    )
    with pytest.raises(ValueError, match="began at .*nowhere/checkpoints/step-2, which is damaged"):
        train(drives, tmp_path / "1", *latest, "--save_steps", "6", steps=4)


def test_no_whole_checkpoint_is_an_error_that_names_each(drives, whole, tmp_path):
    run = copy_of(whole, tmp_path)
    for checkpoint in list_checkpoints(run):
        flip(checkpoint / "model.safetensors")
    recipe = parse_recipe(flags(drives, run, *EACH_STEP, "--resume_from_checkpoint", "latest", steps=4))
    with pytest.raises(ValueError, match=r"no checkpoint of this run is whole(?s:.*)step-4(?s:.*)step-1"):
        find_checkpoint(recipe)
    (run / "config.yaml").write_text("videos: [unclosed")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match="config.yaml is not valid YAML"):
        find_checkpoint(recipe)


def test_a_run_from_before_the_damage_writes_the_same_again(drives, whole, tmp_path):
    run = copy_of(whole, tmp_path)
    flip(run / "checkpoints" / "step-4" / "optimizer.safetensors")
    flip(run / "checkpoints" / "step-3" / "rank-0.safetensors")
    resumed = train(drives, run, *EACH_STEP, "--resume_from_checkpoint", "latest", steps=4)
    assert without_timings(resumed) == metrics(whole)
    for name in ("model.safetensors", "optimizer.safetensors", "rank-0.safetensors"):
        ours, theirs = (load_file(folder / "checkpoints" / "step-4" / name) for folder in (run, whole))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert all(damage(checkpoint) is None for checkpoint in list_checkpoints(run))


def test_a_run_that_was_sent_back_has_no_panels_and_no_latest_checkpoint_of_the_future_it_left(
    drives, whole, tmp_path, monkeypatch
):
    """
    Panels are removed like the lines of the log, because the last panel is published with the weights.

    Later checkpoints are renamed and can still be named until the run saves its next one.
    """

    def kill():
        raise KeyError("as if killed, with nothing saved yet")

    run = copy_of(whole, tmp_path)
    with monkeypatch.context() as patched:
        at_step(patched, 3, kill)
        with pytest.raises(KeyError, match="as if killed"):
            back = ("--resume_from_checkpoint", str(run / "checkpoints" / "step-2"))
            train(drives, run, *EACH_STEP, *back, steps=4)
    assert names(run) == ["step-1", "step-2"] and damage(run / "checkpoints" / "left-step-4") is None
    panels = [sorted(path.name for path in (folder / "panels").iterdir()) for folder in (whole, run)]
    assert panels == [["step-000001.png", "step-000004.png"], ["step-000001.png"]]
    AcceleratorState._reset_state(True)
    lines = train(drives, run, *EACH_STEP, "--resume_from_checkpoint", "latest", steps=4)
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and names(run) == [f"step-{n}" for n in (1, 2, 3, 4)]
    assert not list((run / "checkpoints").glob("*left*"))


def test_lines_of_all_logs_outlive_a_power_cut_as_their_checkpoint_does(drives, whole, tmp_path, monkeypatch):
    synced, folder = [], copy_of(whole, tmp_path)
    shutil.rmtree(folder / "checkpoints" / "step-4")
    (folder / "probe.jsonl").write_text('{"step": 3, "miou": 0.1}\n')
    monkeypatch.setattr(run, "sync_file", lambda path: synced.append(path.name))
    train(drives, folder, *EACH_STEP, "--resume_from_checkpoint", "latest", steps=4)
    assert synced == ["metrics.jsonl", "probe.jsonl"]


def made_up(output_dir: Path, *steps: int, size: int = 10) -> None:
    """Write checkpoints that hold no model."""
    for step in steps:
        partial = output_dir / "checkpoints" / f".step-{step}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
            write_text(partial / name, f"{step} " * size)
        finish(partial, output_dir / "checkpoints" / f"step-{step}")


@pytest.mark.parametrize(("limit", "kept"), [(2, ["step-7", "step-9"]), (9, ["step-3", "step-5", "step-7", "step-9"])])
def test_rotation_keeps_the_newest(tmp_path, limit, kept):
    made_up(tmp_path, 3, 5, 7, 9)
    rotate(tmp_path, limit)
    assert names(tmp_path) == kept
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == kept


@pytest.mark.parametrize(("limit", "kept"), [(1, ["step-5"]), (2, ["step-3", "step-5"])])
def test_rotation_of_a_run_that_was_sent_back_keeps_none_of_the_future_it_left(tmp_path, limit, kept):
    made_up(tmp_path, 3, 5, 7, 9)
    leave_later(tmp_path, 3)
    left = ["left-step-5", "left-step-7", "left-step-9"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [*left, "step-3"]
    assert [damage(tmp_path / "checkpoints" / name) for name in left] == [None] * 3
    made_up(tmp_path, 5)
    rotate(tmp_path, limit)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == kept


def test_killed_at_any_moment_no_half_checkpoint_is_taken_for_a_whole_one(tmp_path):
    """Twenty SIGKILLs hit a process that writes, seals, replaces and rotates checkpoints without pause."""
    rng, made = random.Random(0), 0

    def write_on() -> None:
        steps = [int(path.name[5:]) for path in list_checkpoints(tmp_path)]
        step = max(steps, default=0)
        while True:
            step += 1
            made_up(tmp_path, step, size=20_000)
            rotate(tmp_path, 2)

    began = time.monotonic()
    made_up(tmp_path / "timed", 1, size=20_000)
    seconds = time.monotonic() - began  # for one checkpoint on this disk under its present load
    for _ in range(20):
        pid = in_child(write_on)
        time.sleep(rng.uniform(0.02, 0.15) + rng.uniform(0, 3) * seconds)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found = list_checkpoints(tmp_path)
        assert [damage(checkpoint) for checkpoint in found] == [None] * len(found)
        assert len(found) >= min(made, 1), "the last good one is gone"
        made = len(found)
    assert made, "no checkpoint was ever finished"
    sweep(tmp_path / "checkpoints")
    assert len(list((tmp_path / "checkpoints").iterdir())) == made


# --- disks ---


def test_a_full_disk_keeps_the_checkpoint_before_and_says_what_to_do(drives, whole, tmp_path, monkeypatch):
    """A limit on file sizes stands for the full disk, because the same calls fail."""
    original, before = run.save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(accelerator, recipe, step, *args, **kwargs):
        try:
            if step == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
            return original(accelerator, recipe, step, *args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with monkeypatch.context() as patch:
        patch.setattr(run, "save_checkpoint", save)
        with pytest.raises(
            OSError, match=r"checkpoint of step 2 could not be written \(.*safetensors.*File too large"
        ):
            train(drives, tmp_path / "run", *EACH_STEP, steps=4)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-1"]
    assert damage(tmp_path / "run" / "checkpoints" / "step-1") is None
    AcceleratorState._reset_state(True)
    resumed = train(drives, tmp_path / "run", *EACH_STEP, "--resume_from_checkpoint", "latest", steps=4)
    assert without_timings(resumed) == metrics(whole)


def test_folders_deleted_during_the_run(drives, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: shutil.rmtree(run / "checkpoints"))
        train(drives, run, *EACH_STEP, steps=3)
    assert names(run) == ["step-2", "step-3"]
    AcceleratorState._reset_state(True)
    at_step(monkeypatch, 2, lambda: shutil.rmtree(tmp_path / "other"))
    with pytest.raises(OSError, match=r"output_dir .*other: .*No such file.*mend the disk or the folder"):
        train(drives, tmp_path / "other", steps=3)
