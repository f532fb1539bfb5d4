"""Indices from tables and from whole files: the pairs do not depend on what a process has read before."""

import io
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from fuzzed_videos import BY_NAME, FAST, FRAMES, RATE, Kind, box, write_clip
from PIL import Image
from test_mov_tables import pairs_of, same

from evaluation.explore_features import read_clip
from training.pair_plans import PairSampling
from training.video_checks import check_videos
from training.video_files import Deadline, UnreadableVideo
from training.video_index import _estimate_pts, index_video, read_index


def test_what_a_file_gives_does_not_hang_on_what_was_read_before(tmp_path, monkeypatch):
    """The clip changes its size and the header has the later one; pairs lie in the first part, in the last, or in both."""
    monkeypatch.chdir(tmp_path)
    path = Path("changes.mp4")  # pairs are drawn by the name
    small, large = (
        write_clip(tmp_path / f"{n}.h264", Kind("", "libx264", size=(n, n), options=FAST)) for n in (48, 96)
    )
    with av.open(str(path), "w") as writer:
        with av.open(str(small)) as first, av.open(str(large)) as second:
            stream, number = writer.add_stream_from_template(second.streams.video[0]), 0
            for source in (first, second):
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.stream, packet.time_base, packet.duration = stream, Fraction(1, RATE), 1
                        packet.pts = packet.dts = number
                        writer.mux(packet)
                        number += 1
    index_video.cache_clear()
    assert read_index(str(path)).height == 96 and read_index(str(path), whole=True).height == 48
    in_turn = [pairs_of(path, epoch) for epoch in range(12)]
    alone = []
    for epoch in range(12):
        index_video.cache_clear()
        alone.append(pairs_of(path, epoch))
    index_video.cache_clear()
    check_videos([str(path)], PairSampling((40, 56), frame_gap_seconds=(0.3, 0.6)))
    assert in_turn == alone == [pairs_of(path, epoch) for epoch in range(12)]
    assert {len(pairs) for pairs in alone} == {1, 3}  # an error, or three pairs


def test_an_flv_whose_video_begins_later_than_zero_is_read(tmp_path):
    """FFmpeg writes such files with sound; in FLVs of Sorenson video it cannot seek to a time before the first keyframe."""
    path = tmp_path / "late.flv"
    with av.open(str(path), "w") as writer:
        stream = writer.add_stream("flv", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 12
        sound = writer.add_stream("pcm_s16le", rate=44100)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 4410), np.int16), format="s16", layout="mono")
        samples.sample_rate, samples.pts = 44100, 0
        writer.mux(sound.encode(samples))
        for number in range(30):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 8 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = 1 + number, Fraction(1, 25)
            writer.mux(stream.encode(frame))
        writer.mux(stream.encode(None))
    index = read_index(str(path))
    assert len(index.pts) == 30 and index.pts[0] > 0 and (index.width, index.height) == (64, 48)
    assert len(pairs_of(path, 0)) == 3


@pytest.mark.parametrize("name", ["h264.mp4", "mpeg4_b_frames.mp4"])
def test_a_cover_picture_is_not_the_video(tmp_path, monkeypatch, name):
    """FFmpeg makes a stream of a cover picture, which is the first stream if the picture stands before the tracks."""
    monkeypatch.chdir(tmp_path)
    index_video.cache_clear()
    path = write_clip(Path("clip.mp4"), BY_NAME[name])  # pairs are drawn by the name
    plain, pairs, shown = read_index(str(path)), pairs_of(path, 0), read_clip(str(path), 0.5, 0.5, 2, 64).frames
    data, cover = path.read_bytes(), io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(cover, "PNG")
    place = data.index(b"mvhd") - 4
    place += int.from_bytes(data[place : place + 4])  # after mvhd; the media data stands before all tables
    picture = box(b"covr", box(b"data", bytes([0, 0, 0, 14, 0, 0, 0, 0]) + cover.getvalue()))
    handler = box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    tags = box(b"udta", box(b"meta", bytes(4) + handler + box(b"ilst", picture)))
    movie = data.index(b"moov") - 4
    path.write_bytes(data[:movie] + box(b"moov", data[movie + 8 : place] + tags + data[place:]))
    with av.open(str(path)) as video:
        assert [len(video.streams.video), video.streams.video[0].width] == [2, 32]
    index_video.cache_clear()
    index = read_index(str(path))
    assert same(index, plain) and index.stated == plain.stated and same(read_index(str(path), whole=True), plain)
    assert len(index.pts) == FRAMES and pairs_of(path, 0) == pairs
    assert np.array_equal(read_clip(str(path), 0.5, 0.5, 2, 64).frames, shown)
    path.write_bytes(data[:movie] + box(b"moov", data[movie + 8 : place] + tags))
    with pytest.raises(UnreadableVideo, match="has no video stream"):
        read_index(str(path))


JOINED = ["h264_b_frames.ts", "mpeg2_b_frames.mpg", "vp9.webm", "h264_b_frames.mkv"]


@pytest.mark.parametrize("name", JOINED)
def test_files_joined_end_to_end_are_refused(tmp_path, name):
    """In such a file, two frames of unrelated scenes have the same time."""
    path = write_clip(tmp_path / name, BY_NAME[name])
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(
        UnreadableVideo, match=f"time stamps that begin anew after {FRAMES} frames .*: cut it there, or"
    ):
        read_index(str(path))


def test_a_clock_may_run_over_and_be_a_little_unordered(tmp_path):
    """The clock of MPEG-TS overflows after 33 bits, 26.5 hours; here the second part begins 0.2 s before the end of the first."""
    clip, joined = write_clip(tmp_path / "clip.ts", BY_NAME["h264_b_frames.ts"]), b""
    for offset in (2**33 - 2**18, 2**33 - 2**18 + 90000 * (FRAMES / RATE - 0.2)):
        with av.open(str(clip)) as reader, av.open(str(tmp_path / "part.ts"), "w") as writer:
            source = reader.streams.video[0]
            stream = writer.add_stream_from_template(source)
            for packet in reader.demux(source):
                if packet.size:
                    packet.stream, packet.pts, packet.dts = stream, packet.pts + int(offset), packet.dts + int(offset)
                    writer.mux(packet)
        joined += (tmp_path / "part.ts").read_bytes()
    (tmp_path / "joined.ts").write_bytes(joined)
    index = read_index(str(tmp_path / "joined.ts"))
    assert len(index.pts) == 2 * FRAMES and index.duration == pytest.approx((2 * FRAMES - 1) / RATE - 0.2)


def test_frames_beyond_the_duration_are_not_estimated():
    container = SimpleNamespace(duration=1_990_000)  # microseconds
    for duration, count in ((1990, 49), (2000, 50), (None, 49), (1, 1)):
        stream = SimpleNamespace(
            average_rate=Fraction(25), guessed_rate=None, duration=duration, time_base=Fraction(1, 1000), start_time=40,
            container=container,
        )  # fmt: skip
        assert _estimate_pts(stream, Deadline()).tolist() == [40 + 40 * number for number in range(count)]
