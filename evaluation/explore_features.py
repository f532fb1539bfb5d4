"""Contents of the feature page, independent of the page itself: frames of a file, features in colour, similarity maps, a cache."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import av
import av.error
import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from evaluation.encoders import Encoder
from evaluation.labelled_images import FORMATS, IMAGES, UNREADABLE, as_rgb
from modeling_poodle.folders import files_below
from modeling_poodle.video_frames import ANY_TAGS, CONTAINERS, EXTENSIONS, MAX_PIXELS, moving, upright_of

av.logging.set_level(av.logging.PANIC)  # damaged files are reported once, by this module
MAX_DECODED = 3000  # most frames of a video that are decoded for one strip
MAX_FILES = 500  # most files of a folder that the page lists
SHOWN = 800  # pixels of the longer side of a picture to click; the page's layout shows no larger one
# Least range of similarities that the colours span, so that features that are all alike also look alike.
MINIMUM_SPAN = 0.1


# --- files ---


@dataclass(frozen=True)
class Clip:
    """
    A picture, or frames of a video.

    Args:
        frames: (H, W, 3) uint8 RGB, all of the same size; the user clicks the first.
        times: seconds from the video's start; (0.0,) for a picture.
        duration: seconds of the whole video; 0 for a picture.
    """

    frames: tuple[np.ndarray, ...]
    times: tuple[float, ...]
    duration: float


def list_media(source: str | None) -> list[tuple[str, str]]:
    """
    Return (name to show, path) of a file, or of the pictures and videos below a folder, ordered by name; empty for `None`.

    Raises:
        ValueError: there is no such file or folder, or the folder has no picture or video.
    """
    if source is None:
        return []
    root = Path(source).expanduser()
    if root.is_file():
        return [(root.name, str(root))]
    if not root.is_dir():
        raise ValueError(f"images {source}: no such file or folder")
    files = [p for p in files_below(root) if p.suffix.lower() in (*IMAGES, *EXTENSIONS) and not p.name.startswith(".")]
    if not files:
        raise ValueError(
            f"images {source}: no picture or video below it, expected {', '.join((*IMAGES, *EXTENSIONS))}"
        )
    return [(p.relative_to(root).as_posix(), str(p)) for p in files[:MAX_FILES]]


def read_clip(path: str, start: float, gap: float, count: int, max_side: int) -> Clip:
    """
    Read a picture, or `count` frames of a video from second `start` on, `gap` seconds apart; fewer at the video's end.

    Args:
        max_side: larger frames are shrunk to this longer side, pixels.

    Raises:
        ValueError: the file is no picture or video, is damaged, or has no frame there. The message names the file, but not its folder.
    """
    name, suffix = Path(path).name, Path(path).suffix.lower()
    try:
        if suffix in EXTENSIONS:
            return _read_video(path, start, gap, count, max_side)
        if suffix not in IMAGES:
            raise ValueError(f"expected {', '.join((*IMAGES, *EXTENSIONS))}")
        with Image.open(path, formats=FORMATS) as image:
            image.draft("RGB", (max_side, max_side))
            upright = Image.fromarray(as_rgb(ImageOps.exif_transpose(image)))
        upright.thumbnail((max_side, max_side))
        return Clip((np.asarray(upright),), (0.0,), 0.0)
    except UNREADABLE as error:
        # The library's message may name the folder of an upload.
        reason = getattr(error, "strerror", None) or (
            str(error) if str(path) not in str(error) else "unknown contents"
        )
        raise ValueError(f"{name} is no picture or video that can be read ({reason})") from error


def _read_video(path: str, start: float, gap: float, count: int, max_side: int) -> Clip:
    limit = {"max_pixels": str(MAX_PIXELS)}
    allowed = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file", **limit}
    with av.open(path, options=allowed, **ANY_TAGS) as container:
        if not (streams := moving(container)):
            raise ValueError("it has no video stream")
        stream = streams[0]
        # No frame threads: if one still decodes while the file is closed, it waits for Python's lock and closing waits for it, for ever
        # (PyAV 18.1; seen in a test on a busy machine).
        stream.thread_type = "SLICE"
        stream.codec_context.options = limit  # frames may be larger than the header says
        origin = (stream.start_time or 0) * stream.time_base
        length = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / av.time_base
        if not length:  # a recording from a browser, or a raw stream
            with av.open(path, options=allowed, **ANY_TAGS) as again:
                packets = (p for p in again.demux(moving(again)[0]) if p.pts is not None)
                length = max(((p.pts + (p.duration or 0)) * p.time_base for p in packets), default=origin) - origin
        half = 0.5 / float(stream.average_rate or 25)  # half a frame: the frame nearest to a second is taken
        if start <= round(float(length), 1):  # the slider ends with the video, but the last frame begins earlier
            start = max(min(start, float(length) - 2 * half), 0.0)
        wanted = [start + gap * number for number in range(count)]
        frames, times = [], []
        for decoded, frame in enumerate(_decoded(container, stream, origin, start, start + half)):
            if decoded >= MAX_DECODED:
                raise ValueError(f"over {MAX_DECODED} frames would have to be decoded; choose an earlier second")
            if frame.pts is None:
                continue
            time = float(frame.pts * stream.time_base - origin)
            if time + half < wanted[len(frames)]:
                continue
            frames.append(_to_array(frame, max_side))
            times.append(time)
            if len(frames) == count:
                break
    if not frames:
        raise ValueError(f"it has no frame at {start:.1f} s")
    return Clip(tuple(frames), tuple(times), float(length))


def _decoded(container, stream, origin, start: float, latest: float) -> Iterator[av.VideoFrame]:
    """Decode frames in order, beginning as close before `start` as seeking allows, and not after `latest` if there is such a frame."""
    if start <= 0:
        return container.decode(stream)
    # In MPEG-TS a seek goes by time alone, and decoding starts at the next keyframe. If that is too late or never comes, seek further back.
    for back in (0, 5, 30, start + 1):  # the last value seeks to before the beginning
        container.seek(round((start - back + origin) / stream.time_base), stream=stream)
        frames = container.decode(stream)
        first = next(frames, None)
        if first is not None and (first.pts or 0) * stream.time_base - origin <= latest:
            break
    return frames if first is None else chain([first], frames)


def _to_array(frame: av.VideoFrame, max_side: int) -> np.ndarray:
    shrink = min(1, max_side / max(frame.width, frame.height))
    width, height = (max(round(side * shrink), 2) for side in (frame.width, frame.height))
    array = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="AREA")
    turns, mirrored = upright_of(frame)
    return np.ascontiguousarray(np.rot90(array[:, ::-1] if mirrored else array, turns))


# --- features ---


class FrameFeatures(NamedTuple):
    """
    Features of one picture.

    Args:
        unit: (C, h, w) features of unit length, whose cells cover the picture.
        size: height and width of the picture, pixels.
    """

    unit: Tensor
    size: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.unit.nbytes


@torch.inference_mode()
def frame_features(encoder: Encoder, image: np.ndarray) -> FrameFeatures:
    return FrameFeatures(F.normalize(encoder(encoder.normalise(image))[0].float(), dim=0).cpu(), image.shape[:2])


def cell_at(features: FrameFeatures, point: tuple[float, float]) -> tuple[int, int]:
    """Return the row and column of the cell that contains a point (x, y), pixels."""
    rows, columns = features.unit.shape[1:]
    height, width = features.size
    return min(int(point[1] * rows / height), rows - 1), min(int(point[0] * columns / width), columns - 1)


def similarity(features: FrameFeatures, query: Tensor) -> Tensor:
    """Return the cosines (h, w) of all cells with a unit vector (C,)."""
    return torch.einsum("chw,c->hw", features.unit, query)


class Basis(NamedTuple):
    """Three principal axes (C, 3) around `mean` (C,), and the values (3,) that are drawn as no colour and as full colour."""

    mean: Tensor
    axes: Tensor
    low: Tensor
    high: Tensor


def principal_basis(features: FrameFeatures) -> Basis:
    """
    Compute the principal basis of one frame's cells.

    The other frames use the same basis, so that a colour means the same in all of them. The sign of each axis makes its largest loading
    positive. Colours span the 2nd to the 98th percentile.
    """
    samples = features.unit.flatten(1).t()
    mean = samples.mean(dim=0)
    # Randomised subspace iteration with a fixed seed, because the exact decomposition of 2048 channels takes seconds.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        axes = torch.pca_lowrank(samples - mean, q=min(12, *samples.shape), center=False, niter=4)[2]
    axes = F.pad(axes[:, :3], (0, 3 - min(axes.shape[1], 3)))
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    low, high = torch.quantile((samples - mean) @ axes, torch.tensor([0.02, 0.98]), dim=0)
    return Basis(mean, axes, low, high)


def pca_colours(features: FrameFeatures, basis: Basis) -> np.ndarray:
    """Draw features as colours, (H, W, 3) uint8 of the picture's size. An axis on which the basis' own frame does not vary is grey."""
    values = (features.unit.flatten(1).t() - basis.mean) @ basis.axes
    spread = basis.high - basis.low
    scaled = torch.where(spread > 1e-6, (values - basis.low) / spread.clamp(min=1e-6), 0.5).clamp(0, 1)
    colours = _upsample(scaled.t().unflatten(1, features.unit.shape[1:]), features.size)
    return (255 * colours).round().byte().permute(1, 2, 0).numpy()


def _upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(K, h, w) -> (K, *size)."""
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


# --- pictures ---


def floor_of(cosines: Tensor) -> float:
    """Return the similarity that is drawn dark; 1 is drawn bright."""
    return min(float(cosines.min()), 1 - MINIMUM_SPAN)


def heat_picture(image: np.ndarray, cosines: Tensor, floor: float) -> np.ndarray:
    """Draw the similarity (h, w) in colours from `floor` (dark) to 1 (bright) over the grey picture; (H, W, 3) uint8."""
    share = ((_upsample(cosines[None], image.shape[:2])[0] - floor) / (1 - floor)).clamp(0, 1)
    colours = cv2.applyColorMap((255 * share).round().byte().numpy(), cv2.COLORMAP_INFERNO)[..., ::-1]
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
    return (0.3 * grey + 0.7 * colours).astype(np.uint8)


def enlarged(image: np.ndarray) -> np.ndarray:
    """Enlarge a picture to at least `SHOWN` pixels: Gradio (6.31) reports wrong click positions on a picture shown larger than it is."""
    scale = SHOWN / max(image.shape[:2])
    return image if scale <= 1 else cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)


def marked(image: np.ndarray, point: tuple[float, float]) -> np.ndarray:
    """Draw a ring around a point (x, y), pixels; white with a black edge, to be visible on any background."""
    image = image.copy()  # the original may be in the cache
    centre = round(point[0] - 0.5), round(point[1] - 0.5)
    radius = max(max(image.shape[:2]) // 64, 3)
    for colour, thickness in (((0, 0, 0), 5), ((255, 255, 255), 2)):
        cv2.circle(image, centre, radius, colour, thickness, cv2.LINE_AA)
    return image


def best_match(cosines: Tensor, size: tuple[int, int]) -> tuple[float, tuple[float, float]]:
    """Return the largest similarity, and the centre (x, y) of its cell in a picture of `size` (H, W), pixels."""
    rows, columns = cosines.shape
    row, column = divmod(int(cosines.argmax()), columns)
    return float(cosines[row, column]), ((column + 0.5) * size[1] / columns, (row + 0.5) * size[0] / rows)


# --- cache ---


class Cache:
    """
    A cache of values by key. If the values together exceed `limit` bytes, the least recently used are dropped.

    Values are computed one at a time, because several at once would only share the cores.
    """

    def __init__(self, limit: float):
        self.limit, self.size = limit, 0
        self._values: OrderedDict = OrderedDict()
        self._lock = threading.RLock()

    def __call__(self, key, compute: Callable, nbytes: Callable):
        """Return the value of `key`. A missing value is computed by `compute()` and counts as `nbytes(value)` bytes."""
        with self._lock:
            if key not in self._values:
                value = compute()
                self._values[key] = value, nbytes(value)
                self.size += self._values[key][1]
                while self.size > self.limit and len(self._values) > 1:  # the newest stays, however large
                    self.size -= self._values.popitem(last=False)[1][1]
            self._values.move_to_end(key)
            return self._values[key][0]
