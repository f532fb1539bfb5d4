"""COCO's metrics, and the layouts of data sets with boxes."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.boxes import BDD100K_CLASSES, BoxExample, load_boxes
from evaluation.detection_metrics import coco_scores

# --- COCO's figures ---


def example(boxes, labels=None, crowd=None, areas=None) -> BoxExample:
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    labels = np.zeros(len(boxes), np.int64) if labels is None else np.array(labels)
    crowd = np.zeros(len(boxes), bool) if crowd is None else np.array(crowd)
    sides = boxes[:, 2:] - boxes[:, :2]
    return BoxExample("x", Path("x"), (300, 300), boxes, labels, crowd, sides.prod(1) if areas is None else areas)


def predicted(boxes, scores, labels=None) -> dict:
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    labels = np.zeros(len(boxes), np.int64) if labels is None else np.array(labels)
    return {"boxes": boxes, "scores": np.array(scores, float), "labels": labels}


SMALL, MEDIUM, LARGE = [0, 0, 20, 20], [50, 50, 110, 110], [100, 100, 250, 250]


def test_coco_scores_equal_closed_forms():
    truth = [example([SMALL, MEDIUM, LARGE], [0, 0, 1]), example([])]
    perfect = [predicted([SMALL, MEDIUM, LARGE], [0.9, 0.8, 0.7], [0, 0, 1]), predicted([], [])]
    scores = coco_scores(truth, perfect, ("a", "b", "c"))
    assert scores["per_class"] == {"a": pytest.approx(1), "b": pytest.approx(1), "c": None}  # no image shows c
    assert [scores[k] for k in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")] == pytest.approx([1] * 6)
    assert coco_scores(truth, [predicted([], [])] * 2, ("a", "b", "c"))["ap"] == 0
    # Shifted by a fifth of its width, the box has IoU 2/3. It counts at 0.50, 0.55, 0.60 and 0.65, four of the ten thresholds.
    scores = coco_scores([example([LARGE])], [predicted([[130, 100, 280, 250]], [0.9])], ("a",))
    assert (scores["ap"], scores["ap50"], scores["ap75"]) == pytest.approx((0.4, 1, 0))
    assert (scores["ap_small"], scores["ap_medium"], scores["ap_large"]) == (None, None, pytest.approx(0.4))
    # One of two boxes is found: precision 1 at the recalls 0, 0.01, ..., 0.50, which are 51 of 101.
    assert coco_scores([example([SMALL, LARGE])], [predicted([LARGE], [0.9])], ("a",))["ap"] == pytest.approx(51 / 101)
    # A wrong box ranked above the right one gives precision 1/2 at all recalls. Ranked below, or of another class, it does no harm.
    for score, label, expected in ((0.95, 0, 0.5), (0.5, 0, 1.0), (0.95, 1, 1.0)):
        found = predicted([LARGE, SMALL], [0.9, score], [0, label])
        assert coco_scores([example([LARGE])], [found], ("a", "b"))["ap"] == pytest.approx(expected)
    # A box found in a crowd counts as neither right nor wrong.
    found = predicted([LARGE, MEDIUM], [0.9, 0.95])
    assert coco_scores([example([LARGE, MEDIUM], crowd=[False, True])], [found], ("a",))["ap"] == pytest.approx(1)
    # The given area decides on the size; if the object has a mask, it is the mask's area.
    thin = coco_scores([example([MEDIUM], areas=np.array([900.0]))], [predicted([MEDIUM], [1.0])], ("a",))
    assert (thin["ap_small"], thin["ap_medium"]) == (pytest.approx(1), None)
    with pytest.raises(ValueError, match="2 images, but predictions for 1"):
        coco_scores(truth, perfect[:1], ("a", "b", "c"))


def naive_ap(examples, predictions, label: int, threshold: float) -> float:
    """
    AP of one class at one threshold, by loops.

    In order of falling score, each box takes the best true box that is still free. Precision is interpolated at 101 points.
    """
    ranked = sorted(
        (
            (s, n, b)
            for n, p in enumerate(predictions)
            for b, s, k in zip(p["boxes"], p["scores"], p["labels"])
            if k == label
        ),
        key=lambda r: -r[0],
    )
    free = [[b for b, k in zip(e.boxes, e.labels) if k == label] for e in examples]
    total, hits = sum(map(len, free)), []
    for _, number, box in ranked:
        overlaps = []
        for truth in free[number]:
            w, h = np.minimum(box[2:], truth[2:]) - np.maximum(box[:2], truth[:2])
            common = max(w, 0) * max(h, 0)
            overlaps.append(common / (np.prod(box[2:] - box[:2]) + np.prod(truth[2:] - truth[:2]) - common))
        hits.append(bool(overlaps) and max(overlaps) >= threshold)
        if hits[-1]:
            free[number].pop(int(np.argmax(overlaps)))
    recall, precision = np.cumsum(hits) / total, np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return np.mean([max(precision[recall >= r - 1e-9], default=0.0) for r in np.linspace(0, 1, 101)])


def test_coco_scores_equal_a_naive_twin():
    rng = np.random.default_rng(0)
    examples, predictions = [], []
    for _ in range(6):
        corner, side = rng.uniform(0, 200, (5, 2)), rng.uniform(20, 90, (5, 2))
        labels = rng.integers(0, 2, 5)
        examples.append(example(np.concatenate([corner, corner + side], 1), labels))
        moved = np.concatenate([corner, corner + side], 1) + rng.normal(0, 6, (5, 4))
        false = rng.uniform(0, 100, (3, 2))
        boxes = np.concatenate([moved, np.concatenate([false, false + 60], 1)])
        predictions.append(predicted(boxes, rng.permutation(8) / 8 + rng.uniform(0, 0.1), [*labels, 0, 1, 1]))
    ours = coco_scores(examples, predictions, ("a", "b"))
    thresholds = np.linspace(0.5, 0.95, 10)
    for label, name in enumerate("ab"):
        twin = np.mean([naive_ap(examples, predictions, label, t) for t in thresholds])
        assert 0.05 < ours["per_class"][name] < 0.95 and ours["per_class"][name] == pytest.approx(twin, abs=1e-6)
    assert ours["ap"] == pytest.approx(np.mean(list(ours["per_class"].values())))


# --- data sets ---


def test_coco_folder(street_boxes):
    data = load_boxes("coco_folder", str(street_boxes / "five"))
    data.check()
    assert (len(data.train), len(data.test)) == (4, 5) and data.classes[:3] == ("person", "rider", "car")
    raw = json.loads((street_boxes / "five" / "val" / "annotations.json").read_text())
    box = raw["annotations"][0]
    x, y, w, h = box["bbox"]
    first = data.test[box["image_id"]]
    assert first.boxes[0].tolist() == [x, y, x + w, y + h] and first.areas[0] == box["area"]
    assert first.labels[0] == box["category_id"] - 1 and first.size == (96, 192)
    assert len(data.limit(2, 3).train) == 2 and len(data.limit(2, 3).test) == 3


def write_coco(folder: Path, **changes) -> None:
    """Write train/ and val/ with one black image of 20x10 and one box each; `changes` replace parts of the annotations."""
    for split in ("train", "val"):
        (folder / split / "images").mkdir(parents=True)
        Image.new("RGB", (20, 10)).save(folder / split / "images" / "a.png")
        box = {"id": 7, "image_id": 1, "category_id": 3, "bbox": [2, 2, 5, 5], **changes.get("annotation", {})}
        coco = {
            "images": [{"id": 1, "file_name": "a.png", "height": 10, "width": 20, **changes.get("image", {})}],
            "categories": changes.get("categories", [{"id": 3, "name": "car"}]),
            "annotations": [] if changes.get("no_boxes") else [box],
        }
        if split == "train" and "categories" in changes:
            coco["categories"] = [{"id": 3, "name": "car"}]
        (folder / split / "annotations.json").write_text(json.dumps(coco))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotation": {"category_id": 4}}, r"annotation 7 has the category_id 4; categories are 3"),
        ({"annotation": {"image_id": 5}}, r"annotation 7: there is no image with the id 5"),
        ({"annotation": {"bbox": [2, 2, 5, -1]}}, r"annotation 7: the box from \(2, 2\) to \(7, 1\) has no extent"),
        ({"annotation": {"bbox": [12, 2, 10, 5]}}, r"annotation 7: the box .* reaches beyond its image a.png, 20x10"),
        ({"annotation": {"bbox": [30, 2, 1, 1]}}, r"reaches beyond its image"),
        ({"annotation": {"bbox": [2, 2, float("nan"), 5]}}, r"4 finite numbers"),
        ({"annotation": {"bbox": [2, 2, 5]}}, r"4 finite numbers"),
        ({"annotation": {"area": "wide"}}, r"annotation 7: area must be a number of square pixels, got 'wide'"),
        ({"annotation": {"area": float("nan")}}, r"annotation 7: area must be a number of square pixels, got nan"),
        ({"annotation": {"bbox": [10**400, 2, 5, 1]}}, r"4 finite numbers"),
        ({"annotation": {"iscrowd": "0"}}, r"annotation 7: iscrowd must be 0 or 1, got '0'"),
        ({"image": {"file_name": "b.png"}}, r"1 of 1 annotated images are missing, the first is .*b.png"),
        ({"image": {"height": 12}}, r"a.png is 20x10, but its boxes are for 20x12"),
        ({"image": {"height": None}}, r"an image needs id, file_name, height and width"),
        ({"categories": [{"id": 3, "name": "bus"}]}, r"same categories in the same order; they differ in 'bus'"),
        (
            {"annotation": {"bbox": [0.1, 0.2, 0.5, 0.8]}},
            r"train/annotations.json: all boxes lie in the first pixel .* not in shares",
        ),
        ({"no_boxes": True}, r"the 1 training images have no boxes"),
    ],
)
def test_wrong_boxes_are_named(tmp_path, changes, message):
    write_coco(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_boxes("coco_folder", str(tmp_path)).check()


def test_an_image_that_is_listed_twice_is_named(tmp_path):
    write_coco(tmp_path)
    annotations = tmp_path / "train" / "annotations.json"
    coco = json.loads(annotations.read_text())
    coco["images"] += [{**coco["images"][0], "id": "again"}]
    annotations.write_text(json.dumps(coco))
    with pytest.raises(ValueError, match=r"annotations.json lists the image a.png more than once \(1 are\)"):
        load_boxes("coco_folder", str(tmp_path))


def test_boxes_without_width_or_height_are_left_out_and_counted(tmp_path, caplog):
    """Two boxes in COCO's train2017 are like this."""
    write_coco(tmp_path)
    annotations = tmp_path / "train" / "annotations.json"
    coco = json.loads(annotations.read_text())
    coco["annotations"] += [{**coco["annotations"][0], "id": 8, "bbox": [3, 3, 4, 0]}]
    annotations.write_text(json.dumps(coco))
    assert load_boxes("coco_folder", str(tmp_path)).train[0].boxes.tolist() == [[2, 2, 7, 7]]
    assert caplog.messages == [
        f"1 boxes without width or height are left out, the first is {annotations}, annotation 8"
    ]


def test_boxes_of_which_nothing_is_left_in_the_image_are_left_out(tmp_path, caplog):
    """
    Boxes that are empty once they are cut at the border and stored in single precision.

    A detector would refuse such a box in the middle of a fit.
    """
    write_coco(tmp_path)
    annotations = tmp_path / "train" / "annotations.json"
    coco = json.loads(annotations.read_text())
    thin = [-0.5, 2, 0.4, 5], [-0.6, 2, 0.6, 5], [19, 2, 1e-7, 5], [2, 9.9999999, 5, 0.5], [19.99999999, 2, 0.5, 5]
    # One step of float32 wide. Mirrored in the image, it would have no width at all.
    thin = *thin, [1 - 2**-24, 2, 2**-24, 5]
    coco["annotations"] = [
        {**coco["annotations"][0], "id": 10 + number, "bbox": bbox, "area": number}
        for number, bbox in enumerate([*thin, [2, 2, 5, 5]])
    ]
    annotations.write_text(json.dumps(coco))
    data = load_boxes("coco_folder", str(tmp_path))
    data.check()
    (kept,) = data.train
    assert kept.boxes.tolist() == [[2, 2, 7, 7]] and kept.areas.tolist() == [len(thin)]
    assert kept.labels.tolist() == [0] and kept.crowd.tolist() == [False] and kept.boxes.dtype == np.float32
    assert caplog.messages == [
        f"6 boxes without width or height are left out, the first is {annotations}, annotation 10"
    ]
    coco["annotations"].pop()
    annotations.write_text(json.dumps(coco))
    with pytest.raises(ValueError, match="the 1 training images have no boxes"):
        load_boxes("coco_folder", str(tmp_path)).check()


def test_missing_files_are_explained(tmp_path):
    write_coco(tmp_path, annotation={"bbox": [-0.5, 2, 20.9, 5]})  # boxes less than a pixel outside are cut
    assert load_boxes("coco_folder", str(tmp_path)).test[0].boxes.tolist() == [[0, 2, 20, 7]]
    (tmp_path / "val" / "annotations.json").write_text("{")
    with pytest.raises(ValueError, match=r"annotations.json cannot be read"):
        load_boxes("coco_folder", str(tmp_path))
    (tmp_path / "val" / "annotations.json").write_text('{"images": []}')
    with pytest.raises(ValueError, match=r"must hold a list 'annotations' of objects. Expected: train/ and val/"):
        load_boxes("coco_folder", str(tmp_path))
    (tmp_path / "val" / "annotations.json").unlink()
    with pytest.raises(
        ValueError, match=r"annotations.json is missing; it holds the boxes. Expected: train/ and val/"
    ):
        load_boxes("coco_folder", str(tmp_path))
    with pytest.raises(ValueError, match=r"det_train.json is missing.*Expected: images/100k"):
        load_boxes("bdd100k", str(tmp_path))
    with pytest.raises(ValueError, match="needs --data_dir"):
        load_boxes("bdd100k")
    with pytest.raises(ValueError, match="no such folder"):
        load_boxes("coco_folder", str(tmp_path / "none"))


def test_bdd100k(tmp_path):
    (tmp_path / "labels" / "det_20").mkdir(parents=True)
    box = {"x1": 10.5, "y1": 20.0, "x2": 30.5, "y2": 60.0}
    labels = [
        {"category": "traffic sign", "box2d": box},
        {"category": "motor", "box2d": box},  # the first release's name
        {"category": "other vehicle", "box2d": box},
        {"category": "car", "box2d": box, "attributes": {"crowd": True}},
        {"category": "drivable area", "box2d": None},
    ]
    for split in ("train", "val"):
        (tmp_path / "images" / "100k" / split).mkdir(parents=True)
        for name in ("a", "b"):
            Image.new("RGB", (1280, 720)).save(tmp_path / "images" / "100k" / split / f"{name}.jpg")
        frames = [{"name": "b.jpg"}, {"name": "a.jpg", "labels": labels}]  # an image without objects has no labels
        (tmp_path / "labels" / "det_20" / f"det_{split}.json").write_text(json.dumps(frames))
    data = load_boxes("bdd100k", str(tmp_path))
    data.check()
    first, second = data.test
    assert [BDD100K_CLASSES[k] for k in first.labels] == ["traffic sign", "motorcycle", "car", "car"]
    assert first.crowd.tolist() == [False, False, True, True] and first.boxes[0].tolist() == [10.5, 20, 31.5, 61]
    assert first.areas.tolist() == [21 * 41] * 4 and second.boxes.shape == (0, 4) and len(BDD100K_CLASSES) == 10
    labels[1]["box2d"] = {"x1": -1.0, "y1": 20.0, "x2": -1.0, "y2": 60.0}
    labels[2]["box2d"] = {"x1": 1200.0, "y1": 700.0, "x2": 1280.0, "y2": 719.9}  # up to the border, and no further
    (tmp_path / "labels" / "det_20" / "det_val.json").write_text(json.dumps([{"name": "a.jpg", "labels": labels}]))
    cut = load_boxes("bdd100k", str(tmp_path)).test[0]
    assert [BDD100K_CLASSES[k] for k in cut.labels] == ["traffic sign", "car", "car"]
    assert cut.boxes[1].tolist() == [1200, 700, 1280, 720]
    for wrong in (
        [*labels, "car"],
        [{**labels[0], "category": []}],
        [{**labels[0], "box2d": [1, 2]}],
        [{**labels[0], "attributes": [1]}],
        {"a": 1},
    ):
        (tmp_path / "labels" / "det_20" / "det_val.json").write_text(json.dumps([{"name": "a.jpg", "labels": wrong}]))
        with pytest.raises(
            ValueError, match=r"det_val.json, a.jpg: (labels must be a list|a label must have a category)"
        ):
            load_boxes("bdd100k", str(tmp_path))
    (tmp_path / "labels" / "det_20" / "det_val.json").write_text(json.dumps([{"name": "a.jpg"}] * 2))
    with pytest.raises(ValueError, match="lists the image a.jpg more than once"):
        load_boxes("bdd100k", str(tmp_path))
    labels[0]["category"] = "zebra"
    frames = json.dumps([{"name": "a.jpg", "labels": labels}])
    (tmp_path / "labels" / "det_20" / "det_val.json").write_text(frames)
    with pytest.raises(ValueError, match=r"det_val.json, a.jpg: unknown category 'zebra'"):
        load_boxes("bdd100k", str(tmp_path))


def test_an_image_of_another_size_in_the_middle_is_found_before_the_fit(street_boxes, tmp_path):
    data = load_boxes("coco_folder", str(street_boxes / "five")).limit(3, 3)
    small = tmp_path / "small.png"
    Image.new("RGB", (32, 32)).save(small)
    broken = dataclasses.replace(
        data, test=(data.test[0], dataclasses.replace(data.test[1], image=small), data.test[2])
    )
    height, width = data.test[1].size
    with pytest.raises(ValueError, match=f"small.png is 32x32, but its boxes are for {width}x{height}"):
        broken.check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotation": {"bbox": [20, 2, 0.5, 5]}}, r"reaches beyond its image"),
        ({"annotation": {"bbox": [2, 10, 5, 0.5]}}, r"reaches beyond its image"),
        ({"image": {"width": 24}}, r"a.png is 20x10, but its boxes are for 24x10"),
    ],
)
def test_boxes_at_the_edge_and_images_of_another_width_are_named(tmp_path, changes, message):
    write_coco(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_boxes("coco_folder", str(tmp_path)).check()


def test_classes_are_in_the_order_of_their_ids_and_a_box_without_area_has_its_own(tmp_path):
    write_coco(tmp_path)
    for split in ("train", "val"):
        annotations = tmp_path / split / "annotations.json"
        coco = json.loads(annotations.read_text())
        coco["categories"] = [{"id": 9, "name": "bus"}, {"id": 3, "name": "car"}]
        coco["annotations"][0]["bbox"] = [-0.5, 2, 5, 5]
        annotations.write_text(json.dumps(coco))
    data = load_boxes("coco_folder", str(tmp_path))
    assert data.classes == ("car", "bus") and data.test[0].labels.tolist() == [0]
    assert data.test[0].boxes.tolist() == [[0, 2, 4.5, 7]] and data.test[0].areas.tolist() == [25]
