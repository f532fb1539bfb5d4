"""Boxes, COCO's figures, the detectors, and the script as a user runs it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
)

from evaluation.boxes import BDD100K_CLASSES, BoxExample, load_boxes
from evaluation.detect import main
from evaluation.detection import DetectionReadout, DetectorConfig, build_detector, detect, load_detector
from evaluation.detection_metrics import coco_scores
from evaluation.detection_recipe import DetectionRecipe, parse_detection_recipe
from evaluation.detection_report import draw_boxes
from evaluation.encoders import build
from modeling_poodle import PoodleConfig, PoodleModel
from training.street_files import write_folder

REPOSITORY = Path(__file__).resolve().parent.parent
RESNET = {"layer_type": "basic", "depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 64, 64], "embedding_size": 16}
VIT = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 64}


@pytest.fixture(scope="module")
def street(tmp_path_factory) -> Path:
    """Folder `four` (trained and tested on the same four street images) and `five` (tested on these and a fifth)."""
    root = tmp_path_factory.mktemp("street")
    write_folder(root / "five" / "val", 5, 96, 192, seed=3, num_processes=2)
    annotations = root / "five" / "val" / "annotations.json"
    coco = json.loads(annotations.read_text())
    # A car of four pixels proves nothing.
    coco["annotations"] = [a for a in coco["annotations"] if min(a["bbox"][2:]) >= 8]
    annotations.write_text(json.dumps(coco))
    four = {**coco, "images": coco["images"][:4], "annotations": [a for a in coco["annotations"] if a["image_id"] < 4]}
    for split in ("train", "val"):
        (root / "four" / split).mkdir(parents=True)
        (root / "four" / split / "annotations.json").write_text(json.dumps(four))
        os.symlink(root / "five" / "val" / "images", root / "four" / split / "images")
    os.symlink(root / "four" / "train", root / "five" / "train")
    return root


@pytest.fixture(scope="module")
def resnet(tmp_path_factory) -> Path:
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("models") / "resnet"
    ResNetModel(ResNetConfig(**RESNET)).save_pretrained(folder)
    return folder


def flags(model, data, output_dir, **more) -> list[str]:
    values = [item for key, value in more.items() for item in (f"--{key}", *map(str, np.atleast_1d(value)))]
    named = ["--model", str(model), "--dataset", "coco_folder", "--data_dir", str(data)]
    return [*named, "--output_dir", str(output_dir), *values]


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
    assert scores["per_class"] == {"a": pytest.approx(1), "b": pytest.approx(1), "c": None}  # c is nowhere
    assert [scores[k] for k in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")] == pytest.approx([1] * 6)
    assert coco_scores(truth, [predicted([], [])] * 2, ("a", "b", "c"))["ap"] == 0
    # Shifted by a fifth of its width: IoU 2/3, right at the thresholds 0.50, 0.55, 0.60 and 0.65 of ten.
    scores = coco_scores([example([LARGE])], [predicted([[130, 100, 280, 250]], [0.9])], ("a",))
    assert (scores["ap"], scores["ap50"], scores["ap75"]) == pytest.approx((0.4, 1, 0))
    assert (scores["ap_small"], scores["ap_medium"], scores["ap_large"]) == (None, None, pytest.approx(0.4))
    # One of two found: precision 1 at the recalls 0, 0.01, ..., 0.50 of 101.
    assert coco_scores([example([SMALL, LARGE])], [predicted([LARGE], [0.9])], ("a",))["ap"] == pytest.approx(51 / 101)
    # A wrong box above the right one: precision 1/2 at all recalls; below it, or of another class: no harm.
    for score, label, expected in ((0.95, 0, 0.5), (0.5, 0, 1.0), (0.95, 1, 1.0)):
        found = predicted([LARGE, SMALL], [0.9, score], [0, label])
        assert coco_scores([example([LARGE])], [found], ("a", "b"))["ap"] == pytest.approx(expected)
    # What is found in a crowd counts neither way.
    found = predicted([LARGE, MEDIUM], [0.9, 0.95])
    assert coco_scores([example([LARGE, MEDIUM], crowd=[False, True])], [found], ("a",))["ap"] == pytest.approx(1)
    # Size is told by the given area: a mask's where there is one.
    thin = coco_scores([example([MEDIUM], areas=np.array([900.0]))], [predicted([MEDIUM], [1.0])], ("a",))
    assert (thin["ap_small"], thin["ap_medium"]) == (pytest.approx(1), None)
    with pytest.raises(ValueError, match="2 images, but predictions for 1"):
        coco_scores(truth, perfect[:1], ("a", "b", "c"))


def naive_ap(examples, predictions, label: int, threshold: float) -> float:
    """One class at one threshold: boxes by falling score take the best free true box; 101 points of interpolated precision."""
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


def test_coco_folder(street):
    data = load_boxes("coco_folder", str(street / "five"))
    data.check()
    assert (len(data.train), len(data.test)) == (4, 5) and data.classes[:3] == ("person", "rider", "car")
    raw = json.loads((street / "five" / "val" / "annotations.json").read_text())
    box = raw["annotations"][0]
    x, y, w, h = box["bbox"]
    first = data.test[box["image_id"]]
    assert first.boxes[0].tolist() == [x, y, x + w, y + h] and first.areas[0] == box["area"]
    assert first.labels[0] == box["category_id"] - 1 and first.size == (96, 192)
    assert len(data.limit(2, 3).train) == 2 and len(data.limit(2, 3).test) == 3


def write_coco(folder: Path, **changes) -> None:
    """train/ and val/ of one black image, 20x10, with one box; `changes` replace parts of val's annotations."""
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
        ({"annotation": {"bbox": [2, 2, 5, 0]}}, r"annotation 7: the box from \(2, 2\) to \(7, 2\) has no extent"),
        ({"annotation": {"bbox": [12, 2, 10, 5]}}, r"annotation 7: the box .* is outside its image a.png, 20x10"),
        ({"annotation": {"bbox": [30, 2, 1, 1]}}, r"outside its image"),
        ({"annotation": {"bbox": [2, 2, float("nan"), 5]}}, r"4 finite numbers"),
        ({"annotation": {"bbox": [2, 2, 5]}}, r"4 finite numbers"),
        ({"image": {"file_name": "b.png"}}, r"1 of 1 annotated images are missing, the first is .*b.png"),
        ({"image": {"height": 12}}, r"a.png is 20x10, but its boxes are for 20x12"),
        ({"image": {"height": None}}, r"an image needs id, file_name, height and width"),
        ({"categories": [{"id": 3, "name": "bus"}]}, r"same categories in the same order; they differ in 'bus'"),
        ({"no_boxes": True}, r"the 1 training images have no boxes"),
    ],
)
def test_wrong_boxes_are_named(tmp_path, changes, message):
    write_coco(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_boxes("coco_folder", str(tmp_path)).check()


def test_missing_files_are_explained(tmp_path):
    write_coco(tmp_path, annotation={"bbox": [-0.5, 2, 20.9, 5]})  # less than a pixel outside is cut
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
    assert first.crowd.tolist() == [False, False, True, True] and first.boxes[0].tolist() == [10.5, 20, 30.5, 60]
    assert first.areas.tolist() == [800.0] * 4 and second.boxes.shape == (0, 4) and len(BDD100K_CLASSES) == 10
    labels[0]["category"] = "zebra"
    frames = json.dumps([{"name": "a.jpg", "labels": labels}])
    (tmp_path / "labels" / "det_20" / "det_val.json").write_text(frames)
    with pytest.raises(ValueError, match=r"det_val.json, a.jpg: unknown category 'zebra'"):
        load_boxes("bdd100k", str(tmp_path))


# --- detectors ---


def recipe(**values) -> DetectionRecipe:
    return DetectionRecipe(model=["x"], **values)


ENCODERS = {
    "convnext": lambda: ConvNextModel(ConvNextConfig(depths=[1] * 4, hidden_sizes=[8, 8, 16, 24])),
    "swin": lambda: SwinModel(SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, image_size=64)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(hidden_size=24, num_hidden_layers=4, num_attention_heads=2)),
    "vit": lambda: ViTModel(ViTConfig(**VIT)),
    "poodle": lambda: PoodleModel(
        PoodleConfig(backbone_config={"model_type": "resnet", **RESNET}, decoder_reduction=2)
    ),
}


@pytest.mark.parametrize(
    ("name", "detector", "refused"),
    [
        ("convnext", "fpn", None),
        ("swin", "fpn", None),
        ("poodle", "fpn", None),
        ("poodle", "c4", None),
        ("convnext", "c4", r"c4 needs a ResNet, .* not a 'convnext'; c4 works with ResNets"),
        ("dinov2", "fpn", r"does not fit a 'dinov2' encoder with strides .*; c4 works with ResNets .* four stages"),
        ("vit", "c4", r"an encoder with stages is needed, which AutoBackbone builds; 'vit' has none; c4 works with"),
    ],
)
def test_detectors_take_encoders_with_stages(street, tmp_path, name, detector, refused):
    ENCODERS[name]().save_pretrained(tmp_path)
    data = load_boxes("coco_folder", str(street / "four"))
    encoder = build(str(tmp_path), len(data.classes))
    if refused:
        with pytest.raises(ValueError, match=refused):
            DetectionReadout(encoder, data, recipe(detector=detector))
        return
    readout = DetectionReadout(encoder, data, recipe(detector=detector))
    loss = readout.train()(**readout.batch(list(data.train[:1]), torch.Generator().manual_seed(0)))
    loss.backward()
    # DistributedDataParallel needs each trained parameter to have a part in the loss.
    assert all(p.grad is not None for p in readout.trained())
    idle = [n for n, p in readout.named_parameters() if p.grad is None]
    assert idle == [f"model.backbone.encoder.swin.layernorm.{w}" for w in ("weight", "bias") if name == "swin"]
    found = readout.predict(data.image(data.test[0]))
    assert found["boxes"].shape == (len(found["scores"]), 4) and found["labels"].max(initial=0) < len(data.classes)


def test_timm():
    pytest.importorskip("timm")
    config = {"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet18"}, "classes": ["a"]}
    config |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_size": None, "short_side": 64}
    fpn = build_detector(DetectorConfig(detector="fpn", **config)).eval()
    c4 = build_detector(DetectorConfig(detector="c4", **config)).eval()
    pixels = torch.rand(1, 3, 64, 96)
    assert [tuple(m.shape[1:]) for m in fpn.backbone(pixels).values()][:4] == [
        (256, 16, 24), (256, 8, 12), (256, 4, 6), (256, 2, 3)
    ]  # fmt: skip
    assert c4.backbone(pixels).shape == (1, 256, 4, 6) and c4.roi_heads.box_head(torch.rand(2, 256, 14, 14)).shape == (
        2,
        512,
    )


def test_c4_splits_the_pretrained_resnet(street, resnet):
    data = load_boxes("coco_folder", str(street / "four"))
    readout = DetectionReadout(build(str(resnet), 8), data, recipe(detector="c4")).eval()
    whole, pixels = ResNetModel.from_pretrained(resnet).eval(), torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        states = whole(pixels, output_hidden_states=True).hidden_states
        stage3 = readout.model.backbone(pixels)
        assert torch.equal(stage3, states[3]) and torch.equal(
            readout.model.roi_heads.box_head.stage(stage3), states[4]
        )
    # Anchors of 32 to 512 pixels at a shorter side of 800, here of 96: 4 to 61.
    sides = readout.model.rpn.anchor_generator.cell_anchors[0].diff(dim=0)
    assert readout.model.config.short_side == 96 and len(sides) == 14
    anchors = readout.model.rpn.anchor_generator.cell_anchors[0]
    square = anchors[5:10]  # the ratio 1
    assert ((square[:, 2] - square[:, 0]) - torch.tensor([3.84, 7.68, 15.36, 30.72, 61.44])).abs().max() <= 1


def test_statistics_stay_and_weights_move(street, resnet):
    data = load_boxes("coco_folder", str(street / "four"))
    readout = DetectionReadout(build(str(resnet), 8), data, recipe())
    readout.train()
    norms = [m for m in readout.modules() if isinstance(m, _BatchNorm)]
    before = [(m.running_mean.clone(), m.running_var.clone(), m.num_batches_tracked.clone()) for m in norms]
    first = readout.model.backbone.encoder.embedder.embedder.convolution.weight
    was = first.detach().clone()
    optimizer = torch.optim.SGD(readout.trained(), lr=1e-3)
    readout(**readout.batch(list(data.train[:2]), torch.Generator().manual_seed(0))).backward()
    optimizer.step()
    assert len(norms) == 12 and readout.training and not torch.equal(first, was)
    for norm, (mean, var, count) in zip(norms, before):
        assert torch.equal(norm.running_mean, mean) and torch.equal(norm.running_var, var)
        assert norm.num_batches_tracked == count


def test_flips_move_the_boxes_with_the_image(tmp_path, resnet):
    write_coco(tmp_path)
    for split in ("train", "val"):
        image = np.zeros((10, 20, 3), np.uint8)
        image[2:7, 2:7] = 255  # the box
        Image.fromarray(image).save(tmp_path / split / "images" / "a.png")
    data = load_boxes("coco_folder", str(tmp_path))
    readout = DetectionReadout(build(str(resnet), 1), data, recipe())
    lefts = set()
    for seed in range(8):
        batch = readout.batch(list(data.train), torch.Generator().manual_seed(seed))
        x0, y0, x1, y1 = (int(v) for v in batch["targets"][0]["boxes"][0])
        lefts.add(x0)
        assert batch["images"][0][:, y0:y1, x0:x1].eq(1).all() and batch["images"][0].sum() == 3 * 25
        assert batch["targets"][0]["labels"].tolist() == [1]
    assert lefts == {2, 13}


def test_drawn_boxes_are_where_they_are():
    drawn = draw_boxes(np.zeros((100, 640, 3), np.uint8), np.array([[10, 20, 30, 60]]), np.array([0]), ("a",))
    rows, columns = np.nonzero(drawn.any(axis=2))
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (10, 20, 30, 60)


# --- the script ---


@pytest.fixture(scope="module")
def overfitted(street, resnet, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("overfitted")
    options = {"max_steps": 120, "learning_rate": 1e-3, "weight_decay": 0, "per_device_train_batch_size": 4}
    options |= {"image_size": [192, 384], "boxes_per_image": 64, "logging_steps": 30}
    (result,) = main(flags(f"random:{resnet}", street / "four", folder, detector="fpn", **options))
    return folder, result


def test_faster_rcnn_overfits_four_street_images(overfitted, street):
    folder, result = overfitted
    assert result["ap50"] > 0.8, result
    saved = json.loads((folder / "evaluation.json").read_text())
    assert saved == result and (saved["steps"], saved["train_images_seen"], saved["seed"]) == (120, 480, 0)
    assert set(saved["versions"]) == {"python", "torch", "transformers", "torchvision", "pycocotools"}
    report = (folder / "report.html").read_text()
    assert report.count("<img") == 4 and "polyline" in report and "00000.png" in report
    assert not (folder / "fit.safetensors").exists()
    # What was saved detects what was measured.
    model = load_detector(folder / "detector")
    data = load_boxes("coco_folder", str(street / "four"))
    assert tuple(model.config.classes) == data.classes
    scores = coco_scores(data.test, [detect(model, data.image(e)) for e in data.test], data.classes)
    assert {key: result[key] for key in scores} == scores


def test_a_detector_that_is_none_is_refused(overfitted, tmp_path):
    with pytest.raises(ValueError, match="holds no detector: config.json is missing"):
        load_detector(tmp_path)
    shutil.copytree(overfitted[0] / "detector", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "classes": ["a"]}))
    with pytest.raises(ValueError, match="weights do not fit config.json"):
        load_detector(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="config.json is no detector's"):
        load_detector(tmp_path / "other")


TWO_PROCESSES = """
import json, sys
from evaluation.boxes import load_boxes
from evaluation.detect import detect_all, main
from evaluation.detection import detect, load_detector
from evaluation.detection_metrics import coco_scores
from evaluation.outputs import make_accelerator

detector, data_dir, output, *flags = sys.argv[1:]
accelerator = make_accelerator()
model, data, seen = load_detector(detector), load_boxes("coco_folder", data_dir), []
found = detect_all(accelerator, lambda image: (seen.append(1), detect(model, image))[1], data)
scores = coco_scores(data.test, found, data.classes)
with open(f"{output}.{accelerator.process_index}", "w") as file:
    json.dump([len(seen), scores, [len(f["scores"]) for f in found]], file)
main(flags)
"""


def test_two_processes_give_the_figures_of_one(overfitted, street, resnet, tmp_path):
    model, data = load_detector(overfitted[0] / "detector"), load_boxes("coco_folder", str(street / "five"))
    found = [detect(model, data.image(e)) for e in data.test]
    ours = coco_scores(data.test, found, data.classes)
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    run = flags(resnet, street / "five", tmp_path / "run", detector="fpn", max_steps=2, boxes_per_image=16)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "two.py"), str(overfitted[0] / "detector"), str(street / "five"), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [*command, *run], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    (seen0, scores0, counts0), (seen1, scores1, counts1) = (
        json.loads((tmp_path / f"out.{rank}").read_text()) for rank in (0, 1)
    )
    assert (seen0, seen1) == (3, 2) and counts0 == counts1 == [len(f["scores"]) for f in found]
    assert ours["ap50"] > 0.5 and scores0 == scores1
    for key in ("ap", "ap50", "ap75", "ap_small"):
        assert scores0[key] == pytest.approx(ours[key], abs=1e-3)
    # The whole script, fit included.
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert (result["num_test_images"], result["train_images_seen"]) == (5, 8)
    assert done.stdout.count("AP75") == 1 and (tmp_path / "run" / "detector" / "model.safetensors").is_file()


def test_same_seed_same_bytes_also_when_resumed(street, resnet, tmp_path, monkeypatch, capsys):
    options = {"detector": "c4", "max_steps": 4, "save_steps": 2, "logging_steps": 1, "boxes_per_image": 16}
    options |= {"learning_rate": 1e-3, "max_test_images": 2}
    both = [f"random:{resnet}", "--model", str(resnet)]
    first = main([*flags(both[0], street / "four", tmp_path / "a", **options), *both[1:]])
    assert [r["model"] for r in first] == [both[0], str(resnet)] and "AP75" in capsys.readouterr().out
    folders = [p.parent.relative_to(tmp_path / "a") for p in sorted((tmp_path / "a").rglob("detector"))]
    assert len(folders) == 2 and json.loads((tmp_path / "a" / "evaluation.json").read_text()) == {"results": first}
    original, calls = DetectionReadout.forward, []

    def stop(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DetectionReadout, "forward", stop)
    with pytest.raises(KeyboardInterrupt):
        main([*flags(both[0], street / "four", tmp_path / "b", **options), *both[1:]])
    assert not (tmp_path / "b" / "evaluation.json").exists()
    with pytest.raises(ValueError, match="holds an interrupted evaluation"):
        main([*flags(both[0], street / "four", tmp_path / "b", **options), *both[1:]])
    resumed = flags(both[0], street / "four", tmp_path / "b", **options, resume_from_checkpoint="latest")
    calls.extend([1] * 10)
    main([*resumed, *both[1:]])
    assert len(calls) == 4 + 10 + 2 + 4  # the last two steps of the first model, all four of the second
    for folder in folders:
        ours, theirs = (load_file(tmp_path / run / folder / "detector" / "model.safetensors") for run in "ab")
        assert all(torch.equal(ours[key], theirs[key]) for key in ours) and len(ours) > 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--detector", "fnp"], "detector must be one of c4, fpn .did you mean 'fpn'"),
        (["--detecter", "fpn"], "did you mean 'detector'"),
        (["--dataset", "camvid"], "dataset must be one of street, bdd100k, coco_folder, which have boxes"),
        (["--image_size", "400", "300"], "image_size must be a shorter and a longer side"),
        (["--boxes_per_image", "0"], "boxes_per_image must be an integer of at least 1"),
        (["--model", "no/such-model"], "no such model|cannot be loaded"),
    ],
)
def test_wrong_input_is_refused_early(street, resnet, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        main([*flags(resnet, street / "four", tmp_path / "run"), *change])
    assert not (tmp_path / "run").exists()


def test_wrong_input_ends_with_a_sentence(street, resnet, tmp_path):
    done = subprocess.run(
        [sys.executable, "evaluation/detect.py", *flags(resnet, tmp_path, tmp_path / "run")],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"error: coco_folder: .*train/annotations.json is missing", done.stderr)


def test_recipes_of_the_detectors():
    for name in ("c4", "fpn"):
        ours = parse_detection_recipe(["--model", "a", "--model", "b", "--detector", name])
        assert (ours.detector, ours.model, ours.image_size) == (name, ["a", "b"], None)
    assert parse_detection_recipe(["--model", "a", "--config", "c4", "--image_size", "800", "1333"]).image_size == [
        800,
        1333,
    ]
