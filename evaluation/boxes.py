"""Images with boxes: the street, BDD100K and any folder in COCO's format, checked before any costly step."""

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation.data import within
from evaluation.labelled_images import file_size, read_ahead, read_image
from evaluation.street_data import STREETS, street_folder
from modeling_poodle.folders import spread
from modeling_poodle.recipe_files import is_finite, shown

logger = logging.getLogger("poodle")
BOX_DATASETS = (*STREETS, "bdd100k", "coco_folder")
BDD100K_CLASSES = (
    "pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle", "traffic light", "traffic sign",
)  # fmt: skip
# Class names of BDD100K's first release, with their present names.
BDD100K_RENAMED = {"person": "pedestrian", "bike": "bicycle", "motor": "motorcycle", "van": "car", "caravan": "car"}
# Labels that BDD100K's evaluation does not count, with the class that a detector may take them for (the toolkit's configs/det.toml).
BDD100K_IGNORED = {"other person": "pedestrian", "other vehicle": "car", "trailer": "truck"}
BDD100K_SIZE = (720, 1280)  # height and width of all images; the labels do not give it
ROUNDING = 1.0  # pixels by which a box may exceed the image; it is cut at the border
# Least side of a box in pixels. In images of up to 8192 pixels, a thinner box may vanish in float32 when it is flipped or resized.
THIN = 1e-3

_LAYOUTS = {
    **dict.fromkeys(STREETS, "Expected: what `python -m training.street --labelled` writes."),
    "bdd100k": "Expected: images/100k/{train,val}/*.jpg and labels/det_20/det_{train,val}.json, from bdd-data.berkeley.edu.",
    "coco_folder": "Expected: train/ and val/, each with images/ and annotations.json in COCO's format "
    "(images, annotations with bbox [x, y, width, height], categories).",
}


@dataclass(frozen=True)
class BoxExample:
    """
    One image with its boxes.

    Args:
        size: height and width, pixels.
        boxes: (N, 4) float32, xyxy pixels.
        labels: (N,) class ids from 0.
        crowd: (N,) bool; a detection on such a box counts neither as right nor as wrong.
        areas: (N,) square pixels, by which COCO distinguishes small from large boxes.
    """

    name: str
    image: Path
    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray


@dataclass(frozen=True)
class BoxImages:
    """
    A data set with boxes.

    Args:
        name: shown in tables.
        classes: names by id.
    """

    name: str
    classes: tuple[str, ...]
    train: tuple[BoxExample, ...]
    test: tuple[BoxExample, ...]

    def image(self, example: BoxExample) -> np.ndarray:
        """
        Read an example's image, (H, W, 3) uint8 RGB.

        Raises:
            ValueError: the image differs in size from the one its boxes were made for.
        """
        image = read_image(example.image)
        self._need_size(example, image.shape[:2])
        return image

    def _need_size(self, example: BoxExample, size: tuple[int, int]) -> None:
        if size != example.size:
            (height, width), (told_height, told_width) = size, example.size
            raise ValueError(f"{example.image} is {width}x{height}, but its boxes are for {told_width}x{told_height}")

    def check(self) -> None:
        """
        Check the first and last image of each split, the sizes of all images, and that each split has boxes, before any costly step.

        Raises:
            ValueError: an image cannot be read or has another size than its boxes, or a split has no boxes.
        """
        for name, split in (("training", self.train), ("test", self.test)):
            if all(example.crowd.all() for example in split):
                raise ValueError(f"{self.name}: the {len(split)} {name} images have no boxes; a detector needs some")
            self.image(split[0])
            self.image(split[-1])
            for example, (width, height) in zip(split, read_ahead(lambda example: file_size(example.image), split)):
                self._need_size(example, (height, width))

    def limit(self, max_train_images: int | None, max_test_images: int | None) -> "BoxImages":
        """Return the data set with fewer images, spread evenly over each split."""
        return dataclasses.replace(
            self, train=spread(self.train, max_train_images), test=spread(self.test, max_test_images)
        )


def load_boxes(name: str, data_dir: str | None = None) -> BoxImages:
    """
    Load a data set with boxes by name, one of `BOX_DATASETS`.

    Raises:
        ValueError: files are missing, boxes are invalid or ids do not fit; the message names them and the expected layout.
    """
    if name in STREETS:
        return _coco_splits(name, street_folder(name, data_dir))
    if name not in BOX_DATASETS:
        raise ValueError(f"unknown data set {name!r}: one of {', '.join(BOX_DATASETS)}")
    if data_dir is None:
        raise ValueError(f"--dataset {name} needs --data_dir, the folder that holds it. {_LAYOUTS[name]}")
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise ValueError(f"--data_dir {folder}: no such folder. {_LAYOUTS[name]}")
    return _bdd100k(folder) if name == "bdd100k" else _coco_splits(name, folder)


def _read_json(path: Path, name: str):
    if not path.is_file():
        raise ValueError(f"{name}: {path} is missing; it holds the boxes. {_LAYOUTS[name]}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}. {_LAYOUTS[name]}") from None


def _is_box(box) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(map(is_finite, box))


def _example(name: str, image: Path, size: tuple[int, int], found: Sequence[tuple], flat: list[str]) -> BoxExample:
    """
    Build an example from its annotations. Boxes are checked and cut at the image border.

    Args:
        found: tuples of (xyxy box, label, crowd, area or `None`, place of the annotation, for messages).
        flat: receives the places of boxes that are left out because they have no width or height.
    """
    height, width = size
    kept, boxes, areas = [], [], []
    for box, label, crowd, area, where in found:
        if not _is_box(box):
            raise ValueError(f"{where}: a box must be 4 finite numbers, got {shown(box)}")
        if area is not None and not (is_finite(area) and area >= 0):
            raise ValueError(f"{where}: area must be a number of square pixels, got {area!r}")
        x0, y0, x1, y1 = box
        if x1 < x0 or y1 < y0:
            raise ValueError(
                f"{where}: the box from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g}) has no extent; remove or mend it"
            )
        if x1 == x0 or y1 == y0:  # COCO's own train2017 has two
            flat.append(where)
            continue
        if min(x0, y0) < -ROUNDING or x1 > width + ROUNDING or y1 > height + ROUNDING or x0 >= width or y0 >= height:
            raise ValueError(
                f"{where}: the box from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g}) reaches beyond its image {name}, {width}x{height}"
            )
        cut = np.array([max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)], np.float32)
        if min(cut[2:] - cut[:2]) < THIN:
            flat.append(where)
            continue
        kept.append((label, crowd))
        boxes.append(cut)
        areas.append((x1 - x0) * (y1 - y0) if area is None else area)
    return BoxExample(
        name,
        image,
        size,
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array([label for label, _ in kept], np.int64),
        np.array([crowd for _, crowd in kept], bool),
        np.array(areas, np.float64),
    )


def _refuse_shares(examples: Sequence[BoxExample], path: Path) -> None:
    """
    Refuse boxes given as shares of the image, as in YOLO's format: all of them would lie in the first pixel.

    Raises:
        ValueError: no box reaches beyond the first pixel.
    """
    ends = [example.boxes[:, 2:].max() for example in examples if len(example.boxes)]
    if ends and max(ends) <= 1:
        raise ValueError(
            f"{path}: all boxes lie in the first pixel of their images; they must be in pixels, not in shares of the image"
        )


def _refuse_twice(names: Iterable[str], path: Path) -> None:
    """
    Refuse an image that is listed twice.

    Each entry would have only some of the boxes, and a detection that is right for one entry would be wrong for the other.

    Raises:
        ValueError: a name occurs more than once.
    """
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{path} lists the image {twice[0]} more than once ({len(twice)} are)")


def _tell_flat(flat: Sequence[str]) -> None:
    if flat:
        logger.warning("%d boxes without width or height are left out, the first is %s", len(flat), flat[0])


def _need_images(name: str, folder: Path, paths: Sequence[Path]) -> None:
    if not paths:
        raise ValueError(f"{name}: the annotations for {folder} list no images. {_LAYOUTS[name]}")
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise ValueError(
            f"{name}: {len(missing)} of {len(paths)} annotated images are missing, the first is {missing[0]}. {_LAYOUTS[name]}"
        )


def _coco_splits(name: str, folder: Path) -> BoxImages:
    (classes, train), (others, test) = (_coco(name, folder / split) for split in ("train", "val"))
    if classes != others:
        differing = sorted(set(classes) ^ set(others)) or [a for a, b in zip(classes, others) if a != b]
        raise ValueError(
            f"{name}: train/ and val/ must have the same categories in the same order; they differ in {differing[0]!r}"
        )
    return BoxImages(name, classes, train, test)


def _coco(name: str, folder: Path) -> tuple[tuple[str, ...], tuple[BoxExample, ...]]:
    """Read one annotations.json: the classes ordered by category id, and the examples ordered by file name."""
    path = folder / "annotations.json"
    values = _read_json(path, name)
    for key in ("images", "annotations", "categories"):
        entries = values.get(key) if isinstance(values, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{path} must hold a list {key!r} of objects. {_LAYOUTS[name]}")
    categories = {}
    for category in values["categories"]:
        identity, label = category.get("id"), category.get("name")
        if not isinstance(identity, int) or not isinstance(label, str) or identity in categories:
            raise ValueError(f"{path}: categories need different integer ids and a name each, got {category!r}")
        categories[identity] = label
    if not categories or len(set(categories.values())) < len(categories):
        raise ValueError(f"{path} must list categories of different names, got {list(categories.values())}")
    order = sorted(categories)
    images = {}
    for image in values["images"]:
        size = (image.get("height"), image.get("width"))
        if not isinstance(image.get("file_name"), str) or not all(isinstance(v, int) and v > 0 for v in size):
            raise ValueError(f"{path}: an image needs id, file_name, height and width, got {image!r}")
        if not isinstance(image.get("id"), (int, str)) or image["id"] in images:
            raise ValueError(f"{path}: images need different ids, numbers or text, got {image.get('id')!r}")
        images[image["id"]] = (image["file_name"], size)
    _refuse_twice((file for file, _ in images.values()), path)
    files = {identity: within(folder / "images", file, path) for identity, (file, _) in images.items()}
    _need_images(name, folder / "images", list(files.values()))
    found = {identity: [] for identity in images}
    for annotation in values["annotations"]:
        where = f"{path}, annotation {annotation.get('id')!r}"
        identity = annotation.get("image_id")
        if not isinstance(identity, (int, str)) or identity not in images:
            raise ValueError(f"{where}: there is no image with the id {annotation.get('image_id')!r}")
        category = annotation.get("category_id")
        if not isinstance(category, int) or category not in categories:
            ids = ", ".join(str(identity) for identity in order[:20])
            raise ValueError(f"{where} has the category_id {annotation.get('category_id')!r}; categories are {ids}")
        box = annotation.get("bbox")
        if _is_box(box):
            box = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
        label = order.index(annotation["category_id"])
        if (crowd := annotation.get("iscrowd", 0)) not in (0, 1):
            raise ValueError(f"{where}: iscrowd must be 0 or 1, got {shown(crowd)}")
        entry = (box, label, bool(crowd), annotation.get("area"), where)
        found[annotation["image_id"]].append(entry)
    flat: list[str] = []
    examples = [
        _example(file, files[identity], size, found[identity], flat) for identity, (file, size) in images.items()
    ]
    _tell_flat(flat)
    _refuse_shares(examples, path)
    return tuple(categories[i] for i in order), tuple(sorted(examples, key=lambda e: e.name))


def _bdd100k(folder: Path) -> BoxImages:
    splits = []
    for split in ("train", "val"):
        path, images = folder / "labels" / "det_20" / f"det_{split}.json", folder / "images" / "100k" / split
        frames = _read_json(path, "bdd100k")
        if not isinstance(frames, list) or not all(
            isinstance(f, dict) and isinstance(f.get("name"), str) for f in frames
        ):
            raise ValueError(f"{path} must hold a list of frames, each with its name. {_LAYOUTS['bdd100k']}")
        _need_images("bdd100k", images, [within(images, frame["name"], path) for frame in frames])
        _refuse_twice((frame["name"] for frame in frames), path)
        examples, flat = [], []
        for frame in sorted(frames, key=lambda f: f["name"]):
            where = f"{path}, {frame['name']}"
            labels = frame.get("labels") or []
            if not isinstance(labels, list) or not all(isinstance(label, dict) for label in labels):
                raise ValueError(f"{where}: labels must be a list of objects, got {shown(labels)}")
            found = [_bdd100k_box(label, where) for label in labels if label.get("box2d")]
            examples.append(_example(frame["name"], images / frame["name"], BDD100K_SIZE, found, flat))
        _tell_flat(flat)
        _refuse_shares(examples, path)
        splits.append(tuple(examples))
    return BoxImages("bdd100k", BDD100K_CLASSES, *splits)


def _bdd100k_box(label: dict, where: str) -> tuple:
    attributes = label.get("attributes") or {}
    for part, kind in ((label.get("category"), str), (label["box2d"], dict), (attributes, dict)):
        if not isinstance(part, kind):
            raise ValueError(f"{where}: a label must have a category, a box2d and attributes, got {shown(label)}")
    name = BDD100K_RENAMED.get(label["category"], label["category"])
    ignored = name in BDD100K_IGNORED
    name = BDD100K_IGNORED.get(name, name)
    if name not in BDD100K_CLASSES:
        raise ValueError(f"{where}: unknown category {name!r}; BDD100K's are {', '.join(BDD100K_CLASSES)}")
    crowd = ignored or bool(attributes.get("crowd", False))
    box = [label["box2d"].get(key) for key in ("x1", "y1", "x2", "y2")]
    # x2 and y2 are the box's last pixels, so its width is x2 - x1 + 1, as in BDD100K's own conversion to COCO (scalabel, box2d_to_bbox).
    for side, limit in ((3, BDD100K_SIZE[0]), (2, BDD100K_SIZE[1])):
        if isinstance(box[side], (int, float)):
            box[side] = min(box[side] + 1, max(box[side], limit))  # a box inside the image stays inside it
    return box, BDD100K_CLASSES.index(name), crowd, None, where
