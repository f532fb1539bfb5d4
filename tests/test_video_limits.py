"""Time limits of one opening of a video, files that change, names of any kind, and files that are not videos."""

import json
import logging
import os
import threading
import time
from pathlib import Path

import av
import pytest
import torch
from fuzzed_videos import (
    BY_NAME,
    FRAMES,
    write_clip,
)

from training import video_files
from training.pair_plans import PairSampling
from training.video_decoding import Cut, decode_cuts
from training.video_files import UnreadableVideo, ended_if_stuck
from training.video_index import index_video, read_index
from training.video_stream import PairLoader, generate_pairs, video_pairs

NAMES = ("h264.mp4", "mpeg4.avi", "vp9.webm", "hevc.mp4", "h264_444.mp4")


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    return {name: write_clip(folder / name, BY_NAME[name]) for name in NAMES}


SAMPLING = PairSampling(crop_size=(32, 48), frame_gap_seconds=(0.2, 0.8))


def test_an_opening_has_a_time_limit(clips, monkeypatch):
    path = str(clips["h264.mp4"])
    index = index_video(path)
    assert video_files.time_limit(path) == pytest.approx(60 + clips["h264.mp4"].stat().st_size / 1e7)
    monkeypatch.setattr(video_files, "SECONDS", -1.0)
    for act in (
        lambda: read_index(path),
        lambda: decode_cuts(path, index, [Cut(0, (0, 0, 16, 16), (8, 8))]),
    ):
        with pytest.raises(UnreadableVideo, match=r"takes (longer than -1 s|too long)"):
            act()


class Stuck(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, _):
        with ended_if_stuck("/videos/\x1b[31mspins.mp4", 0.3):
            time.sleep(60)


def test_a_decoder_that_never_comes_back_ends_its_worker_and_is_named(capfd):
    with ended_if_stuck("here.mp4", 0.01):  # this process is not a worker, so nothing is ended
        time.sleep(0.05)
    errors = logging.StreamHandler(os.fdopen(os.dup(2), "w"))
    logging.getLogger("poodle").addHandler(errors)
    start = time.monotonic()
    try:
        with pytest.raises(RuntimeError, match="exited unexpectedly"):
            list(torch.utils.data.DataLoader(Stuck(), num_workers=1, multiprocessing_context="fork"))
    finally:
        logging.getLogger("poodle").removeHandler(errors)
    assert time.monotonic() - start < 30
    assert r"/videos/\x1b[31mspins.mp4: no end after 0.3 s; its loader worker ends" in capfd.readouterr().err


@pytest.mark.parametrize("size", [0, 10**9])
def test_a_worker_is_given_five_times_the_limit_of_an_opening(tmp_path, monkeypatch, size):
    path, seconds = tmp_path / "sparse.mp4", []
    path.touch()
    os.truncate(path, size)
    timer = threading.Timer
    monkeypatch.setattr(threading, "Timer", lambda given, end: seconds.append(given) or timer(given, end))
    with pytest.raises(UnreadableVideo, match="cannot be opened as a video"):
        next(video_pairs(str(path), SAMPLING, 0))
    assert seconds == [5 * (60 + size / 1e7)]


def test_an_empty_file_in_the_place_of_a_video_changes_no_pair_of_the_others(tmp_path, clips):
    names = ["h264.mp4", "mpeg4.avi", "vp9.webm", "hevc.mp4"]
    for name in names:
        (tmp_path / name).write_bytes(clips[name].read_bytes())

    def two_epochs() -> tuple[dict, set]:
        loader = PairLoader([str(tmp_path / name) for name in names], SAMPLING, 1, num_workers=2)
        pairs, skipped = {}, set()
        try:
            for batch in loader:
                (path,), epoch = batch["video"], int(batch["epoch"])
                skipped |= {path for path, _ in batch["skipped"]}
                if epoch > 5:  # one worker may be ahead of the other
                    return pairs, skipped
                if epoch < 2:
                    pairs[path, epoch] = batch["frames"].numpy().tobytes()
        finally:
            loader.close()

    before, skipped = two_epochs()
    assert len(before) == 8 and not skipped
    empty = str(tmp_path / "vp9.webm")
    (tmp_path / "vp9.webm").write_bytes(b"")
    after, skipped = two_epochs()
    assert skipped == {empty} and after == {key: pair for key, pair in before.items() if key[0] != empty}


def test_a_file_that_was_replaced_after_it_was_indexed_is_left_out_once(tmp_path, clips):
    path = tmp_path / "a.mp4"
    path.write_bytes(clips["h264.mp4"].read_bytes())
    assert len(list(generate_pairs([((0, str(path)),)], SAMPLING))) == 1
    path.write_bytes(clips["h264_444.mp4"].read_bytes())
    with pytest.raises(UnreadableVideo, match="has changed since it was first read"):
        decode_cuts(str(path), index_video(str(path)), [Cut(0, (0, 0, 16, 16), (8, 8))])
    assert decode_cuts(str(path), index_video(str(path)), [Cut(0, (0, 0, 16, 16), (8, 8))])[0][0].shape == (3, 8, 8)


def test_lists_of_other_files_are_no_videos(tmp_path, clips):
    """FFmpeg alone would open the files that a list names."""
    (tmp_path / "secret.mp4").write_bytes(clips["h264.mp4"].read_bytes())
    script = tmp_path / "video.mp4"
    script.write_text("ffconcat version 1.0\nfile secret.mp4\n")
    with av.open(str(script)) as container:
        assert container.format.name == "concat" and next(container.decode(video=0)).width == 64
    with pytest.raises(UnreadableVideo, match="cannot be opened as a video"):
        index_video(str(script))
    for text in (
        f"#EXTM3U\n#EXTINF:1,\n{tmp_path}/secret.mp4\n",
        "v=0\nm=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    ):
        script.write_text(text)
        with pytest.raises(UnreadableVideo, match="cannot be opened as a video"):
            index_video(str(script))


def test_any_file_name_is_a_file(tmp_path, clips, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = clips["h264.mp4"].read_bytes()
    for name in ("12:30.mp4", "a::b.mp4", "x.tar::b.mp4", "pipe:0", "%03d.mp4", "öü 視.mp4"):
        Path(name).write_bytes(data)
        assert len(index_video(name).pts) == FRAMES, name
    unprintable = os.fsdecode(b"\xff\x1b[31m\n.mp4")  # not UTF-8, and would colour a terminal
    Path(unprintable).write_bytes(data)
    loader = PairLoader([unprintable], SAMPLING, 2)
    assert next(iter(loader))["video"] == [unprintable] * 2 and json.loads(json.dumps(loader.state_dict()))
    Path(unprintable).write_bytes(data[:200])
    index_video.cache_clear()
    samples = list(generate_pairs([((0, unprintable), (1, unprintable)), ((0, "öü 視.mp4"),)], SAMPLING))
    (path, reason), again = samples[0]["skipped"]
    assert path == r"\udcff\x1b[31m\n.mp4" and "cannot be opened" in reason and again == (path, reason)
    assert reason.isprintable()
