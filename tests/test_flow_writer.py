"""What `python -m training.flow` writes, which flow it refuses to mix, and what it leaves after a failure."""

import resource
import shutil
import signal

import numpy as np
import pytest
from conftest import REPOSITORY
from flow_folders import recipe_of, videos, write, writer_flags
from forked_scripts import forked
from safetensors.numpy import save

from training import flow_writer
from training.flow_files import (
    FlowFiles,
    opening_file,
    precomputed_epochs,
)
from training.pair_plans import PairSampling
from training.recipe import Recipe
from training.video_files import UnreadableVideo
from training.video_stream import PairLoader, video_pairs

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_an_estimator_is_known_by_the_contents_of_its_weights(tmp_path, monkeypatch):
    def known(**values) -> dict:
        return flow_writer.estimator_fields(Recipe(videos=["a.mp4"], **values))

    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    for file, values in (
        (tmp_path / "raft.pth", {"flow": "raft_small", "flow_weights": str(tmp_path / "raft.pth")}),
        (model / "model.safetensors", {"flow": "unflow", "flow_model": str(tmp_path / "run")}),
    ):
        file.write_bytes(b"one")
        before = known(**values)
        file.write_bytes(b"two")
        assert known(**values) != before
        file.write_bytes(b"one")
        assert known(**values) == before
    assert known(flow="unflow", flow_model=str(model)) == before
    # The flow of a network depends on its dtype and its updates. DIS has no dtype, weights or updates.
    assert known(flow="unflow", flow_model=str(model), bf16=True) != before
    for name, values in (("bf16", (False, True)), ("flow_updates", (1, 2))):
        some, others = ({"flow": "raft_small", name: value} for value in values)
        assert known(**some) != known(**others)
        assert known(**{**some, "flow": "dis"}) == known(**{**others, "flow": "dis"}) == {"flow": "dis"}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").rename("unflow")  # `flow_model unflow` names this folder, not the estimator
    assert known(flow="unflow", flow_model="unflow") == before


def test_a_flow_that_is_not_finite_is_written_down_as_a_reason(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(save({"other": np.zeros(1)}))
    assert not flow_writer.is_written(file)  # a file of another kind is written anew
    sample = {"video": "a.mp4", "flow": np.full((2, 2, 4, 4), np.inf, np.float32)}
    assert flow_writer.write_opening(file, "a.mp4", [sample]) == 0
    assert not file.exists() and file.with_suffix(".skipped").read_text() == "gives a flow that is not finite"


def test_the_writer_refuses_what_would_mix(drives, written, tmp_path):
    with pytest.raises(ValueError, match="holds another recipe's flow: seed 0 there, 3 now"):
        write(drives, written, "--seed", "3")
    with pytest.raises(ValueError, match="another recipe's flow: flow dis there, exact now"):
        write(drives, written, "--flow", "exact")
    with pytest.raises(ValueError, match="flow must name the estimator"):
        write(drives, tmp_path, "--flow", "precomputed", "--flow_dir", str(written))
    with pytest.raises(ValueError, match="--epochs must be at least 1"):
        write(drives, tmp_path, "--epochs", "0")


def test_a_video_without_pairs_is_written_down_and_tried_again(drives, tmp_path):
    own, out = tmp_path / "drives", tmp_path / "flow"
    shutil.copytree(drives, own)
    late = own / "drive-0001.mp4"
    whole = late.read_bytes()
    late.write_bytes(whole[:200])
    write(own, out, "--epochs", "1")
    file = opening_file(out, 0, str(late))
    assert not file.exists() and "cannot be opened" in file.with_suffix(".skipped").read_text()
    recipe = recipe_of(own, out, "--max_steps", "1", "--per_device_train_batch_size", "2")
    assert precomputed_epochs(recipe, PairLoader(videos(own), PairSampling.of(recipe), 2)) == 1
    late.write_bytes(whole)  # readable again, but without flow
    with pytest.raises(UnreadableVideo, match="has no flow: cannot be opened"):
        FlowFiles(out)(next(video_pairs(str(late), PairSampling.of(recipe), 0)))
    write(own, out, "--epochs", "1")
    assert file.exists() and not file.with_suffix(".skipped").exists()


def test_a_write_that_fails_leaves_whole_files_and_a_sentence(drives, tmp_path):
    """A limit on file sizes stands for the full disk."""
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
        with pytest.raises(ValueError, match="cannot be written .File too large.*give the same command again"):
            write(drives, tmp_path / "flow", "--epochs", "1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in (tmp_path / "flow").rglob("*") if path.is_file()] == ["flow.json"]


def test_two_processes_write_the_same_files_as_one(drives, written, tmp_path):
    arguments = writer_flags(drives, tmp_path / "two", "--epochs", "2", "--dataloader_num_workers", "1")
    done = forked(REPOSITORY / "training" / "flow.py", *arguments, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "this process wrote 2 openings" in done.stdout + done.stderr
    one, two = (
        {str(p.relative_to(r)): p.read_bytes() for p in r.rglob("*.safetensors")} for r in (written, tmp_path / "two")
    )
    assert len(one) == 4 and one == two
    assert not list((tmp_path / "two").rglob(".*"))
