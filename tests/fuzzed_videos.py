"""Small clips of all kinds that PyAV can write, whose frames show their number as colours, and seeded damage to these clips."""

import io
import os
import zlib
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

FRAMES, RATE = 24, 12


@dataclass(frozen=True)
class Kind:
    """How a clip is written: file name, codec, pixel format, size (height, width), and options of the encoder and container."""

    name: str
    codec: str
    pix_fmt: str = "yuv420p"
    size: tuple[int, int] = (48, 64)
    options: dict = field(default_factory=dict)
    container: dict = field(default_factory=dict)
    frames: int = FRAMES
    times: tuple[float, ...] | None = None  # seconds; None: RATE frames a second
    flags: int = 0
    turns: int | None = None  # counter-clockwise turns by 90 degrees that a player shall apply


FAST = {"preset": "ultrafast"}
B_FRAMES = {"preset": "veryfast", "bf": "2", "b_strategy": "0"}
X265 = {"preset": "ultrafast", "x265-params": "log-level=none:pools=none:frame-threads=1"}
VPX = {"cpu-used": "8", "deadline": "realtime"}
SVT = {
    "preset": "8",
    "svtav1-params": "lp=1:enable-tf=0",
}  # in faster settings of SVT-AV1 4.2 a frame is the mean of its neighbours
UNEVEN = tuple(np.cumsum(np.random.default_rng(0).integers(20, 200, FRAMES) / 1000).round(3).tolist())
INTERLACED = 0x20040000  # AV_CODEC_FLAG_INTERLACED_DCT and _ME

KINDS = (
    Kind("h264.mp4", "libx264", options=FAST),
    Kind("h264_b_frames.mkv", "libx264", options=B_FRAMES),
    Kind("h264_10_bit.mp4", "libx264", "yuv420p10le", options=FAST),
    Kind("h264_422_10_bit.mov", "libx264", "yuv422p10le", options=FAST),
    Kind("h264_444.mp4", "libx264", "yuv444p", options=FAST),
    Kind("h264_odd.mp4", "libx264", "yuv444p", (47, 61), options=FAST),
    Kind("h264_interlaced.ts", "libx264", options={"preset": "ultrafast", "x264-params": "tff=1"}, flags=INTERLACED),
    Kind("h264_interlaced.mov", "libx264", options={"preset": "ultrafast", "x264-params": "tff=1"}, flags=INTERLACED),
    Kind("h264_fragments.mp4", "libx264", options=FAST, container={"movflags": "frag_keyframe+empty_moov"}),
    Kind("h264_uneven.mp4", "libx264", options=FAST, times=UNEVEN),
    Kind("h264_no_times.h264", "libx264", options=FAST),
    Kind("h264_no_times.avi", "libx264", options=B_FRAMES),
    Kind("h264_turned_1.mp4", "libx264", options=FAST, turns=1),
    Kind("h264_turned_2.mov", "libx264", options=FAST, turns=2),
    Kind("h264_turned_3.mp4", "libx264", options=FAST, turns=3),
    Kind("hevc.mp4", "libx265", options=X265),
    Kind("hevc_10_bit.mkv", "libx265", "yuv420p10le", options=X265),
    Kind("hevc_444.mp4", "libx265", "yuv444p", options=X265),
    Kind("mpeg4.avi", "mpeg4"),
    Kind("mpeg4_odd.mp4", "mpeg4", size=(47, 61)),
    Kind("mpeg4_b_frames.avi", "mpeg4", options={"bf": "2"}),
    Kind("mpeg2.mpg", "mpeg2video"),
    Kind("mpeg2_interlaced.ts", "mpeg2video", flags=INTERLACED),
    Kind("vp8.webm", "libvpx", options=VPX),
    Kind("vp9.webm", "libvpx-vp9", options=VPX),
    Kind("vp9_odd.webm", "libvpx-vp9", size=(47, 61), options=VPX),
    Kind("vp9_uneven.mkv", "libvpx-vp9", options=VPX, times=UNEVEN),
    Kind("av1.mp4", "libsvtav1", size=(64, 96), options=SVT),
    Kind("av1_10_bit.mkv", "libsvtav1", "yuv420p10le", (64, 96), options=SVT),
    Kind("h264_b_frames.ts", "libx264", options=B_FRAMES),
    Kind("h264_b_frames.flv", "libx264", options=B_FRAMES),
    Kind("hevc_b_frames.ts", "libx265", options={**X265, "preset": "fast"}),
    Kind("hevc_b_frames.mp4", "libx265", options={**X265, "preset": "fast"}),
    Kind("mpeg2_b_frames.mpg", "mpeg2video", options={"bf": "2"}),
    Kind("mpeg2_b_frames.mov", "mpeg2video", options={"bf": "2"}),
    Kind("mpeg4_b_frames.mp4", "mpeg4", options={"bf": "2"}),
    Kind("mjpeg.avi", "mjpeg", "yuvj422p"),
    Kind("prores.mov", "prores_ks", "yuv422p10le"),
    Kind("ffv1_16_bit.mkv", "ffv1", "yuv444p16le", (47, 61)),
    Kind("png.mov", "png", "rgb24", (47, 61)),
    Kind("raw.avi", "rawvideo", "bgr24"),
    Kind("huffyuv.avi", "huffyuv", "yuv422p"),
    Kind("flv1.flv", "flv"),
    Kind("h263.3gp", "h263", size=(96, 128)),
    Kind("wmv2.wmv", "wmv2"),
)
BY_NAME = {kind.name: kind for kind in KINDS}


def picture(number: int, height: int, width: int) -> np.ndarray:
    """Draw a number, (H, W, 3) uint8: bits 0-2 as R, G, B of the upper left quarter, bits 3 and 4 as R and G of the lower right one."""
    canvas = np.full((height, width, 3), 40, np.uint8)
    bits = [40 + 170 * (number >> bit & 1) for bit in range(5)]
    canvas[: height // 2, : width // 2] = bits[:3]
    canvas[height // 2 :, width // 2 :] = (*bits[3:], 40)
    return canvas


def number_of(frame: np.ndarray, tolerance: int = 24) -> int:
    """
    Return the number that a frame (3, H, W) shows.

    Raises:
        AssertionError: the frame's colours, away from the edges of its quarters, fit no number.
    """
    quarters = []
    for rows in np.array_split(frame, 2, axis=1):
        for part in np.array_split(rows, 2, axis=2):
            h, w = part.shape[1] // 4, part.shape[2] // 4
            quarters.append(part[:, h : part.shape[1] - h, w : part.shape[2] - w].mean(axis=(1, 2)))
    bits = [*(quarters[0] > 125), *(quarters[3] > 125)[:2]]
    number = sum(int(bit) << k for k, bit in enumerate(bits))
    shown = picture(number, 8, 8)
    expected = np.array([shown[0, 0], shown[0, 7], shown[7, 0], shown[7, 7]], dtype=float)
    assert np.abs(np.array(quarters) - expected).max() < tolerance, (number, quarters, expected)
    return number


def write_clip(path: Path, kind: Kind) -> Path:
    # If it may (as root), SVT-AV1 gives its process, and all that this starts, the highest real-time priority for ever. It is reset here.
    scheduling = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        return _write_clip(path, kind)
    finally:
        os.sched_setscheduler(0, *scheduling)


def _write_clip(path: Path, kind: Kind) -> Path:
    with av.open(str(path), "w", container_options=kind.container) as container:
        stream = container.add_stream(kind.codec, rate=RATE, options=kind.options)
        (stream.height, stream.width), stream.pix_fmt = kind.size, kind.pix_fmt
        context = stream.codec_context
        context.thread_count, context.gop_size = 1, 8
        context.flags |= kind.flags
        if kind.times is not None:
            context.time_base = Fraction(1, 1000)
        container.start_encoding()  # otherwise a clip without frames would have no header
        for number in range(kind.frames):
            shown = picture(number, *kind.size)
            frame = av.VideoFrame.from_ndarray(shown, format="rgb24").reformat(format=kind.pix_fmt)
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            if kind.times is not None:
                frame.pts, frame.time_base = round(kind.times[number] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if kind.turns:
        path.write_bytes(turned(path.read_bytes(), kind.turns))
    return path


def turned(data: bytes, counter_clockwise: int) -> bytes:
    """Set the display matrix of an MP4's track (ISO 14496-12: x' = a x + c y, y' = b x + d y, y down)."""
    data = bytearray(data)
    matrix = data.index(b"tkhd") + 44
    a, b = ((1, 0), (0, -1), (-1, 0), (0, 1))[counter_clockwise]
    for slot, value in ((0, a), (1, b), (3, -b), (4, a)):
        data[matrix + 4 * slot : matrix + 4 * slot + 4] = (value * 65536).to_bytes(4, "big", signed=True)
    return bytes(data)


# --- damage ---


def damaged(data: bytes, other: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """Apply one random kind of damage and return (its name, the damaged bytes). Some kinds mix in bytes of `other`."""
    kind = rng.choice(list(DAMAGE))
    return kind, DAMAGE[kind](data, other, rng)


def _flip(data: bytes, rng, count: int, begin: int = 0, end: int | None = None) -> bytes:
    changed = np.frombuffer(data, np.uint8).copy()
    where = rng.integers(begin, max(end or len(data), begin + 1), count)
    changed[where % len(data)] ^= rng.integers(1, 256, count, dtype=np.uint8)
    return changed.tobytes()


def _extreme(data: bytes, other: bytes, rng) -> bytes:
    """Replace four bytes, one to five times, in the header or the index at the end by a number that no sound file has there."""
    changed, edge = bytearray(data), min(len(data), 2048)
    for _ in range(rng.integers(1, 6)):
        place = int(rng.integers(0, edge - 4)) + (0 if rng.random() < 0.5 else len(data) - edge)
        changed[place : place + 4] = int(rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**24])).to_bytes(4, "big")
    return bytes(changed)


def _zeros(data: bytes, other: bytes, rng) -> bytes:
    begin, length = int(rng.integers(0, len(data))), int(rng.integers(1, len(data) // 3))
    return data[:begin] + bytes(len(data[begin : begin + length])) + data[begin + length :]


def _moved(data: bytes, other: bytes, rng) -> bytes:
    a, b, c = sorted(rng.integers(0, len(data), 3).tolist())
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def _header_of_another(data: bytes, other: bytes, rng) -> bytes:
    cut = int(rng.choice([32, 256, 1024, len(other) // 2]))
    return other[:cut] + data[cut:]


DAMAGE = {
    "truncated": lambda data, other, rng: data[: int(rng.integers(1, len(data)))],
    "one byte flipped": lambda data, other, rng: _flip(data, rng, 1),
    "1 % of bytes flipped": lambda data, other, rng: _flip(data, rng, max(len(data) // 100, 2)),
    "header flipped": lambda data, other, rng: _flip(data, rng, 8, 0, 512),
    "end flipped": lambda data, other, rng: _flip(data, rng, 8, max(len(data) - 2048, 0)),
    "extreme numbers": _extreme,
    "zeros": _zeros,
    "parts moved": _moved,
    "bytes missing": lambda data, other, rng: (lambda a: data[:a] + data[a + int(rng.integers(1, 64)) :])(
        int(rng.integers(0, len(data)))
    ),
    "header of another": _header_of_another,
}


# --- files that declare more than they hold ---


def declared_h264(path: Path, height: int, width: int, references: int) -> Path:
    """
    Write a clip of some KB whose sequence parameter set declares a false size and number of reference frames.

    The size must be in multiples of 16 (ITU-T H.264, 7.3.2.1.1); the slices are those of 16x16 pixels.
    """
    options = {**FAST, "profile": "baseline"}
    plain = write_clip(path.with_suffix(".h264"), Kind(path.name, "libx264", size=(16, 16), options=options))
    data = plain.read_bytes()
    begin = data.index(b"\0\0\1\x67") + 4
    end = data.index(b"\0\0\1", begin)
    bits = "".join(f"{byte:08b}" for byte in data[begin:end].rstrip(b"\0").replace(b"\0\0\3", b"\0\0"))
    profile, place = bits[:16], 24
    for _ in range(3):  # id, bits of frame_num, order type (which is 2, without further fields)
        place = _behind_code(bits, place)
    kept, place = bits[24:place], _behind_code(bits, place) + 1  # reference frames and gaps_in_frame_num_allowed
    place = _behind_code(bits, _behind_code(bits, place))  # the size in macroblocks
    size = _code(references) + "0" + _code(width // 16 - 1) + _code(height // 16 - 1)
    bits = profile + f"{62:08b}" + kept + size + bits[place:]
    bits += "0" * (-len(bits) % 8)
    sequence = int(bits, 2).to_bytes(len(bits) // 8, "big")
    for value in range(4):
        sequence = sequence.replace(bytes([0, 0, value]), bytes([0, 0, 3, value]))
    data = data[:begin] + sequence + data[end:]
    with av.open(io.BytesIO(data), format="h264") as source, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(p for p in source.demux() if p.size):
            packet.stream, packet.time_base = stream, Fraction(1, RATE)
            packet.pts = packet.dts = number
            container.mux(packet)
    plain.unlink()
    return path


def _code(value: int) -> str:
    bits = f"{value + 1:b}"
    return "0" * (len(bits) - 1) + bits


def _behind_code(bits: str, place: int) -> int:
    return place + 2 * (bits.index("1", place) - place) + 1


def declared_png(path: Path, height: int, width: int) -> Path:
    """Write a MOV of PNG pictures of 2x2 pixels whose headers declare another size."""
    data = write_clip(path, Kind(path.name, "png", "rgb24", (2, 2))).read_bytes()
    place = data.index(b"IHDR")
    while place > 0:
        header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + data[place + 12 : place + 17]
        data = data[:place] + header + zlib.crc32(header).to_bytes(4, "big") + data[place + 21 :]
        place = data.find(b"IHDR", place + 4)
    path.write_bytes(data)
    return path


def declared_samples(path: Path, count: int, tracks: int = 1, edits: int | None = None) -> Path:
    """
    Write a raw video in MOV whose tables declare `count` frames of the same size in one chunk.

    Args:
        tracks: number of copies of the track.
        edits: number of entries of the edit list, each of which shows the whole track; `None` for the list as written.
    """
    data = bytearray(write_clip(path, Kind(path.name, "rawvideo", "rgb24", (16, 16))).read_bytes())
    for name, place in ((b"stts", 12), (b"stsz", 12), (b"stsc", 16)):  # sample_count, sample_count, samples_per_chunk
        begin = data.index(name) + place
        data[begin : begin + 4] = count.to_bytes(4, "big")
    movie, track = (_box_at(data, name) for name in (b"moov", b"trak"))
    if edits is not None:
        parts = [part for part in _boxes(track[8:]) if part[4:8] != b"edts"]
        shown = box(b"elst", bytes(4) + edits.to_bytes(4, "big") + (b"\x7f" * 4 + bytes(4) + b"\0\1\0\0") * edits)
        track = box(b"trak", parts[0] + box(b"edts", shown) + b"".join(parts[1:]))
    parts = [part for part in _boxes(movie[8:]) if part[4:8] != b"trak"]
    path.write_bytes(data.replace(movie, box(b"moov", parts[0] + track * tracks + b"".join(parts[1:]))))
    return path


def declared_fragment(path: Path, count: int) -> Path:
    """Write a fragmented MP4 whose first fragment declares a run of `count` more samples without any bytes."""
    kind = BY_NAME["h264_fragments.mp4"]
    data = write_clip(path, kind).read_bytes()
    fragment = _box_at(data, b"moof")
    head, track = _boxes(fragment[8:])
    longer = box(b"traf", track[8:] + box(b"trun", bytes(4) + count.to_bytes(4, "big")))
    path.write_bytes(data.replace(fragment, box(b"moof", head + longer)))
    return path


def box(name: bytes, contents: bytes) -> bytes:
    return (8 + len(contents)).to_bytes(4, "big") + name + contents


def _box_at(data: bytes, name: bytes) -> bytes:
    begin = data.index(name) - 4
    return bytes(data[begin : begin + int.from_bytes(data[begin : begin + 4], "big")])


def _boxes(data: bytes) -> list[bytes]:
    boxes = []
    while data:
        length = int.from_bytes(data[:4], "big")
        boxes.append(data[:length])
        data = data[length:]
    return boxes


def with_sound(path: Path, codec: str, seconds: int) -> Path:
    """Write two seconds of video with `seconds` of silence, 48,000 samples a second."""
    kind = Kind(path.name, "mpeg4")
    with av.open(str(path), "w") as container:
        stream, sound = container.add_stream("mpeg4", rate=RATE), container.add_stream(codec, rate=48000)
        (stream.height, stream.width), stream.pix_fmt, sound.layout = kind.size, kind.pix_fmt, "mono"
        for number in range(kind.frames):
            frame = av.VideoFrame.from_ndarray(picture(number, *kind.size), format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        for second in range(seconds):
            silence = np.zeros((1, 48000), np.uint8 if codec == "pcm_u8" else np.int16)
            frame = av.AudioFrame.from_ndarray(silence, format="u8" if codec == "pcm_u8" else "s16", layout="mono")
            frame.sample_rate, frame.pts = 48000, second * 48000
            container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    return path
