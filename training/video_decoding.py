"""Frames of a video at asked-for times, cropped first and resized after. PyAV; nothing here knows pairs or models."""

import bisect
import itertools
from contextlib import nullcontext
from dataclasses import dataclass

import av
import av.filter
import numpy as np

from modeling_poodle.video_frames import upright_of
from training.video_files import Deadline, OpenVideo, UnreadableVideo, open_video
from training.video_index import (
    VideoIndex,
    explained,
    index_video,
    video_stream,
)

MOST_SECONDS_BACK = 64  # that a keyframe is looked for before a frame whose file's keyframes are not known
MOST_BACK = 3  # keyframes before the last one that a decoder begins at where it else skips a frame


@dataclass(frozen=True)
class Cut:
    """One wanted picture: frame `number` of the index, `box` xyxy of it in displayed pixels, resized to `size` (H, W)."""

    number: int
    box: tuple[int, int, int, int]
    size: tuple[int, int]


def decode_cuts(
    source: str, index: VideoIndex, cuts: list[Cut], video: OpenVideo | None = None
) -> tuple[list[np.ndarray | None], list[float]]:
    """
    Decode the wanted pictures in one pass over the file.

    Args:
        video: the file where it is open already, and nothing was decoded of it.

    Returns:
        RGB uint8 arrays (3, H, W), and the frames' times in seconds, both in the order of `cuts`. Where times are estimated from the header,
        which may tell of more than there is (the sound's length), some may be `None`: those behind the last frame.

    Raises:
        UnreadableVideo: a wanted frame is missing, corrupt, or not what the index says.
    """
    wanted: dict[int, list[int]] = {}
    for position, cut in enumerate(cuts):
        wanted.setdefault(index.pts[cut.number], []).append(position)
    pictures: list = [None] * len(cuts)
    times = [0.0] * len(cuts)
    with open_video(source) if video is None else nullcontext(video) as video, explained():
        if video.version != index.version:
            index_video.drop(source)  # its next opening reads it anew
            raise UnreadableVideo("has changed since it was first read")
        stream = video_stream(video.container)
        for pts, frame in _decode_frames(video.container, stream, index, sorted(wanted), video.deadline):
            shown = (frame.width, frame.height) if index.quarter_turns % 2 else (frame.height, frame.width)
            upright = (index.quarter_turns, index.mirrored)
            if index.stated and (*shown, *upright_of(frame)) != (index.height, index.width, *upright):
                raise UnreadableVideo("has frames of another size, or turned otherwise, than its header says")
            if shown != (index.height, index.width):
                sizes = f"from {index.width}x{index.height} to {shown[1]}x{shown[0]}"
                raise UnreadableVideo(f"changes its size {sizes} at {_seconds(index, pts):.2f} s")
            for position in wanted[pts]:
                pictures[position] = cut_frame(frame, cuts[position].box, cuts[position].size, *upright)
                seconds = (frame.pts - index.pts[0]) * float(stream.time_base) + float(index.times[0])
                times[position] = seconds
    missing = [index.times[cut.number] for cut, picture in zip(cuts, pictures) if picture is None]
    if missing and (index.exact or len(missing) == len(cuts)):
        raise UnreadableVideo(f"has no decodable frame at {missing[0]:.2f} s (truncated?)")
    return pictures, times


def _decode_frames(container, stream, index: VideoIndex, wanted: list[int], deadline: Deadline):
    """
    Yield (asked-for pts, frame), with one seek for all those of a group of pictures. Those that the file's end lacks do not come.

    Raises:
        UnreadableVideo: a wanted frame is damaged, or later ones come without it.
    """
    # Packets hold whole frames: elsewhere they may be fields, two of which make a frame.
    back, drain = 0, index.exact and container.format.name.startswith(("mov", "matroska"))
    for _, group in itertools.groupby(wanted, key=lambda pts: _entry(index, pts)):
        pending = list(group)
        while pending:
            outcome = yield from _decode_group(container, stream, index, pending, back, drain, deadline)
            if outcome == "fields":
                drain = False
            # Intra refresh (H.264) has no whole keyframes: a decoder gives nothing before it has seen all parts of a picture anew.
            elif (
                pending and back < MOST_BACK and _entry(index, pending[0], back) != _entry(index, pending[0], back + 1)
            ):
                back += 1
            elif outcome == "end":
                return
            elif pending:
                raise UnreadableVideo(f"skips the frame at {_seconds(index, pending[0]):.2f} s")


def _decode_group(
    container, stream, index: VideoIndex, pending: list[int], back: int, drain: bool, deadline: Deadline
):
    """
    One pass from the keyframe of `pending`, or as many before it as `back` says; what is yielded is taken out of `pending`.

    On the way, frames that no other frame refers to are not decoded (skip_frame="NONREF": half the time of a seek on
    long groups of pictures); a wanted frame's own packet always is. At the last one the decoder is asked for what it
    holds (`drain`): else it is given frame after frame until it is sure that none comes before the wanted one.

    Returns:
        "found", "skipped" (a later frame came first), "end" (of the file), or "fields": once more without `drain`, in case a frame's other
        field follows.
    """
    context = stream.codec_context
    # libdav1d (AV1) reads skip_frame once, when it is opened: it would go on leaving out frames that are wanted later.
    everything = not index.exact or context.codec.name.startswith("lib")
    asked, damaged = set(pending), False
    _, place = _entry(index, pending[0], back)
    for packet in _packets_up_to(container, stream, index, pending[0], place, deadline):
        deadline.check()
        whole = everything or packet.pts in asked or packet.pts is None
        context.skip_frame = "DEFAULT" if whole else "NONREF"
        frames = packet.decode()
        drained = drain and pending == [packet.pts]
        if drained:
            frames += context.decode(None)
            if any(frame.interlaced_frame for frame in frames):
                return "fields"
        for frame in frames:
            if frame.pts is None:
                continue
            # What is damaged stays so in the frames that follow, up to one that refers to none; these are not marked.
            damaged = frame.is_corrupt or (damaged and not frame.key_frame)
            if damaged and frame.pts >= pending[0]:
                raise UnreadableVideo(f"is damaged at {_seconds(index, frame.pts):.2f} s")
            # Several wanted frames can come out of one packet at the end of the stream.
            while pending and (frame.pts == pending[0] or (not index.exact and frame.pts >= pending[0])):
                yield pending.pop(0), frame
            if not pending:
                return "found"
            if index.exact and frame.pts > pending[0]:
                return "skipped"
        if drained:  # the decoder takes nothing more before a seek
            return "skipped"
    return "end"


def _packets_up_to(container, stream, index: VideoIndex, target: int, place: int, deadline: Deadline):
    """
    Packets up to a frame and on, from the keyframe to which `place` leads. A MOV without edit lists is sought in the order of decoding, in which its frames are
    some earlier than they are shown: of two keyframes closer than that (a cut just before a group's end) it takes the later one.
    """
    seconds = 1
    while True:
        deadline.check()
        try:
            container.seek(min(place, target), stream=stream, backward=True)
        except av.error.FFmpegError:
            if seconds == 1:
                raise
            # FLV and AVI are not sought before their first keyframe.
            container.seek(index.pts[0], stream=stream, backward=True)
            return container.demux(stream)
        packets = container.demux(stream)
        first = next(packets)
        if not index.exact:
            # In MPEG-TS and MPEG-PS FFmpeg seeks any packet, behind which the next keyframe may lie seconds later than the wanted frame.
            last = seconds > MOST_SECONDS_BACK or place < index.pts[0] - 2 / stream.time_base
            while not last and first.size and not first.is_keyframe and (first.dts is None or first.dts <= target):
                deadline.check()
                first = next(packets)
            if last or (first.is_keyframe and first.pts is not None and first.pts <= target):
                return itertools.chain([first], packets)
            place, seconds = int(target - seconds / stream.time_base), 2 * seconds
            continue
        earlier = bisect.bisect_left(index.seek_points, place) - 1
        if first.pts is None or first.pts <= target or earlier < 0:
            return itertools.chain([first], packets)
        place = index.seek_points[earlier]


def _entry(index: VideoIndex, target: int, back: int = 0) -> tuple[int, int]:
    """The last keyframe up to a frame, or as many before that as `back` says, and where to seek to for it."""
    if not index.keyframes:
        return target, target
    number = max(bisect.bisect_right(index.keyframes, target) - 1 - back, 0)
    return index.keyframes[number], index.seek_points[number]


def _seconds(index: VideoIndex, pts: int) -> float:
    return float(index.times[min(bisect.bisect_left(index.pts, pts), len(index.pts) - 1)])


def cut_frame(
    frame: av.VideoFrame,
    box: tuple[int, int, int, int],
    size: tuple[int, int],
    quarter_turns: int,
    mirrored: bool = False,
) -> np.ndarray:
    """
    Crop a frame, resize it, mirror it where asked for, and turn it upright; only the crop is converted to RGB.

    One libavfilter graph (crop, scale) knows every pixel format, colour matrix and range. Shrinking averages areas.

    Args:
        box: xyxy, displayed pixels; moved to even coded pixels, on which 4:2:0 chroma lies.
        size: (H, W) of the result.

    Returns:
        (3, H, W) uint8 RGB.
    """
    x0, y0, x1, y1 = _to_coded(box, frame.width, frame.height, quarter_turns, mirrored)
    height, width = size if quarter_turns % 2 == 0 else size[::-1]
    flags = "area" if (x1 - x0) > width else "bicubic"
    graph = av.filter.Graph()
    graph.threads = 1  # or it starts one for each core of the machine, at every cut: 1.9 instead of 1.0 ms with two
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
    if mirrored:
        picture = picture[..., ::-1]
    return np.ascontiguousarray(np.rot90(picture, quarter_turns, axes=(1, 2)))


def _plane(plane, height: int, width: int) -> np.ndarray:
    return np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)[:, :width]


def _to_coded(box, width: int, height: int, quarter_turns: int, mirrored: bool) -> tuple[int, int, int, int]:
    """A box of the displayed frame in the pixels of the coded one (width x height)."""
    x0, y0, x1, y1 = box
    if quarter_turns == 1:
        x0, y0, x1, y1 = width - y1, x0, width - y0, x1
    elif quarter_turns == 2:
        x0, y0, x1, y1 = width - x1, height - y1, width - x0, height - y0
    elif quarter_turns == 3:
        x0, y0, x1, y1 = y0, height - x1, y1, height - x0
    if mirrored:
        x0, x1 = width - x1, width - x0
    return x0 - x0 % 2, y0 - y0 % 2, x1 - x0 % 2, y1 - y0 % 2
