"""Videos of every kind give the requested frames. Damaged and hostile ones are skipped with a reason, in bounded time and memory."""

import contextlib
import json
import os
import select
import struct
import subprocess
import sys
import tarfile
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from fuzzed_videos import (
    BY_NAME,
    FAST,
    FRAMES,
    KINDS,
    RATE,
    Kind,
    box,
    damaged,
    declared_fragment,
    declared_h264,
    declared_png,
    declared_samples,
    number_of,
    with_sound,
    write_clip,
)
from loopback import serve

from modeling_poodle.video_frames import MAX_PIXELS
from training import video_files, video_index
from training.video_decoding import Cut, decode_cuts
from training.video_files import MAX_ENTRIES, Deadline, UnreadableVideo
from training.video_index import _estimate_pts, index_video, read_index
from training.video_sources import find_videos

WITHOUT_TIMES = {
    "h264_no_times.h264": "has no frames with time stamps",
    "h264_no_times.avi": r"has time stamps out of order \(B frames in AVI\?\): encode it anew",
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    return {kind.name: write_clip(folder / kind.name, kind) for kind in KINDS}


@pytest.mark.parametrize("name", [kind.name for kind in KINDS if kind.name not in WITHOUT_TIMES])
def test_frames_times_and_colours_of_every_kind(clips, name):
    kind, path = BY_NAME[name], str(clips[name])
    index = index_video(path)
    height, width = kind.size[::-1] if (kind.turns or 0) % 2 else kind.size
    assert (index.height, index.width, len(index.pts)) == (height, width, FRAMES)
    times = kind.times or np.arange(FRAMES) / RATE
    np.testing.assert_allclose(np.diff(index.times), np.diff(times), atol=1.5e-3)
    whole = [Cut(number, (0, 0, width, height), (height, width)) for number in range(FRAMES)]
    pictures, shown = decode_cuts(path, index, whole)
    np.testing.assert_allclose(shown, index.times, atol=1e-6)
    for cut in whole:  # with a separate seek for each frame
        pictures += decode_cuts(path, index, [cut])[0]
        assert np.array_equal(pictures[-1], pictures[cut.number])
    # A player turns the coded picture counter-clockwise by `turns`. The test turns it back.
    numbers = [number_of(np.rot90(picture, -(kind.turns or 0), axes=(1, 2))) for picture in pictures]
    assert numbers == [*range(FRAMES), *range(FRAMES)]


@pytest.mark.parametrize(
    "name", ["h264.mp4", "h264_fragments.mp4", "hevc.mp4", "av1.mp4", "prores.mov", "mpeg4_b_frames.mp4"]
)
def test_a_movie_is_opened_without_decoding_unless_its_header_has_no_size(clips, monkeypatch, name):
    asked, opened = [], av.open
    monkeypatch.setattr(av, "open", lambda *args, **how: asked.append(how["options"]) or opened(*args, **how))
    with video_files.open_video(str(clips[name])) as video:
        context = video.container.streams.video[0].codec_context
        assert (context.height, context.width) == BY_NAME[name].size
    # FFmpeg gets the size of MPEG-4 Part 2 only from a frame.
    decoders = [options.get("codec_whitelist") for options in asked]
    assert decoders == (["none", None] if name == "mpeg4_b_frames.mp4" else ["none"])


@pytest.mark.parametrize("name", WITHOUT_TIMES)
def test_files_without_time_stamps_are_refused_rather_than_guessed(clips, name):
    with pytest.raises(UnreadableVideo, match=WITHOUT_TIMES[name]):
        index_video(str(clips[name]))


# --- damaged files, read in a separate process ---


class Reader:
    """
    A process that reads videos like a loader worker, and may crash or hang.

    `read` returns its report on a video. If the process ends or takes too long, `read` fails and names the file.
    """

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fuzz_reader.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"

    def read(self, path: Path | str, limit: float) -> dict:
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], limit)
        assert ready, f"{path}: no end after {limit} s"
        line = self.process.stdout.readline()
        assert line, f"{path}: ended its reader ({self.process.wait()})"
        return json.loads(line)


@contextlib.contextmanager
def reading():
    reader = Reader()
    try:
        yield reader
    finally:
        reader.process.kill()
        reader.process.wait()


def fuzz(folder: Path, clips: dict[str, Path], count: int):
    """Yield (name of the damage, path) for `count` damaged clips, each kind in turn. Every call writes the same bytes."""
    names = list(clips)
    for number in range(count):
        rng = np.random.default_rng([11, number])
        one, other = names[number % len(names)], names[rng.integers(len(names))]
        damage, data = damaged(clips[one].read_bytes(), clips[other].read_bytes(), rng)
        path = folder / f"{number:03d}_{one}"
        path.write_bytes(data)
        yield damage, path


def skipped(report: dict, source: Path | str) -> bool:
    """Return whether the video was skipped. Checks that each skip has a reason, and that otherwise all pairs are there."""
    found = report["skipped"]
    assert 2 * len(found) + report["pairs"] == 4, report  # two pairs in each of two epochs
    assert all(path == str(source) and len(reason) > 8 for path, reason in found), report
    return bool(found)


def test_damaged_clips_are_skipped_with_a_reason_or_read(tmp_path, clips):
    with reading() as reader:
        for name, path in clips.items():
            assert skipped(reader.read(path, 30), path) == (name in WITHOUT_TIMES)
        left_out = 0
        for damage, path in fuzz(tmp_path, clips, 60):
            report = reader.read(path, 30)
            left_out += skipped(report, path)
            assert report["mib"] < 64, (damage, report)
        assert 15 <= left_out <= 55  # some clips are damaged too much, some are not


def test_damaged_clips_on_a_server(tmp_path, clips):
    """The frame times of remote files are estimated from the header, which may say anything."""
    damages = [path for _, path in fuzz(tmp_path, clips, 24)]
    giant = bytearray(clips["vp9.webm"].read_bytes())
    place = giant.index(b"\x44\x89\x88") + 3  # Duration, a float of 8 bytes, in ms
    giant[place : place + 8] = struct.pack(">d", 2_400_000 / RATE * 1000)
    for number in range(3):
        (tmp_path / f"giant_{number}.webm").write_bytes(giant)
    with reading() as reader, serve(tmp_path) as server:
        left_out = 0
        for path in damages:
            report = reader.read(f"{server.url}/{path.name}", 30)
            left_out += skipped(report, f"{server.url}/{path.name}")
            assert report["mib"] < 64, report
        assert 6 <= left_out <= 21
        for number in range(3):
            report = reader.read(f"{server.url}/giant_{number}.webm", 60)
            assert report["mib"] < 100 and report["seconds"] < 30, (
                report
            )  # the third index replaces the first one in memory


def test_estimated_times_are_those_of_fractions_and_end_at_the_deadline():
    class Stream:
        guessed_rate, container, start_time = None, None, 7

        def __init__(self, rate, time_base):
            self.average_rate, self.time_base = Fraction(rate), Fraction(1, time_base)
            self.duration = int(200 / self.average_rate / self.time_base)

    for rate, time_base in (("30000/1001", 90000), (16, 1000), (25, 1000), ("24000/1001", 1000), (3, 7)):
        stream = Stream(rate, time_base)
        expected = [7 + round(i / stream.average_rate / stream.time_base) for i in range(199)]
        assert _estimate_pts(stream, Deadline())[:199].tolist() == expected
        with pytest.raises(UnreadableVideo, match="takes longer than -1 s"):
            _estimate_pts(stream, Deadline(-1))


def test_indices_are_kept_by_their_frames(clips, monkeypatch):
    monkeypatch.setattr(video_index, "FRAMES_KEPT", 2 * (1000 + 2 * FRAMES))
    read = []
    kept = video_index._KeptIndices(lambda source: read.append(source) or read_index(source))
    a, b, c = (str(clips[name]) for name in ("h264.mp4", "mpeg4.avi", "hevc.mp4"))
    for source in (a, b, a, c, a, b):
        assert len(kept(source).pts) == FRAMES
    assert read == [a, b, c, b] and list(kept.kept) == [a, b]
    monkeypatch.setattr(video_index, "FRAMES_KEPT", 1)
    assert len(kept(c).pts) == FRAMES and list(kept.kept) == [c]
    assert kept.frames == 1000 + FRAMES + len(kept(c).keyframes)


def test_declared_and_edge_sizes(tmp_path, clips):
    beyond = (MAX_PIXELS // 8192 + 16) // 16 * 16  # one row of macroblocks above the limit
    large = f"has frames of 8192x{beyond}, larger than 8192x4352 in all"
    sized = "cannot be decoded (Invalid data found"  # FFmpeg's message for a size over the limit inside the stream
    of_all = "frames and samples of all its tracks, the most is 10000000"
    header = bytearray(write_clip(tmp_path / "header.mov", Kind("", "rawvideo", "rgb24", (16, 16))).read_bytes())
    place = header.index(b"raw ", header.index(b"stsd")) + 28
    header[place : place + 4] = b"\xff" * 4
    (tmp_path / "header.mov").write_bytes(header)
    hostile = {
        write_clip(tmp_path / "large.mkv", Kind("", "libx264", size=(beyond, 8192), options=FAST, frames=1)): large,
        tmp_path / "header.mov": "has frames of 65535x65535, larger than 8192x4352 in all",
        declared_h264(tmp_path / "beyond.ts", beyond, 8192, 16): sized,
        declared_h264(tmp_path / "beyond.mkv", 16384, 16384, 16): sized,
        declared_png(tmp_path / "beyond.mov", 65000, 65000): sized,
        declared_samples(tmp_path / "samples.mov", 6_000_000): "has by its header 6000000 frames, the most is 5000000",
        declared_samples(tmp_path / "tracks.mov", 30_000_000, 4): f"declares 120000000 {of_all}",
        declared_samples(tmp_path / "edits.mov", 4_000_000, 1, 20): f"declares 80000000 {of_all}",
        declared_fragment(tmp_path / "fragment.mp4", 50_000_000): f"declares 50000024 {of_all}",
        write_clip(tmp_path / "1x1.mkv", Kind("", "ffv1", "yuv444p", (1, 1))): "has frames of 1x1, 2x2 is the least",
        write_clip(
            tmp_path / "one.mp4", Kind("", "mpeg4", frames=1)
        ): "is too short: 0.00 s, the smallest frame gap is 0.2 s",
        write_clip(tmp_path / "none.mp4", Kind("", "libx264", options=FAST, frames=0)): "has no video stream",
        tmp_path / "gone.mp4": "cannot be opened as a video (No such file or directory)",
    }
    eight_k = Kind("", "mjpeg", "yuvj420p", (4320, 7680), frames=2, times=(0.0, 0.5))
    usable = {
        write_clip(tmp_path / "8k.mov", eight_k): 400,
        write_clip(tmp_path / "2x2.mkv", Kind("", "ffv1", size=(2, 2))): 64,
        write_clip(
            tmp_path / "raw.avi", Kind("", "rawvideo", "bgr24", (720, 1280))
        ): 48,  # its 66 MB are not held in memory as a whole
    }
    with reading() as reader:
        for path, reason in hostile.items():
            report = reader.read(path, 60)
            assert skipped(report, path) and report["skipped"][0][1].startswith(reason), report
            assert report["mib"] < 400, report
        for path, bound in usable.items():
            report = reader.read(path, 60)
            assert not skipped(report, path) and report["mib"] < bound, report


def test_giant_indices_are_found_wherever_they_are_declared(tmp_path):
    """
    Declared in a tar, on a server, in a compressed header, or in a box with a 64-bit size.

    Also in other boxes in which FFmpeg looks for a lost movie header.
    """
    path = declared_samples(tmp_path / "tracks.mov", 6_000_000, 2)
    data, told = path.read_bytes(), "declares 12000000 frames and samples of all its tracks"
    begin = data.index(b"moov") - 4
    movie = data[begin : begin + int.from_bytes(data[begin : begin + 4], "big")]
    assert data.endswith(movie)
    packed = box(b"dcom", b"zlib") + box(b"cmvd", len(movie).to_bytes(4, "big") + zlib.compress(movie))
    places = {
        "compressed.mov": box(b"moov", box(b"cmov", packed)),
        "wide.mov": (1).to_bytes(4, "big") + b"moov" + (len(movie) + 8).to_bytes(8, "big") + movie[8:],
        "endless.mov": bytes(4) + movie[4:],
        "lost.mov": movie.replace(b"moov", b"hoov", 1),
        "freed.mov": movie.replace(b"moov", b"free", 1),
        "freed_compressed.mov": box(b"free", box(b"cmov", packed)),
        "unknown.mov": box(b"abcd", b"") + movie,
        "sized.mov": movie.replace(b"\0\0\0\x14stsz", b"\0\0\0\1stsz\0\0\0\0\0\0\0\x14"),
        "fours.mov": movie.replace(b"stsz", b"stz2"),
    }
    for name, place in places.items():
        (tmp_path / name).write_bytes(data[:begin] + place)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(path, arcname="tracks.mov")
    with serve(tmp_path) as server:
        sources = [*(str(tmp_path / name) for name in places), f"{server.url}/tracks.mov"]
        sources += [*find_videos([str(tmp_path / "a.tar")]), *find_videos([f"{server.url}/a.tar"])]
        for source in sources:
            with pytest.raises(UnreadableVideo, match=told):
                index_video(source)


def test_hours_of_plain_sound_are_no_giant_index(tmp_path):
    """These have more samples than the limit, but FFmpeg indexes a thousand at once. Samples that could be frames are still refused."""
    for name, codec in (("a.mov", "pcm_u8"), ("b.mp4", "pcm_s16le"), ("c.mov", "adpcm_ima_qt")):
        path = with_sound(tmp_path / name, codec, 220)
        assert 220 * 48000 > MAX_ENTRIES and len(index_video(str(path)).pts) == FRAMES
    data = (tmp_path / "a.mov").read_bytes()
    sound = data.index(b"soun")
    handler, runs = data.index(b"url ", sound), data.index(b"stsc", sound) + 16
    times = data.index(b"stts", sound) + 16
    for place, new in ((handler, b"vide"), (runs, b"\x7f\xff\xff\xff"), (times, b"\0\0\0\2")):
        path.write_bytes(data[:place] + new + data[place + 4 :])
        with pytest.raises(UnreadableVideo, match=r"declares \d+ frames and samples of all its tracks"):
            read_index(str(path))


@pytest.mark.long
def test_five_hundred_damaged_clips_and_the_largest_declared_sizes(tmp_path, clips):
    """Print the table in docs/reliability.md (with pytest -s)."""
    groups: dict[str, list[dict]] = {}
    with reading() as reader:
        for damage, path in fuzz(tmp_path, clips, 500):
            report = reader.read(path, 30)
            skipped(report, path)
            groups.setdefault(damage, []).append(report)
        # Sizes within the limits are decoded. These are the slowest and largest cases that a file of a few KB can cause.
        for references in (1, 16):
            for name in ("within.ts", "within.mkv", "within.flv"):
                path = declared_h264(tmp_path / f"{references}_{name}", 4352, 8192, references)
                groups.setdefault("8192x4352 declared", []).append(reader.read(path, 120))
        for number, (count, tracks, edits) in enumerate(((80_000_000, 1, 1), (5_000_000, 2, None), (5_000_000, 1, 2))):
            path = declared_samples(tmp_path / f"{number}_samples.mov", count, tracks, edits)
            groups.setdefault("5 to 80 million frames declared", []).append(reader.read(path, 300))
    print("\n| damage | files | skipped | most seconds | most MiB |\n|---|---|---|---|---|")
    for damage, reports in sorted(groups.items()):
        left_out, seconds = sum(bool(r["skipped"]) for r in reports), max(r["seconds"] for r in reports)
        print(f"| {damage} | {len(reports)} | {left_out} | {seconds:.2f} | {max(r['mib'] for r in reports):.0f} |")
    assert sum(len(reports) for reports in groups.values()) == 509
    assert max(r["mib"] for reports in groups.values() for r in reports) < 1024
