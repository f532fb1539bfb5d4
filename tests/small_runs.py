"""Small runs of training/pretrain.py shared by several test files: videos, flags, and a run with four checkpoints."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from training import pretrain
from training.checkpoint_files import list_checkpoints
from training.pretrain import main
from training.street_files import write_videos

RESNET = {
    "model_type": "resnet", "layer_type": "basic", "depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "embedding_size": 8,
}  # fmt: skip
MODEL = {"backbone_config": RESNET, "decoder_reduction": 2, "projection_hidden_size": 16, "projection_size": 8}


@pytest.fixture(scope="session")
def drives(tmp_path_factory) -> Path:
    """Two drives that tests read and no test writes to."""
    folder = tmp_path_factory.mktemp("drives")
    write_videos(folder, num_videos=2, duration=1.5, fps=4, height=64, width=128, num_processes=1)
    return folder


@pytest.fixture
def fresh_accelerator():
    """Keep runs in this process from finding the accelerator of the run before; for `usefixtures`."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def flags(drives, output_dir, *more, model=None, steps=3):
    return [
        "--config", "street", "--videos", str(drives), "--output_dir", str(output_dir), "--model", json.dumps(model or MODEL),
        "--crop_size", "64", "128", "--subcrop_size", "32", "--num_subcrops", "2", "--per_device_train_batch_size", "2",
        "--max_steps", str(steps), "--warmup_steps", "1", "--logging_steps", "1", "--panel_steps", "1000", "--save_steps", "1000",
        "--dataloader_num_workers", "0", *more,
    ]  # fmt: skip


def train(drives, output_dir, *more, **kwargs) -> list[dict]:
    main(flags(drives, output_dir, *more, **kwargs))
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


TIMINGS = ("pairs_per_second", "data_wait")
EACH_STEP = ("--save_steps", "1", "--save_total_limit", "9")


def without_timings(lines: list[dict]) -> list[dict]:
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def names(output_dir: Path) -> list[str]:
    return [path.name for path in list_checkpoints(output_dir)]


def at_step(monkeypatch, step: int, action) -> None:
    """Call `action()` after the backward pass of step `step`, when its metrics are summed; steps count from 1."""
    original = pretrain.Run.accumulate

    def accumulate(run, *args, **kwargs):
        if run.step + 1 == step:
            action()
        original(run, *args, **kwargs)

    monkeypatch.setattr(pretrain.Run, "accumulate", accumulate)


def opened(monkeypatch) -> dict:
    """
    Return a dict that is filled once a run is open, before its first step.

    It holds `model` and `optimizer`, tensors by their names in a checkpoint, `sums`, and the `span` of the run's videos.
    """
    held, original = {}, pretrain.Run.open

    def open_and_look(run, checkpoint):
        original(run, checkpoint)
        names = {parameter: name for name, parameter in run.model.named_parameters()}
        state = run.optimizer.state.items()
        moments = {f"{key}.{names[p]}": value.clone() for p, values in state for key, value in values.items()}
        held["model"] = {name: value.clone() for name, value in run.model.state_dict().items()}
        held.update(optimizer=moments, sums=run.sums.clone(), span=run.loader.span)

    monkeypatch.setattr(pretrain.Run, "open", open_and_look)
    return held


def assert_goes_on_exactly(held: dict, checkpoint: Path) -> None:
    """Assert that what `opened` held equals the checkpoint bit for bit: weights, buffers, moments and their step counts."""
    for part in ("model", "optimizer"):
        saved = load_file(checkpoint / f"{part}.safetensors")
        assert held[part].keys() == saved.keys()
        assert [name for name, value in saved.items() if not torch.equal(held[part][name], value)] == []
    assert {name.split(".")[0] for name in saved} == {"exp_avg", "exp_avg_sq", "step"}
    steps = {value.item() for name, value in saved.items() if name.startswith("step.")}
    assert steps == {float(checkpoint.name.removeprefix("step-"))}


@pytest.fixture(scope="module")
def whole(drives, tmp_path_factory) -> Path:
    """A run of four steps with a checkpoint after each."""
    AcceleratorState._reset_state(True)
    output_dir = tmp_path_factory.mktemp("whole") / "run"
    train(drives, output_dir, *EACH_STEP, steps=4)
    return output_dir


def metrics(output_dir: Path) -> list[dict]:
    return without_timings([json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()])


def copy_of(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))
