"""Decode wanted frames of a video with PyAV, crop them, then resize the crops. This module knows nothing of pairs or models."""

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

MOST_SECONDS_BACK = 64  # if the file's keyframes are unknown: how far before a frame to search for one
MOST_BACK = 3  # if the decoder skips the wanted frame: how many keyframes further back decoding may begin


@dataclass(frozen=True)
class Cut:
    """A wanted picture: the part `box` (xyxy in displayed pixels) of frame `number` of the index, resized to `size` (H, W)."""

    number: int
    box: tuple[int, int, int, int]
    size: tuple[int, int]


def decode_cuts(
    source: str, index: VideoIndex, cuts: list[Cut], video: OpenVideo | None = None
) -> tuple[list[np.ndarray | None], list[float]]:
    """
    Decode the wanted pictures in one pass over the file.

    Args:
        video: the file, if it is open already. Nothing may have been decoded from it.

    Returns:
        RGB uint8 arrays (3, H, W) and the frames' times in seconds, both in the order of `cuts`. If times were estimated from the header,
        its duration may be too long (for example the sound's). Pictures beyond the last frame are then `None`.

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
            index_video.drop(source)  # so that the next opening reads a new index
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
    Yield (wanted pts, frame), with one seek for each group of pictures. Wanted frames beyond the end of the file are left out.

    Raises:
        UnreadableVideo: a wanted frame is damaged, or the decoder skips it.
    """
    # In these two formats a packet holds a whole frame. In others it may hold one field, and two fields make a frame.
    back, drain = 0, index.exact and container.format.name.startswith(("mov", "matroska"))
    for _, group in itertools.groupby(wanted, key=lambda pts: _entry(index, pts)):
        pending = list(group)
        while pending:
            outcome = yield from _decode_group(container, stream, index, pending, back, drain, deadline)
            if outcome == "fields":
                drain = False
            # H.264 with intra refresh has no whole keyframes: the decoder returns no frame until it has refreshed all parts of the picture.
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
    Decode from the keyframe before the first of `pending`, or from `back` keyframes earlier, and yield the pending frames.

    Frames that are yielded are removed from `pending`. On the way to them, frames that no other frame refers to are not decoded
    (skip_frame="NONREF"), which halves the time of a seek in long groups of pictures. The packet of a wanted frame is always decoded.

    Args:
        drain: flush the decoder after the last wanted packet. Otherwise the decoder is fed further packets until it returns the frame.

    Returns:
        "found": all pending frames were yielded.
        "skipped": the decoder returned a later frame first, or nothing when it was flushed.
        "end": the file ended.
        "fields": the frame is interlaced, and its second field may be in the next packet. Try again without `drain`.
    """
    context = stream.codec_context
    # libdav1d (AV1) reads skip_frame only when it is opened, so it would go on skipping when a wanted frame comes.
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
        # At the end of the stream, one packet can yield several wanted frames.
        for frame in frames:
            if frame.pts is None:
                continue
            # Damage spreads to the following frames up to the next keyframe, but FFmpeg does not mark those frames.
            damaged = frame.is_corrupt or (damaged and not frame.key_frame)
            if damaged and frame.pts >= pending[0]:
                raise UnreadableVideo(f"is damaged at {_seconds(index, frame.pts):.2f} s")
            # If times were estimated, several wanted time stamps can lead to the same frame.
            while pending and (frame.pts == pending[0] or (not index.exact and frame.pts >= pending[0])):
                yield pending.pop(0), frame
            if not pending:
                return "found"
            if index.exact and frame.pts > pending[0]:
                return "skipped"
        if drained:  # a flushed decoder takes no packets until the next seek
            return "skipped"
    return "end"


def _packets_up_to(container, stream, index: VideoIndex, target: int, place: int, deadline: Deadline):
    """
    Seek to the keyframe at `place`, and return the packets from there on.

    In a MOV without edit lists, FFmpeg seeks by decoding times, which are somewhat earlier than presentation times. If two keyframes are
    close together (a cut just before the end of a group), it may choose the later one. Then the seek is repeated further back.
    """
    seconds = 1
    while True:
        deadline.check()
        try:
            container.seek(min(place, target), stream=stream, backward=True)
        except av.error.FFmpegError:
            if seconds == 1:
                raise
            # FLV and AVI refuse a seek to a time before their first keyframe.
            container.seek(index.pts[0], stream=stream, backward=True)
            return container.demux(stream)
        packets = container.demux(stream)
        first = next(packets)
        if not index.exact:
            # In MPEG-TS and MPEG-PS, FFmpeg seeks to any packet, and the next keyframe may be seconds after the wanted frame.
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
    """Return the pts of the last keyframe up to `target`, or of the one `back` keyframes earlier, and the time stamp to seek to."""
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
    Crop a frame, resize the crop, convert it to RGB, mirror it if asked to, and turn it upright.

    A libavfilter graph (crop, scale) handles every pixel format, colour matrix and range. Shrinking averages areas.

    Args:
        box: xyxy in displayed pixels. The corner is moved to even coded pixels, where 4:2:0 chroma samples lie.
        size: (H, W) of the result.

    Returns:
        (3, H, W) uint8 RGB.
    """
    x0, y0, x1, y1 = _to_coded(box, frame.width, frame.height, quarter_turns, mirrored)
    height, width = size if quarter_turns % 2 == 0 else size[::-1]
    flags = "area" if (x1 - x0) > width else "bicubic"
    graph = av.filter.Graph()
    graph.threads = 1  # by default each cut starts one thread a core, and takes 1.9 instead of 1.0 ms with two cores
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or av.time_base
    )
    crop = graph.add("crop", f"{x1 - x0}:{y1 - y0}:{x0}:{y0}:exact=1")  # without exact, odd sides would lose a pixel
    scale = graph.add("scale", f"{width}:{height}:flags={flags}+accurate_rnd+full_chroma_int")
    # Planar RGB differs from rgb24 by at most one level of 255, and takes a third to a half of the time.
    convert = graph.add("format", "gbrp")
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
    """Convert a box from pixels of the displayed frame to pixels of the coded frame (width x height)."""
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
