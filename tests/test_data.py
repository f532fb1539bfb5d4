"""Layouts of labelled data sets, and the errors for wrong layouts."""

import dataclasses
import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from labelled_shapes import squares
from PIL import Image

from evaluation.data import load_dataset
from evaluation.labelled_images import Example, LabelledImages, as_rgb, read_image, read_label
from evaluation.readouts import majority
from training.street_labels import write_folder

# --- data ---


def test_folder_layouts(tmp_path, shapes):
    data = load_dataset("folder", str(shapes)).with_groups()
    assert data.classes == ("grass", "red <b>", "blue") and (len(data.train), len(data.test)) == (12, 5)
    assert data.groups["large"] == ["grass", "red <b>", "blue"] and data.groups["rare"] == []
    squares(tmp_path, 7, 0)
    (tmp_path / "classes.json").write_text('["a", "b", "c"]')
    flat = load_dataset("folder", str(tmp_path))
    # The test images are one block, because neighbours in a drive look alike.
    assert [e.name for e in flat.test] == ["5", "6"] and [e.name for e in flat.train] == ["0", "1", "2", "3", "4"]
    assert len(flat.limit(3, 1).train) == 3 and len(flat.limit(3, 1).test) == 1
    label = np.asarray(Image.open(tmp_path / "labels" / "3.png")).copy()
    label[9, 9] = 7
    Image.fromarray(label).save(tmp_path / "labels" / "3.png")
    with pytest.raises(ValueError, match=r"labels/3.png has the label 7, but there are classes 0 to 2"):
        flat.label(flat.train[3])
    (tmp_path / "labels" / "4.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 7 images .* have no label .*4.png"):
        load_dataset("folder", str(tmp_path))
    (tmp_path / "classes.json").write_text('{"classes": ["a", "a"]}')
    with pytest.raises(ValueError, match=r"classes.json must give classes different names, got 'a' twice"):
        load_dataset("folder", str(tmp_path))
    (tmp_path / "classes.json").write_bytes('["Straße"]'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"classes.json cannot be read: 'utf-8' codec .* Expected: images/"):
        load_dataset("folder", str(tmp_path))


def of_labels(labels: list[np.ndarray], classes: tuple[str, ...]) -> LabelledImages:
    examples = [
        Example(str(k), lambda label=label: np.zeros((*label.shape, 3), np.uint8), lambda label=label: label)
        for k, label in enumerate(labels)
    ]
    return LabelledImages("made", classes, tuple(examples), tuple(examples[:1]))


def test_the_rarest_classes_are_in_a_group_too():
    """Groups are made from 200 evenly spread labels. A class that is in none of these is searched for in the other labels."""
    labels = [np.zeros((20, 30), np.uint8) for _ in range(401)]
    for index in (1, 3, 7):
        labels[index][4, 5] = 1
    labels[399][5:15] = 2
    data = of_labels(labels, ("road", "bike", "water", "never")).with_groups()
    groups = {name: list(members) for name, members in data.groups.items()}
    # Water has 300 of 240,000 pixels, less than 0.3 % of all. They are one region of half an image.
    assert groups == {
        "small": ["bike"], "large": ["road", "water"], "rare": ["bike", "water"], "common": ["road"]
    }  # fmt: skip
    assert data.absent == ("never",)


def test_classes_without_a_pixel_are_named_and_one_class_alone_is_refused(caplog):
    """Drawing programs write masks of 0 and 255. The 255 is not counted, and nothing else would look wrong."""
    mask = np.zeros((8, 8), np.uint8)
    mask[2:4] = 255
    with pytest.raises(
        ValueError,
        match=r"no training label has a pixel of fg \(1 of 2 classes\), and .* 255 is not counted: are the masks 0 and 255\?",
    ):
        of_labels([mask], ("bg", "fg")).with_groups().check()
    mask[6:] = 1
    of_labels([mask], ("bg", "fg")).with_groups().check()
    assert caplog.text == ""
    caplog.set_level("INFO")
    of_labels([mask], ("bg", "fg", "x")).with_groups().check()
    assert "no training label has a pixel of x (1 of 3 classes)" in caplog.text


def test_one_class_is_none_to_measure():
    data = of_labels([np.zeros((4, 4), np.uint8)] * 3, ("car",))
    with pytest.raises(
        ValueError, match="has 1 class, with which all figures would be 100 %: what is not 'car' needs a class too"
    ):
        data.check()


def test_a_test_split_of_void_alone_is_refused():
    """Nothing could be measured, and after the fit the figures would be None."""
    mask = np.zeros((8, 8), np.uint8)
    mask[2:4] = 1
    data = of_labels([np.full_like(mask, 255), mask], ("bg", "fg"))
    with pytest.raises(ValueError, match="made: none of the 1 test images has a labelled pixel"):
        data.check()
    dataclasses.replace(data, test=data.train).check()


@pytest.mark.parametrize("kind", ["label", "image"])
def test_what_is_wrong_in_the_middle_of_the_test_is_found_before_the_fit(shapes, tmp_path, kind):
    shutil.copytree(shapes, tmp_path / "set")
    path = tmp_path / "set" / "val" / f"{kind}s" / "2.png"
    if kind == "label":
        label = np.asarray(Image.open(path)).copy()
        label[9, 9] = 7
        Image.fromarray(label).save(path)
    else:
        path.write_bytes(path.read_bytes()[:3000])
    message = "2.png has the label 7" if kind == "label" else "image .*2.png cannot be read"
    with pytest.raises(ValueError, match=message):
        load_dataset("folder", str(tmp_path / "set")).check()


def test_masks_of_one_bit_are_ids_and_other_files_than_png_are_named(tmp_path):
    squares(tmp_path, 4, 0)
    (tmp_path / "classes.json").write_text('["a", "b"]')
    for number in range(4):
        path = tmp_path / "labels" / f"{number}.png"
        Image.fromarray(np.asarray(Image.open(path)) == 1).save(path)
    data = load_dataset("folder", str(tmp_path))
    assert Image.open(path).mode == "1" and set(np.unique(data.label(data.train[0]))) == {0, 1}
    path.rename(path.with_suffix(".jpg"))
    with pytest.raises(ValueError, match=r"labels must be .png, .*labels has 3.jpg"):
        load_dataset("folder", str(tmp_path))
    path.with_suffix(".jpg").rename(path)
    Image.new("RGB", (96, 64)).save(tmp_path / "images" / "3.jpg")
    with pytest.raises(ValueError, match=r"3.jpg and 3.png would have one label"):
        load_dataset("folder", str(tmp_path))


def grey_png(ids: np.ndarray, bits: int) -> bytes:
    """A grey PNG of 1, 2, 4 or 8 bits a pixel (PNG specification, 11.2.2 and 7.2), which PIL does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = ids.shape
    rows = np.unpackbits(ids.astype(np.uint8)[..., None], axis=2)[..., 8 - bits :].reshape(height, -1)
    lines = b"".join(b"\0" + np.packbits(row).tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_labels_of_few_bits_hold_the_ids_that_are_stored(tmp_path, bits):
    ids = np.random.default_rng(0).integers(0, 2**bits, (7, 13))
    (tmp_path / "label.png").write_bytes(grey_png(ids, bits))
    assert np.array_equal(read_label(tmp_path / "label.png"), ids)


def test_labels_that_were_stored_with_loss_are_refused(tmp_path):
    ids = Image.fromarray(np.random.default_rng(0).integers(0, 9, (32, 32), dtype=np.uint8))
    for kind in ("JPEG", "WEBP"):
        ids.save(tmp_path / "label.png", kind)
        with pytest.raises(
            ValueError, match=r"label .*label.png cannot be read: .*expected PNG or BMP; JPEG and WebP change ids"
        ):
            read_label(tmp_path / "label.png")


def test_hidden_folders_are_passed_over_and_labels_without_images_are_told(tmp_path, caplog):
    squares(tmp_path, 4, 0)
    (tmp_path / "classes.json").write_text('["a", "b", "c"]')
    for place, end in (("images", ".jpg"), ("labels", ".png")):
        (tmp_path / place / ".trash").mkdir()
        shutil.copy(next((tmp_path / place).glob("0.*")), tmp_path / place / ".trash" / f"z{end}")
    data = load_dataset("folder", str(tmp_path))
    assert {e.name for e in (*data.train, *data.test)} == {"0", "1", "2", "3"} and not caplog.records
    next((tmp_path / "images").glob("2.*")).rename(tmp_path / "images" / "2.tif")
    assert len(load_dataset("folder", str(tmp_path)).train) == 2
    assert "folder: 1 labels in" in caplog.text and caplog.text.strip().endswith("are left out, the first is 2")


def test_sixteen_bits_of_grey_are_no_white(tmp_path):
    """PIL's own conversion turns every value above 255 into white."""
    grey = np.arange(64 * 1024, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(grey).save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png")
    assert read.shape == (256, 256, 3) and (read[..., 0] == np.round(grey / 257)).all()
    assert (read == read[..., :1]).all()
    with pytest.raises(ValueError, match="32 bits"):
        as_rgb(Image.fromarray(np.float32([[0.5]])))


def test_images_in_linked_folders_are_found(tmp_path):
    """Each folder is read once, by its own path, even if links lead around in a circle."""
    squares(tmp_path / "elsewhere", 4, 0)
    squares(tmp_path / "own", 3, 1)
    for kind in ("images", "labels"):
        folder = tmp_path / "set" / kind
        folder.mkdir(parents=True)
        (tmp_path / "own" / kind).rename(folder / "own")
        for link, target in (
            ("night", tmp_path / "elsewhere" / kind), ("again", folder / "own"), ("loop", folder), ("up", tmp_path)
        ):  # fmt: skip
            (folder / link).symlink_to(target)
        (folder / "own" / "back").symlink_to(folder)
    (tmp_path / "set" / "classes.json").write_text('["a", "b", "c"]')
    data = load_dataset("folder", str(tmp_path / "set"))
    data.check()
    names = [*(f"night/{number}" for number in range(4)), *(f"own/{number}" for number in range(3))]
    assert [example.name for example in (*data.train, *data.test)] == names
    (tmp_path / "link").symlink_to(tmp_path / "set")
    assert [example.name for example in load_dataset("folder", str(tmp_path / "link")).train] == names[:-2]


def write(path: Path, array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


def test_shipped_layouts_and_their_label_conventions(tmp_path):
    picture = np.zeros((4, 6, 3))
    for split in ("train", "val"):
        write(tmp_path / "cs/leftImg8bit" / split / "ulm/ulm_0_leftImg8bit.png", picture)
        write(tmp_path / "cs/gtFine" / split / "ulm/ulm_0_gtFine_labelIds.png", [[0, 7, 8, 11, 33, 26]] * 4)
        write(tmp_path / "bdd/images/10k" / split / "a.jpg", picture)
        write(tmp_path / "bdd/labels/sem_seg/masks" / split / "a.png", [[0, 1, 18, 255, 13, 2]] * 4)
        write(tmp_path / "cam" / split / "images/a.png", picture)
        write(tmp_path / "cam" / split / "labels/a.png", [[0, 10, 11, 255, 3, 11]] * 4)
        write(tmp_path / "wt/images" / split / "venice/1.jpg", picture)
        write(tmp_path / "wt/annotations" / split / "venice/1.png", [[0, 1, 2, 255, 0, 1]] * 4)
    for split in ("training", "validation"):
        write(tmp_path / "ade/images" / split / "x.jpg", picture)
        write(tmp_path / "ade/annotations" / split / "x.png", [[0, 1, 2, 150, 149, 3]] * 4)
    rows = "\n".join(f"{k}\t0.1\t1\t1\tname {k}, other" for k in range(1, 151))
    (tmp_path / "ade/objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + rows)
    (tmp_path / "wt/classes.json").write_text('["wall", "sky"]')
    for name, folder, row in (
        ("cityscapes", "cs", [255, 0, 1, 2, 18, 13]),
        ("bdd100k", "bdd", [0, 1, 18, 255, 13, 2]),
        ("ade20k", "ade", [255, 0, 1, 149, 148, 2]),
        ("wt_sem", "wt", [255, 0, 1, 255, 255, 0]),
        ("camvid", "cam", [0, 10, 255, 255, 3, 255]),
    ):
        data = load_dataset(name, str(tmp_path / folder))
        data.check()
        assert data.label(data.test[0])[0].tolist() == row, name
    assert load_dataset("ade20k", str(tmp_path / "ade")).classes[:2] == ("name 1", "name 2")
    write(tmp_path / "wt/annotations/val/venice/1.png", [[0, 1, 2, 3, 0, 1]] * 4)
    with pytest.raises(ValueError, match=r"1.png has the label 3 \(class 2\), but there are classes 0 to 1"):
        load_dataset("wt_sem", str(tmp_path / "wt")).check()
    # The variant of CamVid with 32 classes, where ids have other meanings.
    write(tmp_path / "cam/val/labels/a.png", [[0, 10, 11, 12, 31, 3]] * 4)
    with pytest.raises(ValueError, match="a.png has the label 12, but there are classes 0 to 10"):
        load_dataset("camvid", str(tmp_path / "cam")).check()
    with pytest.raises(ValueError, match=r"cityscapes: there is no folder .*leftImg8bit.* Expected: leftImg8bit/"):
        load_dataset("cityscapes", str(tmp_path / "ade"))
    with pytest.raises(ValueError, match="needs --data_dir"):
        load_dataset("camvid")
    with pytest.raises(ValueError, match="unknown data set 'citiscapes'"):
        load_dataset("citiscapes")


def test_street_frames_have_labels_and_boxes(tmp_path):
    folder = write_folder(tmp_path / "val", 2, 64, 128, seed=5, num_processes=1)
    made = (folder / "images" / "00000.png").stat().st_mtime_ns
    assert write_folder(folder, 2, 64, 128, seed=5).joinpath("images", "00000.png").stat().st_mtime_ns == made
    coco = json.loads((folder / "annotations.json").read_text())
    assert {c["name"] for c in coco["categories"]} >= {"car", "person"} and coco["annotations"]
    for box in coco["annotations"]:
        x, y, w, h = box["bbox"]
        assert w >= 4 and h >= 4 and 0 <= x <= x + w <= 128 and 0 <= y <= y + h <= 64 and 0 < box["area"] <= w * h


def test_camvid(poodle_data):
    data = load_dataset("camvid", str(poodle_data / "camvid")).with_groups()
    data.check()
    assert (len(data.train), len(data.test)) == (367, 101)
    assert {"pole", "sign", "pedestrian"} <= set(data.groups["small"]) and "road" in data.groups["large"]


def test_majority_equals_a_loop():
    label = np.random.default_rng(0).choice([0, 1, 2, 255], (22, 33)).astype(np.uint8)
    label[:8, :8] = 255
    ours = majority(label, (2, 4), 3)
    for row in range(2):
        for column in range(4):
            rows = [r for r in range(22) if min(r * 2 // 22, 1) == row]
            columns = [c for c in range(33) if min(c * 4 // 33, 3) == column]
            cell = label[np.ix_(rows, columns)]
            counts = [(cell == k).sum() for k in range(3)]
            assert ours[row, column] == (int(np.argmax(counts)) if sum(counts) else 255)
