"""Labelled data sets read by `--dataset org/name` from a Hub on 127.0.0.1."""

import io
import json

import datasets
import numpy as np
from PIL import Image
from published import REPOSITORY
from test_data import grey_png

CLASSES = ("grass", "brick")


def masks(count: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.where(rng.random((8, 12)) < 0.5, 0, np.where(rng.random((8, 12)) < 0.9, 1, 255)) for _ in range(count)]


def parquet(labels: list[np.ndarray], tmp_path) -> bytes:
    def png(array: np.ndarray) -> dict:
        buffer = io.BytesIO()
        Image.fromarray(array.astype(np.uint8)).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    rows = {
        "image": [png(np.stack([label % 7, label % 5, label % 3], axis=-1) * 30) for label in labels],
        "annotation": [png(label) for label in labels],
    }
    features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "split.parquet")
    return (tmp_path / "split.parquet").read_bytes()


def turned(tmp_path) -> dict[str, bytes]:
    """
    Files of a data set with two traps.

    The training image is turned upside down by its EXIF, and its label is 1 where the stored, unturned pixels are bright. The validation
    label is a PNG of two bits per pixel.
    """
    picture, exif, files = np.zeros((40, 40, 3), np.uint8), Image.Exif(), {}
    picture[:20] = 200
    exif[0x0112] = 3
    image, mask = io.BytesIO(), io.BytesIO()
    Image.fromarray(picture).save(image, "JPEG", exif=exif, quality=100)
    Image.fromarray((picture[..., 0] > 100).astype(np.uint8)).save(mask, "PNG")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    for split, label in (("train", mask.getvalue()), ("validation", grey_png(np.array([[0, 1], [2, 3]]), 2))):
        rows = {"image": [{"bytes": image.getvalue(), "path": None}], "label": [{"bytes": label, "path": None}]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "split.parquet")
        files[f"data/{split}-00000-of-00001.parquet"] = (tmp_path / "split.parquet").read_bytes()
    return files


def test_masks_and_classes_of_a_hub_data_set(bare_hub, hub_process, tmp_path):
    train, test = masks(3, 0), masks(2, 1)
    names = json.dumps({str(k): name for k, name in enumerate(CLASSES)}).encode()
    files = {
        "data/train-00000-of-00001.parquet": parquet(train, tmp_path),
        "data/validation-00000-of-00001.parquet": parquet(test, tmp_path),
    }
    bare_hub.add_dataset("org/masks", {**files, "id2label.json": names})
    bare_hub.add_dataset(
        "org/turned", {**turned(tmp_path), "id2label.json": b'{"0": "a", "1": "b", "2": "c", "3": "d"}'}
    )
    bare_hub.add_dataset("org/nameless", files)
    bare_hub.add_dataset("org/giant", {**files, "id2label.json": b'{"1000000000": "grass"}'})
    bare_hub.add_dataset("org/twice", {**files, "id2label.json": b'{"0": "grass", "1": "grass"}'})
    bare_hub.add_dataset("org/script", {"script.py": b"raise SystemExit"})
    damaged = {path: data[: len(data) // 2] for path, data in files.items()}
    bare_hub.add_dataset("org/damaged", {**damaged, "id2label.json": names})
    bare_hub.add_dataset("org/untested", {name: data for name, data in files.items() if "train" in name})
    script = f"""
import sys, json
sys.path.insert(0, {str(REPOSITORY)!r})
from evaluation.data import load_dataset
data = load_dataset("org/masks")
data.check()
print(json.dumps(data.classes))
for split in (data.train, data.test):
    print(json.dumps([[data.label(e).tolist(), data.image(e).shape] for e in split]))
for name in ("org/none", "org/nameless", "org/untested", "org/giant", "org/twice", "org/script", "org/damaged"):
    try:
        load_dataset(name)
    except ValueError as error:
        print(str(error).splitlines()[0])
data = load_dataset("org/turned")
print(json.dumps([int(data.image(data.train[0])[data.label(data.train[0]) == 1].mean()), data.label(data.test[0]).tolist()]))
import huggingface_hub

def gone(*arguments, **keywords):
    raise huggingface_hub.errors.LocalEntryNotFoundError("cannot find the requested files in the disk cache")

huggingface_hub.hf_hub_download = gone
try:
    load_dataset("org/masks")
except ValueError as error:
    print(error)
"""
    classes, *splits, missing, nameless, untested, giant, twice, script, damaged, upright, offline = hub_process(
        tmp_path, script
    ).splitlines()
    assert json.loads(classes) == list(CLASSES)
    for found, truth in zip(splits, (train, test), strict=True):
        assert [label for label, _ in json.loads(found)] == [label.tolist() for label in truth]
        assert all(shape == [8, 12, 3] for _, shape in json.loads(found))
    assert json.loads(upright) == [200, [[0, 1], [2, 3]]]
    assert "--dataset org/none: no such data set on the Hub" in missing
    assert "--dataset org/nameless has no id2label.json" in nameless
    assert "--dataset org/untested needs a train and a validation or test split, it has train" in untested
    assert "--dataset org/masks: id2label.json cannot be fetched" in offline
    assert "--dataset org/giant: id2label.json must have ids from 0 to 253" in giant
    assert "--dataset org/twice: id2label.json must give classes different names, got 'grass' twice" in twice
    assert "--dataset org/script cannot be read: Dataset scripts are no longer supported" in script
    assert "--dataset org/damaged cannot be read: " in damaged
