"""Values that are not finite, collapse, and resumption with other numbers of processes or workers."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import REPOSITORY
from safetensors.torch import load_file
from small_runs import (
    EACH_STEP,
    MODEL,
    assert_goes_on_exactly,
    copy_of,
    flags,
    metrics,
    names,
    opened,
    train,
    without_timings,
)

from modeling_poodle import PoodleConfig, PoodleForPreTraining
from modeling_poodle.recipe_files import run_script
from training import health, pretrain
from training.checkpoint_files import finish
from training.checkpoints import read_rank_state
from training.pair_plans import PairSampling
from training.recipe import Recipe, parse_recipe
from training.resume import find_checkpoint, prepare_output_dir
from training.run import Run
from training.schedules import learning_rate
from training.video_sources import find_videos
from training.video_stream import PairLoader
from training.views import model_inputs

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


# --- numbers ---


def test_a_gradient_that_is_not_finite_changes_no_weight():
    """Five updates, of which the third is NaN, give bit for bit the weights, moments and step count of the other four."""
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


def test_the_norm_of_a_gradient_is_of_the_bits_that_checkpoints_and_logs_were_made_with():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(300, 70), torch.nn.LayerNorm(70), torch.nn.Linear(70, 9))
    optimizer, guard = torch.optim.AdamW(model.parameters()), health.Health(Accelerator(cpu=True))
    model(torch.randn(40, 300)).square().sum().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    assert guard.guard(model, optimizer).equal(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))))


def test_the_videos_of_a_loss_that_is_not_finite_are_named_in_one_line():
    watcher = health.Health(Accelerator(cpu=True))
    watcher.watch(torch.tensor(float("nan")), 1, ["b.mp4", "a\x1b[31m\n.mp4"])
    with pytest.raises(
        FloatingPointError, match=r"on the ranks that had it: a\\x1b\[31m\\n\.mp4, b\.mp4\. The"
    ) as stopped:
        watcher.stop_if_not_finite()
    assert str(stopped.value).isprintable()


def test_skipped_updates_are_counted_and_ten_running_stop_the_run(drives, tmp_path, monkeypatch):
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


def test_weights_that_are_not_finite_are_never_saved(drives, tmp_path):
    """The loss of step 1 is finite, but its update overflows. The checkpoint of step 1 is not written."""
    with pytest.raises(FloatingPointError, match=r"student\..* is not finite, so no checkpoint is written"):
        train(drives, tmp_path / "run", "--learning_rate", "1e38", "--warmup_steps", "0", *EACH_STEP, steps=3)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_flow_that_is_not_finite_is_no_flow():
    """NaN or infinite flow in a corner of an image gives the loss and the gradient of a corner that is marked invalid."""
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


def test_collapse_stops_the_run_and_keeps_the_checkpoints_from_before(drives, tmp_path, monkeypatch):
    monkeypatch.setattr(health, "LINES_ALLOWED", 3)

    def collapse(features):
        lines = metrics(run) if (run / "metrics.jsonl").exists() else []
        return torch.tensor(0.5 if len(lines) < 2 else 0.001)

    run = tmp_path / "run"
    monkeypatch.setattr(pretrain, "feature_std", collapse)
    with pytest.raises(
        FloatingPointError, match=r"collapsed to one direction \(feature_std 0.0010\) in the last 3 lines"
    ):
        train(drives, run, "--save_steps", "1", "--save_total_limit", "1", steps=9)
    assert names(run) == ["step-2", "step-3", "step-4"]  # without suspected collapse, only the last one is kept
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
    with pytest.raises(FloatingPointError, match=r"no pixel has flow .* in the last 20 lines.*another --flow"):
        resumed.judge({"feature_std": 0.5, "valid_fraction": 0.0})


# --- another number of processes or workers ---


def test_another_batch_needs_the_word_and_as_many_pairs_a_step(drives, whole, tmp_path, monkeypatch):
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
    held = opened(monkeypatch)
    lines = without_timings(train(drives, run, *latest, *halved, "--resume_inexact", "true", steps=4))
    assert_goes_on_exactly(held, whole / "checkpoints" / "step-3")
    before = metrics(whole)
    assert lines[:3] == before[:3]
    assert lines[3]["loss"] != before[3]["loss"]  # other pairs
    for same in ("step", "epoch", "lr", "momentum"):
        assert lines[3][same] == before[3][same]
    # This is now the configuration of the run, so it can be resumed exactly again.
    assert "resume_inexact" not in str(find_checkpoint(recipe(*halved)))


def test_a_finished_run_is_made_longer_by_the_word(drives, whole, tmp_path, monkeypatch):
    run = copy_of(whole, tmp_path)
    longer = ("--resume_from_checkpoint", "latest")
    with pytest.raises(ValueError, match=r"max_steps: 4 in the run, 5 now.*--resume_inexact true"):
        find_checkpoint(parse_recipe(flags(drives, run, *longer, steps=5)))
    held = opened(monkeypatch)
    lines = without_timings(train(drives, run, *longer, "--resume_inexact", "true", steps=5))
    assert_goes_on_exactly(held, whole / "checkpoints" / "step-4")
    assert lines[:4] == metrics(whole) and lines[4]["step"] == 5
    recipe = parse_recipe(flags(drives, run, steps=5))
    expected = learning_rate(4, 5, recipe.warmup_steps, recipe.learning_rate, recipe.min_learning_rate)
    assert lines[4]["lr"] == expected != lines[3]["lr"]


def test_ranks_in_different_spans_go_on_behind_all_of_them(drives, whole, tmp_path, monkeypatch):
    """Rank 1 has skipped videos, so it is two spans ahead of rank 0."""
    run = copy_of(whole, tmp_path)
    checkpoint, partial = run / "checkpoints" / "step-3", run / "checkpoints" / ".step-3.partial"
    shutil.rmtree(checkpoint.with_name("step-4"))
    checkpoint.rename(partial)
    (partial / "SHA256SUMS").unlink()
    shutil.copy(partial / "rank-0.safetensors", partial / "rank-1.safetensors")
    rank = json.loads((partial / "rank-0.json").read_text())
    size = rank["loader"]["openings"]  # openings of a span on one process
    for number, span in enumerate((1, 3)):
        rank["loader"].update(span=span, openings=(span + 1) * 2 * size, world_size=2)
        (partial / f"rank-{number}.json").write_text(json.dumps(rank))
    state = json.loads((partial / "state.json").read_text())
    (partial / "state.json").write_text(json.dumps({**state, "num_processes": 2}))
    finish(partial, checkpoint)
    held = opened(monkeypatch)
    train(drives, run, *EACH_STEP, "--resume_from_checkpoint", "latest", "--resume_inexact", "true", steps=4)
    assert held["span"] == 8
    # Two ranks with another number of workers also go on at a common place. In an exact resumption each goes on where it was.
    places = [
        [read_rank_state(checkpoint, 2, rank, 2, {}, inexact)["loader"] for rank in (0, 1)]
        for inexact in (True, False)
    ]
    assert [place["openings"] for place in places[0]] == [8 * size, 8 * size]
    assert [place["span"] for place in places[1]] == [1, 3]


def test_an_inexact_resumption_reads_only_pairs_that_the_run_has_not_seen(drives):
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
    with pytest.raises(ValueError, match="videos was"):  # resume_inexact does not allow another data set
        other.load_state_dict(state, inexact=True)
    # The number of ranks is the same, but another rank is two spans ahead. After an inexact resumption this rank goes on behind it.
    state = {**before.state_dict(), "openings": (7 + 1) * 12}
    again = PairLoader(paths, sampling, batch_size=4, num_workers=0, world_size=3)
    again._openings_per_span = 12
    with pytest.raises(ValueError, match="earlier version"):
        again.load_state_dict(state)
    again.load_state_dict(state, inexact=True)
    assert again.span == 8


def test_a_log_window_and_counts_go_on_where_they_were(drives, tmp_path, monkeypatch):
    """The run resumes from step 3, in the middle of a window of two steps. The update of step 1 was skipped."""
    accumulate = Run.accumulate

    def poisoned(run, *args, **kwargs):
        if run.step == 0:
            next(p for p in run.model.parameters() if p.grad is not None).grad.fill_(float("inf"))
        accumulate(run, *args, **kwargs)

    monkeypatch.setattr(Run, "accumulate", poisoned)
    flags = (*EACH_STEP, "--logging_steps", "2")
    whole = train(drives, tmp_path, *flags, steps=4)
    shutil.rmtree(tmp_path / "checkpoints" / "step-4")
    AcceleratorState._reset_state(True)
    resumed = train(drives, tmp_path, *flags, "--resume_from_checkpoint", "latest", steps=4)
    assert without_timings(resumed) == without_timings(whole)
    assert [line["skipped_updates"] for line in resumed] == [1, 1]


def test_the_first_step_whose_loss_is_not_finite_is_named_with_its_own_videos(fresh_accelerator):
    watcher = health.Health(Accelerator(cpu=True))
    for step, loss in enumerate((0.5, float("nan"), 0.5, float("inf")), 1):
        watcher.watch(torch.tensor(loss), step, [f"{step}.mp4"])
    with pytest.raises(
        FloatingPointError, match=r"not finite at step 2; videos of that batch on the ranks that had it: 2\.mp4\. The"
    ):
        watcher.stop_if_not_finite()
    watcher.judge({"valid_fraction": 1.0})
    assert watcher.videos == []  # the videos of a whole run would fill the memory


@pytest.mark.parametrize(
    ("ranks", "said"),
    [([[-1, 0], [4, 0]], "loss is not finite at step 4"), ([[-1, 0], [-1, 12]], "not finite in the last 12 steps")],
)
def test_what_one_rank_saw_stops_all(ranks, said):
    watcher = health.Health(SimpleNamespace(device="cpu", gather=lambda own: torch.tensor(ranks).float()))
    with pytest.raises(FloatingPointError, match=said):
        watcher.stop_if_not_finite()


def test_moments_that_are_not_finite_are_not_saved(fresh_accelerator):
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    watcher = health.Health(Accelerator(cpu=True))
    layer.register_buffer("empty", torch.zeros(1, 0))  # such as the register tokens of a network without any
    watcher.refuse_bad_weights(layer, optimizer)
    optimizer.state[layer.bias]["exp_avg_sq"][1] = float("inf")
    with pytest.raises(FloatingPointError, match="exp_avg_sq of bias is not finite, so no checkpoint is written"):
        watcher.refuse_bad_weights(layer, optimizer)


def test_an_error_without_words_is_named(monkeypatch):
    def out_of_memory():
        raise MemoryError

    with pytest.raises(SystemExit, match="^error: MemoryError$"):
        run_script(out_of_memory)
    with pytest.raises(ZeroDivisionError, match="division"):  # a bug in the code needs its stack trace
        run_script(lambda: 1 // 0)


@pytest.mark.parametrize("traceback", ["", "1"])
def test_ctrl_c_ends_a_script_by_its_signal_and_with_a_word(traceback):
    script = "import os, signal; from modeling_poodle.recipe_files import run_script; run_script(lambda: os.kill(os.getpid(), signal.SIGINT))"
    environment = {**os.environ, "POODLE_TRACEBACK": traceback}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == -signal.SIGINT  # a shell then ends its loop around the command too
    assert ("Traceback" in done.stderr) == bool(traceback)
    assert traceback or done.stderr == "\ninterrupted\n"


def test_a_script_searches_for_garbage_again_once_its_imports_are_done(monkeypatch):
    seen = []
    monkeypatch.setattr(gc, "freeze", lambda: seen.append("frozen"))
    try:
        gc.disable()
        run_script(lambda: seen.append(gc.isenabled()))
    finally:
        gc.enable()
    assert seen == ["frozen", True]
