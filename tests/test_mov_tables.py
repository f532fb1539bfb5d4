"""The index that the tables of a MOV or MP4 give is the one that reading the whole file gives; what is not in order is read."""

import tarfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from fuzzed_videos import (
    B_FRAMES,
    FRAMES,
    KINDS,
    RATE,
    UNEVEN,
    X265,
    Kind,
    box,
    number_of,
    turned,
    write_clip,
)
from loopback import serve

from training import video_index
from training.mov_tables import track
from training.video_decoding import Cut, decode_cuts
from training.video_files import _Part, open_video
from training.video_index import OtherThanStated, index_video, read_index
from training.video_sources import find_videos
from training.video_stream import PairSampling, check_videos, video_pairs

MORE = (
    Kind("first.mp4", "libx264", options=B_FRAMES, container={"movflags": "faststart"}),
    Kind("negative_offsets.mp4", "libx264", options=B_FRAMES, container={"movflags": "negative_cts_offsets"}),
    Kind("no_edits.mp4", "libx264", options=B_FRAMES, container={"use_editlist": "0"}),
    Kind("uneven_b_frames.mov", "libx264", options=B_FRAMES, times=UNEVEN),
    Kind("late.mp4", "libx264", options=B_FRAMES, times=tuple(np.array(UNEVEN) + 3.0)),
    Kind("open_groups.mp4", "libx265", options={**X265, "preset": "fast"}),
    Kind("open_groups_264.mp4", "libx264", options={**B_FRAMES, "x264-params": "open-gop=1"}),
    Kind("intra.mov", "mjpeg", "yuvj422p"),
)
ALL = {kind.name: kind for kind in (*KINDS, *MORE) if kind.name.endswith((".mp4", ".mov", ".3gp"))}
READ_THROUGH = {"h264_fragments.mp4"}  # whose times lie all over the file
WHOLE = ((0, 0, 64, 48), (48, 64))


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("movies")
    return {kind.name: write_clip(folder / kind.name, kind) for kind in ALL.values()}


def tables_of(path: Path | str):
    with open_video(str(path)) as video:
        return video.movie and track(video.movie, video.container.streams.video[0].id)


def read_through(path: Path | str, monkeypatch) -> video_index.VideoIndex:
    with monkeypatch.context() as patched:
        patched.setattr(video_index, "track", lambda movie, number: None)
        return read_index(str(path))


def same(index, other) -> bool:
    return (index.pts, index.keyframes, index.seek_points, index.height, index.width, index.quarter_turns) == (
        other.pts, other.keyframes, other.seek_points, other.height, other.width, other.quarter_turns
    ) and np.array_equal(index.times, other.times)  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_tables_tell_what_reading_the_file_tells(clips, monkeypatch, name):
    index, other = read_index(str(clips[name])), read_through(clips[name], monkeypatch)
    assert len(index.pts) == FRAMES and index.exact and other.looked
    assert same(index, other)
    assert (tables_of(clips[name]) is None) == (name in READ_THROUGH)
    assert index.looked == (name in READ_THROUGH)


@pytest.mark.parametrize("sound", [False, True])
def test_a_cut_without_encoding(clips, tmp_path, monkeypatch, sound):
    """`ffmpeg -ss X -i IN -c copy OUT`: an edit list hides the first frames; beside it sound, whose track comes first."""
    path = str(tmp_path / "cut.mp4")
    with (
        av.open(str(clips["first.mp4"])) as reader,
        av.open(path, "w", options={"avoid_negative_ts": "disabled"}) as writer,
    ):
        if sound:
            other = writer.add_stream("aac", rate=48000)
        source = reader.streams.video[0]
        stream, shift = writer.add_stream_from_template(source), round(Fraction(5, RATE) / source.time_base)
        for packet in reader.demux(source):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                writer.mux(packet)
        if sound:
            for second in range(2):
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.float32), format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 48000, second * 48000
                writer.mux(other.encode(frame))
            writer.mux(other.encode(None))
    index = read_index(path)
    assert len(index.pts) == FRAMES - 5 and not index.looked
    assert same(index, read_through(path, monkeypatch))
    pictures, _ = decode_cuts(path, index, [Cut(number, *WHOLE) for number in range(FRAMES - 5)])
    assert [number_of(picture) for picture in pictures] == list(range(5, FRAMES))


def test_of_the_media_three_packets_are_read(clips, tmp_path, monkeypatch):
    clip = write_clip(tmp_path / "large.mov", Kind("large.mov", "rawvideo", "rgb24", (96, 128)))
    with tarfile.open(tmp_path / "videos.tar", "w") as tar:
        tar.add(clip, "large.mov")
    (member,) = find_videos([str(tmp_path / "videos.tar")])
    read, whole = [], _Part.read

    def counted(self, size=-1):
        read.append(whole(self, size))
        return read[-1]

    monkeypatch.setattr(_Part, "read", counted)
    index = read_index(member)
    by_tables = sum(map(len, read))
    read.clear()
    assert same(index, read_through(member, monkeypatch))
    with open_video(member) as video:
        packets = [entry.size for entry in video.container.streams.video[0].index_entries]
        assert by_tables < len(video.movie) + sum(packets[:3]) + 4 * 32768 < sum(packets) < sum(map(len, read))


def test_a_remote_movie_has_its_exact_times(clips):
    """Others are estimated from the header: frames of uneven times would not be found."""
    name = "uneven_b_frames.mov"
    with serve(clips[name].parent) as server:
        url = f"{server.url}/{name}"
        index, local = read_index(url), read_index(str(clips[name]))
        assert index.exact and same(index, local)
        pictures, times = decode_cuts(url, index, [Cut(number, *WHOLE) for number in (5, 17)])
        assert [number_of(picture) for picture in pictures] == [5, 17]
        np.testing.assert_array_equal(times, local.times[[5, 17]])


def test_of_a_truncated_movie_the_frames_that_are_there(clips, tmp_path, monkeypatch):
    data, path = clips["first.mp4"].read_bytes(), tmp_path / "truncated.mp4"
    path.write_bytes(data[: -len(data) // 4])
    index = read_index(str(path))
    assert tables_of(path) is not None and len(index.pts) < FRAMES
    assert same(index, read_through(path, monkeypatch))


# --- headers that are not true ---


def other_size(data: bytes) -> bytes:
    place = data.rindex(b"avc1") + 28  # the first one is a brand
    return data[:place] + (40).to_bytes(2, "big") + (60).to_bytes(2, "big") + data[place + 4 :]


def twice(data: bytes) -> bytes:
    """Turned by the track, and as much by the movie."""
    data = bytearray(turned(data, 1))
    place, there = data.index(b"mvhd") + 40, data.index(b"tkhd") + 44
    data[place : place + 36] = data[there : there + 36]
    return bytes(data)


@pytest.mark.parametrize(("change", "stated"), [(other_size, True), (twice, False)])
def test_frames_that_are_not_what_the_header_says_are_looked_at(clips, tmp_path, monkeypatch, change, stated):
    path = tmp_path / "clip.mp4"
    path.write_bytes(change(clips["h264.mp4"].read_bytes()))
    index, looked = read_index(str(path)), read_through(path, monkeypatch)
    assert index.looked is not stated and (index.height, index.width) != (looked.height, looked.width) or not stated
    index_video.cache_clear()
    if stated:
        with pytest.raises(OtherThanStated):
            decode_cuts(str(path), index, [Cut(3, (0, 0, 16, 16), (16, 16))])
    index_video.cache_clear()
    height, width = looked.height, looked.width
    sampling = PairSampling((height, width), frame_gap_seconds=(0.3, 0.6), frame_scale=(1.0, 1.0), pairs_per_video=3)
    for sample in video_pairs(str(path), sampling, 0):
        upright = [np.rot90(frame, -looked.quarter_turns, axes=(1, 2)) for frame in sample["frames"]]
        np.testing.assert_allclose([number_of(frame) for frame in upright], sample["times"] * RATE, atol=1e-3)
    assert same(index_video(str(path)), looked)


def test_the_first_look_decodes_whatever_the_tables_say(clips, tmp_path):
    data, path = clips["h264.mp4"].read_bytes(), tmp_path / "noise.mp4"
    begin, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    path.write_bytes(data[:begin] + bytes(end - begin) + data[end:])
    sampling = PairSampling((48, 64), frame_gap_seconds=(0.3, 0.6))
    assert len(read_index(str(path)).pts) == FRAMES
    with pytest.raises(ValueError, match="no usable video"):
        check_videos([str(path)], sampling)


# --- tables that are not in order ---


def movie_of(path: Path) -> bytes:
    with open_video(str(path)) as video:
        return video.movie


def entries(*rows: tuple[int, int]) -> bytes:
    table = b"".join(a.to_bytes(4, "big", signed=True) + b.to_bytes(4, "big", signed=True) for a, b in rows)
    return bytes(4) + len(rows).to_bytes(4, "big") + table


def replaced(data: bytes, name: bytes, contents: bytes | None) -> bytes:
    """A box in another, whose sizes follow; `None` drops it."""
    out, place = b"", 0
    while place < len(data):
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        inner = data[place + 8 : place + length]
        if kind == name:
            inner = contents
        elif kind in (b"trak", b"mdia", b"minf", b"stbl", b"edts"):
            inner = replaced(inner, name, contents)
        out += box(kind, inner) if inner is not None else b""
        place += length
    return out


def test_offsets_are_those_of_the_table(clips):
    movie = movie_of(clips["first.mp4"])
    whole = track(movie, 1)
    assert len(whole.offsets) == FRAMES and len(set(whole.offsets.tolist())) > 1 and whole.quarter_turns == 0
    runs = [(3, 5), (FRAMES - 4, -7), (0, 1), (1, 2)]
    assert track(replaced(movie, b"ctts", entries(*runs)), 1).offsets.tolist() == [5] * 3 + [-7] * (FRAMES - 4) + [2]
    assert track(replaced(movie, b"ctts", None), 1).offsets.tolist() == [0] * FRAMES


@pytest.mark.parametrize(
    "change",
    {
        "another number": lambda movie: movie[: movie.index(b"tkhd") + 19] + b"\2" + movie[movie.index(b"tkhd") + 20 :],
        "too few offsets": lambda movie: replaced(movie, b"ctts", entries((FRAMES - 1, 0))),
        "too many offsets": lambda movie: replaced(movie, b"ctts", entries((FRAMES, 0), (1, 0))),
        "a negative count": lambda movie: replaced(movie, b"ctts", entries((FRAMES + 1, 0), (-1, 0))),
        "offsets out of measure": lambda movie: replaced(movie, b"ctts", entries((FRAMES, 1 << 28))),
        "more rows than are there": lambda movie: replaced(movie, b"ctts", entries((FRAMES, 0))[:-8] + bytes(4)),
        "two tables": lambda movie: movie.replace(b"stco", b"stsz"),
        "no sizes": lambda movie: replaced(movie, b"stsz", None),
        "no media": lambda movie: replaced(movie, b"mdia", None),
        "no header": lambda movie: replaced(movie, b"mvhd", None),
        "fragments": lambda movie: movie + box(b"mvex", b""),
        "two headers": lambda movie: movie + box(b"mvhd", bytes(100)),
        "two tracks of a number": lambda movie: movie + movie[movie.index(b"trak") - 4 :],
        "two edits": lambda movie: replaced(
            movie, b"elst", entries((9, 0))[:4] + b"\0\0\0\2" + b"".join(bytes([0, 0, 0, 9, 0, 0, 0, n, 0, 1, 0, 0]) for n in (0, 9))
        ),
        "a box longer than its box": lambda movie: movie[:-1],
        "a box without a head": lambda movie: movie + bytes(4),
        "very many boxes": lambda movie: movie + box(b"free", b"") * 10_001,
        "nothing": lambda movie: b"",
        "noise": lambda movie: np.random.default_rng(0).bytes(1000),
    }.items(),
    ids=lambda change: change[0],
)  # fmt: skip
def test_tables_that_are_not_in_order_tell_nothing(clips, change):
    movie = movie_of(clips["first.mp4"])
    assert track(movie, 1) is not None
    changed = change[1](movie)
    assert changed != movie and track(changed, 1) is None
