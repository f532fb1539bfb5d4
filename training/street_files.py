"""The street as files: H.264 videos with sidecars, labelled images, and frame sequences with object masks."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

from training.street import STREET_CLASSES, Street
from training.street_cameras import CAMERAS, check_camera
from training.street_processes import alone, over_processes

FORMAT = "poodle-street-2"  # change this whenever the pictures change
# Rendering the default videos takes about 80 s on two cores.
DEFAULTS = {"num_videos": 16, "duration": 10.0, "fps": 8, "height": 192, "width": 384, "seed": 0, "camera": "driving"}
HELD_OUT_SEED = 1_000_000  # labelled drives have seeds from here on, so that they differ from the videos' drives


def street_videos(cache_dir: str | Path | None = None, **parameters) -> list[str]:
    """
    Return the paths of the street's videos. Missing videos are rendered first, so the second call is instant.

    Args:
        cache_dir: folder of the videos. By default, a folder in [`cache_root`] that is named after the parameters.
        parameters: arguments of [`write_videos`] that override `DEFAULTS`.
    """
    parameters = {**DEFAULTS, **parameters}
    if cache_dir is None:
        name = "-".join(str(parameters[key]) for key in ("num_videos", "duration", "fps", "height", "width", "seed"))
        camera = "" if parameters["camera"] == "driving" else f"-{parameters['camera']}"
        # Imported here because recipe_files imports torch and transformers. That takes seconds, in each rendering process too.
        from modeling_poodle.recipe_files import cache_root

        cache_dir = cache_root() / f"{FORMAT}-{name}{camera}"
    return write_videos(cache_dir, **parameters)


def _check(num_videos: int, duration: float, fps: int, height: int, width: int) -> None:
    if height % 2 or width % 2:
        raise ValueError(f"height and width must be even (4:2:0 video), got {height}x{width}")
    for name, value in (("num_videos", num_videos), ("duration", duration), ("fps", fps)):
        if not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")
    if round(duration * fps) < 1:
        raise ValueError(f"duration {duration} holds no frame at {fps} frames a second: give at least {1 / fps:g}")


def write_videos(
    output_dir: str | Path,
    num_videos: int,
    duration: float,
    fps: int,
    height: int,
    width: int,
    seed: int = 0,
    num_processes: int | None = None,
    camera: str = "driving",
) -> list[str]:
    """
    Render drives to `drive-0000.mp4` … (H.264, one keyframe a second), each with a sidecar `drive-0000.json`, and return the paths.

    The sidecar suffices to compute the exact flow between any two times of the video. Complete drives are left as they are.

    Raises:
        ValueError: the height or width is odd, a value is not positive, the duration holds no frame, the camera is unknown, or the folder
            holds a file that is named like a drive but is not one.
    """
    _check(num_videos, duration, fps, height, width)
    check_camera(camera, "camera")
    output_dir = Path(output_dir)

    def drive(number: int) -> tuple[Path, dict]:
        street = Street(seed + number, height, width, camera=camera)
        sidecar = {"format": FORMAT, "street": street.to_json(), "fps": fps, "num_frames": round(duration * fps)}
        return output_dir / f"drive-{number:04d}.mp4", sidecar

    drives = [drive(number) for number in range(num_videos)]
    if not all(_is_complete(path, sidecar) for path, sidecar in drives):
        with alone(output_dir) as locked:
            begun = _begin_videos(output_dir, drive)
            # Files that killed commands left. Without a lock, they may be those of another command that is still running.
            for left in output_dir.glob("drive-[0-9]*.*.*-*.partial") if locked else ():
                left.unlink(missing_ok=True)
            jobs = [(str(path), sidecar) for path, sidecar in drives if not _is_complete(path, sidecar)]
            done = over_processes(write_video, jobs, num_processes) if jobs else ()
            bar = tqdm(
                done, total=len(jobs), desc="rendering the street", unit="drive", disable=not sys.stderr.isatty()
            )
            for count, _ in enumerate(bar, 1):
                if bar.disable:
                    print(f"rendered drive {count}/{len(jobs)}", flush=True)
            begun.unlink(missing_ok=True)
    return [str(path) for path, _ in drives]


def _begin_videos(output_dir: Path, drive: Callable[[int], tuple[Path, dict]]) -> Path:
    """
    Prepare a folder for rendering. Deletes incomplete drives and those of another street, because readers use all videos in the folder.

    Args:
        drive: maps a drive's number to its path and sidecar.

    Returns:
        The marker file, which exists while the folder's drives may be incomplete.

    Raises:
        ValueError: a file is named like a drive but is not one.
    """
    begun, others = output_dir / ".rendering", []
    for video in sorted(
        {file.with_suffix(".mp4") for kind in ("mp4", "json") for file in output_dir.glob(f"drive-*.{kind}")}
    ):
        number = video.stem.removeprefix("drive-")
        if number.isdecimal() and not _is_complete(*drive(int(number))):
            others.append(video)
            if not begun.exists() and not _is_sidecar(video.with_suffix(".json")):
                raise ValueError(
                    f"{video} is no drive of the street, and rendering could replace it: give a new or an empty folder"
                )
    begun.touch()
    for video in others:
        # Delete the sidecar first: a drive without its sidecar counts as incomplete.
        video.with_suffix(".json").unlink(missing_ok=True)
        video.unlink(missing_ok=True)
    return begun


def _is_sidecar(path: Path) -> bool:
    try:
        stored = json.loads(path.read_text())
        return {"format", "street", "fps", "num_frames"} <= stored.keys()
    except (OSError, ValueError, AttributeError):
        return False


def _is_complete(path: Path, sidecar: dict) -> bool:
    try:
        stored = json.loads(path.with_suffix(".json").read_text())
        return path.is_file() and {**stored, "street": Street.from_json(stored["street"]).to_json()} == sidecar
    except (OSError, ValueError, TypeError, KeyError):  # no such file, not JSON, or fields of another format
        return False


def made_of_street(marker: Path) -> dict | None:
    """
    Return the parameters that a folder was rendered with, as its marker file says. The marker is written last, once the folder is complete.

    Returns `None` if there is no such file, or if it is not a marker of the street. A marker without a camera means the driving camera.
    """
    try:
        stored = json.loads(marker.read_text())
    except (OSError, ValueError):
        return None
    stored = stored.get("street", stored) if isinstance(stored, dict) else {}
    return {"camera": "driving", **stored} if "format" in stored else None


def _begin(folder: Path, marker: Path) -> Path:
    """
    Prepare the folder of a data set for rendering.

    Returns:
        A file that marks the folder as the street's and as incomplete. The caller deletes it at the end.

    Raises:
        ValueError: the folder holds files that are not the street's.
    """
    begun = folder / ".rendering"
    if made_of_street(marker) is None and not begun.exists() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} holds files that are not the street's and could be overwritten: give a new or an empty folder (an "
            "evaluation's data_dir is where the street is rendered, unless dataset names data of your own)"
        )
    begun.touch()
    marker.unlink(missing_ok=True)  # the files that it describes are about to be replaced
    return begun


def write_video(path: str, sidecar: dict) -> None:
    """
    Render one drive to a video and its sidecar.

    Each file is written under a temporary name and then renamed. The sidecar comes last, so a drive with a sidecar is complete.
    """
    street, fps = Street.from_json(sidecar["street"]), sidecar["fps"]
    # The name is unique, because another process may be writing the same drive.
    aside = f"{os.uname().nodename}-{os.getpid()}.partial"
    partial = f"{path}.{aside}"
    with av.open(partial, "w", format="mp4") as container:
        # x264 uses one thread, so that each rendering writes the same bytes.
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
    partial_sidecar = Path(f"{sidecar_path}.{aside}")
    partial_sidecar.write_text(json.dumps(sidecar))
    os.replace(partial_sidecar, sidecar_path)


DETECTED = ("person", "rider", "car", "truck", "bus", "bicycle", "traffic light", "traffic sign")


def write_folder(
    output_dir: str | Path,
    num_images: int,
    height: int = 192,
    width: int = 384,
    seed: int = 0,
    num_processes: int | None = None,
    camera: str = "driving",
) -> Path:
    """
    Render a labelled data set of held-out drives, one image from each drive. A complete data set is left as it is.

    The data set consists of `images/NAME.png`, `labels/NAME.png` (class indices), `classes.json`, and `annotations.json` (boxes in COCO's
    format, of objects at least 4 pixels wide and high).
    """
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    check_camera(camera, "camera")
    output_dir = Path(output_dir)
    made_of = {"format": FORMAT, "num_images": num_images, "height": height, "width": width, "seed": seed}
    made_of["camera"] = camera
    classes = {"classes": list(STREET_CLASSES), "ignore_index": 255, "street": made_of}
    listed = output_dir / "classes.json"
    if made_of_street(listed) == made_of:
        return output_dir
    with alone(output_dir):
        if made_of_street(listed) != made_of:
            _render_folder(output_dir, listed, classes, num_processes)
    return output_dir


def _render_folder(output_dir: Path, listed: Path, classes: dict, num_processes: int | None) -> None:
    made_of = classes["street"]
    num_images, height, width = (made_of[name] for name in ("num_images", "height", "width"))
    begun = _begin(output_dir, listed)
    for name in ("images", "labels"):
        (output_dir / name).mkdir(exist_ok=True)
        for file in (output_dir / name).glob("[0-9]*.png"):  # files left over from a larger data set
            if file.stem.isdecimal() and int(file.stem) >= num_images:
                file.unlink()
    streets = [
        Street(HELD_OUT_SEED + made_of["seed"] + number, height, width, camera=made_of["camera"])
        for number in range(num_images)
    ]
    jobs = [(str(output_dir), number, street) for number, street in enumerate(streets)]
    boxes = list(over_processes(_write_labelled, jobs, num_processes))
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
    listed.write_text(json.dumps(classes, indent=1))  # must be last, because it marks the folder as complete
    begun.unlink(missing_ok=True)


def held_out_time(number: int) -> float:
    """Return the time (seconds) at which a held-out drive is labelled. 20 successive drives have 20 different times."""
    return 1.0 + 0.37 * (number % 20)


def _write_labelled(output_dir: str, number: int, street: Street) -> list[dict]:
    """Write one labelled frame, and return its boxes in COCO's format (xywh)."""
    time = held_out_time(number)
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


SEQUENCE_SEED = HELD_OUT_SEED + 500_000  # so that the drives differ from those of the labelled frames
SEQUENCE_FRAMES, SEQUENCE_FPS, MAX_OBJECTS = 12, 8, 8
OBJECT_SHARE = 1 / 400  # smallest share of the first frame that an object must cover


def write_sequences(
    output_dir: str | Path,
    num_sequences: int,
    height: int = 192,
    width: int = 384,
    seed: int = 0,
    num_processes: int | None = None,
    camera: str = "driving",
) -> Path:
    """
    Render frames and object masks of held-out drives in the layout of DAVIS 2017. A complete folder is left as it is.

    The objects are instances that cover at least `OBJECT_SHARE` of the first frame and are still visible in the last frame. Only the 8
    largest are kept.
    """
    if num_sequences < 1:
        raise ValueError(f"num_sequences must be at least 1, got {num_sequences}")
    check_camera(camera, "camera")
    output_dir = Path(output_dir)
    made_of = {"format": FORMAT, "num_sequences": num_sequences, "height": height, "width": width, "seed": seed}
    made_of["camera"] = camera
    marker = output_dir / "street.json"
    if made_of_street(marker) == made_of:
        return output_dir
    with alone(output_dir):
        if made_of_street(marker) == made_of:
            return output_dir
        begun = _begin(output_dir, marker)
        streets = [
            Street(SEQUENCE_SEED + seed + number, height, width, camera=camera) for number in range(num_sequences)
        ]
        jobs = [(str(output_dir), street) for street in streets]
        names = list(over_processes(_write_sequence, jobs, num_processes))
        listed = output_dir / "ImageSets" / "2017" / "val.txt"
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("\n".join(names) + "\n")
        marker.write_text(json.dumps(made_of))  # must be last, because it marks the folder as complete
        begun.unlink(missing_ok=True)
    return output_dir


def _write_sequence(output_dir: str, street: Street) -> str:
    """
    Write one drive's frames and object masks, and return its name.

    Raises:
        ValueError: no object of the first frame is large enough and still visible in the last frame.
    """
    name = f"drive-{street.seed - SEQUENCE_SEED:04d}"
    folders = [Path(output_dir, kind, "480p", name) for kind in ("JPEGImages", "Annotations")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    times = [1.0 + number / SEQUENCE_FPS for number in range(SEQUENCE_FRAMES)]
    frames, instances = zip(*[(street.frame(time), street.instances(time)) for time in times])
    keys, sizes = np.unique(instances[0][instances[0] > 0], return_counts=True)
    kept = (sizes >= OBJECT_SHARE * street.height * street.width) & np.isin(keys, instances[-1])
    if not kept.any():
        raise ValueError(f"the drive of seed {street.seed} keeps no object in view; choose another --seed")
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
    parser.add_argument(
        "--output_dir",
        default=argparse.SUPPRESS,
        help="folder of the videos (default: the cache that --videos street reads)",
    )
    parser.add_argument(
        "--labelled", type=int, default=0, help="write a labelled data set of N held-out frames instead"
    )
    parser.add_argument(
        "--sequences",
        type=int,
        default=0,
        help="write N held-out drives with object masks, as DAVIS is laid out, instead",
    )
    about = {
        "num_videos": "drives",
        "duration": "seconds of each",
        "fps": "frames a second",
        "height": "pixels",
        "width": "pixels",
        "seed": "of the first drive",
        "camera": f"one of {', '.join(CAMERAS)}",
    }
    for name, value in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=about[name])
    options = vars(parser.parse_args(arguments))
    output_dir, labelled, sequences = (options.pop(name, None) for name in ("output_dir", "labelled", "sequences"))
    size = {name: options[name] for name in ("height", "width", "seed", "camera")}
    try:
        if (labelled or sequences) and output_dir is None:
            raise ValueError("--labelled and --sequences need --output_dir")
        if labelled and sequences:
            raise ValueError("--labelled and --sequences write a folder each: give one of them")
        unused = [name for name, value in options.items() if name not in size and value != DEFAULTS[name]]
        if (labelled or sequences) and unused:
            raise ValueError(f"--labelled and --sequences write no videos: leave out --{', --'.join(unused)}")
        if labelled:
            print(f"{labelled} labelled frames in {write_folder(output_dir, labelled, **size)}")
        elif sequences:
            print(f"{sequences} sequences in {write_sequences(output_dir, sequences, **size)}")
        else:
            videos = street_videos(output_dir, **options)
            print(f"{len(videos)} drives in {Path(videos[0]).parent}")
    except (ValueError, OSError) as error:
        parser.error(str(error))
