"""The first look at videos before a run: sources without a usable video, and videos that crash or block their reader."""

import ctypes
import faulthandler
import multiprocessing
import os
import shutil
import signal
import time

import pytest
from accelerate import Accelerator
from test_video_stream import SAMPLING, videos

from training import first_look, video_checks
from training.pair_plans import PairSampling
from training.recipe import Recipe
from training.video_checks import check_videos
from training.video_index import by_index, index_video, read_index
from training.video_loader import resolve_videos
from training.video_sources import merged, videos_by_source

__all__ = ["videos"]  # a fixture


def test_a_source_without_a_usable_video_is_refused_by_its_name(tmp_path, videos):
    good, bad = tmp_path / "good", tmp_path / "bad"
    for folder in (good, bad):
        folder.mkdir()
        for name in ("a.mp4", "b.mp4", "c.mp4"):
            (folder / name).write_bytes(b"no video")
    shutil.copyfile(videos[0], good / "b.mp4")
    recipe = Recipe(videos=[str(good), str(bad)], crop_size=[32, 64], output_dir=str(tmp_path / "run"))
    with pytest.raises(
        ValueError, match=rf"videos: {bad} has no usable video, for example {bad}/a.mp4: cannot be opened"
    ) as error:
        resolve_videos(Accelerator(cpu=True), recipe)
    assert str(good) not in str(error.value)
    by_source = videos_by_source(recipe.videos)
    # Files may be named one by one, as when a shell expands a pattern: a bad one is skipped, as in a folder.
    alone = by_source[str(bad)][0]
    assert len(check_videos([alone, *videos], SAMPLING, videos_by_source([alone, *videos]))) == 1
    # If the first video seen of a source is bad, its other videos are looked at.
    sources = {"g": by_source[str(good)], "v": videos}
    (skipped,) = check_videos(merged(sources), SAMPLING, sources, limit=3)
    assert skipped.startswith(f"{good}/a.mp4: ")
    with pytest.raises(ValueError, match="videos: b has no usable video of 2 looked at, among 3, for example .*a.mp4"):
        check_videos([*by_source[str(bad)], *videos], SAMPLING, {"b": by_source[str(bad)], "v": videos}, limit=2)


def test_videos_smaller_than_a_crop_are_named(videos, caplog):
    index = read_index(videos[0])
    for crop_size, more in (((index.height, index.width), {}), ((999, 999), {"frame_size": (999, 999)})):
        assert check_videos(videos, PairSampling(crop_size, frame_gap_seconds=(0, 0.1), **more)) == []
        assert not caplog.messages
    assert check_videos(videos, PairSampling((index.height, index.width + 2), frame_gap_seconds=(0, 0.1))) == []
    (said,) = caplog.messages
    assert said.startswith(f"{len(videos)} of the {len(videos)} videos looked at first are smaller than crop_size")
    assert f"({videos[0]} is {index.height}x{index.width})" in said


def test_the_first_look_is_bounded_whatever_the_number_of_sources(monkeypatch, caplog):
    looked_at = []
    monkeypatch.setattr(
        video_checks, "reasons_to_skip", lambda paths, _: [(p, looked_at.append(p) or "") for p in paths]
    )
    paths = [f"{number:03d}.mp4" for number in range(500)]
    with caplog.at_level("INFO", logger="poodle"):
        assert check_videos(paths, SAMPLING, {f"folder of {path}": [path] for path in paths}) == []
    assert 64 < len(looked_at) == len(set(looked_at)) <= 128
    assert caplog.messages == [
        "372 of the 500 folders, patterns, tars and data sets are not looked at before the run; what of them cannot be used is skipped"
    ]
    caplog.clear(), looked_at.clear()
    # Beside a folder of many videos, each source of one video is looked at.
    by_source = {"many": paths[:490]} | {f"folder of {path}": [path] for path in paths[490:]}
    assert check_videos(paths, SAMPLING, by_source) == [] and set(paths[490:]) < set(looked_at)
    assert len(looked_at) < 80 and not caplog.messages


def segfault():
    faulthandler.disable()  # pytest's, which would print a page that looks like a failure
    os.kill(os.getpid(), signal.SIGSEGV)


def spin():
    ctypes.PyDLL(None).sleep(60)  # PyDLL keeps the GIL: like a decoder that never returns, no Python thread runs


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (segfault, r"it crashed its reader \(SIGSEGV\)"),
        (spin, "reading it did not end within 0.4 s"),
        (lambda: os._exit(3), r"it crashed its reader \(exit code 3\)"),
    ],
)
def test_the_first_look_outlives_what_a_video_does_to_its_reader(videos, monkeypatch, act, said):
    def read(path, use):
        if path == videos[2]:
            act()
        return by_index(path, use)

    monkeypatch.setattr(first_look, "by_index", read)
    monkeypatch.setattr(first_look, "time_limit", lambda path: 0.4 / 5 if path == videos[2] else 60)
    index_video.cache_clear()
    start = time.monotonic()
    with pytest.raises(
        ValueError, match=f"{videos[2]}: {said}, and would stop the run in the same way. Remove it, or put an empty"
    ):
        check_videos(videos, SAMPLING)
    assert time.monotonic() - start < 30 and list(index_video.kept) == videos[:2]
    assert not multiprocessing.active_children()


def test_the_first_look_ends_without_a_word_where_its_run_is_gone(videos):
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    reader = fork.Process(target=first_look._send_indices, args=(videos[:1] * 2000, receiver, sender))
    reader.start()
    receiver.close()
    sender.close()
    reader.join(60)
    assert reader.exitcode == 0  # it would be 1 after a stack trace


def test_the_first_look_is_not_taken_twice(videos):
    index_video.cache_clear()
    assert check_videos(videos, SAMPLING) == [] and list(index_video.kept) == videos
    kept = index_video(videos[0])
    assert kept is index_video.kept[videos[0]] and kept.pts == read_index(videos[0]).pts
