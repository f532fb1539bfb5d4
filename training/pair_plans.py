"""Draw the frames and crops of a video's pairs. The draw depends on the video's index alone and is the same on every machine."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training.addresses import video_name
from training.video_decoding import Cut
from training.video_files import UnreadableVideo
from training.video_index import VideoIndex

# A pair's gap may be outside its range by up to the time between two frames, clipped to these seconds.
SPARE = (0.1, 1.0)


@dataclass(frozen=True)
class PairSampling:
    """
    How pairs are drawn from a video (arXiv 2408.11208, section 3).

    Args:
        crop_size: (H, W) of the crop that both frames share, pixels.
        frame_scale: range of the frame's scale s before the crop.
        frame_size: (H, W) of a frame at s = 1; of a portrait video (W, H), or as much larger as the
            crop needs. `None` is the smallest size of the video's aspect ratio in which the crop fits.
        frame_gap_seconds: range of the time between the two frames, met as closely as the video's frame times allow.
        pairs_per_video: pairs taken each time a video is opened.
        seed: of all draws, together with epoch, video and repeat.
    """

    crop_size: tuple[int, int]
    frame_scale: tuple[float, float] = (1.0, 1.0)
    frame_size: tuple[int, int] | None = None
    frame_gap_seconds: tuple[float, float] = (0.5, 1.5)
    pairs_per_video: int = 1
    seed: int = 0

    def __post_init__(self):
        if self.frame_size is not None:
            smallest = [side * self.frame_scale[0] for side in self.frame_size]
            if any(crop > side + 1e-6 for crop, side in zip(self.crop_size, smallest)):
                raise ValueError(
                    f"crop_size {self.crop_size[0]}x{self.crop_size[1]} is larger than the frame at its smallest scale "
                    f"({smallest[0]:.0f}x{smallest[1]:.0f}): raise frame_scale or frame_size, or lower crop_size"
                )

    @classmethod
    def of(cls, recipe) -> "PairSampling":
        """Return the sampling that a recipe asks for."""
        return cls(
            crop_size=tuple(recipe.crop_size),
            frame_scale=tuple(recipe.frame_scale),
            frame_size=None if recipe.frame_size is None else tuple(recipe.frame_size),
            frame_gap_seconds=tuple(recipe.frame_gap_seconds),
            pairs_per_video=recipe.pairs_per_video,
            seed=recipe.seed,
        )


def plan_pairs(index: VideoIndex, sampling: PairSampling, epoch: int, path: str) -> list[tuple[Cut, Cut]]:
    """
    Draw frames and crops of the pairs of one opening of a video. Randomness comes only from (seed, epoch, crc32(video_name(path)), repeat).

    The later frame is the one nearest to the drawn gap, and never the earlier frame itself unless `frame_gap_seconds` asks for 0. Around a
    hole in the video, a pair's gap can be outside the range by more than the time between two frames (see SPARE). Such a pair is drawn
    again among pairs that are within.

    Raises:
        UnreadableVideo: the video is too short for the smallest gap, or has no pair within the range.
    """
    low, high = sampling.frame_gap_seconds
    frame_time = index.duration / max(len(index.pts) - 1, 1)
    if len(index.pts) < (2 if high > 0 else 1) or index.duration + frame_time / 2 < low:
        raise UnreadableVideo(f"is too short: {index.duration:.2f} s, the smallest frame gap is {low:g} s")
    pairs = []
    for repeat in range(sampling.pairs_per_video):
        rng = np.random.default_rng([sampling.seed, epoch, checksum(video_name(path)), repeat])
        gap = rng.uniform(low, max(low, min(high, index.duration)))
        start = index.times[0] + rng.uniform(0, max(index.duration - gap, 0))
        first = _nearest(index.times, start)
        second = _nearest(index.times, index.times[first] + gap)
        if high > 0 and second <= first:
            first, second = (first, first + 1) if first + 1 < len(index.pts) else (first - 1, first)
        apart = index.times[second] - index.times[first]
        if not low - SPARE[0] <= apart <= high + SPARE[0]:
            spare = float(np.clip(np.median(np.diff(index.times)), *SPARE))
            if not low - spare <= apart <= high + spare:
                first, second = _frames_within(index.times, sampling.frame_gap_seconds, spare, gap, rng)
        box = _draw_box(index, sampling, rng)
        pairs.append((Cut(first, box, sampling.crop_size), Cut(second, box, sampling.crop_size)))
    return pairs


def is_within(times: Sequence[float], index: VideoIndex, sampling: PairSampling) -> bool:
    """Return whether two decoded frames are as far apart as [`plan_pairs`] allows. `times`: seconds of both."""
    (low, high), apart = sampling.frame_gap_seconds, times[1] - times[0]
    if high == 0:
        return apart == 0
    spare = float(np.clip(np.median(np.diff(index.times)), *SPARE))
    return apart > 0 and low - spare <= apart <= high + spare


def _frames_within(times: np.ndarray, gaps, spare: float, gap: float, rng: np.random.Generator) -> tuple[int, int]:
    """
    Draw a pair of frames within the range of gaps, give or take `spare`.

    The first frame is drawn from those with such a later frame. The second is the one of these nearest to `gap`.
    """
    soonest = np.maximum(np.searchsorted(times, times + gaps[0] - spare), np.arange(1, len(times) + 1))
    latest = np.searchsorted(times, times + gaps[1] + spare, "right") - 1
    firsts = np.flatnonzero(soonest <= latest)
    if not len(firsts):
        raise UnreadableVideo(
            f"has no frames as far apart as frame_gap_seconds asks for ({gaps[0]:g} to {gaps[1]:g} s): they follow one another in "
            f"{np.diff(times).mean():.2f} s on average"
        )
    first = int(rng.choice(firsts))
    return first, int(np.clip(_nearest(times, times[first] + gap), soonest[first], latest[first]))


def checksum(text: str) -> int:
    return zlib.crc32(text.encode(errors="surrogateescape"))  # file names need not be UTF-8


def _nearest(times: np.ndarray, time: float) -> int:
    right = min(int(np.searchsorted(times, time)), len(times) - 1)
    return right - 1 if right > 0 and time - times[right - 1] <= times[right] - time else right


def _draw_box(index: VideoIndex, sampling: PairSampling, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw the crop as xyxy in the video's own pixels: frames are cropped first and resized afterwards."""
    (crop_h, crop_w), scale = sampling.crop_size, rng.uniform(*sampling.frame_scale)
    if sampling.frame_size is None:
        fit = max(crop_h / index.height, crop_w / index.width)
        frame_h, frame_w = index.height * fit * scale, index.width * fit * scale
    else:
        frame_h, frame_w = (side * scale for side in sampling.frame_size)
        # The released code resizes portrait videos (of BDD100K some are) to the landscape size too, which stretches them threefold.
        if (index.height > index.width) != (frame_h > frame_w):
            frame_h, frame_w = frame_w, frame_h
            fit = max(1.0, crop_h / frame_h, crop_w / frame_w)
            frame_h, frame_w = frame_h * fit, frame_w * fit
    h = min(max(round(crop_h * index.height / frame_h), 2), index.height)
    w = min(max(round(crop_w * index.width / frame_w), 2), index.width)
    # Even corners: chroma of 4:2:0 video lies on every second pixel.
    x, y = (2 * int(rng.uniform(0, (slack + 2) // 2)) for slack in (index.width - w, index.height - h))
    x, y = min(x, index.width - w), min(y, index.height - h)
    return x, y, x + w, y + h
