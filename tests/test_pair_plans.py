"""Which pairs are drawn from a video, in which order videos are opened, and what a worker notes while it reads."""

import dataclasses
import multiprocessing

import numpy as np
import pytest
import torch
from test_video_stream import CFR, SAMPLING, VFR, WHOLE, numbered_video

from training import pair_plans, video_stream, workers
from training.pair_plans import PairSampling, _nearest, plan_pairs
from training.run_recipe import MOST_PAIRS
from training.video_files import UnreadableVideo
from training.video_index import VideoIndex
from training.video_stream import PairLoader, generate_pairs


def made_up(times, height=720, width=1280) -> VideoIndex:
    return VideoIndex(tuple(range(len(times))), np.array(times), (0,), (0,), True, height, width, 0, ())


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("videos")
    return [numbered_video(folder / f"{k}.mp4", CFR[: 40 + 5 * k]) for k in range(5)]


def test_a_crop_is_of_a_frame_of_the_size_that_is_asked_for():
    """Frames of 300x640 at scale 0.8 have 240x512 pixels, so the crop covers 200/240 of the video's rows and 320/512 of its columns."""
    sampling = PairSampling((200, 320), (0.8, 0.8), (300, 640), pairs_per_video=60)
    boxes = np.array([a.box for a, _ in plan_pairs(made_up(np.arange(90) / 30), sampling, 0, "a.mp4")])
    assert {(x1 - x0, y1 - y0) for x0, y0, x1, y1 in boxes.tolist()} == {(800, 600)}
    assert boxes.min() >= 0 and (boxes[:, 2:].max(0) <= (1280, 720)).all()
    PairSampling((240, 512), (0.8, 1.25), (300, 640))  # just fits
    for crop, smallest in (((241, 320), "240x512"), ((200, 513), "240x512")):
        with pytest.raises(ValueError, match=f"is larger than the frame at its smallest scale .{smallest}"):
            PairSampling(crop, (0.8, 1.25), (300, 640))


def test_portrait_videos_are_not_stretched_to_the_landscape_frame_size():
    """At 1080x1920 for landscape, a 1280x720 video becomes 1920x1080, or as much larger as the crop of 1024 columns needs."""
    sampling = PairSampling((512, 1024), (0.75, 1.25), (1080, 1920), pairs_per_video=60)
    portrait = made_up(np.arange(90) / 30, 1280, 720)
    boxes = np.array([a.box for a, _ in plan_pairs(portrait, sampling, 0, "a.mp4")])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert np.abs(width / height - 2).max() < 0.02
    # At scale 1.25 the crop covers 1024 of 1350 columns; below 1024 / 1080 it covers all.
    assert width.max() == 720 and 720 * 1024 / 1350 - 2 <= width.min() < 0.85 * 720
    landscape = [a.box for a, _ in plan_pairs(made_up(np.arange(90) / 30), sampling, 0, "a.mp4")]
    assert {round((x1 - x0) / (y1 - y0), 2) for x0, y0, x1, y1 in landscape} <= {1.99, 2.0, 2.01}


def test_a_gap_of_half_a_frame_more_than_the_video_is_that_of_its_ends():
    index = made_up([0.0, 0.5, 1.0])
    (pair,) = plan_pairs(index, PairSampling(**WHOLE, frame_gap_seconds=(1.2, 1.5)), 0, "a.mp4")
    assert [cut.number for cut in pair] == [0, 2]
    with pytest.raises(UnreadableVideo, match="is too short: 1.00 s, the smallest frame gap is 1.3 s"):
        plan_pairs(index, PairSampling(**WHOLE, frame_gap_seconds=(1.3, 1.5)), 0, "a.mp4")


def test_frames_are_those_nearest_to_times_from_the_first_frame_on():
    times = 10 + np.arange(9.0)
    assert [_nearest(times, time) for time in (3, 10.4, 10.5, 10.6, 17.7, 30)] == [0, 0, 0, 1, 8, 8]
    sampling = PairSampling(**WHOLE, frame_gap_seconds=(1.0, 3.0), pairs_per_video=200)
    plans = plan_pairs(made_up(times), sampling, 0, "a.mp4")
    assert {first.number for first, _ in plans} == set(range(8))
    assert {second.number - first.number for first, second in plans} == {1, 2, 3}
    # If the gap is shorter than half the time between frames, the last frame is paired with the one before it.
    sampling = PairSampling(**WHOLE, frame_gap_seconds=(0.1, 0.2), pairs_per_video=200)
    plans = plan_pairs(made_up(times), sampling, 0, "a.mp4")
    assert {(first.number, second.number) for first, second in plans} == {(k, k + 1) for k in range(8)}


def test_gaps_end_where_the_video_does_and_one_frame_is_enough_for_none():
    index = made_up(np.arange(11) / 10)
    sampling = PairSampling(**WHOLE, frame_gap_seconds=(0.5, 10.0), pairs_per_video=300)
    gaps = [b.number - a.number for a, b in plan_pairs(index, sampling, 0, "a.mp4")]
    # Not all pairs span the whole video.
    assert set(gaps) == {5, 6, 7, 8, 9, 10} and max(map(gaps.count, set(gaps))) < 100
    (pair,) = plan_pairs(made_up([0.0]), PairSampling(**WHOLE, frame_gap_seconds=(0.0, 0.0)), 0, "a.mp4")
    assert [cut.number for cut in pair] == [0, 0]


def test_no_pair_lies_across_a_hole():
    times = np.concatenate([np.arange(60) / 30, 3600 + np.arange(90) / 30])
    sampling = PairSampling(**WHOLE, frame_gap_seconds=(0.5, 1.5), pairs_per_video=400)
    plans = plan_pairs(made_up(times), sampling, 0, "a.mp4")
    gaps = np.array([times[b.number] - times[a.number] for a, b in plans])
    assert 0.399 <= gaps.min() < 0.55 and 1.45 < gaps.max() <= 1.601
    # First frames are not only those at the edges of the hole, where most draws land.
    assert len({a.number for a, _ in plans if a.number < 60}) > 20
    again = plan_pairs(made_up(times), dataclasses.replace(sampling, pairs_per_video=50), 0, "a.mp4")
    assert again == plans[:50]


def test_frames_further_apart_than_pairs_shall_be_are_refused(tmp_path):
    path = numbered_video(tmp_path / "slow.mp4", np.arange(10) * 10.0)
    (reason,) = dict(video_stream.reasons_to_skip([path], SAMPLING)).values()
    assert reason == (
        f"{path}: has no frames as far apart as frame_gap_seconds asks for (0.2 to 0.4 s): they follow one another in 10.00 s on average"
    )
    with pytest.raises(UnreadableVideo, match="0.5 to 1.5 s.*: they follow one another in 3600.00 s on average"):
        plan_pairs(made_up([0.0, 3600.0]), PairSampling(**WHOLE, frame_gap_seconds=(0.5, 1.5)), 0, "a.mp4")


@pytest.mark.parametrize("times", [np.arange(30.0), np.arange(60) / 0.5, np.arange(300) / 30, VFR], ids=len)
def test_of_ordinary_videos_no_pair_is_drawn_anew(monkeypatch, times):
    """Otherwise runs of earlier versions could not be resumed. Even frames 2 s apart give neighbours for a gap of a second."""
    monkeypatch.setattr(pair_plans, "_frames_within", None)
    sampling = PairSampling(**WHOLE, frame_gap_seconds=(0.5, 1.5), pairs_per_video=400)
    assert len(plan_pairs(made_up(times), sampling, 0, "a.mp4")) == 400


def test_a_video_that_is_skipped_is_handed_on_once(tmp_path, monkeypatch):
    monkeypatch.setattr(video_stream, "_PENDING", [])  # drops what earlier tests left
    good, bad = numbered_video(tmp_path / "good.mp4", CFR[:40]), tmp_path / "bad.mp4"
    bad.write_bytes(b"")
    groups = [((epoch, str(bad)), (epoch, good)) for epoch in range(2)]
    skipped = [sample["skipped"] for sample in generate_pairs(groups, SAMPLING)]
    assert [[path for path, _ in found] for found in skipped] == [[str(bad)], [], [str(bad)], []]


def test_each_epoch_has_an_order_of_its_own():
    loader = PairLoader([f"{k}.mp4" for k in range(20)], SAMPLING, 4)
    openings = loader.openings(0)
    orders = [tuple(path for _, path in openings[20 * epoch : 20 * epoch + 20]) for epoch in range(10)]
    assert len(set(orders)) == 10 and all(len(set(order)) == 20 for order in orders)
    # A span continues where the previous one ended.
    epoch, following = openings[-1][0], loader.openings(1)
    assert len(openings) % 20 and following[0][0] == epoch
    assert {path for e, path in (*openings[-20:], *following[:20]) if e == epoch} == set(orders[0])


def test_a_worker_notes_whose_flow_it_computes(videos, monkeypatch):
    note, seen = multiprocessing.RawArray("c", workers.NOTE_BYTES), []
    monkeypatch.setattr(workers, "_NOTES", [note])
    group = tuple((0, path) for path in videos[:2])
    for _ in generate_pairs([group], SAMPLING, lambda sample: seen.append((sample["video"], note.value.decode()))):
        pass
    assert len(seen) == 4 and all(video == noted for video, noted in seen)
    workers.note("x" * 2000 + "/last.mp4")
    assert note.value.endswith(b"x/last.mp4")


def test_as_many_videos_take_turns_as_memory_has_room_for(videos):
    for pairs, batch_size, turns in ((2, 4, 4), (2, 64, 32), (16, 64, 4), (100, 8, 1)):
        loader = PairLoader(videos, dataclasses.replace(SAMPLING, pairs_per_video=pairs), batch_size)
        assert {len(shard) for shard in loader.shards(0)} == {turns}
    # The largest number of pairs that a recipe may ask for.
    loader = PairLoader(videos, dataclasses.replace(SAMPLING, pairs_per_video=MOST_PAIRS), 16)
    assert {len(shard) for shard in loader.shards(0)} == {2} and 2 * MOST_PAIRS == video_stream.PAIRS_HELD


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_draws_nothing_from_the_generator_of_dropout(videos, workers):
    loader, before = PairLoader(videos, SAMPLING, 4, workers), torch.get_rng_state()
    next(iter(loader))
    loader.close()
    assert torch.equal(torch.get_rng_state(), before)


def test_span_after_span_every_pair_comes_once_in_whole_batches(videos, monkeypatch):
    monkeypatch.setattr(video_stream, "OPENINGS_PER_SPAN", 3)
    monkeypatch.setattr(video_stream, "OPENINGS_PER_LANE", 1)
    stream, seen = iter(PairLoader(videos, SAMPLING, 3)), []
    for _ in range(20):  # five spans of six openings each
        batch = next(stream)
        seen += list(zip(batch["video"], batch["epoch"].tolist(), batch["repeat"].tolist()))
    assert len(seen) == 60 and set(seen) == {(v, epoch, r) for v in videos for epoch in range(6) for r in range(2)}
    stream = iter(PairLoader(videos, dataclasses.replace(SAMPLING, pairs_per_video=16), 40))  # 128 pairs a span
    assert [len(next(stream)["frames"]) for _ in range(4)] == [40] * 4
