"""The detectors, drawn boxes, and the script as a user runs it."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_scripts import forked
from PIL import Image
from safetensors.torch import load_file
from test_boxes import write_coco
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

from evaluation.boxes import load_boxes
from evaluation.detect import main
from evaluation.detection import DetectionReadout, DetectorConfig, build_detector, detect, load_detector
from evaluation.detection_metrics import coco_scores
from evaluation.detection_recipe import DetectionRecipe, parse_detection_recipe
from evaluation.detection_report import draw_boxes
from evaluation.encoders import build
from modeling_poodle import PoodleConfig, PoodleModel

REPOSITORY = Path(__file__).resolve().parent.parent
RESNET = {"layer_type": "basic", "depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 64, 64], "embedding_size": 16}
VIT = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 64}


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
def test_detectors_take_encoders_with_stages(street_boxes, tmp_path, name, detector, refused):
    ENCODERS[name]().save_pretrained(tmp_path)
    data = load_boxes("coco_folder", str(street_boxes / "four"))
    encoder = build(str(tmp_path), len(data.classes))
    if refused:
        with pytest.raises(ValueError, match=refused):
            DetectionReadout(encoder, data, recipe(detector=detector))
        return
    readout = DetectionReadout(encoder, data, recipe(detector=detector))
    loss = readout.train()(**readout.batch(list(map(readout.read, data.train[:1])), torch.Generator().manual_seed(0)))
    loss.backward()
    # DistributedDataParallel needs every trained parameter to contribute to the loss.
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


def test_c4_splits_the_pretrained_resnet(street_boxes, resnet):
    data = load_boxes("coco_folder", str(street_boxes / "four"))
    readout = DetectionReadout(build(str(resnet), 8), data, recipe(detector="c4")).eval()
    whole, pixels = ResNetModel.from_pretrained(resnet).eval(), torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        states = whole(pixels, output_hidden_states=True).hidden_states
        stage3 = readout.model.backbone(pixels)
        assert torch.equal(stage3, states[3]) and torch.equal(
            readout.model.roi_heads.box_head.stage(stage3), states[4]
        )
    # Anchors of 32 to 512 pixels for a shorter side of 800 become 4 to 61 pixels for 96.
    sides = readout.model.rpn.anchor_generator.cell_anchors[0].diff(dim=0)
    assert readout.model.config.short_side == 96 and len(sides) == 14
    anchors = readout.model.rpn.anchor_generator.cell_anchors[0]
    square = anchors[5:10]  # those with the aspect ratio 1
    assert ((square[:, 2] - square[:, 0]) - torch.tensor([3.84, 7.68, 15.36, 30.72, 61.44])).abs().max() <= 1


@pytest.mark.parametrize("detector", ["fpn", "c4"])
def test_small_images_have_anchors_of_some_size(tmp_path, resnet, detector):
    """For a side of 10 pixels, the smallest anchor would be 0.4 pixels wide, rounded to 0. Every box would be infinitely larger."""
    write_coco(tmp_path)
    readout = DetectionReadout(
        build(str(resnet), 1), load_boxes("coco_folder", str(tmp_path)), recipe(detector=detector)
    )
    assert readout.model.config.short_side == 10
    for anchors in readout.model.rpn.anchor_generator.cell_anchors:
        assert (anchors[:, 2:] - anchors[:, :2]).min() >= 2
    example = readout.read(readout.data.train[0])
    assert readout(**readout.batch([example], torch.Generator().manual_seed(0))).isfinite()


def test_statistics_stay_and_weights_move(street_boxes, resnet):
    data = load_boxes("coco_folder", str(street_boxes / "four"))
    readout = DetectionReadout(build(str(resnet), 8), data, recipe())
    readout.train()
    norms = [m for m in readout.modules() if isinstance(m, _BatchNorm)]
    before = [(m.running_mean.clone(), m.running_var.clone(), m.num_batches_tracked.clone()) for m in norms]
    first = readout.model.backbone.encoder.embedder.embedder.convolution.weight
    was = first.detach().clone()
    optimizer = torch.optim.SGD(readout.trained(), lr=1e-3)
    readout(**readout.batch(list(map(readout.read, data.train[:2])), torch.Generator().manual_seed(0))).backward()
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
        batch = readout.batch(list(map(readout.read, data.train)), torch.Generator().manual_seed(seed))
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
def overfitted(street_boxes, resnet, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("overfitted")
    # AP50 with the seeds 0 to 2 on one thread: 0.95, 0.99, 0.99. With a learning rate of 1e-3: 0.85, 1.00, 0.98.
    options = {"max_steps": 120, "learning_rate": 6e-4, "weight_decay": 0, "per_device_train_batch_size": 2}
    options |= {"max_train_images": 2, "max_test_images": 2, "image_size": [128, 256], "boxes_per_image": 64}
    options["logging_steps"] = 30
    (result,) = main(flags(f"random:{resnet}", street_boxes / "four", folder, detector="fpn", **options))
    return folder, result


def test_faster_rcnn_overfits_two_street_images(overfitted, street_boxes):
    folder, result = overfitted
    assert result["ap50"] > 0.8, result
    saved = json.loads((folder / "evaluation.json").read_text())
    assert saved == result and (saved["steps"], saved["train_images_seen"], saved["seed"]) == (120, 240, 0)
    assert set(saved["versions"]) == {"python", "torch", "transformers", "torchvision", "pycocotools"}
    report = (folder / "report.html").read_text()
    assert report.count("<img") == 2 and "polyline" in report and "00000.png" in report
    assert not (folder / "fit.safetensors").exists()
    # The saved detector gives the measured figures.
    model = load_detector(folder / "detector")
    data = load_boxes("coco_folder", str(street_boxes / "four")).limit(None, 2)
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
    os.truncate(tmp_path / "other" / "model.safetensors", 5000)
    with pytest.raises(ValueError, match="model.safetensors cannot be read .*; it is damaged or half copied"):
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
model, data, seen = load_detector(detector), load_boxes("coco_folder", data_dir).limit(None, 3), []
found = detect_all(accelerator, lambda image: (seen.append(1), detect(model, image))[1], data)
scores = coco_scores(data.test, found, data.classes)
with open(f"{output}.{accelerator.process_index}", "w") as file:
    json.dump([len(seen), scores, [len(f["scores"]) for f in found]], file)
main(flags)
"""


def test_two_processes_give_the_figures_of_one(overfitted, street_boxes, resnet, tmp_path):
    model = load_detector(overfitted[0] / "detector")
    data = load_boxes("coco_folder", str(street_boxes / "four")).limit(None, 3)  # two training images and another
    found = [detect(model, data.image(e)) for e in data.test]
    ours = coco_scores(data.test, found, data.classes)
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    run = flags(resnet, street_boxes / "five", tmp_path / "run", detector="fpn", max_steps=2, boxes_per_image=16)
    arguments = (overfitted[0] / "detector", street_boxes / "four", tmp_path / "out", *run)
    done = forked(tmp_path / "two.py", *arguments, ranks=2)
    assert done.returncode == 0, done.stderr
    (seen0, scores0, counts0), (seen1, scores1, counts1) = (
        json.loads((tmp_path / f"out.{rank}").read_text()) for rank in (0, 1)
    )
    assert (seen0, seen1) == (2, 1) and counts0 == counts1 == [len(f["scores"]) for f in found]
    assert ours["ap50"] > 0.2 and scores0 == scores1  # boxes of the third image were not learned, so scores vary
    for key in ("ap", "ap50", "ap75", "ap_small"):
        assert scores0[key] == pytest.approx(ours[key], abs=1e-3)
    # The whole script, including the fit.
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert result["num_processes"] == 2 and result["protocol"]["per_device_train_batch_size"] > 0
    assert (result["num_test_images"], result["train_images_seen"]) == (5, 8)
    assert done.stdout.count("AP75") == 1 and (tmp_path / "run" / "detector" / "model.safetensors").is_file()


def test_same_seed_same_bytes_also_when_resumed(street_boxes, resnet, tmp_path, monkeypatch, capsys):
    options = {"detector": "c4", "max_steps": 4, "save_steps": 2, "logging_steps": 1, "boxes_per_image": 16}
    options |= {"learning_rate": 1e-3, "max_test_images": 2}
    both = [f"random:{resnet}", "--model", str(resnet)]
    first = main([*flags(both[0], street_boxes / "four", tmp_path / "a", **options), *both[1:]])
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
        main([*flags(both[0], street_boxes / "four", tmp_path / "b", **options), *both[1:]])
    assert not (tmp_path / "b" / "evaluation.json").exists()
    with pytest.raises(ValueError, match="holds an interrupted evaluation"):
        main([*flags(both[0], street_boxes / "four", tmp_path / "b", **options), *both[1:]])
    resumed = flags(both[0], street_boxes / "four", tmp_path / "b", **options, resume_from_checkpoint="latest")
    calls.extend([1] * 10)
    main([*resumed, *both[1:]])
    assert len(calls) == 4 + 10 + 2 + 4  # after resuming: two steps of the first model, four of the second
    for folder in folders:
        ours, theirs = (load_file(tmp_path / run / folder / "detector" / "model.safetensors") for run in "ab")
        assert all(torch.equal(ours[key], theirs[key]) for key in ours) and len(ours) > 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--detector", "fnp"], "detector must be one of c4, fpn .did you mean 'fpn'"),
        (["--detecter", "fpn"], "did you mean 'detector'"),
        (
            ["--dataset", "camvid"],
            "dataset must be one of street, street:walking, street:static, street:aerial, bdd100k, coco_folder, which have boxes",
        ),
        (["--image_size", "400", "300"], "image_size must be a shorter and a longer side"),
        (["--boxes_per_image", "0"], "boxes_per_image must be an integer of at least 1"),
        (["--model", "no/such-model"], "no such model|cannot be loaded"),
    ],
)
def test_wrong_input_is_refused_early(street_boxes, resnet, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        main([*flags(resnet, street_boxes / "four", tmp_path / "run"), *change])
    assert not (tmp_path / "run").exists()


def test_wrong_input_ends_with_a_sentence(resnet, tmp_path, as_script):
    said = as_script("evaluation/detect.py", *flags(resnet, tmp_path, tmp_path / "run"))
    assert re.search(r"error: coco_folder: .*train/annotations.json is missing", said)


def test_recipes_of_the_detectors():
    for name in ("c4", "fpn"):
        ours = parse_detection_recipe(["--model", "a", "--model", "b", "--detector", name])
        assert (ours.detector, ours.model, ours.image_size) == (name, ["a", "b"], None)
    assert parse_detection_recipe(["--model", "a", "--config", "c4", "--image_size", "800", "1333"]).image_size == [
        800,
        1333,
    ]
