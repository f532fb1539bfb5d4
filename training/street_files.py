"""The street as files: H.264 videos with sidecars, and a labelled folder data set."""

import argparse
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

from modeling_poodle.recipe_files import cache_root
from training.street import STREET_CLASSES, Street

FORMAT = "poodle-street-2"  # changes whenever the pictures do
# Rendered in about 80 s on two cores.
DEFAULTS = {"num_videos": 16, "duration": 10.0, "fps": 8, "height": 192, "width": 384, "seed": 0}
HELD_OUT_SEED = 1_000_000  # labelled drives have seeds from here on: never those of the videos


def street_videos(cache_dir: str | Path | None = None, **parameters) -> list[str]:
    """
    Paths of the street's videos. What is missing is rendered, so the second call is instant.

    Args:
        cache_dir: folder; by default one in [`cache_root`] that is named by the parameters.
        parameters: of [`write_videos`].
    """
    parameters = {**DEFAULTS, **parameters}
    if cache_dir is None:
        name = "-".join(str(parameters[key]) for key in ("num_videos", "duration", "fps", "height", "width", "seed"))
        cache_dir = cache_root() / f"{FORMAT}-{name}"
    return write_videos(cache_dir, **parameters)


def _check(num_videos: int, duration: float, fps: int, height: int, width: int) -> None:
    if height % 2 or width % 2:
        raise ValueError(f"height and width must be even (4:2:0 video), got {height}x{width}")
    for name, value in (("num_videos", num_videos), ("duration", duration), ("fps", fps)):
        if not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")


def write_videos(
    output_dir: str | Path,
    num_videos: int,
    duration: float,
    fps: int,
    height: int,
    width: int,
    seed: int = 0,
    num_processes: int | None = None,
) -> list[str]:
    """
    Render drives to `drive-0000.mp4` … (H.264, one keyframe a second) with a sidecar `drive-0000.json` each, through which the exact
    flow between any two times of the file can be had. Complete ones are left as they are.

    Raises:
        ValueError: odd sizes or values that are not positive.
    """
    _check(num_videos, duration, fps, height, width)
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    jobs = []
    for number in range(num_videos):
        street = Street(seed + number, height, width)
        sidecar = {"format": FORMAT, "street": street.to_json(), "fps": fps, "num_frames": round(duration * fps)}
        path = output_dir / f"drive-{number:04d}.mp4"
        if not _is_complete(path, sidecar):
            jobs.append((str(path), sidecar))
    if jobs:
        # spawn: the caller may hold threads (torch, CUDA) that a fork would leave locked.
        workers = min(num_processes or os.cpu_count() or 1, len(jobs))
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            done = as_completed([pool.submit(write_video, *job) for job in jobs])
            bar = tqdm(
                done, total=len(jobs), desc="rendering the street", unit="drive", disable=not sys.stderr.isatty()
            )
            for count, future in enumerate(bar, 1):
                future.result()
                if bar.disable:
                    print(f"rendered drive {count}/{len(jobs)}", flush=True)
    return [str(output_dir / f"drive-{number:04d}.mp4") for number in range(num_videos)]


def _is_complete(path: Path, sidecar: dict) -> bool:
    try:
        return path.is_file() and json.loads(path.with_suffix(".json").read_text()) == sidecar
    except (OSError, json.JSONDecodeError):
        return False


def write_video(path: str, sidecar: dict) -> None:
    """Render one drive. The sidecar is written last, each file aside first: a drive with a sidecar is whole."""
    street, fps = Street.from_json(sidecar["street"]), sidecar["fps"]
    partial = f"{path}.partial"
    with av.open(partial, "w", format="mp4") as container:
        # One thread of x264: the same bytes on every run.
        stream = container.add_stream("libx264", rate=fps, options={"crf": "18", "preset": "medium", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = street.height, street.width, "yuv420p"
        stream.codec_context.gop_size = max(fps, 1)
        stream.codec_context.time_base = Fraction(1, fps)
        for number in range(sidecar["num_frames"]):
            frame = av.VideoFrame.from_ndarray(street.frame(number / fps), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    os.replace(partial, path)
    sidecar_path = Path(path).with_suffix(".json")
    sidecar_path.with_suffix(".partial").write_text(json.dumps(sidecar))
    os.replace(sidecar_path.with_suffix(".partial"), sidecar_path)


DETECTED = ("person", "rider", "car", "truck", "bus", "bicycle", "traffic light", "traffic sign")


def write_folder(
    output_dir: str | Path,
    num_images: int,
    height: int = 192,
    width: int = 384,
    seed: int = 0,
    num_processes: int | None = None,
) -> Path:
    """
    Labelled data set of held-out drives, each image from a drive of its own: `images/NAME.png`, `labels/NAME.png` (indices into the
    classes), `annotations.json` (boxes of what is at least 4 pixels wide and high, in COCO's format), `classes.json`. A complete one
    is left as it is.
    """
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    output_dir = Path(output_dir)
    made_of = {"format": FORMAT, "num_images": num_images, "height": height, "width": width, "seed": seed}
    classes = {"classes": list(STREET_CLASSES), "ignore_index": 255, "street": made_of}
    listed = output_dir / "classes.json"
    if listed.is_file() and json.loads(listed.read_text()) == classes:
        return output_dir
    for name in ("images", "labels"):
        (output_dir / name).mkdir(parents=True, exist_ok=True)
    workers = min(num_processes or os.cpu_count() or 1, num_images)
    jobs = [(str(output_dir), number, height, width, HELD_OUT_SEED + seed + number) for number in range(num_images)]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        boxes = list(pool.map(_write_labelled, *zip(*jobs)))
    annotations = [
        {"id": index, "image_id": number, "iscrowd": 0, **box}
        for index, (number, box) in enumerate(((n, box) for n, found in enumerate(boxes) for box in found), 1)
    ]
    coco = {
        "images": [
            {"id": number, "file_name": f"{number:05d}.png", "height": height, "width": width}
            for number in range(num_images)
        ],
        "annotations": annotations,
        "categories": [{"id": index, "name": name} for index, name in enumerate(DETECTED, 1)],
    }
    (output_dir / "annotations.json").write_text(json.dumps(coco))
    listed.write_text(json.dumps(classes, indent=1))  # last: with it the folder is whole
    return output_dir


def _write_labelled(output_dir: str, number: int, height: int, width: int, seed: int) -> list[dict]:
    """Write one labelled frame; its boxes, COCO's xywh."""
    street, time = Street(seed, height, width), 1.0 + 0.37 * (number % 20)
    labels, instances = street.labels(time), street.instances(time)
    Image.fromarray(street.frame(time)).save(Path(output_dir, "images", f"{number:05d}.png"))
    Image.fromarray(labels).save(Path(output_dir, "labels", f"{number:05d}.png"))
    boxes = []
    for instance in np.unique(instances[instances > 0]):
        mask = instances == instance
        name = STREET_CLASSES[np.bincount(labels[mask]).argmax()]
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        h, w = int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1)
        if name in DETECTED and h >= 4 and w >= 4:
            box = [int(columns[0]), int(rows[0]), w, h]
            boxes.append({"category_id": DETECTED.index(name) + 1, "bbox": box, "area": int(mask.sum())})
    return boxes


SEQUENCE_SEED = HELD_OUT_SEED + 500_000  # never those of the labelled frames
SEQUENCE_FRAMES, SEQUENCE_FPS, MAX_OBJECTS = 12, 8, 8
OBJECT_SHARE = 1 / 400  # of the first frame that an object covers at least


def write_sequences(
    output_dir: str | Path,
    num_sequences: int,
    height: int = 192,
    width: int = 384,
    seed: int = 0,
    num_processes: int | None = None,
) -> Path:
    """
    Frames and object masks of held-out drives in the layout of DAVIS 2017. Objects are the largest instances of the first frame (at
    most 8) that the last one still shows. A complete folder is left as it is.
    """
    if num_sequences < 1:
        raise ValueError(f"num_sequences must be at least 1, got {num_sequences}")
    output_dir = Path(output_dir)
    made_of = {"format": FORMAT, "num_sequences": num_sequences, "height": height, "width": width, "seed": seed}
    marker = output_dir / "street.json"
    if marker.is_file() and json.loads(marker.read_text()) == made_of:
        return output_dir
    workers = min(num_processes or os.cpu_count() or 1, num_sequences)
    jobs = [(str(output_dir), height, width, SEQUENCE_SEED + seed + number) for number in range(num_sequences)]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        names = list(pool.map(_write_sequence, *zip(*jobs)))
    listed = output_dir / "ImageSets" / "2017" / "val.txt"
    listed.parent.mkdir(parents=True, exist_ok=True)
    listed.write_text("\n".join(names) + "\n")
    marker.write_text(json.dumps(made_of))  # last: with it the folder is whole
    return output_dir


def _write_sequence(output_dir: str, height: int, width: int, seed: int) -> str:
    """Write one drive; its name."""
    street, name = Street(seed, height, width), f"drive-{seed - SEQUENCE_SEED:04d}"
    folders = [Path(output_dir, kind, "480p", name) for kind in ("JPEGImages", "Annotations")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    times = [1.0 + number / SEQUENCE_FPS for number in range(SEQUENCE_FRAMES)]
    frames, instances = zip(*[(street.frame(time), street.instances(time)) for time in times])
    keys, sizes = np.unique(instances[0][instances[0] > 0], return_counts=True)
    kept = (sizes >= OBJECT_SHARE * height * width) & np.isin(keys, instances[-1])
    if not kept.any():
        raise ValueError(f"the drive of seed {seed} keeps no object in view; choose another --seed")
    objects = keys[kept][np.argsort(-sizes[kept], kind="stable")][:MAX_OBJECTS]
    palette = [0, 0, 0, *np.random.default_rng(0).integers(64, 256, 3 * MAX_OBJECTS).tolist()]
    for number, (frame, seen) in enumerate(zip(frames, instances)):
        Image.fromarray(frame).save(folders[0] / f"{number:05d}.jpg", quality=95)
        mask = np.zeros(seen.shape, np.uint8)
        for index, key in enumerate(objects, 1):
            mask[seen == key] = index
        picture = Image.fromarray(mask)
        picture.putpalette(palette)
        picture.save(folders[1] / f"{number:05d}.png")
    return name


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m training.street",
        description="Render the street.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_dir", help="folder of the videos (default: the cache that --videos street reads)")
    parser.add_argument(
        "--labelled", type=int, default=0, help="write a labelled data set of N held-out frames instead"
    )
    parser.add_argument(
        "--sequences",
        type=int,
        default=0,
        help="write N held-out drives with object masks, as DAVIS is laid out, instead",
    )
    for name, value in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=" ")
    options = vars(parser.parse_args(arguments))
    output_dir, labelled, sequences = (options.pop(name) for name in ("output_dir", "labelled", "sequences"))
    size = {name: options[name] for name in ("height", "width", "seed")}
    try:
        if (labelled or sequences) and output_dir is None:
            raise ValueError("--labelled and --sequences need --output_dir")
        if labelled:
            print(f"{labelled} labelled frames in {write_folder(output_dir, labelled, **size)}")
        elif sequences:
            print(f"{sequences} sequences in {write_sequences(output_dir, sequences, **size)}")
        else:
            videos = street_videos(output_dir, **options)
            print(f"{len(videos)} drives in {Path(videos[0]).parent}")
    except (ValueError, OSError) as error:
        parser.error(str(error))
