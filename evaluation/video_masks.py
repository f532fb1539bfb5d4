"""Videos with object masks in the layout of DAVIS 2017, and the measures of DAVIS: region similarity J and contour accuracy F."""

import math
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from evaluation.data import within
from evaluation.labelled_images import file_size, read_label
from evaluation.street_data import STREETS, render_street, street_place
from modeling_poodle.folders import spread

VIDEO_DATASETS = ("davis", *STREETS)
STREET_SEQUENCES = 12
VOID = 255  # not annotated; the toolkit counts it as background
BOUND = 0.008  # tolerance of a contour, as a share of the image's diagonal
LAYOUT = (
    "Expected: ImageSets/2017/val.txt, JPEGImages/480p/SEQUENCE/*.jpg and Annotations/480p/SEQUENCE/*.png of the same stems, as in "
    "DAVIS-2017-trainval-480p from davischallenge.org."
)


@dataclass(frozen=True)
class Sequence:
    """One video: its frames, and a mask of each frame (0 is background, else the object's id)."""

    name: str
    frames: tuple[Path, ...]
    masks: tuple[Path, ...]

    def mask(self, index: int) -> np.ndarray:
        """Read the object ids of a frame, (H, W) uint8; void becomes background."""
        mask = read_label(self.masks[index])
        return np.where(mask == VOID, 0, mask).astype(np.uint8)

    def objects(self) -> list[int]:
        """Return the object ids in the first frame. A propagation cannot know objects that appear later; they count as background."""
        return [int(index) for index in np.unique(self.mask(0)) if index]


def load_sequences(dataset: str, data_dir: str | None = None, max_sequences: int | None = None) -> list[Sequence]:
    """
    Load the sequences of `davis` (those in its val.txt) or of one of the rendered `STREETS`.

    Args:
        max_sequences: number of sequences. From davis they are evenly spread; of the street exactly so many are rendered.

    Raises:
        ValueError: a folder or mask is missing, sizes differ, or a sequence has fewer than three frames or no object.
    """
    if dataset in STREETS:
        folder = street_sequences(dataset, data_dir, max_sequences or STREET_SEQUENCES)
    elif data_dir is None:
        raise ValueError(f"--dataset {dataset} needs --data_dir, the folder that holds it. {LAYOUT}")
    else:
        folder = Path(data_dir).expanduser()
    listed = folder / "ImageSets" / "2017" / "val.txt"
    if not listed.is_file():
        raise ValueError(f"{dataset}: there is no {listed}. {LAYOUT}")
    names = list(dict.fromkeys(listed.read_text(encoding="utf-8").split()))
    if not names:
        raise ValueError(f"{dataset}: {listed} lists no sequence. {LAYOUT}")
    return [_sequence(folder, name) for name in spread(names, max_sequences)]


def _sequence(folder: Path, name: str) -> Sequence:
    frames, masks = (
        within(folder / part / "480p", name, "ImageSets/2017/val.txt") for part in ("JPEGImages", "Annotations")
    )
    for place in (frames, masks):
        if not place.is_dir():
            raise ValueError(f"sequence {name}: there is no folder {place}. {LAYOUT}")
    paths = sorted(frames.glob("*.jpg"))
    if len(paths) < 3:
        raise ValueError(
            f"sequence {name} has {len(paths)} frames in {frames}; at least 3 are needed, since the first is given and DAVIS does not "
            "count the last"
        )
    missing = [path.name for path in paths if not (masks / f"{path.stem}.png").is_file()]
    if missing:
        raise ValueError(
            f"sequence {name}: {len(missing)} of {len(paths)} frames have no mask in {masks}, the first is {missing[0]}. {LAYOUT}"
        )
    known = {path.stem for path in paths}
    alone = sorted(path.name for path in masks.glob("[!.]*.png") if path.stem not in known)
    if alone:
        raise ValueError(
            f"sequence {name}: {len(alone)} masks have no frame in {frames}, the first is {alone[0]}; the first mask is what is given. {LAYOUT}"
        )
    sequence = Sequence(name, tuple(paths), tuple(masks / f"{path.stem}.png" for path in paths))
    sizes = {path: file_size(path) for path in (*sequence.frames, *sequence.masks)}
    first = sizes[sequence.frames[0]]
    for path, size in sizes.items():
        if size != first:
            raise ValueError(f"sequence {name}: {path} is {size[0]}x{size[1]}, its first frame {first[0]}x{first[1]}")
    if not sequence.objects():
        raise ValueError(f"sequence {name}: the first mask, {sequence.masks[0]}, has no object to propagate")
    return sequence


def street_sequences(name: str, data_dir: str | None, count: int) -> Path:
    """Return the folder of `count` sequences of one of `STREETS`; missing ones are rendered."""
    folder = street_place(name, f"sequences-{count}", data_dir)
    render_street(name, "sequences", folder, "--sequences", str(count))
    return folder


# --- measures, as defined by the DAVIS 2017 toolkit (Perazzi et al. 2016, Pont-Tuset et al. 2017) ---


def region_similarity(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Return J, the intersection over union of two (H, W) bool masks; 1 if both are empty."""
    union = np.count_nonzero(prediction | truth)
    return np.count_nonzero(prediction & truth) / union if union else 1.0


def contour_accuracy(prediction: np.ndarray, truth: np.ndarray) -> float:
    """
    Return F of two (H, W) bool masks: the harmonic mean of the shares of each contour that lie close to the other.

    Close means within a disk whose radius is 0.8 % of the diagonal, rounded up. F is 1 if neither mask has a contour, and 0 if only one has.
    """
    radius = math.ceil(BOUND * math.hypot(*truth.shape))
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    disk = (x * x + y * y <= radius * radius).astype(np.uint8)
    ours, theirs = contour(prediction), contour(truth)
    lengths = np.count_nonzero(ours), np.count_nonzero(theirs)
    if not all(lengths):
        return float(not any(lengths))
    precision = np.count_nonzero(ours & cv2.dilate(theirs, disk)) / lengths[0]
    recall = np.count_nonzero(theirs & cv2.dilate(ours, disk)) / lengths[1]
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def contour(mask: np.ndarray) -> np.ndarray:
    """Mark pixels that differ from the next one to the right, below or diagonally below, (H, W) uint8. The image's border is no contour."""
    wider = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return ((mask != wider[:-1, 1:]) | (mask != wider[1:, :-1]) | (mask != wider[1:, 1:])).astype(np.uint8)


def statistics(values: np.ndarray) -> dict[str, float]:
    """
    Compute the statistics of a measure over an object's frames.

    `mean`; `recall`, the share of frames above 0.5; and `decay`, the mean of the first quarter of the frames minus that of the last. As in
    the toolkit, neighbouring quarters share the frame between them.
    """
    values = np.asarray(values, dtype=np.float64)
    edges = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    first, last = values[: edges[1] + 1], values[edges[3] :]
    return {
        "mean": float(values.mean()),
        "recall": float((values > 0.5).mean()),
        "decay": float(first.mean() - last.mean()),
    }
