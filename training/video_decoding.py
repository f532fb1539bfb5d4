"""Frames of a video at asked-for times, cropped first and resized after. PyAV; nothing here knows pairs or models."""

import bisect
import contextlib
import functools
import itertools
from array import array
from collections import OrderedDict
from dataclasses import dataclass
from fractions import Fraction

import av
import av.error
import av.filter
import numpy as np

from training.addresses import is_remote
from training.video_files import MAX_PIXELS, Deadline, UnreadableVideo, open_video, words

MAX_FRAMES = 5_000_000  # of a video: 23 hours at 60 a second
# Of all indices that a process keeps, some 16 bytes each, keyframes another time: 4,000 videos of 40 s at 30 a second.
FRAMES_KEPT = 10_000_000


@dataclass(frozen=True)
class VideoIndex:
    """
    What is known of a video before its frames are decoded.

    Args:
        pts: presentation time stamps of all frames, ascending, in `time_base`.
        times: the same in seconds from the stream's start.
        keyframes: pts at which decoding can begin, ascending.
        seek_points: for each of them, the time stamp to seek to.
        exact: the pts are the file's own; False where they were estimated from the header (remote files).
        height, width: as displayed, after rotation.
        quarter_turns: counter-clockwise turns by 90 degrees from the coded to the displayed frame.
        version: what tells the file from a later one in its place (size and time, or what the server says of it).
    """

    pts: array
    times: np.ndarray
    keyframes: array
    seek_points: array
    exact: bool
    height: int
    width: int
    quarter_turns: int
    version: tuple

    @property
    def duration(self) -> float:
        """Seconds from the first to the last frame."""
        return float(self.times[-1] - self.times[0])


@contextlib.contextmanager
def _explained():
    """Whatever FFmpeg, PyAV or the arithmetic on a file's own numbers raises on a damaged file, as the reason to skip it."""
    try:
        yield
    except UnreadableVideo:
        raise
    except (av.error.FFmpegError, OSError, ValueError, ArithmeticError, MemoryError) as error:
        raise UnreadableVideo(f"cannot be decoded ({words(error)})") from error


def _video_stream(container):
    if not container.streams.video:
        raise UnreadableVideo("has no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise UnreadableVideo("its codec is not known to this build of PyAV")
    _check_size(stream.codec_context)
    if stream.frames > MAX_FRAMES:
        raise UnreadableVideo(f"has by its header {stream.frames} frames, the most is {MAX_FRAMES}")
    # The frames may turn out other than the header says.
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    # One thread: the loader's workers are the parallelism, and skip_frame acts on the very packet it was set for.
    stream.codec_context.thread_count = 1
    return stream


def _check_size(picture) -> None:
    if not picture.width or not picture.height:  # also what FFmpeg makes of some sizes over its limit
        raise UnreadableVideo("has frames of no known size, or larger than 8192x4352 in all")
    if picture.width * picture.height > MAX_PIXELS:
        raise UnreadableVideo(f"has frames of {picture.width}x{picture.height}, larger than 8192x4352 in all")


class _KeptIndices:
    """A function from a source to its index that keeps those asked for last, up to FRAMES_KEPT frames in all."""

    def __init__(self, make):
        functools.update_wrapper(self, make)
        self.kept: OrderedDict[str, VideoIndex] = OrderedDict()
        self.frames = 0

    def __call__(self, source: str) -> VideoIndex:
        if source not in self.kept:
            self.keep(source, self.__wrapped__(source))
        self.kept.move_to_end(source)
        return self.kept[source]

    def keep(self, source: str, index: VideoIndex) -> None:
        self.drop(source)
        self.kept[source] = index
        self.frames += _weight(index)
        while self.frames > FRAMES_KEPT and len(self.kept) > 1:
            self.drop(next(iter(self.kept)))

    def drop(self, source: str) -> None:
        if source in self.kept:
            self.frames -= _weight(self.kept.pop(source))

    def cache_clear(self) -> None:
        self.kept.clear()
        self.frames = 0


def _weight(index: VideoIndex) -> int:
    return 1000 + len(index.pts) + len(index.keyframes)  # and what an index takes without them


@_KeptIndices
def index_video(source: str) -> VideoIndex:
    """
    Index of a video. Local files are demuxed once (no decoding) for their exact time stamps; of remote ones only the
    header and the first frame are read.

    Raises:
        UnreadableVideo: with the reason.
    """
    with open_video(source) as (container, deadline, version), _explained():
        stream = _video_stream(container)
        if is_remote(source):
            pts, keyframes = _estimate_pts(stream, deadline), {}
        else:
            pts, keyframes = _read_pts(container, stream, deadline)
        # AVI has no presentation times: for B frames of H.264 they are guessed in the order of decoding, as the first frames show.
        avi = container.format.name == "avi"
        shown = list(itertools.islice(container.decode(stream), 8)) if avi else _first_frame(container, stream)
        if not shown:
            raise UnreadableVideo("has no frame that can be decoded")
        if any(a.pts is None or b.pts is None or a.pts >= b.pts for a, b in itertools.pairwise(shown)):
            raise UnreadableVideo("has time stamps out of order (B frames in AVI?): encode it anew, to MP4 or MKV")
        first = shown[0]
        _check_size(first)
        if first.width < 2 or first.height < 2:
            raise UnreadableVideo(f"has frames of {first.width}x{first.height}, 2x2 is the least")
        start = pts[0] if stream.start_time is None else min(stream.start_time, pts[0])
        times = (np.array(pts, dtype=np.float64) - start) * float(stream.time_base)
        turns = round(first.rotation / 90) % 4
        height, width = (first.width, first.height) if turns % 2 else (first.height, first.width)
        return VideoIndex(
            pts,
            times,
            array("q", keyframes),
            array("q", keyframes.values()),
            not is_remote(source),
            height,
            width,
            turns,
            version,
        )


def _first_frame(container, stream) -> list[av.VideoFrame]:
    """The first frame, or none. A keyframe at the start is enough for it: a decoder else waits for the frames that could be shown before."""
    packet = next(container.demux(stream))
    frames = packet.decode()
    if not frames and packet.is_keyframe:
        frames = stream.codec_context.decode(None)
    if not frames:
        container.seek(0)
        frames = list(itertools.islice(container.decode(stream), 1))
    return frames[:1]


def _read_pts(container, stream, deadline: Deadline) -> tuple[array, dict[int, int]]:
    """All time stamps, ascending, and for each that decoding can begin at, where to seek to for it. Keeps no packet: they are the file."""
    # What a demuxer seeks by: the presentation in these, the decoding order (dts) elsewhere (MPEG-TS, FLV, AVI, ...).
    by_pts = container.format.name.startswith(("mov", "matroska"))
    pts, keyframes = set(), {}
    for packet in container.demux(stream):
        deadline.check()
        if packet.pts is None or not packet.size:
            continue
        # Before the cut of `ffmpeg -ss … -c copy` packets are to be discarded: decoded for the frames after it, and never shown.
        if not packet.is_discard:
            pts.add(packet.pts)
        if packet.is_keyframe:
            keyframes[packet.pts] = packet.pts if by_pts or packet.dts is None else packet.dts
        if len(pts) > MAX_FRAMES:
            raise UnreadableVideo(f"has more than {MAX_FRAMES} frames: cut it into parts")
    if not pts:
        raise UnreadableVideo("has no frames with time stamps")
    container.seek(0)
    return array("q", sorted(pts)), dict(sorted(keyframes.items()))


def _estimate_pts(stream, deadline: Deadline) -> array:
    rate = stream.average_rate or stream.guessed_rate
    duration = (
        stream.duration * stream.time_base if stream.duration else (stream.container.duration or 0) / av.time_base
    )
    if not rate or not duration:
        raise UnreadableVideo("its header tells no duration")
    start = stream.start_time or 0
    frames = max(1, int(duration * rate))
    if frames > MAX_FRAMES:
        raise UnreadableVideo(f"has by its header {frames} frames, the most is {MAX_FRAMES}")
    step, pts = 1 / (Fraction(rate) * stream.time_base), array("q")
    for number in range(frames):
        if number % 65536 == 0:
            deadline.check()
        # round(number * step), in whole numbers: fractions take ten times as long
        whole, rest = divmod(number * step.numerator, step.denominator)
        pts.append(start + whole + (2 * rest > step.denominator or (2 * rest == step.denominator and whole % 2)))
    return pts


@dataclass(frozen=True)
class Cut:
    """One wanted picture: frame `number` of the index, `box` xyxy of it in displayed pixels, resized to `size` (H, W)."""

    number: int
    box: tuple[int, int, int, int]
    size: tuple[int, int]


def decode_cuts(source: str, index: VideoIndex, cuts: list[Cut]) -> tuple[list[np.ndarray], list[float]]:
    """
    Decode the wanted pictures in one pass over the file.

    Returns:
        RGB uint8 arrays (3, H, W), and the frames' times in seconds, both in the order of `cuts`.

    Raises:
        UnreadableVideo: a wanted frame is missing or corrupt.
    """
    wanted: dict[int, list[int]] = {}
    for position, cut in enumerate(cuts):
        wanted.setdefault(index.pts[cut.number], []).append(position)
    pictures: list = [None] * len(cuts)
    times = [0.0] * len(cuts)
    with open_video(source) as (container, deadline, version), _explained():
        if version != index.version:
            index_video.drop(source)  # its next opening reads it anew
            raise UnreadableVideo("has changed since it was first read")
        stream = _video_stream(container)
        for pts, frame in _decode_frames(container, stream, index, sorted(wanted), deadline):
            shown = (frame.width, frame.height) if index.quarter_turns % 2 else (frame.height, frame.width)
            if shown != (index.height, index.width):
                sizes = f"from {index.width}x{index.height} to {shown[1]}x{shown[0]}"
                raise UnreadableVideo(f"changes its size {sizes} at {_seconds(index, pts):.2f} s")
            for position in wanted[pts]:
                pictures[position] = cut_frame(frame, cuts[position].box, cuts[position].size, index.quarter_turns)
                seconds = (frame.pts - index.pts[0]) * float(stream.time_base) + float(index.times[0])
                times[position] = seconds
    missing = [index.times[cut.number] for cut, picture in zip(cuts, pictures) if picture is None]
    if missing:
        raise UnreadableVideo(f"has no decodable frame at {missing[0]:.2f} s (truncated?)")
    return pictures, times


def _decode_frames(container, stream, index: VideoIndex, wanted: list[int], deadline: Deadline):
    """
    Yield (asked-for pts, frame). Seeks to the last keyframe before a wanted frame where that lies ahead of the position.

    On the way, frames that no other frame refers to are not decoded (skip_frame="NONREF": half the time of a seek on
    long groups of pictures); a wanted frame's own packet always is. Before a seek, and at the end, the decoder is asked for what it
    holds: else it is given frame after frame until it is sure that none comes before the wanted one.
    """
    context = stream.codec_context
    # libdav1d (AV1) reads skip_frame once, when it is opened: it would go on leaving out frames that are wanted later.
    everything = not index.exact or context.codec.name.startswith("lib")
    # Packets hold whole frames: elsewhere they may be fields, two of which make a frame.
    whole_frames = index.exact and container.format.name.startswith(("mov", "matroska"))
    asked, pending, position, packets, damaged = set(wanted), list(wanted), None, None, False
    while pending:
        target = pending[0]
        keyframe, seek_point = _entry(index, target)
        if position is None or keyframe > position:
            container.seek(min(seek_point, target), stream=stream, backward=True)
            packets, damaged = container.demux(stream), False
        found = False
        for packet in packets:
            deadline.check()
            whole = everything or packet.pts in asked or packet.pts is None
            context.skip_frame = "DEFAULT" if whole else "NONREF"
            frames = packet.decode()
            # Not where the decoder is needed for the next wanted frame, which has no keyframe of its own behind this one.
            drained = (
                whole_frames and packet.pts == target and all(_entry(index, pts)[0] > target for pts in pending[1:2])
            )
            if drained:
                frames += context.decode(None)
                if any(frame.interlaced_frame for frame in frames):
                    whole_frames, position = False, None  # once more, in case its other field follows
                    break
            for frame in frames:
                if frame.pts is None:
                    continue
                position = frame.pts
                # What is damaged stays so in the frames that follow, up to one that refers to none; these are not marked.
                damaged = frame.is_corrupt or (damaged and not frame.key_frame)
                if damaged and pending and frame.pts >= pending[0]:
                    raise UnreadableVideo(f"is damaged at {_seconds(index, frame.pts):.2f} s")
                # Several wanted frames can come out of one packet at the end of the stream.
                while pending and (frame.pts == pending[0] or (not index.exact and frame.pts >= pending[0])):
                    yield pending.pop(0), frame
                    found = True
                if pending and index.exact and frame.pts > pending[0]:
                    raise UnreadableVideo(f"skips the frame at {_seconds(index, pending[0]):.2f} s")
            if drained:
                position = None  # a decoder that was asked for the rest takes nothing more before a seek
                if not found:
                    raise UnreadableVideo(f"skips the frame at {_seconds(index, target):.2f} s")
            if found:
                break
        else:
            return


def _entry(index: VideoIndex, target: int) -> tuple[int, int]:
    """The last keyframe up to a frame, and where to seek to for it."""
    if not index.keyframes:
        return target, target
    number = max(bisect.bisect_right(index.keyframes, target) - 1, 0)
    return index.keyframes[number], index.seek_points[number]


def _seconds(index: VideoIndex, pts: int) -> float:
    return float(index.times[min(bisect.bisect_left(index.pts, pts), len(index.pts) - 1)])


def cut_frame(
    frame: av.VideoFrame, box: tuple[int, int, int, int], size: tuple[int, int], quarter_turns: int
) -> np.ndarray:
    """
    Crop a frame, resize it and turn it upright; only the crop is converted to RGB.

    One libavfilter graph (crop, scale) knows every pixel format, colour matrix and range. Shrinking averages areas.

    Args:
        box: xyxy, displayed pixels; moved to even coded pixels, on which 4:2:0 chroma lies.
        size: (H, W) of the result.

    Returns:
        (3, H, W) uint8 RGB.
    """
    x0, y0, x1, y1 = _to_coded(box, frame.width, frame.height, quarter_turns)
    height, width = size if quarter_turns % 2 == 0 else size[::-1]
    flags = "area" if (x1 - x0) > width else "bicubic"
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or av.time_base
    )
    crop = graph.add("crop", f"{x1 - x0}:{y1 - y0}:{x0}:{y0}:exact=1")  # or odd sides would lose a pixel
    scale = graph.add("scale", f"{width}:{height}:flags={flags}+accurate_rnd+full_chroma_int")
    convert = graph.add("format", "gbrp")  # planes: rgb24 to one level of 255, in a third to a half of the time
    sink = graph.add("buffersink")
    source.link_to(crop)
    crop.link_to(scale)
    scale.link_to(convert)
    convert.link_to(sink)
    graph.configure()
    source.push(frame)
    planes = sink.pull().planes
    picture = np.stack([_plane(planes[channel], height, width) for channel in (2, 0, 1)])
    return np.ascontiguousarray(np.rot90(picture, quarter_turns, axes=(1, 2)))


def _plane(plane, height: int, width: int) -> np.ndarray:
    return np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)[:, :width]


def _to_coded(box, width: int, height: int, quarter_turns: int) -> tuple[int, int, int, int]:
    """A box of the displayed frame in the pixels of the coded one (width x height)."""
    x0, y0, x1, y1 = box
    if quarter_turns == 1:
        x0, y0, x1, y1 = width - y1, x0, width - y0, x1
    elif quarter_turns == 2:
        x0, y0, x1, y1 = width - x1, height - y1, width - x0, height - y0
    elif quarter_turns == 3:
        x0, y0, x1, y1 = y0, height - x1, y1, height - x0
    return x0 - x0 % 2, y0 - y0 % 2, x1 - x0 % 2, y1 - y0 % 2
