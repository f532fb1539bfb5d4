"""Faults of the run itself, in this process: signals, disks, damaged files, numbers that are not finite, workers that die."""

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
from safetensors.torch import load_file
from test_pretrain import MODEL, drives, flags, fresh_accelerator, train  # noqa: F401 (fixtures)

from modeling_poodle import PoodleConfig, PoodleForPreTraining
from training import health, pretrain
from training.checkpoint_files import damage, finish, list_checkpoints, rotate, sweep, write_text
from training.faults import faults_in_words, in_words
from training.locks import lock_output_dir
from training.ranks import RESUMABLE_EXIT_CODE, StopSignals
from training.recipe import Recipe, parse_recipe
from training.resume import find_checkpoint, prepare_output_dir
from training.video_sources import find_videos
from training.video_stream import PairLoader, PairSampling
from training.views import model_inputs

TIMINGS = ("pairs_per_second", "data_wait")
EACH_STEP = ("--save_steps", "1", "--save_total_limit", "9")


def without_timings(lines: list[dict]) -> list[dict]:
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def names(output_dir: Path) -> list[str]:
    return [path.name for path in list_checkpoints(output_dir)]


def at_step(monkeypatch, step: int, action) -> None:
    """`action()` at the end of the backward pass of a step, which counts from 1."""
    original = pretrain.Run.accumulate

    def accumulate(run, *args, **kwargs):
        if run.step + 1 == step:
            action()
        original(run, *args, **kwargs)

    monkeypatch.setattr(pretrain.Run, "accumulate", accumulate)


@pytest.fixture(scope="module")
def whole(drives, tmp_path_factory) -> Path:  # noqa: F811
    """A run of four steps with a checkpoint after each."""
    AcceleratorState._reset_state(True)
    output_dir = tmp_path_factory.mktemp("whole") / "run"
    train(drives, output_dir, *EACH_STEP, steps=4)
    return output_dir


def metrics(output_dir: Path) -> list[dict]:
    return without_timings([json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()])


def copy_of(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def in_child(action) -> int:
    """Pid of a fork that runs `action()` and then waits for its end."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            signal.pause()
        finally:
            os._exit(9)
    return pid


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


# --- signals ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_the_rest_is_the_same(drives, whole, tmp_path, monkeypatch, number):  # noqa: F811
    before = [signal.getsignal(each) for each in StopSignals.SIGNALS]
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: signal.raise_signal(number))
        with pytest.raises(SystemExit) as ended:
            train(drives, tmp_path / "run", steps=4)
    assert ended.value.code == RESUMABLE_EXIT_CODE == 75
    assert names(tmp_path / "run") == ["step-2"] and len(metrics(tmp_path / "run")) == 2
    assert [signal.getsignal(each) for each in StopSignals.SIGNALS] == before
    AcceleratorState._reset_state(True)
    resumed = train(drives, tmp_path / "run", "--resume_from_checkpoint", "latest", steps=4)
    assert without_timings(resumed) == metrics(whole)


def test_a_second_sigint_ends_the_process_at_once():
    def interrupted() -> None:
        with StopSignals(Accelerator(cpu=True), timedelta(seconds=1)) as signals:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # however often: it is the system that sends it
            signal.raise_signal(signal.SIGINT)
            assert signals.agreed() and signals.name == "SIGINT"
            signal.raise_signal(signal.SIGINT)

    _, status = os.waitpid(in_child(interrupted), 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGINT


def test_the_run_is_asked_to_stop_when_accelerate_launch_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # what the launcher leaves in the environment
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
        if os.fork() == 0:  # a loader worker, which outlives its killed parent by some seconds
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
    lock_output_dir(output_dir)  # one after the other in one process


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
    if os.geteuid() == 0:  # root may write anywhere: be nobody for the files
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
def test_latest_goes_back_to_the_last_whole_checkpoint(drives, whole, tmp_path, caplog, name, harm, said):  # noqa: F811
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


def test_no_whole_checkpoint_is_an_error_that_names_each(drives, whole, tmp_path):  # noqa: F811
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


def test_a_run_from_before_the_damage_writes_the_same_again(drives, whole, tmp_path):  # noqa: F811
    run = copy_of(whole, tmp_path)
    flip(run / "checkpoints" / "step-4" / "optimizer.safetensors")
    flip(run / "checkpoints" / "step-3" / "rank-0.safetensors")
    resumed = train(drives, run, *EACH_STEP, "--resume_from_checkpoint", "latest", steps=4)
    assert without_timings(resumed) == metrics(whole)
    for name in ("model.safetensors", "optimizer.safetensors", "rank-0.safetensors"):
        ours, theirs = (load_file(folder / "checkpoints" / "step-4" / name) for folder in (run, whole))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert all(damage(checkpoint) is None for checkpoint in list_checkpoints(run))


def made_up(output_dir: Path, *steps: int, size: int = 10) -> None:
    """Checkpoints without a model in them."""
    for step in steps:
        partial = output_dir / "checkpoints" / f".step-{step}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
            write_text(partial / name, f"{step} " * size)
        finish(partial, output_dir / "checkpoints" / f"step-{step}")


@pytest.mark.parametrize(
    ("step", "limit", "kept"),
    [
        (9, 2, ["step-7", "step-9"]),
        (9, 9, ["step-3", "step-5", "step-7", "step-9"]),
        (5, 1, ["step-5"]),  # resumed from 3: 7 and 9 are of a future that was left, and never kept in the place of 5
        (5, 2, ["step-3", "step-5"]),
    ],
)
def test_rotation_keeps_the_one_just_written_and_those_before_it(tmp_path, step, limit, kept):
    made_up(tmp_path, 3, 5, 7, 9)
    rotate(tmp_path, step, limit)
    assert names(tmp_path) == kept
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == kept


def test_killed_at_any_moment_no_half_checkpoint_is_taken_for_a_whole_one(tmp_path):
    """Twenty SIGKILLs while checkpoints are written, sealed, replaced and rotated, as fast as they can be."""
    rng, made = random.Random(0), 0

    def write_on() -> None:
        steps = [int(path.name[5:]) for path in list_checkpoints(tmp_path)]
        step = max(steps, default=0)
        while True:
            step += 1
            made_up(tmp_path, step, size=20_000)
            rotate(tmp_path, step, 2)

    for _ in range(20):
        pid = in_child(write_on)
        time.sleep(rng.uniform(0.02, 0.15))
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


def test_a_full_disk_keeps_the_checkpoint_before_and_says_what_to_do(drives, whole, tmp_path, monkeypatch):  # noqa: F811
    """A limit on file sizes stands for the full disk: writing fails at the same calls."""
    original, before = pretrain.save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(accelerator, recipe, step, *args, **kwargs):
        try:
            if step == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
            return original(accelerator, recipe, step, *args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "save_checkpoint", save)
        with pytest.raises(
            OSError, match=r"checkpoint of step 2 could not be written \(.*safetensors.*File too large"
        ):
            train(drives, tmp_path / "run", *EACH_STEP, steps=4)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-1"]
    assert damage(tmp_path / "run" / "checkpoints" / "step-1") is None
    AcceleratorState._reset_state(True)
    resumed = train(drives, tmp_path / "run", *EACH_STEP, "--resume_from_checkpoint", "latest", steps=4)
    assert without_timings(resumed) == metrics(whole)


def test_folders_deleted_during_the_run(drives, tmp_path, monkeypatch):  # noqa: F811
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: shutil.rmtree(run / "checkpoints"))
        train(drives, run, *EACH_STEP, steps=3)
    assert names(run) == ["step-2", "step-3"]
    AcceleratorState._reset_state(True)
    at_step(monkeypatch, 2, lambda: shutil.rmtree(tmp_path / "other"))
    with pytest.raises(OSError, match=r"output_dir .*other: .*No such file.*mend the disk or the folder"):
        train(drives, tmp_path / "other", steps=3)


# --- numbers ---


def test_a_gradient_that_is_not_finite_changes_no_weight():
    """Five updates of which the third is NaN leave what the four others leave, on the host as on the device: bit for bit."""
    torch.manual_seed(0)
    start, gradients = torch.randn(7, 5), torch.randn(5, 7, 5)
    guard, ends = health.Health(Accelerator(cpu=True)), []
    for poisoned in (True, False):
        layer = torch.nn.Linear(5, 7, bias=False)
        layer.weight.data.copy_(start)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
        for number, gradient in enumerate(gradients):
            if number == 2 and not poisoned:
                continue
            layer.weight.grad = gradient.clone()
            if number == 2:
                layer.weight.grad[3, 3] = float("nan")
            norm = guard.guard(layer, optimizer)
            assert number == 2 or norm.item() == pytest.approx(gradient.norm().item(), rel=1e-6)
            optimizer.step()
        (state,) = optimizer.state.values()
        ends.append([layer.weight.detach(), state["exp_avg"], state["exp_avg_sq"], state["step"]])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*ends))
    assert int(guard.skipped_updates) == 1 and int(guard.skipped_running) == 0


def test_skipped_updates_are_counted_and_ten_running_stop_the_run(drives, tmp_path, monkeypatch):  # noqa: F811
    original = pretrain.Run.accumulate

    def accumulate(run, *args, **kwargs):
        if run.step >= 1:
            next(p for p in run.model.parameters() if p.grad is not None).grad.fill_(float("inf"))
        original(run, *args, **kwargs)

    monkeypatch.setattr(pretrain.Run, "accumulate", accumulate)
    more = ("--learning_rate", "0.01", "--teacher_momentum", "1.0", *EACH_STEP)
    with pytest.raises(FloatingPointError, match="gradient was not finite in the last 10 steps.*are kept"):
        train(drives, tmp_path / "run", *more, steps=30)
    lines = metrics(tmp_path / "run")
    assert [line["skipped_updates"] for line in lines] == list(range(10))
    assert lines[0]["grad_norm"] > 0 and lines[1]["grad_norm"] is None
    first, last = (load_file(tmp_path / "run" / "checkpoints" / f"step-{n}" / "model.safetensors") for n in (2, 10))
    weights = [name for name in first if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert all(torch.equal(first[name], last[name]) for name in weights)


def test_weights_that_are_not_finite_are_never_saved(drives, tmp_path):  # noqa: F811
    """The loss of step 1 is finite, its update overflows: step 1's checkpoint is not written."""
    with pytest.raises(FloatingPointError, match=r"student\..* is not finite, so no checkpoint is written"):
        train(drives, tmp_path / "run", "--learning_rate", "1e38", "--warmup_steps", "0", *EACH_STEP, steps=3)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_flow_that_is_not_finite_is_no_flow():
    """NaN and infinite flow in an image's corner: the same loss and gradient as if that corner were marked invalid."""
    torch.manual_seed(0)
    model = PoodleForPreTraining(PoodleConfig(**{**MODEL, "pooled_weight": 0.0, "dense_weight": 1.0}))
    frames = torch.randint(0, 256, (2, 2, 3, 64, 96), dtype=torch.uint8)
    flow, valid_mask = torch.randn(2, 2, 2, 64, 96), torch.ones(2, 2, 64, 96, dtype=torch.bool)
    broken, marked = flow.clone(), valid_mask.clone()
    broken[0, 0, 1, :20, :30], broken[1, 1, :, :9, :9] = float("nan"), float("inf")
    marked[0, 0, :20, :30] = marked[1, 1, :9, :9] = False
    recipe, gradients = Recipe(crop_size=[64, 96], num_subcrops=2, subcrop_size=32), []
    for batch in ({"flow": broken, "valid_mask": valid_mask}, {"flow": flow, "valid_mask": marked}):
        inputs = model_inputs({"frames": frames, **batch}, recipe, torch.Generator().manual_seed(0))
        inputs.pop("matched")
        model.zero_grad()
        output = model(**inputs, subcrop_size=32)
        output.loss.backward()
        gradients.append(next(model.parameters()).grad.clone())
    assert 0 < output.valid_fraction < 1 and torch.isfinite(gradients[0]).all()
    torch.testing.assert_close(gradients[0], gradients[1])


def test_collapse_stops_the_run_and_keeps_the_checkpoints_from_before(drives, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(health, "LINES_ALLOWED", 3)

    def collapse(features):
        return torch.tensor(0.5 if len(metrics(run)) < 2 else 0.001)

    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    monkeypatch.setattr(pretrain, "feature_std", collapse)
    with pytest.raises(
        ArithmeticError, match=r"collapsed to one direction \(feature_std 0.0010\) in the last 3 lines"
    ):
        train(drives, run, "--save_steps", "1", "--save_total_limit", "1", steps=9)
    assert names(run) == ["step-2", "step-3", "step-4"]  # without the doubt only the last
    assert [line["feature_std"] for line in metrics(run)] == pytest.approx([0.5, 0.5, 0.001, 0.001, 0.001])


def test_no_valid_pixel_for_long_stops_the_run(caplog):
    watcher = health.Health(Accelerator(cpu=True))
    for _ in range(health.LINES_ALLOWED - 1):
        watcher.judge({"feature_std": 0.5, "valid_fraction": 0.0})
    watcher.judge({"feature_std": 0.5, "valid_fraction": 0.1})  # one pixel is enough to go on
    watcher.judge({"feature_std": 0.5, "valid_fraction": 0.0})
    assert caplog.text.count("no pixel has flow that may be used") == 2
    resumed = health.Health(Accelerator(cpu=True))
    resumed.load_state_dict(watcher.state_dict())
    for _ in range(health.LINES_ALLOWED - 2):
        resumed.judge({"feature_std": 0.5, "valid_fraction": 0.0})
    with pytest.raises(ArithmeticError, match=r"no pixel has flow .* in the last 20 lines.*another --flow"):
        resumed.judge({"feature_std": 0.5, "valid_fraction": 0.0})


# --- another number of processes or workers ---


def test_another_batch_needs_the_word_and_as_many_pairs_a_step(drives, whole, tmp_path):  # noqa: F811
    run = copy_of(whole, tmp_path)
    shutil.rmtree(run / "checkpoints" / "step-4")
    latest = (*EACH_STEP, "--resume_from_checkpoint", "latest")
    halved = ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2")

    def recipe(*more):
        return parse_recipe(flags(drives, run, *latest, *more, steps=4))

    accelerator = Accelerator(cpu=True)
    for more in (halved, ("--dataloader_num_workers", "1")):
        with pytest.raises(ValueError, match=r"another configuration.*run's own values.*--resume_inexact true"):
            prepare_output_dir(accelerator, recipe(*more))
    with pytest.raises(ValueError, match=r"2 pairs a step, this one has 4 \(1 processes x 4 pairs x 1 micro-steps\)"):
        prepare_output_dir(accelerator, recipe("--per_device_train_batch_size", "4", "--resume_inexact", "true"))
    AcceleratorState._reset_state(True)
    lines = without_timings(train(drives, run, *latest, *halved, "--resume_inexact", "true", steps=4))
    before = metrics(whole)
    assert lines[:3] == before[:3]
    assert lines[3]["loss"] != before[3]["loss"]  # other pairs
    for same in ("step", "epoch", "lr", "momentum"):
        assert lines[3][same] == before[3][same]
    # The run now has this configuration: from here on it is exact again.
    assert "resume_inexact" not in str(find_checkpoint(recipe(*halved)))


def test_an_inexact_resumption_reads_only_pairs_that_the_run_has_not_seen(drives):  # noqa: F811
    paths, sampling = find_videos([str(drives)], None), PairSampling(crop_size=(32, 32), pairs_per_video=2)
    before = PairLoader(paths, sampling, batch_size=4, num_workers=0, world_size=3)
    before._openings_per_span, before.span = 12, 5
    state = before.state_dict()
    after = PairLoader(paths, sampling, batch_size=3, num_workers=0, world_size=1)
    after._openings_per_span = 10
    with pytest.raises(ValueError, match="cannot resume the stream exactly: num_processes was 3, now 1"):
        after.load_state_dict(state)
    after.load_state_dict(state, inexact=True)
    seen = {shard for span in range(6) for shard in before.openings(span)}
    assert len(seen) == 72 and not seen & set(after.openings(after.span))
    other = PairLoader(paths[:1], sampling, batch_size=3)
    with pytest.raises(ValueError, match="videos was"):  # the words do not cover another data set
        other.load_state_dict(state, inexact=True)


# --- the loader's workers ---


def crash(sample: dict) -> None:
    if sample["repeat"] == 1:
        os.kill(os.getpid(), signal.SIGSEGV)


def fill_memory(sample: dict) -> None:
    if sample["repeat"] == 1:  # as a full /dev/shm: no file of shared memory can grow
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def stand_still(sample: dict) -> None:
    if sample["repeat"] == 1:
        time.sleep(3600)


def loader_of(drives, pair_flow=None, workers=1):  # noqa: F811
    sampling = PairSampling(crop_size=(32, 32), pairs_per_video=2)
    return PairLoader(find_videos([str(drives)], None)[:1], sampling, 1, workers, pair_flow=pair_flow)


def read_all(loader) -> None:
    with faults_in_words(Recipe(), loader):
        try:
            for _ in loader:
                pass
        finally:
            loader.close()


def test_a_worker_that_crashes_is_named_with_its_video(drives):  # noqa: F811
    (video,) = loader_of(drives).paths
    with pytest.raises(
        ChildProcessError, match=r"exited unexpectedly .*an empty file in its place.*--resume_from_checkpoint"
    ) as error:
        read_all(loader_of(drives, crash))
    assert f"while it read {video} (SIGSEGV)" in str(error.value)


def test_a_worker_without_shared_memory_is_named(drives):  # noqa: F811
    with pytest.raises(MemoryError, match=r"out of shared memory \(/dev/shm\): .*--shm-size"):
        read_all(loader_of(drives, fill_memory))


def test_workers_outlive_a_signal_to_the_group_and_end_with_the_run(drives):  # noqa: F811
    loader = loader_of(drives, stand_still)
    batches = iter(loader)
    next(batches)
    (worker,) = loader._iterator._workers
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker.pid, number)
    time.sleep(0.1)
    assert worker.is_alive()
    began = time.monotonic()
    loader.close()  # though it ignores SIGTERM, and reads for an hour
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
        ("mat1 and mat2 shapes cannot be multiplied", None, ""),
    ],
)  # fmt: skip
def test_messages_of_torch_in_words(message, kind, said):
    fault = in_words(message, ["a.mp4"], 9)
    assert type(fault) is (type(None) if kind is None else kind) and (kind is None or said in str(fault))
