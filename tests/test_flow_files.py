"""Precomputed flow: a run reads what was written, and refuses the flow of other pairs before the first step."""

import dataclasses
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from flow_folders import recipe_of, videos, write, writer_flags
from loopback import serve
from safetensors.numpy import save
from small_runs import flags as run_flags
from test_remote_faults import noisy

from training import flow_writer, pretrain
from training.assembly import make_accelerator
from training.flow import DisFlow, ExactFlow, RaftFlow, build_flow
from training.flow_files import (
    FlowFiles,
    decode_flow,
    encode_flow,
    opening_file,
    precomputed_epochs,
    read_about,
    read_manifest,
)
from training.pair_plans import PairSampling
from training.recipe import Recipe, parse_recipe
from training.video_files import UnreadableVideo
from training.video_loader import build_loader
from training.video_stream import PairLoader, generate_pairs, video_pairs

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


# --- one flow ---


def test_a_flow_comes_back_in_steps_of_a_sixteenth():
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (7, 13), (64, 96)):
        flow = rng.normal(0, 40, (2, 2, height, width)).astype(np.float32)
        back = decode_flow(encode_flow(flow), height, width)
        assert back.dtype == np.float16 and back.shape == flow.shape
        assert np.array_equal(back, (np.rint(flow * 16) / 16).astype(np.float16))
        near = np.abs(flow) < 127
        assert np.abs(back - flow)[near].max() <= 1 / 32
    # The differences of these values overflow 16 bits.
    wild = np.array([-2047, 2047, 0, 1e9, -1e9, 0.03], np.float32).reshape(1, 1, 2, 3).repeat(2, 0).repeat(2, 1)
    kept = decode_flow(encode_flow(wild), 2, 3)[1, 1].ravel()
    assert kept.tolist() == [-2047, 2047, 0, 2048, -2048, 0]  # the largest value, 2047.94, is 2048 in half precision
    with pytest.raises(UnreadableVideo, match="not finite"):
        encode_flow(np.full((2, 2, 4, 4), np.nan, np.float32))


def test_smooth_flow_is_compact():
    y, x = np.mgrid[0:64, 0:128].astype(np.float32)
    plane = np.stack([np.stack([x / 9 + y / 5, 3 - x / 40])] * 2)
    assert len(encode_flow(plane)) < plane.size * 2 / 10


# --- written and read ---


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_read_is_what_would_be_computed(drives, written, workers):
    paths, sampling = videos(drives), PairSampling.of(recipe_of(drives, written))
    pair_flow, module = build_flow("precomputed", folder=str(written))
    assert module is None
    loaders = [PairLoader(paths, sampling, 2, workers, pair_flow=f) for f in (pair_flow, DisFlow())]
    for loader in loaders:
        loader.epochs = 2  # only two were written, and workers prefetch beyond what is read
    read, computed = map(iter, loaders)
    for _ in range(6):  # both epochs
        ours, theirs = next(read), next(computed)
        assert torch.equal(ours["frames"], theirs["frames"]) and ours["video"] == theirs["video"]
        assert ours["flow"].dtype == torch.float16
        assert (ours["flow"].float() - theirs["flow"].float()).abs().max() <= 1 / 32
        assert ours["flow"].float().abs().mean() > 0.5
        assert not ours["skipped"]
    for loader in loaders:
        loader.close()


def test_masks_of_exact_flow_are_kept(drives, tmp_path):
    write(drives, tmp_path / "exact", "--epochs", "1", "--flow", "exact")
    sampling = PairSampling.of(recipe_of(drives, tmp_path / "exact"))
    shards = [((0, path),) for path in videos(drives)]
    for ours, theirs in zip(
        generate_pairs(shards, sampling, FlowFiles(tmp_path / "exact")),
        generate_pairs(shards, sampling, ExactFlow()),
        strict=True,
    ):
        assert np.array_equal(ours["valid_mask"], theirs["valid_mask"]) and 0 < ours["valid_mask"].mean() < 1
        assert np.array_equal(ours["flow"], np.rint(theirs["flow"].astype(np.float32) * 16) / 16)


def test_device_estimators_write_what_they_compute(drives, tmp_path):
    raft = [
        "--flow",
        "raft_small",
        "--flow_weights",
        "random",
        "--flow_updates",
        "1",
        "--crop_size",
        "128",
        "160",
        "--seed",
        "5",
    ]
    write(drives, tmp_path / "raft", "--epochs", "1", "--per_device_train_batch_size", "4", *raft)
    sampling = PairSampling.of(parse_recipe(["--crop_size", "128", "160", "--pairs_per_video", "3", "--seed", "5"]))
    torch.manual_seed(5)  # gives the random weights that the script's seed gives
    module = RaftFlow("raft_small", "random", num_updates=1)
    for path in videos(drives):
        pairs = list(video_pairs(path, sampling, 0))
        flow = module(torch.from_numpy(np.stack([pair["frames"] for pair in pairs]))).numpy()
        for pair, expected in zip(pairs, flow, strict=True):
            FlowFiles(tmp_path / "raft")(pair)
            assert np.abs(pair["flow"] - expected).max() <= 1 / 32 + 1e-3 and np.abs(expected).max() > 0.1


def test_a_run_trains_on_it_and_goes_through_its_epochs_again(drives, tmp_path, written, monkeypatch):
    """With two videos of three pairs, 8 steps of two pairs are nearly three epochs. Two epochs were written."""

    def losses(name, *more):
        AcceleratorState._reset_state(True)
        pretrain.main(run_flags(drives, tmp_path / name, "--pairs_per_video", "3", *more, steps=8))
        return [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    ours = losses("run", "--flow", "precomputed", "--flow_dir", str(written), "--flow_epochs", "2")
    estimate = DisFlow.estimate
    monkeypatch.setattr(
        DisFlow, "estimate", lambda self, frames: np.rint(np.float32(np.float16(estimate(self, frames))) * 16) / 16
    )
    live = losses("live")
    assert ours[:6] == live[:6]  # bit for bit: the same pairs, and the computed flow in steps of 1/16 px
    assert ours[6] != live[6]
    paths, sampling = videos(drives), PairSampling.of(recipe_of(drives, written))
    again = PairLoader(paths, sampling, 2)
    again.epochs = 2
    assert {epoch for epoch, _ in again.openings(0)} == {0, 1}
    first, stream = {}, iter(again)
    for number in range(12):  # four epochs of three batches
        batch = next(stream)
        for k, key in enumerate(zip(batch["video"], batch["epoch"].tolist(), batch["repeat"].tolist())):
            assert (key in first) == (number >= 6)
            assert torch.equal(first.setdefault(key, batch["frames"][k]), batch["frames"][k])


class Crash(DisFlow):
    def __call__(self, sample: dict) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)


def test_a_worker_that_dies_is_named_with_its_video(drives, tmp_path, monkeypatch):
    monkeypatch.setattr(flow_writer, "build_flow", lambda *_, **__: (Crash(), None))
    said = r"a loader worker .* while it read .*\.mp4 \(SIGSEGV\).*an empty file in its place.*then give the same command again$"
    with pytest.raises(ChildProcessError, match=said):
        write(drives, tmp_path, "--dataloader_num_workers", "1")
    assert not multiprocessing.active_children()


def test_a_death_that_torch_reports_while_flow_is_written_is_named_too(drives, tmp_path, monkeypatch):
    def interrupted(*_):  # as torch's handler of SIGCHLD, which raises at any point of the code
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Segmentation fault. ")

    monkeypatch.setattr(flow_writer, "write_opening", interrupted)
    with pytest.raises(ChildProcessError, match="a loader worker was killed by signal: Segmentation fault"):
        write(drives, tmp_path, "--dataloader_num_workers", "1")
    assert not multiprocessing.active_children()


def test_it_lies_beside_the_videos_unless_it_is_said(drives, tmp_path, monkeypatch):
    shutil.copytree(drives, tmp_path / "mine")
    given = writer_flags(tmp_path / "mine", "", "--max_steps", "1")
    at = given.index("--out")
    AcceleratorState._reset_state(True)
    flow_writer.main([*given[:at], *given[at + 2 :], "--epochs", "1"])
    assert sorted(path.name for path in (tmp_path / "mine" / "flow").iterdir()) == ["epoch-0000", "flow.json"]
    recipe = parse_recipe([*given[:at], *given[at + 2 :], "--flow", "precomputed"])
    assert recipe.flow_folder == str(tmp_path / "mine" / "flow")
    (tmp_path / "kept.yaml").write_text(
        recipe.to_yaml()
    )  # no flow folder was given, so it follows a change of flow or videos
    again = parse_recipe(["--config", str(tmp_path / "kept.yaml"), "--videos", str(drives)])
    assert again.flow_folder == str(drives / "flow")
    assert parse_recipe(["--config", str(tmp_path / "kept.yaml"), "--flow", "dis"]).flow_folder is None
    loader = PairLoader(videos(tmp_path / "mine"), PairSampling.of(recipe), 4)
    assert precomputed_epochs(dataclasses.replace(recipe, flow_epochs=1), loader) == 1
    monkeypatch.chdir(tmp_path)
    Path("street").mkdir()  # the name `street` stays a source of videos, even if there is such a folder
    for several in (["street"], ["mine", "mine/flow"], ["mine/*.mp4"], ["gone"]):
        with pytest.raises(ValueError, match="flow_dir must be the folder"):
            parse_recipe(["--flow", "precomputed", "--videos", *several])
        with pytest.raises(ValueError, match="--out must be the folder"):
            flow_writer.main(["--videos", *several])


@pytest.mark.parametrize("flag", ["--output_dir", "--out-dir=x"])
def test_the_folder_of_the_flow_has_a_flag_of_its_own(drives, flag):
    with pytest.raises(ValueError, match=f"{flag.split('=')[0]}: the folder of the flow is given by --out"):
        flow_writer.main(["--videos", str(drives), flag, "x"])


def test_an_opening_s_file_keeps_its_name():
    """Otherwise written flow would not be found again. Videos of the same name in two folders have a file each."""
    assert opening_file("flow", 3, "/data/My drive (1).mp4") == Path(
        "flow/epoch-0003/My-drive-1-c22dc59e0815cf92.safetensors"
    )
    assert opening_file("flow", 0, "/a/x.mp4").name != opening_file("flow", 0, "/b/x.mp4").name


def test_a_name_that_is_not_utf_8_has_flow_too(drives, tmp_path):
    own, out = tmp_path / os.fsdecode(b"caf\xe9"), tmp_path / os.fsdecode(b"fl\xf6w")
    own.mkdir()
    shutil.copyfile(videos(drives)[0], own / os.fsdecode(b"na\xefve.mp4"))
    (own / os.fsdecode(b"\xe9.mp4")).write_bytes(b"no video")
    write(own, out, "--epochs", "1")
    assert sorted(path.suffix for path in (out / "epoch-0000").iterdir()) == [".safetensors", ".skipped"]
    AcceleratorState._reset_state(True)
    flags = ("--pairs_per_video", "3", "--flow", "precomputed", "--flow_dir", str(out), "--flow_epochs", "1")
    pretrain.main(run_flags(own, tmp_path / "run", *flags, steps=2))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda pair: {"crop": pair["crop"] + 1}, "is that of the crop"),
        (lambda pair: {"times": pair["times"] + 0.01}, "is from .* s, the pair from"),
        (lambda pair: {"frames": pair["frames"][..., :-8]}, "is 64x128, the pairs are 64x120"),
        (lambda pair: {"repeat": 3}, "is that of 3 pairs an opening"),
    ],
)
def test_the_flow_of_another_pair_is_not_taken(drives, written, change, said):
    pair = next(video_pairs(videos(drives)[0], PairSampling.of(recipe_of(drives, written)), 0))
    FlowFiles(written)(dict(pair))
    with pytest.raises(UnreadableVideo, match=f"its flow in .* {said}"):
        FlowFiles(written)({**pair, **change(pair)})


# --- refused before the first step ---


def epochs_of(drives, out, *more) -> int | None:
    """Return the number of precomputed epochs for a run with these flags on one process."""
    recipe = recipe_of(drives, out, *more)
    loader = PairLoader(videos(drives), PairSampling.of(recipe), recipe.per_device_train_batch_size)
    return precomputed_epochs(recipe, loader)


def refused(drives, out, *more) -> str:
    with pytest.raises(ValueError) as error:
        epochs_of(drives, out, *more)
    return str(error.value)


def test_flow_of_other_pairs_is_refused(drives, written, tmp_path):
    enough = ("--max_steps", "3", "--per_device_train_batch_size", "4")
    assert epochs_of(drives, written, *enough) == 2
    assert precomputed_epochs(Recipe(), PairLoader(videos(drives), PairSampling((64, 64)), 1)) is None
    for flag, values, said in (
        ("--crop_size", ["64", "64"], r"crop_size \[64, 128\] there, \[64, 64\] in this run"),
        ("--seed", ["1"], "seed 0 there, 1 in this run"),
        ("--frame_gap_seconds", ["0.5", "0.5"], r"frame_gap_seconds \[0.5, 1.0\] there"),
        ("--pairs_per_video", ["4"], "pairs_per_video 3 there, 4"),
    ):
        assert re.search(said, refused(drives, written, *enough, flag, *values))
    assert "holds no flow (no flow.json)" in refused(drives, tmp_path, *enough)
    assert "--flow dis" in refused(drives, tmp_path, *enough) and "--epochs 2" in refused(drives, tmp_path, *enough)
    moved = tmp_path / "moved"
    shutil.copytree(drives, moved)
    assert f"has flow of other videos, none of {moved}/drive-0000.mp4" in refused(moved, written, *enough)
    with pytest.raises(ValueError, match="flow_dir must be the folder"):
        parse_recipe(["--flow", "precomputed"])
    with pytest.raises(ValueError, match="flow_dir must be the folder"):
        parse_recipe(["--flow_dir", str(written)])
    with pytest.raises(ValueError, match="flow_epochs must be an integer of at least 1"):
        parse_recipe(["--flow", "precomputed", "--flow_dir", str(written), "--flow_epochs", "0"])


def test_flow_of_another_estimator_than_the_run_began_with_is_refused(drives, written, tmp_path):
    def loader(flow_dir):
        recipe = recipe_of(drives, flow_dir, "--max_steps", "3", "--per_device_train_batch_size", "4")
        return build_loader(make_accelerator(recipe), recipe, videos(drives), FlowFiles(flow_dir))

    state = json.loads(json.dumps(loader(written).state_dict()))
    loader(written).load_state_dict(state)
    other = tmp_path / "flow"
    shutil.copytree(written, other)
    manifest = json.loads((other / "flow.json").read_text())
    assert manifest["estimator"]["flow"] == "dis"
    manifest["estimator"]["flow"] = "exact"
    (other / "flow.json").write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError, match="now holds the flow of .*'flow': 'exact'.*began with that of .*'flow': 'dis'"
    ):
        loader(other).load_state_dict(state)


def test_a_changed_video_and_a_damaged_file_are_refused(drives, tmp_path):
    own, out = tmp_path / "drives", tmp_path / "flow"
    shutil.copytree(drives, own)
    write(own, out, "--epochs", "1")
    enough = ("--max_steps", "1", "--per_device_train_batch_size", "2")
    assert epochs_of(own, out, *enough) == 1
    first = Path(videos(own)[0])
    whole, times = first.read_bytes(), first.stat()
    first.write_bytes(whole + b"\0")
    assert f"the video had {len(whole)} bytes, it has {len(whole) + 1}" in refused(own, out, *enough)
    first.write_bytes(whole)
    os.utime(first, ns=(times.st_atime_ns, times.st_mtime_ns))  # again the file that was indexed
    file = opening_file(out, 0, str(first))
    good = file.read_bytes()
    file.write_bytes(good[:-7])
    assert "is damaged" in refused(own, out, *enough)
    # Damage that is found only when a pair is read: the video is skipped, named and counted.
    flipped = bytearray(good)
    flipped[-7] ^= 1
    file.write_bytes(flipped)
    sampling = PairSampling.of(recipe_of(own, out, *enough))
    found = list(generate_pairs([((0, path),) for path in videos(own)], sampling, FlowFiles(out)))
    assert {sample["video"] for sample in found[2:]} == {videos(own)[1]}
    assert [entry for sample in found for entry in sample["skipped"]] == [
        (str(first), f"its flow in {file} is damaged: delete it, and training.flow writes it anew")
    ]
    # safetensors files of other programs, with and without metadata, and a file whose flow is too short for its frames.
    about = read_about_of(good)
    short = {"flow.0": np.zeros(8, np.uint8), "flow.1": np.zeros(8, np.uint8)}
    lies = json.dumps({**about, "crc32": [zlib.crc32(bytes(8))] * len(about["crops"])})
    for tensors, metadata, reason in [
        ({}, None, "its flow cannot be read (it was not written by training.flow)"),
        ({}, {"opening": "[]"}, "its flow cannot be read (it was not written by training.flow)"),
        ({}, {"opening": "{"}, "its flow cannot be read (Expecting property name"),
        (
            {},
            {"opening": json.dumps({**about, "crc32": 3})},
            "its flow cannot be read (it was not written by training.flow)",
        ),
        (
            {},
            {"opening": json.dumps({**about, "crc32": []})},
            "its flow cannot be read (it was not written by training.flow)",
        ),
        ({}, {"opening": json.dumps(about)}, "its flow cannot be read ("),
        (short, {"opening": lies}, f"its flow in {file} is damaged"),
    ]:
        file.write_bytes(save(tensors, metadata=metadata))
        with pytest.raises(UnreadableVideo, match=re.escape(reason)):
            FlowFiles(out)(next(video_pairs(str(first), sampling, 0)))
    file.write_bytes(save({}))
    assert "is damaged (it was not written by training.flow)" in refused(own, out, *enough)
    file.write_bytes(good[:-7])
    write(own, out, "--epochs", "1")
    assert file.read_bytes() == good


def read_about_of(opening: bytes) -> dict:
    """Return the metadata from the header of a safetensors file. The length of the header, 8 bytes, comes first."""
    return json.loads(json.loads(opening[8 : 8 + int.from_bytes(opening[:8], "little")])["__metadata__"]["opening"])


def test_epochs_that_are_missing_are_written_by_the_command_that_is_named(drives, tmp_path):
    out = tmp_path / "flow"
    write(drives, out, "--epochs", "1")
    more = ("--max_steps", "6", "--per_device_train_batch_size", "3")
    message = refused(drives, out, *more)
    assert "has 1 complete epoch(s), the run needs 3: 4 openings are missing" in message
    assert message.endswith("or go through those again and again by --flow_epochs 1")
    assert epochs_of(drives, out, *more, "--flow_epochs", "1") == 1
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.safetensors")}
    named = shlex.split(re.search("`(.*?)`", message).group(1))
    assert named[:3] == ["python", "-m", "training.flow"]
    AcceleratorState._reset_state(True)
    flow_writer.main(named[3:])
    assert epochs_of(drives, out, *more) == 3
    assert len(before) == 2 and all(file.stat().st_mtime_ns == time for file, time in before.items())
    assert len(list(out.rglob("*.safetensors"))) == 6


def test_an_epoch_behind_a_gap_is_not_offered(drives, written, tmp_path):
    out = Path(shutil.copytree(written, tmp_path / "flow"))
    opening_file(out, 0, videos(drives)[1]).unlink()
    message = refused(drives, out, "--max_steps", "3", "--per_device_train_batch_size", "4")
    assert "has 0 complete epoch(s)" in message and "1 openings are missing, the first that of" in message
    assert "drive-0001.mp4 in epoch 0" in message and "--flow_epochs" not in message


def test_every_video_is_compared_with_what_was_written(drives, tmp_path):
    own, out = Path(shutil.copytree(drives, tmp_path / "drives")), tmp_path / "flow"
    write(own, out, "--epochs", "1")
    for video in map(Path, videos(own)):
        whole = video.read_bytes()
        video.write_bytes(whole + b"\0")
        said = refused(own, out, "--max_steps", "1", "--per_device_train_batch_size", "2")
        assert f"the flow of {video} in" in said and "is that of another file" in said
        video.write_bytes(whole)


def test_pairs_that_a_remote_video_lacks_are_lacking_in_its_flow_too(tmp_path):
    """The times of a remote video are estimated. If the video has a gap, some pairs are left out once they are decoded."""
    (tmp_path / "web").mkdir()
    noisy(tmp_path / "web" / "a.mkv", [number / 25 for number in (*range(100), *range(200, 300))], gop=25)
    with serve(tmp_path / "web") as server:
        url, more = f"{server.url}/a.mkv", ("--pairs_per_video", "24")
        write(url, tmp_path / "flow", "--epochs", "1", *more)
        (file,) = (tmp_path / "flow" / "epoch-0000").iterdir()
        kept = len(read_about(file)["crops"])
        assert 0 < kept < 24
        AcceleratorState._reset_state(True)
        pretrain.main(
            run_flags(
                url, tmp_path / "run", *more, "--flow", "precomputed", "--flow_dir", str(tmp_path / "flow"), "--flow_epochs", "1",
                "--per_device_train_batch_size", "1", steps=kept + 1,
            )
        )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == kept + 1 and lines[-1]["skipped_videos"] == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"format": "poodle-flow-0"}', "is of format poodle-flow-0, expected poodle-flow-1: write the flow anew"),
        ("{}", "cannot be read .* write the flow anew"),
        ("[]", "cannot be read .* write the flow anew"),
        ("{", "cannot be read .* write the flow anew"),
    ],
)
def test_a_manifest_of_others_is_named(tmp_path, text, said):
    assert read_manifest(tmp_path) is None
    (tmp_path / "flow.json").write_text(text)
    with pytest.raises(ValueError, match=f"flow.json {said}"):
        read_manifest(tmp_path)
