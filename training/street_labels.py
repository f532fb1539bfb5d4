"""The street's labelled data: images of held-out drives with class ids and boxes, and frame sequences with object masks."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from training.street import FORMAT, STREET_CLASSES, Street
from training.street_cameras import check_camera
from training.street_processes import alone, over_processes

HELD_OUT_SEED = 1_000_000  # labelled drives have seeds from here on, so that they differ from the videos' drives
SEQUENCE_SEED = HELD_OUT_SEED + 500_000  # so that the drives differ from those of the labelled frames
DETECTED = ("person", "rider", "car", "truck", "bus", "bicycle", "traffic light", "traffic sign")
SEQUENCE_FRAMES, SEQUENCE_FPS, MAX_OBJECTS = 12, 8, 8
OBJECT_SHARE = 1 / 400  # smallest share of the first frame that an object must cover


def made_of_street(marker: Path) -> dict | None:
    """
    Return the parameters that a folder was rendered with, as its marker file says. The marker is written last, once the folder is complete.

    Returns `None` if there is no such file, or if it is not a marker of the street. A marker without a camera means the driving camera.
    """
    try:
        stored = json.loads(marker.read_text(encoding="utf-8"))
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
    (output_dir / "annotations.json").write_text(json.dumps(coco), encoding="utf-8")
    # This file must be the last, because it marks the folder as complete.
    listed.write_text(json.dumps(classes, indent=1), encoding="utf-8")
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
        listed.write_text("\n".join(names) + "\n", encoding="utf-8")
        # This file must be the last, because it marks the folder as complete.
        marker.write_text(json.dumps(made_of), encoding="utf-8")
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
