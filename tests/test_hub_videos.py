"""Video data sets on a Hub on 127.0.0.1: read by ranges and over broken connections, and resumed exactly after the data set changes."""

import json
import shutil
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from loopback import serve
from published import REPOSITORY, flags
from safetensors.torch import load_file
from test_video_stream import CFR, numbered_video

from training import video_loader
from training.assembly import make_accelerator
from training.recipe import Recipe
from training.street_files import write_videos
from training.video_files import ATTEMPTS, RemoteFile, UnreadableVideo
from training.video_index import index_video


def noise_video(path: Path, frames: int) -> None:
    """A large file: every frame is a keyframe of noise."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 512, 256, "yuvj420p"
        for _ in range(frames):
            picture = rng.integers(0, 256, (256, 512, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


READ = f"""
import sys, json
sys.path[:0] = [{str(REPOSITORY)!r}, {str(REPOSITORY / "tests")!r}]
from test_video_stream import WHOLE, number_of
from training.video_files import UnreadableVideo
from training.video_index import index_video
from training.video_sources import find_videos
from training.pair_plans import PairSampling, plan_pairs
from training.video_stream import video_pairs
"""


def test_a_data_set_is_read_by_ranges_over_broken_connections(bare_hub, hub_process, tmp_path):
    numbered_video(tmp_path / "numbers.mp4", CFR, gop=10)
    noise_video(tmp_path / "noise.mp4", 500)
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        archive.add(tmp_path / "numbers.mp4", arcname="inside.mp4")
    names = {"train/numbers.mp4": "numbers.mp4", "noise.mp4": "noise.mp4", "shard.tar": "shard.tar"}
    commit = bare_hub.add_dataset("org/drives", {name: (tmp_path / file).read_bytes() for name, file in names.items()})
    size = (tmp_path / "noise.mp4").stat().st_size
    assert size > 8e6
    bare_hub.add_dataset("org/tables", {"README.md": b"---\nlicense: mit\n---\n", "data/train-00000.parquet": b"PAR1"})
    # The first reads fail one after the other: with half a body, a dropped connection and a server error.
    bare_hub.fail("GET /cdn/", "truncate", 1)
    bare_hub.fail("GET /cdn/", "drop", 1)
    bare_hub.fail("GET /cdn/", 500, 1)
    script = (
        READ
        + """
everything = find_videos(["org/drives"])
print(json.dumps(everything))
for source in ("hf://datasets/org/drives", "hf://datasets/org/drives@main"):
    assert find_videos([source]) == everything, source
for source in ("hf://datasets/org/drives/**.mp4", "hf://datasets/org/drives/**/*.mp4"):
    assert find_videos([source]) == [path for path in everything if "::" not in path], source
numbers = [path for path in everything if path.endswith("train/numbers.mp4")]
assert find_videos(["hf://datasets/org/drives/train"]) == find_videos(["hf://datasets/org/drives/train/numbers.mp4"]) == numbers
sampling = PairSampling(**WHOLE, frame_gap_seconds=(0.3, 0.6), pairs_per_video=6)
for path in (*numbers, *[path for path in everything if "::" in path]):
    plans = plan_pairs(index_video(path), sampling, 0, path)
    for sample, plan in zip(video_pairs(path, sampling, 0), plans, strict=True):
        assert [number_of(frame) for frame in sample["frames"]] == [cut.number for cut in plan], path
(pair,) = video_pairs(everything[0], PairSampling(crop_size=(64, 128), frame_gap_seconds=(0.2, 0.3)), 0)
assert pair["frames"].std() > 2
for source in ("org/none", "hf://datasets/org/drives@nowhere", "hf://datasets/org/drives/*.xyz", "org/tables"):
    try:
        find_videos([source])
    except ValueError as error:
        print(str(error).splitlines()[1])
"""
    )
    found, *errors = hub_process(tmp_path, script).splitlines()
    root = f"hf://datasets/org/drives@{commit.oid}"
    plain, member = json.loads(found)[:2], json.loads(found)[2:]
    assert (
        plain[0] == f"{root}/noise.mp4"
        and member[-1] == f"{root}/train/numbers.mp4"
        and plain[1].startswith(f"{root}/shard.tar::")
    )
    assert [fault[2] for fault in bare_hub.faults] == [0, 0, 0]
    assert "org/none" in errors[0] and "no such repository, revision or file" in errors[0]
    assert "no such repository, revision or file" in errors[1] and "0 files on the Hub, none a video" in errors[2]
    assert "2 files on the Hub, none a video: videos inside tables are not read" in errors[3]
    # One pair from the large file needs only some of its blocks.
    large = commit.files["noise.mp4"].sha256
    blocks = {span for _, path, span in bare_hub.requests if path == f"/cdn/{large}"}
    assert 0 < len(blocks) * 2**20 < size / 2


def test_a_connection_that_stays_broken_is_a_reason_and_a_refusal_is_not_tried_again(tmp_path, monkeypatch):
    """With a plain URL, whose fsspec backend does not reconnect by itself."""
    monkeypatch.setattr("training.video_files.time.sleep", lambda seconds: None)
    numbered_video(tmp_path / "a.mp4", CFR[:30])
    whole = (tmp_path / "a.mp4").read_bytes()
    with serve(tmp_path) as server:
        server.drop = ATTEMPTS - 1
        file = RemoteFile(f"{server.url}/a.mp4")
        file.seek(-100, 2)
        assert file.read(1000) == whole[-100:] and file.tell() == len(whole)
        file.seek(10)
        assert file.read(50) == whole[10:60] and server.drop == 0
        server.drop = 10**6
        with pytest.raises(UnreadableVideo, match="cannot be (opened|decoded)"):
            index_video(f"{server.url}/a.mp4")
        server.drop = 0
        server.refused.add("/a.mp4")
        before = len(server.requests)
        with pytest.raises(UnreadableVideo, match="403"):
            index_video(f"{server.url}/a.mp4?again")
        assert len(server.requests) - before <= 3


def lines(folder: Path) -> list[dict]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k not in ("pairs_per_second", "data_wait")} for entry in entries]


def test_a_run_on_a_data_set_resumes_exactly_though_the_data_set_goes_on(bare_hub, hub_process, tmp_path):
    write_videos(tmp_path / "drives", num_videos=2, duration=1.5, fps=4, height=64, width=128, num_processes=2)
    videos = {path.name: path.read_bytes() for path in sorted((tmp_path / "drives").glob("*.mp4"))}
    first = bare_hub.add_dataset("org/streets", videos)
    script = f"""
import sys
sys.path[:0] = [{str(REPOSITORY)!r}]
from accelerate.state import AcceleratorState
from training.pretrain import main
AcceleratorState._reset_state(True)
main(%r)
"""
    arguments = flags("org/streets", tmp_path / "whole", "--save_steps", "3", steps=4)
    hub_process(tmp_path, script % arguments)
    assert json.loads((tmp_path / "whole" / "revisions.json").read_text()) == {"datasets/org/streets@main": first.oid}
    # This run looks as if killed after step 3; meanwhile somebody has uploaded other videos under the same names.
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "step-4")
    names = list(videos)
    second = bare_hub.add_dataset("org/streets", dict(zip(names, reversed(list(videos.values())))))
    assert second.oid != first.oid
    bare_hub.fail("GET /cdn/", "truncate", 2)
    arguments[arguments.index("--output_dir") + 1] = str(tmp_path / "killed")
    printed = hub_process(tmp_path, script % [*arguments, "--resume_from_checkpoint", "latest"])
    assert "step 4/4" in printed and "step 3/4" not in printed and bare_hub.faults[-1][2] == 0
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    card = (tmp_path / "whole" / "encoder" / "README.md").read_text()
    assert "datasets:\n- org/streets\n" in card and "hf://datasets/org/streets" in card


@pytest.mark.usefixtures("fresh_accelerator")
def test_the_checkpoint_of_another_run_brings_the_commits_that_it_began_with(tmp_path, monkeypatch):
    (tmp_path / "first" / "checkpoints" / "step-3").mkdir(parents=True)
    (tmp_path / "first" / "revisions.json").write_text('{"datasets/org/streets@main": "abc"}')
    seen = []
    monkeypatch.setattr(video_loader, "videos_by_source", lambda sources, pins: seen.append(pins.read_text()) or {})
    monkeypatch.setattr(video_loader, "check_videos", lambda *_: [])
    checkpoint = str(tmp_path / "first" / "checkpoints" / "step-3")
    recipe = Recipe(videos=["org/streets"], output_dir=str(tmp_path / "second"), resume_from_checkpoint=checkpoint)
    video_loader.resolve_videos(make_accelerator(recipe), recipe)
    assert seen == ['{"datasets/org/streets@main": "abc"}']
    # "latest" names no other run's checkpoint, so a revisions.json in the current folder is ignored.
    monkeypatch.chdir(tmp_path / "first")
    monkeypatch.setattr(video_loader, "videos_by_source", lambda sources, pins: seen.append(pins.exists()) or {})
    recipe = Recipe(videos=["org/streets"], output_dir=str(tmp_path / "third"), resume_from_checkpoint="latest")
    video_loader.resolve_videos(make_accelerator(recipe), recipe)
    assert seen[1:] == [False]
