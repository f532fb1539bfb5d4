"""Pairs from videos whose frames carry their own number, sharding, and exact resume."""

import dataclasses
import io
import json
import multiprocessing
import os
import tarfile
from fractions import Fraction

import av
import cv2
import datasets
import numpy as np
import pytest
import torch
from loopback import serve

from training import video_sources, workers
from training.first_look import indices_in_subprocess
from training.pair_plans import PairSampling, plan_pairs
from training.video_checks import check_videos
from training.video_decoding import cut_frame
from training.video_files import UnreadableVideo
from training.video_index import VideoIndex, index_video
from training.video_sources import find_videos
from training.video_stream import PairLoader, video_pairs

HEIGHT, WIDTH = 64, 128


def numbered_video(path, times, codec="libx264", options=None, offset=0, gop=12):
    """Write a video whose frames show their number as eight blocks, bright for 1; pts are in milliseconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.codec_context.gop_size = gop
        for number, time in enumerate(times):
            picture = np.full((HEIGHT, WIDTH, 3), 30, np.uint8)
            for bit in range(8):
                if number >> bit & 1:
                    picture[:, bit * 16 : bit * 16 + 16] = 220
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = offset + round(time * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


def number_of(frame):
    """Read the number that a (3, H, W) frame shows."""
    bright = frame.mean(axis=(0, 1)).reshape(8, -1)[:, 4:12].mean(axis=1) > 125
    return sum(int(bit) << k for k, bit in enumerate(bright))


CFR = [k / 25 for k in range(120)]
VFR = list(np.cumsum(np.random.default_rng(0).uniform(0.02, 0.2, 120)))
WHOLE = {"crop_size": (HEIGHT, WIDTH), "frame_scale": (1.0, 1.0)}


@pytest.mark.parametrize(
    ("name", "times", "kwargs"),
    [
        ("cfr.mp4", CFR, {"options": {"bf": "0"}}),
        ("b_frames.mp4", CFR, {"options": {"bf": "3", "b_strategy": "0"}}),
        ("vfr.mp4", VFR, {}),
        ("long_gop.mp4", CFR, {"gop": 250}),
        ("offset.mkv", [t + 3.5 for t in CFR], {}),
        ("mpeg4.mp4", CFR, {"codec": "mpeg4", "offset": 0}),
        ("hevc.mp4", CFR, {"codec": "libx265", "options": {"x265-params": "log-level=none"}}),
        ("vp9.webm", CFR[:60], {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}}),
    ],
)
def test_the_frames_of_a_pair_are_those_asked_for(tmp_path, name, times, kwargs):
    path = numbered_video(tmp_path / name, times, **kwargs)
    index = index_video(path)
    assert len(index.pts) == len(times)
    np.testing.assert_allclose(np.diff(index.times), np.diff(times), atol=2e-3)
    sampling = PairSampling(**WHOLE, frame_gap_seconds=(0.3, 0.9), pairs_per_video=12)
    plans = plan_pairs(index, sampling, 0, path)
    for sample, plan in zip(video_pairs(path, sampling, 0), plans, strict=True):
        assert [number_of(frame) for frame in sample["frames"]] == [cut.number for cut in plan]
        np.testing.assert_allclose(sample["times"], [index.times[cut.number] for cut in plan], atol=2e-3)
        gap = sample["times"][1] - sample["times"][0]
        assert 0.3 - 0.11 <= gap <= 0.9 + 0.11  # within half a frame of the range


@pytest.mark.parametrize("gop", [12, 250])
def test_frames_before_a_cut_without_encoding_are_never_asked_for(tmp_path, gop):
    """`ffmpeg -ss X -i IN -c copy OUT` keeps the frames from the keyframe before X on, and adds an edit list that hides them."""
    whole, path, hidden = numbered_video(tmp_path / "whole.mp4", CFR, gop=gop), str(tmp_path / "cut.mp4"), 40
    with (
        av.open(whole) as reader,
        av.open(path, "w", options={"avoid_negative_ts": "disabled", "use_editlist": "1"}) as writer,
    ):
        source = reader.streams.video[0]
        stream, shift = writer.add_stream_from_template(source), round(CFR[hidden] / source.time_base)
        for packet in reader.demux(source):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                writer.mux(packet)
    index = index_video(path)
    assert len(index.pts) == len(CFR) - hidden and index.times[0] == 0
    sampling = PairSampling(**WHOLE, frame_gap_seconds=(0.3, 0.9), pairs_per_video=40)
    plans = plan_pairs(index, sampling, 0, path)
    assert min(cut.number for plan in plans for cut in plan) < 10  # these are decoded from hidden frames
    for sample, plan in zip(video_pairs(path, sampling, 0), plans, strict=True):
        assert [number_of(frame) for frame in sample["frames"]] == [hidden + cut.number for cut in plan]


def test_one_frame_a_second_gives_neighbours_never_the_same_frame(tmp_path):
    path = numbered_video(tmp_path / "slow.mp4", list(range(10)))
    sampling = PairSampling(**WHOLE, frame_gap_seconds=(0.1, 0.6), pairs_per_video=20)
    assert {b.number - a.number for a, b in plan_pairs(index_video(path), sampling, 0, path)} == {1}


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_crop_first_equals_convert_turn_crop_resize(turns, mirrored):
    rng = np.random.default_rng(0)
    picture = cv2.resize(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8), (160, 96), interpolation=cv2.INTER_CUBIC)
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
    coded = frame.to_ndarray(format="rgb24")
    shown = np.rot90(np.fliplr(coded) if mirrored else coded, turns)
    box = (8, 12, 72, 76)
    expected = cv2.resize(np.ascontiguousarray(shown[12:76, 8:72]), (32, 32), interpolation=cv2.INTER_AREA)
    ours = cut_frame(frame, box, (32, 32), turns, mirrored).transpose(1, 2, 0)
    assert np.abs(ours.astype(int) - expected).mean() < 2.5


def test_a_cut_with_odd_sides_is_whole():
    """The `exact` flow is computed for the box, so the picture must fill the box to its edge."""
    column = (3 * np.arange(80)).astype(np.uint8)
    frame = av.VideoFrame.from_ndarray(np.broadcast_to(column[None, :, None], (96, 80, 3)).copy(), format="rgb24")
    for x1 in (71, 72):
        ours = cut_frame(frame.reformat(format="yuv420p"), (8, 12, x1, 75), (63, x1 - 8), 0)
        np.testing.assert_allclose(ours[0, 30], column[8:x1], atol=1.5)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return [numbered_video(folder / f"{k}.mp4", CFR[: 40 + k]) for k in range(5)]


SAMPLING = PairSampling(
    crop_size=(32, 64), frame_scale=(1.0, 1.5), frame_gap_seconds=(0.2, 0.4), pairs_per_video=2, seed=3
)


def test_a_cut_starts_no_threads(monkeypatch):
    """By default libavfilter would start a thread per core for every cut, in each of the loader's workers."""
    made, graph = [], av.filter.Graph
    monkeypatch.setattr(av.filter, "Graph", lambda: made.append(graph()) or made[-1])
    frame = av.VideoFrame.from_ndarray(np.zeros((64, 96, 3), np.uint8), format="rgb24")
    cut_frame(frame, (0, 0, 64, 32), (32, 64), 0)
    assert [one.threads for one in made] == [1]


def test_which_pairs_are_drawn_is_the_same_everywhere_and_next_year():
    """These numbers are pinned: if they change, runs of earlier versions can no longer be repeated or resumed."""
    index = VideoIndex(tuple(range(300)), np.arange(300) / 30, (0,), (0,), True, 720, 1280, 0, ())
    sampling = PairSampling(
        crop_size=(512, 1024), frame_scale=(1.0, 1.5), frame_gap_seconds=(0.5, 1.5), pairs_per_video=2, seed=5
    )
    pairs = plan_pairs(index, sampling, 3, "videos/a.mp4")
    assert [(first.number, second.number, first.box) for first, second in pairs] == [
        (125, 151, (4, 66, 1104, 616)),
        (162, 201, (50, 82, 1274, 694)),
    ]
    assert all(first.box == second.box and first.size == second.size == (512, 1024) for first, second in pairs)
    # Another seed, epoch, name or number gives another pair.
    for other in [
        plan_pairs(index, dataclasses.replace(sampling, seed=6), 3, "videos/a.mp4"),
        plan_pairs(index, sampling, 4, "videos/a.mp4"),
        plan_pairs(index, sampling, 3, "videos/b.mp4"),
        pairs[::-1],
    ]:
        assert all(ours != theirs for ours, theirs in zip(pairs, other, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact_after_any_batch(videos, workers):
    def batches(state=None, count=7):
        loader = PairLoader(videos, SAMPLING, 4, workers)
        if state is not None:
            loader.load_state_dict(state)
        stream, result = iter(loader), []
        for _ in range(count):
            result.append((next(stream), json.loads(json.dumps(loader.state_dict()))))
        loader.close()
        return result

    whole = batches()
    for stop in (0, 3):
        for (ours, _), (theirs, _) in zip(batches(whole[stop][1], 3), whole[stop + 1 :]):
            assert torch.equal(ours["frames"], theirs["frames"]) and ours["video"] == theirs["video"]
            assert torch.equal(ours["crop"], theirs["crop"]) and torch.equal(ours["epoch"], theirs["epoch"])


def test_spawned_processes_read_what_forked_ones_read(videos, monkeypatch):
    """On macOS the processes are spawned: all that they are given must be picklable."""

    def read(kind):
        monkeypatch.setattr(workers, "START_METHOD", kind)
        loader = PairLoader(videos, SAMPLING, 4, 1)
        batch, (worker,) = next(iter(loader)), multiprocessing.active_children()
        loader.close()
        return (
            type(worker).__name__,
            batch["frames"],
            [(p, list(index.pts)) for p, index in indices_in_subprocess(videos)],
        )

    (fork, *forked), (spawn, *spawned) = read("fork"), read("spawn")
    assert (fork, spawn) == ("ForkProcess", "SpawnProcess")
    assert torch.equal(forked[0], spawned[0]) and forked[1] == spawned[1]


def test_a_stream_leaves_the_cache_of_datasets_alone(videos, tmp_path, monkeypatch):
    """Otherwise one lock file of each span would remain there, and a run would need a home folder that can be written."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    next(iter(PairLoader(videos, SAMPLING, 4, 0)))
    assert not list(tmp_path.iterdir())


def test_no_pair_is_seen_by_two_ranks_and_every_epoch_is_whole(videos):
    seen = []
    for rank in range(2):
        stream = iter(PairLoader(videos, SAMPLING, 5, 0, rank, 2))
        for _ in range(8):
            batch = next(stream)
            seen += list(zip(batch["video"], batch["epoch"].tolist(), batch["repeat"].tolist()))
    assert len(seen) == 80 == len(set(seen))
    for epoch in range(8):  # 10 pairs per epoch, two ranks in step
        assert {s for s in seen if s[1] == epoch} == {(v, epoch, r) for v in videos for r in range(2)}


def test_the_pairs_of_a_batch_come_from_different_videos(videos):
    stream = iter(PairLoader(videos, SAMPLING, 4, 0))
    openings = []
    for _ in range(10):
        batch = next(stream)
        opened = list(zip(batch["video"], batch["epoch"].tolist()))
        assert len(set(opened)) == 4
        openings += opened
    # Both pairs of each opening come first, then the next openings.
    assert openings[:4] == openings[4:8] and not set(openings[:8]) & set(openings[8:])


def test_a_span_grows_with_the_workers(videos):
    """At the end of a span, workers are forked anew and nothing is read ahead; of 2,048 openings, 64 workers would get only 32 each."""
    few, many = PairLoader(videos, SAMPLING, 4, 2), PairLoader(videos, SAMPLING, 4, 8, world_size=8)
    assert len(few.openings(0)) == 2048 and len(many.openings(0)) >= 64 * 512
    state = {**many.state_dict(), "openings": 2048}
    with pytest.raises(
        ValueError, match="the run is of an earlier version, which divided the videos differently among workers"
    ):
        many.load_state_dict(state)
    many.load_state_dict(state, inexact=True)  # as the error advises
    assert many.span == 1 and 2048 <= len(many.openings(0))
    # The same holds if another rank of the run is spans ahead: this rank then gets that rank's `openings`.
    many.load_state_dict({**many.state_dict(), "span": 1, "openings": 4 * len(many.openings(0))}, inexact=True)
    assert many.span == 4


def test_another_stream_is_not_resumed(videos):
    state = PairLoader(videos, SAMPLING, 4, 2).state_dict()
    with pytest.raises(ValueError, match="dataloader_num_workers was 2, now 1; go on with --resume_inexact true"):
        PairLoader(videos, SAMPLING, 4, 1).load_state_dict(state)
    others = (
        r"a list that begins with \S+0\.mp4, now another, of 4, that begins with \S+0\.mp4; give the run's own videos"
    )
    with pytest.raises(ValueError, match=f"videos was {others}"):
        PairLoader(videos[:4], SAMPLING, 4, 2).load_state_dict(state)
    with pytest.raises(ValueError, match=r"videos was a list that begins with a\\nb, now"):  # on one line
        PairLoader(videos, SAMPLING, 4, 2).load_state_dict({**state, "first_path": "a\nb", "paths": 0})


def test_bad_files_are_skipped_named_and_counted(tmp_path, videos):
    whole = open(videos[0], "rb").read()
    bad = {"empty.mp4": b"", "noise.mp4": bytes(range(256)) * 40, "cut.mp4": whole[: len(whole) // 3]}
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    short = numbered_video(tmp_path / "short.mp4", CFR[:3])
    paths = [*videos, *(str(tmp_path / name) for name in bad), short]
    stream, skipped = iter(PairLoader(paths, SAMPLING, 4, 0)), set()
    for _ in range(8):
        skipped |= {path for path, _ in next(stream)["skipped"]}
    assert skipped == {*(str(tmp_path / name) for name in bad), short}
    with pytest.raises(ValueError, match="(?s)no usable video.*short.mp4: is too short: 0.08 s"):
        check_videos([*(str(tmp_path / name) for name in bad), short], SAMPLING)
    with pytest.raises(UnreadableVideo, match="cannot be opened"):
        index_video(str(tmp_path / "noise.mp4"))
    with pytest.raises(ValueError, match="none of the 1 videos gave a full batch"):
        next(iter(PairLoader([short], SAMPLING, 4, 0)))


def test_audio_only_is_named(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(UnreadableVideo, match="has no video stream"):
        index_video(str(tmp_path / "sound.mp4"))


def test_real_clips(poodle_data):
    paths = find_videos([str(poodle_data / "videos")])
    sampling = PairSampling((64, 128), (1.0, 1.5), None, (0.5, 1.5), 2)
    assert check_videos(paths, sampling) == []
    for path in paths:
        for sample in video_pairs(path, sampling, 0):
            gap = sample["times"][1] - sample["times"][0]
            assert 0.45 <= gap <= 1.55 and sample["frames"].std() > 5


@pytest.mark.parametrize("clockwise", [0, 1, 2, 3])
def test_rotation_metadata_of_a_phone(tmp_path, clockwise):
    """The track's display matrix (ISO 14496-12) is x' = a x + c y, y' = b x + d y, with y down."""
    path = tmp_path / "phone.mp4"
    numbered_video(path, CFR[:30])
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44
    a, b = ((1, 0), (0, 1), (-1, 0), (0, -1))[clockwise]
    for slot, value in ((0, a), (1, b), (3, -b), (4, a)):
        data[matrix + 4 * slot : matrix + 4 * slot + 4] = (value * 65536).to_bytes(4, "big", signed=True)
    path.write_bytes(data)
    index = index_video(str(path))
    shown = (WIDTH, HEIGHT) if clockwise % 2 else (HEIGHT, WIDTH)
    assert (index.height, index.width) == shown
    sampling = PairSampling(crop_size=shown, frame_gap_seconds=(0.3, 0.6), pairs_per_video=4)
    for sample, plan in zip(
        video_pairs(str(path), sampling, 0), plan_pairs(index, sampling, 0, str(path)), strict=True
    ):
        for frame, cut in zip(sample["frames"], plan):
            upright = np.rot90(frame, clockwise, axes=(1, 2))  # turns counter-clockwise, back to the coded picture
            assert number_of(upright) == cut.number


def test_videos_at_a_url_are_read_by_ranges(tmp_path, monkeypatch):
    path = tmp_path / "web" / "long.mp4"
    path.parent.mkdir()
    numbered_video(path, [k / 25 for k in range(250)], gop=10)
    with serve(path.parent) as server:
        url = f"{server.url}/long.mp4"
        assert find_videos([url]) == [url]
        sampling = PairSampling(**WHOLE, frame_gap_seconds=(0.3, 0.6), pairs_per_video=2)
        plans = plan_pairs(index_video(url), sampling, 0, url)
        for sample, plan in zip(video_pairs(url, sampling, 0), plans, strict=True):
            assert [number_of(frame) for frame in sample["frames"]] == [cut.number for cut in plan]
        assert any(range_header for _, _, range_header in server.requests)
        missing = f"{server.url}/none.mp4"
        with pytest.raises(UnreadableVideo, match="cannot be opened"):
            index_video(missing)
        with pytest.raises(ValueError, match="(?s)no usable video.*none.mp4"):
            check_videos([missing], sampling)


def test_reading_on_leaves_no_file_open(videos):
    stream = iter(PairLoader(videos, SAMPLING, 5, 0))
    counts = []
    for _ in range(30):
        next(stream)
        counts.append(len(os.listdir("/proc/self/fd")))
    assert max(counts[5:]) <= counts[4]


@pytest.mark.parametrize(("batch_size", "workers", "batches"), [(2, 0, 5), (4, 0, 7), (3, 2, 6), (12, 0, 2)])
def test_epochs_seen_are_those_of_the_pairs(videos, batch_size, workers, batches):
    """The batches hold no pair of a later epoch, and one epoch fewer would not cover them."""
    loader = PairLoader(videos, SAMPLING, batch_size, workers)
    shards, lanes = loader.shards(0), max(workers, 1)
    # The number of shards that each lane has read.
    taken = -(-(-(-batches // lanes) * batch_size) // (len(shards[0]) * SAMPLING.pairs_per_video))
    epochs = {epoch for lane in range(lanes) for shard in shards[lane::lanes][:taken] for epoch, _ in shard}
    assert loader.epochs_seen(batches) == max(epochs) + 1


def test_names_of_videos_are_of_one_line_in_logs_and_errors(tmp_path, videos, caplog):
    name, shown = "x\x1b[31m\n.mp4", r"x\x1b[31m\n.mp4"
    tar = tmp_path / "\x1b[31m.tar"
    with tarfile.open(tar, "w") as archive:
        member = tarfile.TarInfo(name)
        member.size = 5
        archive.addfile(member, io.BytesIO(b"video"))
    paths = find_videos([str(tar)])
    with pytest.raises(ValueError, match="no usable video") as error:
        check_videos(paths, SAMPLING)
    assert error.value.args[0].count("\n") == 1 and "\x1b" not in str(error.value) and shown in str(error.value)
    with pytest.raises(ValueError, match="none of the 1 videos gave a full batch, for example") as error:
        next(iter(PairLoader(paths, SAMPLING, 4)))
    assert str(error.value).isprintable() and shown in str(error.value)
    member.size = 10**6
    tar.write_bytes(member.tobuf())
    with pytest.raises(
        ValueError, match=r"in some sources; tried\n  .*/\\x1b\[31m.tar: a tar without videos\n"
    ) as error:
        find_videos([str(tar), videos[0]])
    assert "\x1b" not in str(error.value)
    tar.unlink()
    tar.mkdir()
    assert video_sources._tar_members(str(tar)) == []
    assert len(caplog.messages) == 2
    assert all(line.isprintable() and r"/\x1b[31m.tar" in line for line in caplog.messages)
    with pytest.raises(ValueError, match=r"tried\n  nowhere\\x1b31m: no such file or folder\n"):
        find_videos(["nowhere\x1b31m"])
