"""The tables of a MOV or MP4 give the same index as reading the whole file; if they are not in order, the file is read."""

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
    write_clip,
)
from loopback import serve

from training import video_index
from training.mov_tables import track
from training.pair_plans import PairSampling
from training.video_checks import check_videos
from training.video_decoding import Cut, decode_cuts
from training.video_files import UnreadableVideo, _Part, open_video
from training.video_index import by_index, index_video, read_index
from training.video_sources import find_videos
from training.video_stream import video_pairs

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
READ_THROUGH = {"h264_fragments.mp4"}  # its times are spread over the whole file
WHOLE = ((0, 0, 64, 48), (48, 64))


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("movies")
    return {kind.name: write_clip(folder / kind.name, kind) for kind in ALL.values()}


def tables_of(path: Path | str):
    with open_video(str(path)) as video:
        return video.movie and track(video.movie, video.container.streams.video[0].id)


def same(index, other) -> bool:
    return index.same_as(other) and np.array_equal(index.times, other.times)


@pytest.mark.parametrize("name", ALL)
def test_tables_tell_what_reading_the_file_tells(clips, monkeypatch, name):
    index, other = read_index(str(clips[name])), read_index(str(clips[name]), whole=True)
    assert len(index.pts) == FRAMES and index.exact and not other.stated
    assert same(index, other)
    assert (tables_of(clips[name]) is None) == (name in READ_THROUGH)
    assert index.stated == (name not in READ_THROUGH)


@pytest.mark.parametrize("sound", [False, True])
def test_a_cut_without_encoding(clips, tmp_path, monkeypatch, sound):
    """Like `ffmpeg -ss X -i IN -c copy OUT`: an edit list hides the first frames. With sound, the sound track comes first."""
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
    assert len(index.pts) == FRAMES - 5 and index.stated
    assert same(index, read_index(str(path), whole=True))
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
    assert same(index, read_index(str(member), whole=True))
    with open_video(member) as video:
        packets = [entry.size for entry in video.container.streams.video[0].index_entries]
        assert by_tables < len(video.movie) + sum(packets[:3]) + 4 * 32768 < sum(packets) < sum(map(len, read))


def test_a_remote_movie_has_its_exact_times(clips):
    """Times estimated from the header, as for other remote videos, would not find frames at uneven times."""
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
    assert len(tables_of(path).offsets) == FRAMES > len(index.pts)
    assert same(index, read_index(str(path), whole=True))


# --- tables that are not true ---


def with_size(data: bytes, height: int, width: int) -> bytes:
    place = data.rindex(b"avc1") + 28  # the first "avc1" is a brand
    return data[:place] + width.to_bytes(2, "big") + height.to_bytes(2, "big") + data[place + 4 :]


def with_matrix(data: bytes, header: bytes, *sides: int) -> bytes:
    data, place = bytearray(data), data.index(header) + (40 if header == b"mvhd" else 44)
    for slot, value in zip((0, 1, 3, 4), sides):
        data[place + 4 * slot : place + 4 * slot + 4] = (value * 65536).to_bytes(4, "big", signed=True)
    return bytes(data)


def with_keyframes(data: bytes, numbers: list[int] | None) -> bytes:
    """Replace the list of keyframes, or drop it with `None`; the movie must end with its tables, so that no media data moves."""
    place = data.index(b"moov") - 4
    table = None if numbers is None else bytes(4) + b"".join(n.to_bytes(4, "big") for n in (len(numbers), *numbers))
    return data[:place] + replaced(data[place:], b"stss", table)


def pairs_of(path: Path, epoch: int) -> list:
    sampling = PairSampling((40, 56), frame_gap_seconds=(0.3, 0.6), frame_scale=(1.0, 1.0), pairs_per_video=3)
    try:
        return [
            (sample["times"].tolist(), sample["frames"].tobytes())
            for sample in video_pairs(str(path), sampling, epoch)
        ]
    except UnreadableVideo as error:
        return [str(error)]


UNTRUE = {
    "another size": lambda data: with_size(data, 40, 60),
    "no size": lambda data: with_size(data, 1, 64),
    "turned by the movie": lambda data: with_matrix(data, b"mvhd", 0, -1, 1, 0),
    "mirrored": lambda data: with_matrix(data, b"tkhd", -1, 0, 0, 1),
    "no keyframes": lambda data: with_keyframes(data, None),
    "keyframes that are none": lambda data: with_keyframes(data, [1, 4]),
}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (change, name)
        for change in UNTRUE
        for name in ("h264.mp4", "h264_b_frames.mp4", "hevc.mp4", "av1.mp4")
        if "h264" in name or "size" not in change  # with_size changes only H.264 files
    ],
)
def test_tables_that_are_not_true_cost_time_and_no_pair(clips, tmp_path, monkeypatch, name, change):
    """The pairs are those of the same file read without its tables."""
    path = tmp_path / "clip.mp4"
    kind = ALL.get(name, Kind(name, "libx264", options=B_FRAMES))
    data = write_clip(path, kind).read_bytes()
    path.write_bytes(UNTRUE[change](data))
    assert path.read_bytes() != data
    index_video.cache_clear()
    found = [pairs_of(path, epoch) for epoch in range(4)]
    sampling = PairSampling((40, 56), frame_gap_seconds=(0.3, 0.6))
    index = read_index(str(path))
    assert index.stated == (change != "no keyframes" or name == "hevc.mp4")
    assert index.same_as(read_index(str(path), whole=True)) or change not in ("turned by the movie", "mirrored")
    index_video.cache_clear()
    assert check_videos([str(path)], sampling) == []
    assert [kept.stated for kept in index_video.kept.values()] in ([], [index.stated])
    monkeypatch.setattr(video_index, "track", lambda movie, number: None)
    index_video.cache_clear()
    assert found == [pairs_of(path, epoch) for epoch in range(4)]
    # In these two formats FFmpeg itself relies on a table of wrong keyframes.
    believed = change.endswith(("keyframes", "none")) and name in ("hevc.mp4", "av1.mp4")
    assert all(len(pairs) == 3 for pairs in found) or believed


def test_a_damaged_file_with_true_tables_is_read_whole_once(clips, tmp_path, monkeypatch):
    data, path, read = clips["h264.mp4"].read_bytes(), tmp_path / "damaged.mp4", []
    with av.open(str(clips["h264.mp4"])) as video:
        entry = video.streams.video[0].index_entries[12]
        path.write_bytes(data[: entry.pos + 8] + bytes(entry.size - 8) + data[entry.pos + entry.size :])
    whole = video_index.read_index
    monkeypatch.setattr(video_index, "read_index", lambda *given, **how: read.append(how) or whole(*given, **how))
    index_video.cache_clear()
    for _ in range(3):
        with pytest.raises(UnreadableVideo, match="cannot be decoded|damaged|skips"):
            by_index(str(path), lambda index, _: decode_cuts(str(path), index, [Cut(12, *WHOLE)]))
    assert read == [{"whole": True}]


def test_turns_that_only_the_frames_tell(clips, tmp_path, monkeypatch):
    """Messages in the stream can turn frames in the same way; here the turn in the tables is hidden."""
    path = str(clips["h264_turned_1.mp4"])
    whole, tables = read_index(path, whole=True), video_index.track
    monkeypatch.setattr(video_index, "track", lambda *given: tables(*given)._replace(quarter_turns=0))
    index = read_index(path)
    assert index.stated and (index.height, index.width, index.quarter_turns) == (48, 64, 0) != (
        whole.height,
        whole.width,
        1,
    )
    with pytest.raises(UnreadableVideo, match="has frames of another size, or turned otherwise, than its header says"):
        decode_cuts(path, index, [Cut(3, (0, 0, 16, 16), (16, 16))])
    index_video.cache_clear()
    assert by_index(path, lambda index, _: (decode_cuts(path, index, [Cut(3, (0, 0, 16, 16), (16, 16))]), index))[
        1
    ].same_as(whole)


def test_the_first_look_decodes_whatever_the_tables_say(clips, tmp_path):
    data, path = clips["h264.mp4"].read_bytes(), tmp_path / "noise.mp4"
    with av.open(str(clips["h264.mp4"])) as video:
        packets = [(entry.pos, entry.size) for entry in video.streams.video[0].index_entries]
    # The packets follow one another without gaps.
    assert sum(size for _, size in packets) == packets[-1][0] + packets[-1][1] - packets[0][0]

    def damage(frames: int) -> None:
        """Zero the first `frames` frames except for the bytes that tell slices of keyframes from others."""
        noise = b"".join(data[begin : begin + 8] + bytes(size - 8) for begin, size in packets[1:frames])
        begin, length = packets[0]
        slice_at = begin + 4 + int.from_bytes(data[begin : begin + 4], "big")  # after the encoder's note about itself
        first = data[begin : slice_at + 8] + bytes(begin + length - slice_at - 8)
        path.write_bytes(data[:begin] + first + noise + data[begin + length + len(noise) :])

    sampling = PairSampling((48, 64), frame_gap_seconds=(0.3, 0.6))
    damage(FRAMES)
    assert len(read_index(str(path)).pts) == FRAMES
    with pytest.raises(ValueError, match="no usable video"):
        check_videos([str(path)], sampling)
    # If only the first group of pictures is damaged, the video still has others.
    damage(8)
    assert check_videos([str(path)], sampling) == []


# --- tables that are not in order ---


def numbers(*values: int) -> bytes:
    return b"".join(value.to_bytes(4, "big") for value in values)


def movie_of(path: Path) -> bytes:
    with open_video(str(path)) as video:
        return video.movie


def entries(*rows: tuple[int, int]) -> bytes:
    table = b"".join(a.to_bytes(4, "big", signed=True) + b.to_bytes(4, "big", signed=True) for a, b in rows)
    return bytes(4) + len(rows).to_bytes(4, "big") + table


def replaced(data: bytes, name: bytes, contents: bytes | None) -> bytes:
    """Replace the contents of the box `name`, or drop it with `None`, and adjust the sizes of the boxes around it."""
    out, place = b"", 0
    while place < len(data):
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        inner = data[place + 8 : place + length]
        if kind == name:
            inner = contents
        elif kind in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts"):
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


def wide(movie: bytes) -> bytes:
    """Rewrite the movie and track headers with 64-bit times."""
    for name, zeros in ((b"mvhd", (4, 8, 16)), (b"tkhd", (4, 8, 20))):
        place = movie.index(name) + 4
        header = movie[place : place - 8 + int.from_bytes(movie[place - 8 : place - 4], "big")]
        parts, begin = [b"\1" + header[1:4]], 4
        for field in zeros:
            parts.append(header[begin:field] + bytes(4))
            begin = field
        movie = replaced(movie, name, b"".join(parts) + header[begin:])
    return movie


@pytest.mark.parametrize("name", ["first.mp4", "h264_turned_3.mp4"])
def test_headers_of_64_bits_say_the_same(clips, tmp_path, name):
    movie, path = movie_of(clips[name]), tmp_path / "wide.mp4"
    data = clips["h264_turned_3.mp4"].read_bytes()
    assert (wide(movie)[:112] != movie[:112]) and track(wide(movie), 1).quarter_turns == track(movie, 1).quarter_turns
    place = data.index(b"moov") - 4
    path.write_bytes(data[:place] + box(b"moov", wide(movie_of(clips["h264_turned_3.mp4"]))))
    index = read_index(str(path))
    assert index.stated and same(index, read_index(str(path), whole=True)) and index.quarter_turns == 3


@pytest.mark.parametrize(
    "more",
    [
        lambda movie: movie + box(b"moov", b""),
        lambda movie: movie + box(b"moof", b""),
        lambda movie: box(b"moov", movie[8:] + box(b"free", box(b"trun", b"\0\0\0\1" * 2))),
    ],
)
def test_what_is_described_elsewhere_too_is_read_from_end_to_end(clips, tmp_path, more):
    data, path = clips["h264.mp4"].read_bytes(), tmp_path / "more.mp4"
    place = data.index(b"moov") - 4
    path.write_bytes(data[:place] + more(data[place:]))
    assert len(tables_of(clips["h264.mp4"]).offsets) == FRAMES
    assert tables_of(path) is None and len(read_index(str(path)).pts) == FRAMES


# The offsets differ from those of the first packets, or one is missing.
@pytest.mark.parametrize(
    "change",
    [
        lambda track: track._replace(offsets=track.offsets + np.arange(FRAMES)),
        lambda track: track._replace(offsets=track.offsets[:-1]),
    ],
)
def test_tables_that_the_first_packets_do_not_bear_out_are_not_relied_on(clips, monkeypatch, change):
    monkeypatch.setattr(video_index, "track", lambda movie, number: change(track(movie, number)))
    index = read_index(str(clips["first.mp4"]))
    monkeypatch.undo()
    assert not index.stated and same(index, read_index(str(clips["first.mp4"])))


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
    assert len(track(movie, 1).offsets) == FRAMES
    changed = change[1](movie)
    assert changed != movie and track(changed, 1) is None


def test_an_edit_list_of_64_bits_may_begin_later_too(clips):
    movie = movie_of(clips["first.mp4"])

    def edited(*begins: int) -> bytes:
        rows = [(9).to_bytes(8, "big") + begin.to_bytes(8, "big", signed=True) + b"\0\1\0\0" for begin in begins]
        return replaced(movie, b"elst", b"\1\0\0\0" + numbers(len(begins)) + b"".join(rows))

    assert len(track(edited(-1, -1, 0), 1).offsets) == FRAMES
    assert track(edited(-1, 0, 0), 1) is None
