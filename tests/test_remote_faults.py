"""Videos on a server that stalls, breaks off, refuses or changes them, and false tars: they are skipped and counted, in bounded time."""

import dataclasses
import io
import tarfile
import time
from fractions import Fraction

import av
import numpy as np
import pytest
from forked_scripts import forked
from fuzzed_videos import BY_NAME, FRAMES, RATE, number_of, write_clip
from loopback import serve

from training import video_decoding, video_files, video_stream
from training.pair_plans import PairSampling
from training.video_decoding import Cut, decode_cuts
from training.video_files import ATTEMPTS, RemoteFile, UnreadableVideo
from training.video_index import index_video, read_index
from training.video_sources import find_videos
from training.video_stream import PairLoader, video_pairs

SAMPLING_FIELDS = {"crop_size": (32, 48), "frame_gap_seconds": (0.2, 0.8), "pairs_per_video": 2}
SAMPLING = PairSampling(**SAMPLING_FIELDS)
WHOLE = ((0, 0, 64, 48), (48, 64))


@pytest.fixture
def web(tmp_path):
    folder = tmp_path / "web"
    folder.mkdir()
    write_clip(folder / "good.mp4", BY_NAME["h264.mp4"])
    with serve(folder) as server:
        yield server


@pytest.fixture
def hasty(monkeypatch):
    """Shorten the time limits; gives the seconds that all attempts at one request may take, including pauses."""
    monkeypatch.setattr(video_files, "REQUEST_SECONDS", 0.3)
    monkeypatch.setattr(video_files, "BACK_OFF", 0.02)
    return ATTEMPTS * 0.3 + 0.02 * (2 ** (ATTEMPTS - 1) - 1)


def copy(server, name: str) -> str:
    (server.folder / name).write_bytes((server.folder / "good.mp4").read_bytes())
    return f"{server.url}/{name}"


def test_a_loader_goes_on_with_the_videos_that_can_be_read(web, hasty):
    good = f"{web.url}/good.mp4"
    bad = {name: copy(web, f"{name}.mp4") for name in ("stalls", "refused", "gone")}
    web.stalled.add("/stalls.mp4")
    web.refused.add("/refused.mp4")
    (web.folder / "gone.mp4").unlink()
    loader, skipped, start = iter(PairLoader([good, *bad.values()], SAMPLING, 2)), [], time.monotonic()
    for _ in range(3):
        batch = next(loader)
        assert batch["video"] == [good, good] and batch["frames"].shape == (2, 2, 3, 32, 48)
        skipped += batch["skipped"]
    elapsed = time.monotonic() - start
    assert set(skipped) == {
        (bad["stalls"], f"cannot be opened as a video (no answer in time, tried {ATTEMPTS} times)"),
        (bad["refused"], next(reason for path, reason in skipped if path == bad["refused"] and "403" in reason)),
        (bad["gone"], next(reason for path, reason in skipped if path == bad["gone"])),
    }
    epochs = len(skipped) / 3
    assert 2 <= epochs <= 4 and elapsed < epochs * hasty + 10
    # Refused and missing files are requested once per epoch (a HEAD, and a GET if that fails); a stall is tried ATTEMPTS times.
    asked = {name: sum(path == f"/{name}.mp4" for _, path, _ in web.requests) for name in bad}
    assert asked["refused"] <= 2 * 4 and asked["gone"] <= 2 * 4 and asked["stalls"] >= 2 * ATTEMPTS


def test_a_stall_or_a_broken_connection_that_passes_is_survived(web, hasty):
    whole = (web.folder / "good.mp4").read_bytes()
    web.drop = ATTEMPTS - 1
    file = RemoteFile(f"{web.url}/good.mp4")
    assert file.read() == whole and web.drop == 0
    web.stalled.add("/good.mp4")
    file = RemoteFile(f"{web.url}/good.mp4")
    start = time.monotonic()
    with pytest.raises(OSError, match=f"no answer in time, tried {ATTEMPTS} times"):
        file.read(100)
    assert ATTEMPTS * 0.3 <= time.monotonic() - start < hasty + 3
    web.stalled.clear()
    assert file.read(100) == whole[:100]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_failing_server_is_asked_again_and_then_given_up(web, hasty, status):
    whole = (web.folder / "good.mp4").read_bytes()
    web.statuses["/good.mp4"] = failing = [status, 2 * ATTEMPTS - 1]  # a HEAD and a GET per attempt
    assert RemoteFile(f"{web.url}/good.mp4").read() == whole and failing[1] == 0
    failing[1] = 100
    with pytest.raises(OSError, match=f"{status}.*, tried {ATTEMPTS} times"):
        RemoteFile(f"{web.url}/good.mp4")


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 416])
def test_a_refusal_is_not_asked_again(web, status):
    web.statuses["/good.mp4"] = [status, 100]
    with pytest.raises(OSError, match=r"^((?!tried).)*$"):
        RemoteFile(f"{web.url}/good.mp4")
    assert len(web.requests) <= 2


@pytest.mark.parametrize("header", [None, "none"])
def test_a_server_without_ranges_is_named_and_not_asked_again(web, monkeypatch, header):
    """`python -m http.server` has no Accept-Ranges header and sends whole files; other servers state "none"."""
    clip = BY_NAME["raw.avi"]  # larger than one block
    write_clip(web.folder / "large.avi", dataclasses.replace(clip, size=(240, 320)))
    assert (web.folder / "large.avi").stat().st_size > 2 * video_files.REMOTE_BLOCK
    web.ranges = header
    monkeypatch.setattr(video_files.time, "sleep", lambda _: pytest.fail("it is asked again"))
    with pytest.raises(
        UnreadableVideo, match=r"gives no byte ranges, which videos are read by: download it(?!.*tried)"
    ):
        index_video(f"{web.url}/large.avi")


def test_a_run_s_log_has_no_line_of_each_request(web):
    script = web.folder / "script.py"
    script.write_text(
        "import sys\nfrom accelerate import Accelerator\nfrom modeling_poodle.processes import log_plainly\n"
        "from training.video_index import index_video\n"
        "log_plainly(Accelerator(cpu=True))\nprint(len(index_video(sys.argv[1]).pts))\n"
    )
    done = forked(script, f"{web.url}/good.mp4")
    assert done.stdout == f"{FRAMES}\n" and "fetching" not in done.stderr


def test_an_opening_as_a_whole_has_a_time_limit(web, monkeypatch):
    """The limit holds however many attempts are left."""
    monkeypatch.setattr(video_files, "REQUEST_SECONDS", 0.3)
    monkeypatch.setattr(video_files, "REMOTE_SECONDS", 1.0)
    web.stalled.add("/good.mp4")
    start = time.monotonic()
    # Two attempts take 0.3 + 0.5 + 0.3 s, and the next pause would be 1 s.
    with pytest.raises(UnreadableVideo, match=r"no answer in time, tried 2 times"):
        index_video(f"{web.url}/good.mp4")
    assert time.monotonic() - start < 4


def test_a_file_that_changes_on_its_server_is_left_out(web, hasty):
    url = copy(web, "changes.mp4")
    index = index_video(url)
    pictures, times = decode_cuts(url, index, [Cut(7, *WHOLE)])
    assert number_of(pictures[0]) == 7 and times == [pytest.approx(7 / RATE)]
    # A change during a read is seen when the connection is made anew, so that old and new bytes are never mixed.
    file = RemoteFile(url)
    assert len(file.read(1000)) == 1000
    write_clip(web.folder / "changes.mp4", BY_NAME["h264_444.mp4"])
    file.file = None
    with pytest.raises(OSError, match="has changed on its server while it was read$"):
        file.read(1000)
    # The file changes between two openings.
    with pytest.raises(UnreadableVideo, match="has changed since it was first read"):
        decode_cuts(url, index, [Cut(7, *WHOLE)])


@pytest.mark.parametrize("sign", ["size", "ETag", "Last-Modified"])
def test_each_sign_of_a_change_alone_is_one(web, hasty, sign):
    url = copy(web, "changes.mp4")
    web.told["/changes.mp4"] = told = {"Last-Modified": "Wed, 25 Nov 2026 08:00:00 GMT"}
    if sign == "ETag":
        told["ETag"] = '"one"'
    index, file = index_video(url), RemoteFile(url)
    whole = file.read()
    if sign == "size":
        with open(web.folder / "changes.mp4", "ab") as changed:
            changed.write(bytes(8))
    else:
        told[sign] = {"ETag": '"two"', "Last-Modified": "Wed, 25 Nov 2026 08:00:01 GMT"}[sign]
    file.file = None
    with pytest.raises(OSError, match="has changed on its server while it was read$"):
        file.read(1000)
    with pytest.raises(UnreadableVideo, match="has changed since it was first read"):
        decode_cuts(url, index, [Cut(7, *WHOLE)])
    # With the old contents and headers, it is the same file again.
    (web.folder / "changes.mp4").write_bytes(whole)
    told |= {"Last-Modified": "Wed, 25 Nov 2026 08:00:00 GMT"} | ({"ETag": '"one"'} if sign == "ETag" else {})
    pictures, _ = decode_cuts(url, index, [Cut(7, *WHOLE)])
    assert number_of(pictures[0]) == 7


# --- tars ---


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    """A tar header that may declare any size, also a negative one."""
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = max(size, 0), kind, link
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    if size < 0:
        block[124:136] = (256**12 + size).to_bytes(12, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


@pytest.fixture
def clip(tmp_path) -> bytes:
    return write_clip(tmp_path / "clip.mp4", BY_NAME["h264.mp4"]).read_bytes()


def test_names_and_links_in_a_tar_lead_nowhere(tmp_path, clip, monkeypatch):
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(clip)
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    names = [
        "../secret.mp4",
        str(secret),
        "x::0:9:/../secret.mp4",
        f"https://127.0.0.1:9/a.tar::0:{len(clip)}:b.mp4",
        "a\n.mp4",
    ]
    tar = tmp_path / "in" / "a.tar"
    blocks = [header(name, len(clip)) + padded(clip) for name in names]
    for kind in (
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
        tarfile.DIRTYPE,
    ):
        blocks.insert(2, header("link.mp4", 0, kind, "../secret.mp4"))
    tar.write_bytes(b"".join(blocks) + bytes(1024))
    secret.unlink()  # a reader that follows a name finds nothing
    members = find_videos(["a.tar"])
    assert sorted(member.split(":", 4)[4] for member in members) == sorted(names)
    for member in members:
        index = index_video(member)
        assert index.exact and len(index.pts) == FRAMES
        assert number_of(decode_cuts(member, index, [Cut(9, *WHOLE)])[0][0]) == 9
    assert {path.name for path in tmp_path.rglob("*")} == {"in", "a.tar", "clip.mp4"}  # nothing was extracted


@pytest.mark.parametrize("size", [-512, -2048, 10**15, 10**6])
def test_a_tar_that_lies_of_its_sizes_gives_what_is_whole(tmp_path, clip, size, caplog):
    """tarfile alone loops for ever at a size of -512 (CVE-2025-8194) and raises other errors than TarError at other sizes."""
    tar = tmp_path / "lies.tar"
    tar.write_bytes(header("a.mp4", len(clip)) + padded(clip) + header("b.mp4", size) + padded(clip) + bytes(1024))
    members = find_videos([str(tar)])
    assert [member.rsplit(":", 1)[1] for member in members] == ["a.mp4"]
    assert len(list(video_pairs(members[0], SAMPLING, 0))) == 2
    assert caplog.messages == [
        f"{tar}: not a whole tar (a member of {size} bytes by its header ends outside of the file); "
        "the 1 videos before that place are used"
    ]


def test_a_member_is_read_no_further_than_it_goes(tmp_path, clip):
    tar = tmp_path / "a.tar"
    tar.write_bytes(padded(clip) + padded(clip))
    cut = f"{tar}::0:{len(clip) // 2}:a.mp4"
    with pytest.raises(UnreadableVideo, match="cannot be opened as a video"):
        video_pairs(cut, SAMPLING, 0).__next__()
    part = video_files._Part(io.BytesIO(bytes(range(100))), 10, 50)
    assert (
        part.read(5) == bytes(range(10, 15))
        and part.seek(-3, io.SEEK_END) == 47
        and part.read() == bytes([57, 58, 59])
    )
    assert part.read(1) == b"" and part.seek(2, io.SEEK_CUR) == 52 and part.read() == b""


def test_a_remote_member_is_read_by_ranges(web, clip):
    size = 3_000_000
    noise = bytes(size)
    tar = header("noise.bin", size) + padded(noise) + header("a.mp4", len(clip)) + padded(clip) + bytes(1024)
    (web.folder / "a.tar").write_bytes(tar)
    (member,) = find_videos([f"{web.url}/a.tar"])
    index = index_video(member)
    assert number_of(decode_cuts(member, index, [Cut(5, *WHOLE)])[0][0]) == 5
    before = web.sent
    read_index(member)
    assert web.sent - before <= 2 * video_files.REMOTE_BLOCK


# --- times that are estimated ---


def noisy(path, times, codec="libx264", gop=250, sound: float = 0.0) -> str:
    """Write a video of noise, which takes many bytes, with frames at `times` (seconds) and `sound` seconds of silence."""
    rng, size = np.random.default_rng(0), (48, 64, 3)
    with av.open(str(path), "w") as container:
        # The preset "ultrafast" makes no B frames.
        stream = container.add_stream(codec, rate=25, options={"preset": "veryfast"} if codec == "libx264" else {})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.gop_size = gop
        audio = container.add_stream("mp2" if codec == "mpeg2video" else "libopus", rate=48000) if sound else None
        for time_ in times:
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, size, dtype=np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(time_ * 25), Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        for number in range(round(sound * 48000 / 960)):
            heard = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.int16), format="s16", layout="mono")
            heard.sample_rate, heard.pts, heard.time_base = 48000, 960 * number, Fraction(1, 48000)
            container.mux(audio.encode(heard))
        if audio is not None:
            container.mux(audio.encode(None))
    return str(path)


@pytest.mark.parametrize(
    ("name", "codec", "gop"),
    [
        ("a.ts", "libx264", 250),
        ("b.ts", "libx264", 12),
        ("c.mpg", "mpeg2video", 15),
        ("d.flv", "libx264", 10),
        ("e.avi", "mpeg4", 12),
        ("f.mkv", "libx264", 30),
    ],
)
def test_frames_of_streams_without_an_index_are_those_that_were_asked_for(tmp_path, monkeypatch, name, codec, gop):
    """
    In MPEG-TS and PS, FFmpeg seeks to any packet, and the next keyframe may be seconds later.

    Each frame must be the right one, and a read may not cover more than some groups of pictures.
    """
    passes, original = [], video_decoding._packets_up_to

    def counted(*arguments):
        passes.append(0)
        for packet in original(*arguments):
            passes[-1] += 1
            yield packet

    monkeypatch.setattr(video_decoding, "_packets_up_to", counted)
    noisy(tmp_path / name, [number / 25 for number in range(300)], codec, gop)
    with serve(tmp_path) as server:
        url = f"{server.url}/{name}"
        index = index_video(url)
        assert not index.exact and len(index.pts) > 250
        for number in range(0, min(len(index.pts), 300), 23):
            (picture,), (seconds,) = decode_cuts(url, index, [Cut(number, *WHOLE)])
            assert picture is not None and seconds == pytest.approx(number / 25, abs=0.081), number
    assert np.median(passes) < 2 * gop + 12, passes


@pytest.mark.parametrize("name", ["a.mkv", "a.webm", "a.ts"])
def test_pairs_of_a_remote_video_with_a_hole_are_as_far_apart_as_was_asked_for(tmp_path, monkeypatch, name):
    """The header does not tell of the hole, so two estimated times may mean the same frame, or frames on both sides of the hole."""
    times = [number / 25 for number in (*range(100), *range(200, 300))]
    noisy(tmp_path / name, times, "libvpx" if name.endswith("webm") else "libx264", gop=25)
    sampling, gaps, left_out = PairSampling(**{**SAMPLING_FIELDS, "pairs_per_video": 8}), [], 0
    with serve(tmp_path) as server:
        for epoch in range(4):  # several, because the pairs drawn depend on the server's port
            pairs = list(video_pairs(f"{server.url}/{name}", sampling, epoch))
            assert [pair["repeat"] for pair in pairs] == list(range(len(pairs)))
            gaps += [float(np.diff(pair["times"])[0]) for pair in pairs]
            left_out += 8 - len(pairs)
        assert left_out and gaps and all(0.1 < gap < 0.9 for gap in gaps), (left_out, gaps)
        monkeypatch.setattr(video_stream, "is_within", lambda *_: False)
        with pytest.raises(UnreadableVideo, match="so that none are as far apart as frame_gap_seconds asks for"):
            list(video_pairs(f"{server.url}/{name}", sampling, 0))


@pytest.mark.parametrize(("name", "sound"), [("a.mkv", 11.0), ("a.webm", 12.0), ("a.flv", 0.0)])
def test_pairs_beyond_the_end_of_a_remote_video_are_left_out_alone(tmp_path, name, sound):
    """The duration in the header is that of the sound, which may be longer than the video."""
    noisy(
        tmp_path / name,
        [number / 25 for number in range(250)],
        "libvpx" if name.endswith("webm") else "libx264",
        25,
        sound,
    )
    sampling = PairSampling(**{**SAMPLING_FIELDS, "pairs_per_video": 12})
    with serve(tmp_path) as server:
        found = [len(list(video_pairs(f"{server.url}/{name}", sampling, epoch))) for epoch in range(4)]
    assert min(found) >= 1 and sum(found) > 0.5 * 48, found
