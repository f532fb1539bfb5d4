"""Frames of a video at asked-for times, cropped first and resized after. PyAV; nothing here knows pairs or models."""

import bisect
import functools
import io
import time
from dataclasses import dataclass

import av
import av.error
import av.filter
import fsspec
import numpy as np

av.logging.set_level(av.logging.PANIC)  # damaged files are reported once, in our words


class UnreadableVideo(ValueError):
    """A video that cannot be used; the message is the reason in plain words, without the path."""


@dataclass(frozen=True)
class VideoIndex:
    """
    What is known of a video before its frames are decoded.

    Args:
        pts: presentation time stamps of all frames, ascending, in `time_base`.
        times: the same in seconds from the stream's start.
        keyframes: pts at which decoding can begin, ascending.
        exact: the pts are the file's own; False where they were estimated from the header (remote files).
        height, width: as displayed, after rotation.
        quarter_turns: counter-clockwise turns by 90 degrees from the coded to the displayed frame.
    """

    pts: tuple[int, ...]
    times: np.ndarray
    keyframes: tuple[int, ...]
    exact: bool
    height: int
    width: int
    quarter_turns: int

    @property
    def duration(self) -> float:
        """Seconds from the first to the last frame."""
        return float(self.times[-1] - self.times[0])


def is_remote(source: str) -> bool:
    return "://" in source


REMOTE_BLOCK = (
    1 << 20
)  # bytes a request, each block asked for once an opening: a pair lies in few, a seek wastes at most one
ATTEMPTS = 5


class RemoteFile(io.RawIOBase):
    """
    A remote file for PyAV, read by ranges. A read that fails is tried again on a new connection; what is not there, or not allowed,
    fails at once.

    Args:
        block: bytes a request.
    """

    def __init__(self, source: str, block: int = REMOTE_BLOCK):
        self.source, self.block, self.position, self.file = source, block, 0, None
        self.size = self._attempt(lambda file: file.size)
        if self.size is None:
            raise OSError("its server tells no size, so that it cannot be read by ranges")

    def _attempt(self, act):
        for attempt in range(ATTEMPTS):
            try:
                if self.file is None:
                    files, path = fsspec.core.url_to_fs(self.source)
                    self.file = files.open(path, "rb", block_size=self.block, cache_type="blockcache")
                return act(self.file)
            except Exception as error:  # each fsspec backend has errors of its own, and few of them are OSErrors
                self.file, root = None, error
                while root.__cause__ is not None:  # fsspec says "not found" of whatever failed; the cause is behind it
                    root = root.__cause__
                status = getattr(getattr(root, "response", None), "status_code", getattr(root, "status", None))
                refused = status is not None and 400 <= status < 500 and status not in (408, 429)
                if refused or isinstance(root, FileNotFoundError) or attempt + 1 == ATTEMPTS:
                    raise OSError(" ".join((str(root) or type(root).__name__).split())) from error
            time.sleep(0.5 * 2**attempt)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def read(self, size: int = -1) -> bytes:
        def from_here(file) -> bytes:
            file.seek(self.position)
            return file.read(size)

        data = self._attempt(from_here)
        self.position += len(data)
        return data


def open_video(source: str):
    """
    An open PyAV container, to be used in a `with` block (PyAV leaks without close).

    Args:
        source: a local path, a URL that fsspec opens (range requests), or a member of a tar, `TAR::OFFSET:SIZE:NAME`.
    """
    try:
        if "::" in source:
            tar, member = source.rsplit("::", 1)
            offset, size, _ = member.split(":", 2)
            with RemoteFile(tar) if is_remote(tar) else open(tar, "rb") as file:
                file.seek(int(offset))
                return av.open(io.BytesIO(file.read(int(size))), metadata_errors="replace")
        # Tags that are not UTF-8 (AVI has Latin-1) are no reason to leave a video out.
        return av.open(RemoteFile(source) if is_remote(source) else source, metadata_errors="replace")
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise UnreadableVideo(f"cannot be opened as a video ({_words(error)})") from error


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _video_stream(container):
    if not container.streams.video:
        raise UnreadableVideo("has no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise UnreadableVideo("its codec is not known to this build of PyAV")
    # One thread: the loader's workers are the parallelism, and skip_frame acts on the very packet it was set for.
    stream.codec_context.thread_count = 1
    return stream


@functools.lru_cache(maxsize=4096)
def index_video(source: str) -> VideoIndex:
    """
    Index of a video. Local files are demuxed once (no decoding) for their exact time stamps; of remote ones only the
    header and the first frame are read.

    Raises:
        UnreadableVideo: with the reason.
    """
    with open_video(source) as container:
        stream = _video_stream(container)
        try:
            if is_remote(source):
                pts, keyframes = _estimate_pts(stream), ()
            else:
                packets = [p for p in container.demux(stream) if p.pts is not None and p.size]
                pts = sorted({p.pts for p in packets})
                keyframes = sorted(p.pts for p in packets if p.is_keyframe)
                container.seek(0)
            if not pts:
                raise UnreadableVideo("has no frames with time stamps")
            first = next((frame for frame in container.decode(stream)), None)
        except (av.error.FFmpegError, OSError) as error:
            raise UnreadableVideo(f"cannot be decoded ({_words(error)})") from error
        if first is None or first.width < 2 or first.height < 2:
            raise UnreadableVideo("has no frame that can be decoded")
        start = pts[0] if stream.start_time is None else min(stream.start_time, pts[0])
        times = (np.array(pts, dtype=np.float64) - start) * float(stream.time_base)
        turns = round(first.rotation / 90) % 4
        height, width = (first.width, first.height) if turns % 2 else (first.height, first.width)
        return VideoIndex(tuple(pts), times, tuple(keyframes), not is_remote(source), height, width, turns)


def _estimate_pts(stream) -> list[int]:
    rate = stream.average_rate or stream.guessed_rate
    duration = (
        stream.duration * stream.time_base if stream.duration else (stream.container.duration or 0) / av.time_base
    )
    if not rate or not duration:
        raise UnreadableVideo("its header tells no duration")
    start = stream.start_time or 0
    return [start + round(i / rate / stream.time_base) for i in range(max(1, int(duration * rate)))]


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
    with open_video(source) as container:
        stream = _video_stream(container)
        try:
            for pts, frame in _decode_frames(container, stream, index, sorted(wanted)):
                if frame.is_corrupt:
                    raise UnreadableVideo(f"is damaged at {index.times[index.pts.index(pts)]:.2f} s")
                for position in wanted[pts]:
                    pictures[position] = cut_frame(frame, cuts[position].box, cuts[position].size, index.quarter_turns)
                    seconds = (frame.pts - index.pts[0]) * float(stream.time_base) + float(index.times[0])
                    times[position] = seconds
        except (av.error.FFmpegError, OSError) as error:
            raise UnreadableVideo(f"cannot be decoded ({_words(error)})") from error
    missing = [index.times[cut.number] for cut, picture in zip(cuts, pictures) if picture is None]
    if missing:
        raise UnreadableVideo(f"has no decodable frame at {missing[0]:.2f} s (truncated?)")
    return pictures, times


def _decode_frames(container, stream, index: VideoIndex, wanted: list[int]):
    """
    Yield (asked-for pts, frame). Seeks to the last keyframe before a wanted frame where that lies ahead of the position.

    On the way, frames that no other frame refers to are not decoded (skip_frame="NONREF": half the time of a seek on
    long groups of pictures); a wanted frame's own packet always is.
    """
    context = stream.codec_context
    asked, pending, position, packets = set(wanted), list(wanted), None, None
    while pending:
        target = pending[0]
        keyframe = target
        if index.keyframes:
            keyframe = index.keyframes[max(bisect.bisect_right(index.keyframes, target) - 1, 0)]
        if position is None or keyframe > position:
            container.seek(min(keyframe, target), stream=stream, backward=True)
            packets = container.demux(stream)
        found = False
        for packet in packets:
            context.skip_frame = (
                "DEFAULT" if not index.exact or packet.pts in asked or packet.pts is None else "NONREF"
            )
            for frame in packet.decode():
                if frame.pts is None:
                    continue
                position = frame.pts
                # Several wanted frames can come out of one packet at the end of the stream.
                while pending and (frame.pts == pending[0] or (not index.exact and frame.pts >= pending[0])):
                    yield pending.pop(0), frame
                    found = True
                if pending and index.exact and frame.pts > pending[0]:
                    raise UnreadableVideo(f"skips the frame at {index.times[index.pts.index(pending[0])]:.2f} s")
            if found:
                break
        else:
            return


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
    crop = graph.add("crop", f"{x1 - x0}:{y1 - y0}:{x0}:{y0}")
    scale = graph.add("scale", f"{width}:{height}:flags={flags}+accurate_rnd+full_chroma_int")
    convert = graph.add("format", "rgb24")
    sink = graph.add("buffersink")
    source.link_to(crop)
    crop.link_to(scale)
    scale.link_to(convert)
    convert.link_to(sink)
    graph.configure()
    source.push(frame)
    picture = np.rot90(sink.pull().to_ndarray(), quarter_turns)
    return np.ascontiguousarray(picture.transpose(2, 0, 1))


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
