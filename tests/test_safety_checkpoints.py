"""Malicious checkpoints to resume from: nothing outside their folder is opened, and the fault is named."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from small_runs import EACH_STEP, copy_of, flags, train

from training.checkpoint_files import damage
from training.checkpoints import export_network
from training.recipe import parse_recipe
from training.resume import prepare_output_dir


def reseal(checkpoint: Path) -> None:
    """Write new checksums that fit, as the author of a malicious checkpoint would."""
    (checkpoint / "SHA256SUMS").unlink()
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint.iterdir()}
    (checkpoint / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))


NOTHING = hashlib.sha256(b"").hexdigest()


@pytest.mark.parametrize("name", ["/dev/null", "../outside", "..", "a/b", "\x1b[2J", ""])
def test_checksums_of_a_checkpoint_lead_nowhere_else(whole, tmp_path, name):
    checkpoint = copy_of(whole, tmp_path) / "checkpoints" / "step-4"
    assert damage(checkpoint) is None
    (checkpoint.parent / "outside").touch()
    with open(checkpoint / "SHA256SUMS", "a") as file:
        file.write(f"{NOTHING}  {name}\n")
    assert damage(checkpoint) == f"SHA256SUMS names {name!r}, which is no file of a checkpoint"


@pytest.mark.parametrize("name", ["model.safetensors", "rank-0.json", "SHA256SUMS"])
@pytest.mark.parametrize("device", [False, True])
def test_links_and_devices_in_a_checkpoint_are_not_opened(whole, tmp_path, name, device):
    checkpoint = copy_of(whole, tmp_path) / "checkpoints" / "step-4"
    target = Path(os.devnull) if device else (checkpoint / name).rename(tmp_path / "outside")
    (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / name).symlink_to(target)
    if name != "SHA256SUMS":
        reseal(checkpoint)
    assert damage(checkpoint) == f"{name!r} is not a regular file"
    if name != "SHA256SUMS":  # a file that SHA256SUMS does not name is refused too
        (checkpoint / name).unlink()
        (checkpoint / name).touch()
        lines = (checkpoint / "SHA256SUMS").read_text().splitlines(keepends=True)
        (checkpoint / "SHA256SUMS").write_text("".join(line for line in lines if name not in line))
        assert damage(checkpoint) == f"SHA256SUMS does not name {name!r}"


def test_what_file_browsers_and_servers_leave_in_a_checkpoint_is_none_of_its_files(whole, tmp_path):
    checkpoint = copy_of(whole, tmp_path) / "checkpoints" / "step-4"
    (checkpoint / ".ipynb_checkpoints").mkdir()
    (checkpoint / "@eaDir").mkdir()
    (checkpoint / "._model.safetensors").write_bytes(b"AppleDouble")
    assert damage(checkpoint) is None


def fields_of(path: Path, *keys: str, **values) -> None:
    """Change fields of a JSON file, in the mapping below `keys`; `None` removes a field."""
    content = inner = json.loads(path.read_text())
    for key in keys:
        inner = inner[key]
    inner.update(values)
    for name in [name for name, value in values.items() if value is None]:
        del inner[name]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.write_text("{}"), "state.json: step is missing"),
        (lambda path: path.write_text("[]"), r"state.json: expected a mapping with step, .*, got \[\]"),
        (lambda path: path.write_text("[" * 100_000), "state.json cannot be read"),
        (lambda path: path.write_bytes(b"\xff"), "state.json cannot be read"),
        (lambda path: path.write_text("1" * 5000), "state.json cannot be read"),
        (lambda path: fields_of(path, pairs_per_step=None), "state.json: pairs_per_step is missing"),
        (lambda path: fields_of(path, step="4"), "state.json: step must be an integer of at least 0, got '4'"),
        (lambda path: fields_of(path, step=-1), "state.json: step must be an integer of at least 0, got -1"),
        (lambda path: fields_of(path, num_processes=True), "state.json: num_processes must be an integer"),
    ],
)
def test_a_state_that_is_none_is_named(fresh_accelerator, drives, whole, tmp_path, harm, message):
    run = copy_of(whole, tmp_path)
    checkpoint = run / "checkpoints" / "step-4"
    harm(checkpoint / "state.json")
    reseal(checkpoint)
    recipe = parse_recipe(flags(drives, run, *EACH_STEP, "--resume_from_checkpoint", "latest", steps=4))
    with pytest.raises(ValueError, match=message):
        prepare_output_dir(Accelerator(cpu=True), recipe)
    with pytest.raises(ValueError, match=message):
        export_network(run, tmp_path / "student", "student")


def tensors_of(path: Path, **values) -> None:
    save_file({**load_file(path), **values}, path)


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("rank-0.json", lambda path: path.write_text("[]"), "rank-0.json: expected a mapping with loader"),
        ("rank-0.json", lambda path: fields_of(path, skipped=[1]), "rank-0.json: skipped must be a mapping"),
        ("rank-0.json", lambda path: fields_of(path, streaks={}), "rank-0.json: streaks: feature_std is missing"),
        ("rank-0.json", lambda path: fields_of(path, "loader", span=0.5), "rank-0.json: loader: span must be an integer"),
        ("rank-0.json", lambda path: fields_of(path, "loader", loader=[]), "loader: loader must be a mapping or unset"),
        ("rank-0.json", lambda path: fields_of(path, "loader", loader={"x": 1}), "loader.loader is not a loader state"),
        ("rank-0.safetensors", lambda path: tensors_of(path, sums=torch.ones(2)), r"sums must be torch.float32 \(5,\), got .*\(2,\)"),
        ("rank-0.safetensors", lambda path: tensors_of(path, rng=torch.zeros(3)), "rank-0.safetensors: rng must be torch.uint8"),
        ("rank-0.safetensors", lambda path: tensors_of(path, rng=torch.zeros_like(torch.get_rng_state())), "rng is no state of torch's generator"),
        ("optimizer.safetensors", lambda path: tensors_of(path, **{next(iter(load_file(path))): torch.ones(1, 1, 3)}), r"optimizer.safetensors: exp_avg.* is of shape \(1, 1, 3\)"),
    ],
)  # fmt: skip
def test_a_rank_s_state_that_is_none_is_named(fresh_accelerator, drives, whole, tmp_path, name, harm, message):
    run = copy_of(whole, tmp_path)
    checkpoint = run / "checkpoints" / "step-3"
    shutil.rmtree(checkpoint.with_name("step-4"))
    harm(checkpoint / name)
    reseal(checkpoint)
    with pytest.raises(ValueError, match=message):
        train(drives, run, *EACH_STEP, "--resume_from_checkpoint", "latest", steps=4)
