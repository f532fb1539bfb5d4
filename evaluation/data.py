"""Labelled images: data sets in the folder layouts they are shipped in, and data sets on the Hub."""

import glob
import io
import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from evaluation.labelled_images import (
    FORMATS,
    IGNORE,
    IMAGES,
    LABEL_FORMATS,
    UNREADABLE,
    Example,
    LabelledImages,
    as_rgb,
    label_of,
)
from evaluation.metrics import BDD100K_GROUPS
from evaluation.street_data import STREETS, street_folder
from modeling_poodle.folders import files_below

logger = logging.getLogger("poodle")
# Further lossless formats, allowed only in data sets on the Hub: `datasets` itself stores some kinds of images as TIFF.
HUB_FORMATS = ("TIFF", "GIF", "PPM")

DATASETS = (
    *STREETS,
    "camvid",
    "cityscapes",
    "bdd100k",
    "ade20k",
    "wt_sem",
    "folder",
)
DRIVING_CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain", "sky",
    "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
CAMVID_CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
# Cityscapes' labelIds in the order of the train ids (cityscapesScripts, helpers/labels.py); all other ids are ignored.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


# --- layouts ---


def load_dataset(name: str, data_dir: str | None = None) -> LabelledImages:
    """
    Load a labelled data set by name: one of `DATASETS`, or the id of a data set on the Hub (`org/name`).

    Raises:
        ValueError: the name is unknown or files are missing; the message names them and the expected layout.
    """
    if name in STREETS:
        return _folder(street_folder(name, data_dir), name)
    if name in DATASETS:
        if data_dir is None:
            raise ValueError(f"--dataset {name} needs --data_dir, the folder that holds it. {_LAYOUTS[name]}")
        folder = Path(data_dir).expanduser()
        if not folder.is_dir():
            raise ValueError(f"--data_dir {folder}: no such folder. {_LAYOUTS[name]}")
        readers = {
            "camvid": _camvid,
            "cityscapes": _cityscapes,
            "bdd100k": _bdd100k,
            "ade20k": _ade20k,
            "wt_sem": _wt_sem,
            "folder": _folder,
        }
        return readers[name](folder)
    if "/" in name:
        return _hub(name)
    raise ValueError(f"unknown data set {name!r}: one of {', '.join(DATASETS)}, or a Hub id (org/name)")


_LAYOUTS = {
    "camvid": "Expected: train/ and val/, each with images/ and labels/ (PNG) of the same stems (ids 0 to 10, 11 is void).",
    "cityscapes": "Expected: leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and gtFine/{train,val}/CITY/*_gtFine_labelIds.png "
    "(or *_gtFine_labelTrainIds.png), from cityscapes-dataset.com.",
    "bdd100k": "Expected: images/10k/{train,val}/*.jpg and labels/sem_seg/masks/{train,val}/*.png, from bdd-data.berkeley.edu.",
    "ade20k": "Expected: images/{training,validation}/*.jpg, annotations/{training,validation}/*.png and objectInfo150.txt, "
    "the archive ADEChallengeData2016.",
    "wt_sem": "Expected: images/{train,val}/ and annotations/{train,val}/ of the same stems (subfolders allowed), and classes.json "
    "or objectInfo150.txt; labels as in ADE20K (0 and 255 are not counted).",
    "folder": "Expected: images/, labels/ (PNG, one class id a pixel) of the same stems, and classes.json, a list of names or "
    '{"classes": [...], "ignore_index": 255}; with train/ and val/ (each with images/ and labels/), or without, where the '
    "last third of the images by name is held out.",
}


def _pairs(
    name: str, images: Path, labels: Path, image_end: str | None = None, label_ends=(".png",)
) -> tuple[Example, ...]:
    """
    Pair the images below a folder with the labels at the same relative paths below another.

    Args:
        image_end: end of the image names, `None` for any image suffix. The rest of the path, the stem, is common to image and label.
        label_ends: possible ends of the label names, the preferred one first.

    Raises:
        ValueError: a folder is missing or without images, an image has no label, or two images share one.
    """
    for folder in (images, labels):
        if not folder.is_dir():
            raise ValueError(f"{name}: there is no folder {folder}. {_LAYOUTS[name]}")
    files = [p for p in files_below(images) if p.suffix.lower() in IMAGES and not _hidden(p.relative_to(images))]
    files = [p for p in files if image_end is None or p.name.endswith(image_end)]
    examples, missing, known = [], [], {}
    for path in files:
        relative = path.relative_to(images)
        stem = str(relative)[: -len(image_end or path.suffix)]
        if (other := known.setdefault(stem, path)) != path:
            raise ValueError(f"{name}: {other} and {path.name} would have one label, by their stem; remove one")
        label = next((p for p in (labels / (stem + end) for end in label_ends) if p.is_file()), None)
        if label is None:
            missing.append(str(path))
        else:
            examples.append(Example(str(relative.with_suffix("")), path, label))
    if missing:
        relative = Path(missing[0]).relative_to(images)
        others = sorted(p.name for p in (labels / relative).parent.glob(f"{glob.escape(relative.stem)}.*"))
        if others and image_end is None:
            raise ValueError(f"{name}: labels must be .png, {labels} has {others[0]}. {_LAYOUTS[name]}")
        raise ValueError(
            f"{name}: {len(missing)} of {len(files)} images in {images} have no label in {labels}, the first is {missing[0]}. "
            f"{_LAYOUTS[name]}"
        )
    if not examples:
        raise ValueError(f"{name}: no images in {images}. {_LAYOUTS[name]}")
    ends = [
        (path.relative_to(labels), end)
        for path in files_below(labels)
        for end in label_ends
        if path.name.endswith(end)
    ]
    alone = sorted({stem for path, end in ends if not _hidden(path) and (stem := str(path)[: -len(end)]) not in known})
    if alone:
        logger.warning(
            "%s: %d labels in %s have no image in %s (%s) and are left out, the first is %s", name, len(alone), labels, images, ", ".join(IMAGES), alone[0]
        )  # fmt: skip
    return tuple(examples)


def _hidden(path: Path) -> bool:
    """Whether a file is hidden or lies in a hidden folder."""
    return any(part.startswith(".") for part in path.parts)


def _camvid(folder: Path) -> LabelledImages:
    table = np.arange(256).astype(np.uint8)  # ids above 11 (from labels of 32 classes) are kept here and refused later
    table[11] = IGNORE
    train, test = (_pairs("camvid", folder / s / "images", folder / s / "labels") for s in ("train", "val"))
    return LabelledImages("camvid", CAMVID_CLASSES, train, test, table)


def _cityscapes(folder: Path) -> LabelledImages:
    splits = [
        _pairs(
            "cityscapes",
            folder / "leftImg8bit" / split,
            folder / "gtFine" / split,
            "_leftImg8bit.png",
            ("_gtFine_labelTrainIds.png", "_gtFine_labelIds.png"),
        )
        for split in ("train", "val")
    ]
    kinds = {"TrainIds" in e.label.name for split in splits for e in split}
    if len(kinds) > 1:
        raise ValueError("cityscapes: some images have labelTrainIds, some only labelIds; make one kind for all")
    table = None
    if kinds == {False}:
        table = np.full(256, IGNORE, np.uint8)
        table[list(CITYSCAPES_IDS)] = range(19)
    return LabelledImages("cityscapes", DRIVING_CLASSES, *splits, table)


def _bdd100k(folder: Path) -> LabelledImages:
    train, test = (
        _pairs("bdd100k", folder / "images" / "10k" / s, folder / "labels" / "sem_seg" / "masks" / s)
        for s in ("train", "val")
    )
    return LabelledImages("bdd100k", DRIVING_CLASSES, train, test, None, BDD100K_GROUPS)


def _ade_classes(folder: Path, name: str) -> tuple[str, ...]:
    """Read the 150 class names from the last column of objectInfo150.txt."""
    file = folder / "objectInfo150.txt"
    if not file.is_file():
        raise ValueError(f"{name}: {file} is missing; it holds the names of the classes. {_LAYOUTS[name]}")
    lines = [
        line for line in file.read_text(encoding="utf-8").splitlines() if line.strip() and line.lstrip()[0].isdigit()
    ]
    if wrong := next((line for line in lines if "\t" not in line), None):
        raise ValueError(
            f"{name}: {file} must have tabs between its columns, as ADE20K has it, got the line {wrong!r}"
        )
    names = tuple(line.split("\t")[-1].split(",")[0].strip() for line in lines)
    _check_names(names, file)
    return names


def _reduced() -> np.ndarray:
    """Return the label table of ADE20K's convention (`do_reduce_labels`): 0 and 255 are not counted, k is class k - 1."""
    table = (np.arange(256) - 1).astype(np.uint8)  # 0 becomes 255; ids beyond the classes are refused later
    table[IGNORE] = IGNORE
    return table


def _ade20k(folder: Path) -> LabelledImages:
    classes = _ade_classes(folder, "ade20k")
    train, test = (
        _pairs("ade20k", folder / "images" / s, folder / "annotations" / s) for s in ("training", "validation")
    )
    return LabelledImages("ade20k", classes, train, test, _reduced())


def _wt_sem(folder: Path) -> LabelledImages:
    listed = folder / "classes.json"
    if listed.is_file():
        classes, ignore = _read_classes(listed)
        if ignore != IGNORE:
            raise ValueError(f"{listed}: of wt_sem 0 and 255 are not counted, leave out ignore_index {ignore}")
    else:
        classes = _ade_classes(folder, "wt_sem")
    train, test = (_pairs("wt_sem", folder / "images" / s, folder / "annotations" / s) for s in ("train", "val"))
    return LabelledImages("wt_sem", classes, train, test, _reduced())


def _read_classes(file: Path) -> tuple[tuple[str, ...], int]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: not JSON, or not UTF-8
        raise ValueError(f"{file} cannot be read: {error}. {_LAYOUTS['folder']}") from None
    values = {"classes": values} if isinstance(values, list) else values
    classes, ignore = values.get("classes") if isinstance(values, dict) else None, IGNORE
    if isinstance(values, dict):
        ignore = values.get("ignore_index", IGNORE)
    if not isinstance(classes, list) or not classes or not all(isinstance(c, str) and c for c in classes):
        raise ValueError(f"{file} must list the names of the classes. {_LAYOUTS['folder']}")
    _check_names(classes, file)
    if not isinstance(ignore, int) or not 0 <= ignore <= 255:
        raise ValueError(f"{file}: ignore_index must be an id from 0 to 255, got {ignore!r}")
    return tuple(classes), ignore


def _check_names(classes: Sequence[str], where) -> None:
    if len(classes) > 254:
        raise ValueError(f"{where} must list at most 254 classes, got {len(classes)}")
    if twice := [name for name, count in Counter(classes).items() if count > 1]:
        raise ValueError(f"{where} must give classes different names, got {twice[0]!r} twice")


def within(folder: Path, name: str, where) -> Path:
    """
    Return the path below `folder` that a data set's file list gives as `name`.

    Raises:
        ValueError: the path leads out of the folder, to a file that does not belong to the data set.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{where}: {name!r} leads out of {folder}; expected a path below it")
    return folder / name


def _folder(folder: Path, name: str = "folder") -> LabelledImages:
    classes, ignore = _read_classes(folder / "classes.json")
    table = None
    if ignore != IGNORE:
        table = np.arange(256).astype(np.uint8)
        table[ignore] = IGNORE
    if (folder / "train").is_dir():
        train, test = (_pairs("folder", folder / s / "images", folder / s / "labels") for s in ("train", "val"))
    else:
        every = _pairs("folder", folder / "images", folder / "labels")
        if len(every) < 3:
            raise ValueError(f"{folder} has {len(every)} images; at least 3 are needed to hold the last third out")
        # The test images are one block: neighbouring frames of a drive look alike, so none should be in both splits.
        cut = len(every) - len(every) // 3
        train, test = every[:cut], every[cut:]
    return LabelledImages(name, classes, train, test, table)


def _hub(name: str) -> LabelledImages:
    """Load a data set from the Hub that has an image column, a label column of masks, and class names in `id2label.json`."""
    import datasets
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        splits = datasets.load_dataset(name)
    except (datasets.exceptions.DatasetNotFoundError, RepositoryNotFoundError, OSError) as error:
        raise ValueError(
            f"--dataset {name}: no such data set on the Hub, it is private, or the Hub is not reached ({error})"
        ) from None
    # The data set needs a loading script, has several configurations, or is damaged.
    except (datasets.exceptions.DatasetsError, RuntimeError, ValueError) as error:
        raise ValueError(f"--dataset {name} cannot be read: {error.__cause__ or error}") from error
    test_name = next((s for s in ("validation", "val", "test") if s in splits), None)
    if "train" not in splits or test_name is None:
        raise ValueError(f"--dataset {name} needs a train and a validation or test split, it has {', '.join(splits)}")
    features = splits["train"].features
    pictures = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    image = next((key for key in pictures if key in ("image", "pixel_values", "img")), None)
    label = next((key for key in pictures if key != image and any(w in key for w in ("label", "annot", "mask"))), None)
    if image is None or label is None:
        raise ValueError(
            f"--dataset {name} needs an image column and a label column of masks, it has {dict(features)}"
        )
    try:
        with open(hf_hub_download(name, "id2label.json", repo_type="dataset"), encoding="utf-8") as file:
            names = {int(key): str(value) for key, value in json.load(file).items()}
    except RemoteEntryNotFoundError:
        raise ValueError(f"--dataset {name} has no id2label.json with the names of its classes") from None
    except (EntryNotFoundError, HfHubHTTPError) as error:
        raise ValueError(f"--dataset {name}: id2label.json cannot be fetched ({error})") from None
    except (AttributeError, ValueError) as error:
        raise ValueError(f"--dataset {name}: id2label.json must map ids to names ({error})") from None
    if not names or not 0 <= min(names) <= max(names) < 254:
        raise ValueError(f"--dataset {name}: id2label.json must have ids from 0 to 253, as labels are bytes")
    classes = tuple(names.get(index, str(index)) for index in range(max(names) + 1))
    _check_names(classes, f"--dataset {name}: id2label.json")

    def examples(split: str) -> tuple[Example, ...]:
        # Reading a row reads all its columns, so each column is selected separately: a label is then read without its image.
        # decode=False, because `datasets` would rotate an image by its EXIF orientation, but not its label.
        columns = {
            column: splits[split].select_columns([column]).cast_column(column, datasets.Image(decode=False))
            for column in (image, label)
        }

        def read(index: int, column: str) -> np.ndarray:
            where, stored = f"{name}[{split}][{index}]", columns[column][index][column]
            if not stored or (stored["bytes"] is None and not Path(stored["path"] or "").is_file()):
                raise ValueError(f"{where}: its {column} is missing, or is not stored in the data set")
            file = io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else Path(stored["path"])
            if column == label:
                return label_of(file, where, (*LABEL_FORMATS, *HUB_FORMATS))
            try:
                with Image.open(file, formats=(*FORMATS, *HUB_FORMATS)) as picture:
                    return as_rgb(picture)
            except UNREADABLE as error:
                raise ValueError(f"{where}: its {column} cannot be read: {error}") from error

        return tuple(
            Example(f"{split}-{index}", lambda index=index: read(index, image), lambda index=index: read(index, label))
            for index in range(len(splits[split]))
        )

    return LabelledImages(name, classes, examples("train"), examples(test_name))
