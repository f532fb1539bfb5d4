"""Index a video with PyAV: the times of its frames, where decoding can begin, and their size, without decoding them."""

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

MAX_FRAMES = 5_000_000  # of one video: 23 hours at 60 frames a second
# Frames of all the indices that a process keeps: 4,000 videos of 40 s at 30 frames a second. A frame takes some 16 bytes, a keyframe twice that.
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
        exact: whether the pts are the file's own. If not, they were estimated from the header (remote files without usable tables).
        height, width: as displayed, after rotation.
        quarter_turns: counter-clockwise turns by 90 degrees from the coded to the displayed frame, after it was mirrored.
        version: identifies this state of the file: its size and time of change, or what its server says.
        stated: whether all this was read from the tables of a MOV or MP4, which may differ from the frames themselves.
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
    """Turn the errors that a damaged file causes, in FFmpeg, PyAV or arithmetic on its numbers, into the reason to skip the file."""
    try:
        yield
    except UnreadableVideo:
        raise
    except (av.error.FFmpegError, OSError, ValueError, ArithmeticError, MemoryError) as error:
        raise UnreadableVideo(f"cannot be decoded ({words(error)})") from error


def video_stream(container):
    streams = moving(container)
    if not streams:
        raise UnreadableVideo("has no video stream")
    stream = streams[0]
    if stream.codec_context is None:
        raise UnreadableVideo("its codec is not known to this build of PyAV")
    _check_size(stream.codec_context)
    if stream.frames > MAX_FRAMES:
        raise UnreadableVideo(f"has by its header {stream.frames} frames, the most is {MAX_FRAMES}")
    # Checked again by the decoder, because frames may be larger than the header says.
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    # One thread, because the loader's workers already run in parallel, and because skip_frame then acts on the packet for which it is set.
    stream.codec_context.thread_count = 1
    return stream


def _check_size(picture) -> None:
    if not picture.width or not picture.height:  # FFmpeg also reports no size for some that exceed its limit
        raise UnreadableVideo("has frames of no known size, or larger than 8192x4352 in all")
    if picture.width * picture.height > MAX_PIXELS:
        raise UnreadableVideo(f"has frames of {picture.width}x{picture.height}, larger than 8192x4352 in all")


class _KeptIndices:
    """A cache of [`read_index`]: it keeps the indices used last, up to FRAMES_KEPT frames in total."""

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
    return 1000 + len(index.pts) + len(index.keyframes)  # 1000: an index without its frames


def read_index(source: str, whole: bool = False) -> VideoIndex:
    """
    Read the index of a video.

    Of a MOV or MP4, only its tables and three packets are read. Other local files are demuxed once, without decoding, for their exact time
    stamps. Of other remote files, only the header and the first frame are read, and the times are estimated.

    Args:
        whole: ignore the tables.

    Raises:
        UnreadableVideo: with the reason.
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
# Files whose tables were found to be correct, so that a large damaged file is not read from end to end at every damaged frame.
_CONFIRMED: set[tuple[str, tuple]] = set()


def by_index(source: str, use):
    """
    Return `use(index, video)` for a video's index.

    If `use` fails with an index from the tables, the whole file is indexed, and if that index differs, `use` is tried once more. So a file
    gives the same result, whatever the process has read before.

    `video` is the open file if the index was just read without decoding, else `None`. So a new file is opened only once, which saves 0.3 to
    0.7 ms, or the first requests for a remote file.

    Raises:
        UnreadableVideo: `use` or reading the whole file failed.
    """
    with contextlib.ExitStack() as stack:
        video, index = None, index_video.kept.get(source)
        if index is None:
            video = stack.enter_context(open_video(source))
            index = _index_of(video, source)
            index_video.keep(source, index)
            if moving(video.container)[0].codec_context.is_open:  # frames were decoded for the index
                stack.close()
                video = None
        else:
            index_video.kept.move_to_end(source)  # the cache keeps what was used last
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
    # AVI stores no presentation times. With B frames of H.264, FFmpeg guesses them in decoding order; the first frames show whether it did.
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

    If the first packet is a keyframe, it is flushed out of the decoder, which otherwise waits for frames that might be shown before it.
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
    Read all time stamps, ascending, and for each keyframe's pts the time stamp to seek to.

    Packets are not kept, because together they are as large as the file.
    """
    # Demuxers of these two formats seek by presentation times, the others (MPEG-TS, FLV, AVI, ...) by decoding times.
    by_pts = container.format.name.startswith(("mov", "matroska"))
    pts, keyframes, latest = set(), {}, None
    # Decoding times may be out of order, from muxers or FFmpeg's guesses, but by no more than the frames that a decoder holds back.
    disorder = max(1, 16 / (stream.average_rate or 25)) / stream.time_base
    for packet in container.demux(stream):
        deadline.check()
        if packet.pts is None or not packet.size:
            continue
        # `ffmpeg -ss … -c copy` keeps packets before the cut that are decoded for later frames but never shown.
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
    # To the first keyframe, not to 0: FFmpeg cannot seek to 0 in an FLV whose video begins after its sound.
    container.seek(min(keyframes.values(), default=0), stream=stream)
    return array("q", sorted(pts)), dict(sorted(keyframes.items()))


def _check_count(frames: int) -> None:
    if frames > MAX_FRAMES:
        raise UnreadableVideo(f"has more than {MAX_FRAMES} frames: cut it into parts")


def _table_pts(video: OpenVideo, stream, offsets: np.ndarray) -> tuple[array, dict[int, int]] | None:
    """
    Return the same as [`_read_pts`], from the index that FFmpeg made of a MOV's tables.

    FFmpeg's index has the decoding times; `offsets` leads from these to the presentation times. `None` if the two do not fit each other, if
    media data is missing, or if the first packets disagree.
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
    # FFmpeg shifts all decoding times by one number, so that none is later than its frame's presentation time.
    shifts = {packet.pts - packet.dts - int(offset) for packet, offset in zip(first, offsets)}
    # Compared with the packets, whose keyframes a parser finds: without a table of keyframes, every frame would count as one.
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
        # round(number * step), in whole numbers: fractions take ten times as long
        whole, rest = divmod(number * step.numerator, step.denominator)
        pts.append(start + whole + (2 * rest > step.denominator or (2 * rest == step.denominator and whole % 2)))
    return pts
