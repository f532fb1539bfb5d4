"""Index a video with PyAV: its frame times, the places where decoding can begin, and the frame size, without decoding all frames."""

import contextlib
import functools
import itertools
from array import array
from collections import OrderedDict
from dataclasses import dataclass
from fractions import Fraction

import av
import av.error
import numpy as np

from modeling_poodle.video_frames import MAX_PIXELS, moving, upright_of
from training.addresses import is_remote
from training.mov_tables import track
from training.video_files import Deadline, OpenVideo, UnreadableVideo, open_video, words

MAX_FRAMES = 5_000_000  # most frames of one video: 23 hours at 60 frames a second
# Most frames that the indices cached in a process may have in all (see `_weight`): 4,000 videos of 40 s at 30 frames a second. A frame
# takes about 16 bytes, a keyframe twice that.
FRAMES_KEPT = 10_000_000


@dataclass(frozen=True)
class VideoIndex:
    """
    What is known about a video before its frames are decoded.

    Args:
        pts: presentation time stamps of all frames, ascending, in the stream's `time_base`.
        times: the same in seconds from the stream's start.
        keyframes: pts of the frames at which decoding can begin, ascending.
        seek_points: for each of `keyframes`, the time stamp to seek to.
        exact: whether the pts are the file's own. Otherwise they were estimated from the header (remote files without usable tables).
        height, width: size of the displayed frame in pixels, after rotation.
        quarter_turns: counter-clockwise turns by 90 degrees from the coded to the displayed frame, after mirroring.
        version: identifies this state of the file, by its size and modification time, or by what its server says about it.
        stated: whether the times were read from the tables of a MOV or MP4 (and size and orientation, if the tables give them). The tables
            may not match the frames themselves.
        mirrored: whether left and right of the coded frame are exchanged for display.
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
    stated: bool = False
    mirrored: bool = False

    def same_as(self, other: "VideoIndex") -> bool:
        """Return whether both indices would read the same frames."""
        names = ("pts", "keyframes", "seek_points", "exact", "height", "width", "quarter_turns", "mirrored")
        return all(getattr(self, name) == getattr(other, name) for name in names)

    @property
    def duration(self) -> float:
        """Seconds from the first to the last frame."""
        return float(self.times[-1] - self.times[0])


@contextlib.contextmanager
def explained():
    """Turn errors that a damaged file causes (in FFmpeg, PyAV or arithmetic with its numbers) into [`UnreadableVideo`]."""
    try:
        yield
    except UnreadableVideo:
        raise
    except (av.error.FFmpegError, OSError, ValueError, ArithmeticError, MemoryError) as error:
        raise UnreadableVideo(f"cannot be decoded ({words(error)})") from error


def video_stream(container):
    """Return the first video stream of a container, with its decoder set up. Raises UnreadableVideo if there is no usable one."""
    streams = moving(container)
    if not streams:
        raise UnreadableVideo("has no video stream")
    stream = streams[0]
    if stream.codec_context is None:
        raise UnreadableVideo("its codec is not known to this build of PyAV")
    _check_size(stream.codec_context)
    if stream.frames > MAX_FRAMES:
        raise UnreadableVideo(f"has by its header {stream.frames} frames, the most is {MAX_FRAMES}")
    # The decoder checks the size again, because frames may be larger than the header says.
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    # One thread, because the loader's workers already run in parallel. Also, skip_frame then applies to the packet for which it is set.
    stream.codec_context.thread_count = 1
    return stream


def _check_size(picture) -> None:
    if not picture.width or not picture.height:  # FFmpeg also reports no size for some frames that exceed its limit
        raise UnreadableVideo("has frames of no known size, or larger than 8192x4352 in all")
    if picture.width * picture.height > MAX_PIXELS:
        raise UnreadableVideo(f"has frames of {picture.width}x{picture.height}, larger than 8192x4352 in all")


class _KeptIndices:
    """A cache of [`read_index`] that keeps the most recently used indices, up to FRAMES_KEPT frames in total."""

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
    return 1000 + len(index.pts) + len(index.keyframes)  # 1000 stands for the memory of an index without frames


def read_index(source: str, whole: bool = False) -> VideoIndex:
    """
    Read the index of a video.

    For a MOV or MP4, only the tables and three packets are read. Other local files are demuxed once, without decoding, for their exact time
    stamps. For other remote files, only the header and the first frame are read, and the times are estimated.

    Args:
        whole: ignore the tables of a MOV or MP4, and read it like other files.

    Raises:
        UnreadableVideo: the video cannot be used; the text gives the reason.
    """
    with open_video(source) as video:
        return _index_of(video, source, whole)


def _index_of(video: OpenVideo, source: str, whole: bool = False) -> VideoIndex:
    with explained():
        stream = video_stream(video.container)
        tables = track(video.movie, stream.id) if video.movie and not whole else None
        found = _table_pts(video, stream, tables.offsets) if tables else None
        picture = stream.codec_context
        stated = found and tables.quarter_turns is not None and min(picture.width, picture.height) >= 2
        if found:
            pts, keyframes = found
        elif is_remote(source):
            pts, keyframes = _estimate_pts(stream, video.deadline), {}
        else:
            pts, keyframes = _read_pts(video.container, stream, video.deadline)
        if not stated:
            picture = _first_picture(video.container, stream)
        if picture.width < 2 or picture.height < 2:
            raise UnreadableVideo(f"has frames of {picture.width}x{picture.height}, 2x2 is the least")
        turns, mirrored = (tables.quarter_turns, False) if stated else upright_of(picture)
        height, width = (picture.width, picture.height) if turns % 2 else (picture.height, picture.width)
        start = pts[0] if stream.start_time is None else min(stream.start_time, pts[0])
        return VideoIndex(
            pts=pts,
            times=(np.array(pts, dtype=np.float64) - start) * float(stream.time_base),
            keyframes=array("q", keyframes),
            seek_points=array("q", keyframes.values()),
            exact=bool(found) or not is_remote(source),
            height=height,
            width=width,
            quarter_turns=turns,
            version=video.version,
            stated=bool(found),
            mirrored=mirrored,
        )


index_video = _KeptIndices(read_index)
# (source, version) of files whose tables were checked and found correct, so that such a file is not read from end to end at each damaged
# frame.
_CONFIRMED: set[tuple[str, tuple]] = set()


def by_index(source: str, use):
    """
    Return `use(index, video)` with the index of a video.

    If `use` fails with an index that was read from tables, the whole file is indexed. If this second index differs, `use` is called once
    more with it. The second index is not cached. So the result depends only on the file, not on what the process has read before.

    Args:
        use: called with the index, and with the open file if the index was just read without decoding, else with `None`. So a new file is
            opened only once, which saves 0.3 to 0.7 ms, or the first requests to a server.

    Raises:
        UnreadableVideo: reading the index or `use` failed.
    """
    with contextlib.ExitStack() as stack:
        video, index = None, index_video.kept.get(source)
        if index is None:
            video = stack.enter_context(open_video(source))
            index = _index_of(video, source)
            index_video.keep(source, index)
            # If frames were decoded for the index, `use` must open the file again.
            if moving(video.container)[0].codec_context.is_open:
                stack.close()
                video = None
        else:
            index_video.kept.move_to_end(source)  # now the most recently used
        try:
            return use(index, video)
        except UnreadableVideo as error:
            if not index.stated or (source, index.version) in _CONFIRMED:
                raise
            failure = error
    whole = read_index(source, whole=True)
    if whole.same_as(index) and whole.version == index.version:
        _CONFIRMED.add((source, index.version))
    elif whole.version == index.version:
        return use(whole, None)
    raise failure


def _first_picture(container, stream) -> av.VideoFrame:
    # AVI stores no presentation times. If H.264 has B frames, FFmpeg guesses times in decoding order; the first frames show whether it did.
    avi = container.format.name == "avi"
    shown = list(itertools.islice(container.decode(stream), 8)) if avi else _first_frame(container, stream)
    if not shown:
        raise UnreadableVideo("has no frame that can be decoded")
    if any(a.pts is None or b.pts is None or a.pts >= b.pts for a, b in itertools.pairwise(shown)):
        raise UnreadableVideo("has time stamps out of order (B frames in AVI?): encode it anew, to MP4 or MKV")
    _check_size(shown[0])
    return shown[0]


def _first_frame(container, stream) -> list[av.VideoFrame]:
    """
    Decode the first frame, if there is one.

    If the first packet is a keyframe, the decoder is flushed. Otherwise it would wait for frames that might be shown before this one.
    """
    packet = next(container.demux(stream))
    frames = packet.decode()
    if not frames and packet.is_keyframe:
        frames = stream.codec_context.decode(None)
    if not frames:
        container.seek(0)
        frames = list(itertools.islice(container.decode(stream), 1))
    return frames[:1]


def _read_pts(container, stream, deadline: Deadline) -> tuple[array, dict[int, int]]:
    """
    Read the pts of all frames, ascending, and for each keyframe's pts the time stamp to seek to.

    Packets are not kept, because together they are as large as the file.
    """
    # The demuxers of these two formats seek by presentation time, all others (MPEG-TS, FLV, AVI, ...) by decoding time.
    by_pts = container.format.name.startswith(("mov", "matroska"))
    pts, keyframes, latest = set(), {}, None
    # Muxers and FFmpeg's guesses may put decoding times out of order, but by no more than the frames that a decoder holds back.
    disorder = max(1, 16 / (stream.average_rate or 25)) / stream.time_base
    for packet in container.demux(stream):
        deadline.check()
        if packet.pts is None or not packet.size:
            continue
        # `ffmpeg -ss … -c copy` keeps packets before the cut that must be decoded for later frames, but are never shown.
        if not packet.is_discard:
            pts.add(packet.pts)
            if packet.dts is not None:
                latest = packet.dts if latest is None else max(latest, packet.dts)
                if packet.dts < latest - disorder:  # two frames would have the same time
                    raise UnreadableVideo(
                        f"has time stamps that begin anew after {len(pts)} frames (files joined end to end?): cut it there, or re-mux it"
                    )
        if packet.is_keyframe:
            keyframes[packet.pts] = packet.pts if by_pts or packet.dts is None else packet.dts
        _check_count(len(pts))
    if not pts:
        raise UnreadableVideo("has no frames with time stamps")
    # Rewind to the first keyframe, not to 0: FFmpeg cannot seek to 0 in an FLV whose video begins after its sound.
    container.seek(min(keyframes.values(), default=0), stream=stream)
    return array("q", sorted(pts)), dict(sorted(keyframes.items()))


def _check_count(frames: int) -> None:
    if frames > MAX_FRAMES:
        raise UnreadableVideo(f"has more than {MAX_FRAMES} frames: cut it into parts")


def _table_pts(video: OpenVideo, stream, offsets: np.ndarray) -> tuple[array, dict[int, int]] | None:
    """
    Compute the same as [`_read_pts`] from the index that FFmpeg built from a MOV's tables.

    FFmpeg's index holds only decoding times; `offsets` leads from these to presentation times (see [`~training.mov_tables.Track`]). The
    result is `None` if index and offsets do not fit each other, media data is missing, or the first packets disagree.
    """
    entries = stream.index_entries
    if len(entries) != len(offsets) or not len(offsets):
        return None
    _check_count(len(entries))

    def rows():
        for number, entry in enumerate(entries):
            if number % 65536 == 0:
                video.deadline.check()
            yield entry.timestamp, entry.pos, entry.size, entry.is_keyframe, entry.is_discard

    fields = [("dts", "i8"), ("place", "i8"), ("size", "i8"), ("keyframe", "?"), ("discard", "?")]
    rows = np.fromiter(rows(), fields, len(entries))
    if rows["size"].min() < 1 or rows["place"].min() < 0 or (rows["place"] + rows["size"]).max() > video.size:
        return None
    first = [packet for packet in itertools.islice(video.container.demux(stream), 3) if packet.size]
    video.container.seek(0)
    # FFmpeg shifts all decoding times by the same amount, so that none is later than its frame's presentation time.
    shifts = {packet.pts - packet.dts - int(offset) for packet, offset in zip(first, offsets)}
    # Compare the index with the packets, whose keyframes a parser finds. Without a table of keyframes, the index marks every frame as one.
    told = [(packet.dts, packet.is_keyframe) for packet in first]
    if len(shifts) != 1 or told != [(row["dts"], row["keyframe"]) for row in rows[: len(first)]]:
        return None
    pts = rows["dts"] + offsets + shifts.pop()
    keyframes = np.unique(pts[rows["keyframe"]]).tolist()
    shown = np.unique(pts[~rows["discard"]])
    return (array("q", shown.tobytes()), dict(zip(keyframes, keyframes))) if len(shown) else None


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
        # round(number * step) in integers, because fractions take ten times as long.
        whole, rest = divmod(number * step.numerator, step.denominator)
        pts.append(start + whole + (2 * rest > step.denominator or (2 * rest == step.denominator and whole % 2)))
    return pts
