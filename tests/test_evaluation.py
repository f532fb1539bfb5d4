"""Data layouts, encoders, readouts, and the script as a user runs it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinModel,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTModel,
    pipeline,
)

from evaluation import data as data_module
from evaluation.data import load_dataset
from evaluation.encoders import Encoder, build
from evaluation.engine import draw, fingerprint
from evaluation.readouts import KnnReadout, LinearReadout, UperNetReadout, majority
from evaluation.recipe import EvaluationRecipe, parse_recipe
from evaluation.segment import main
from modeling_poodle import PoodleConfig, PoodleForSemanticSegmentation, PoodleModel
from training.street_files import write_folder

REPOSITORY = Path(__file__).resolve().parent.parent
RESNET = {"layer_type": "basic", "depths": [1, 1, 1, 1], "hidden_sizes": [16, 16, 32, 32], "embedding_size": 16}


def squares(folder: Path, count: int, seed: int, size=(64, 96)) -> None:
    """Images whose class can be seen: a red or blue square on green."""
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        label = np.zeros(size, np.uint8)
        top, left = rng.integers(0, size[0] - 32), rng.integers(0, size[1] - 32)
        label[top : top + 32, left : left + 32] = 1 + number % 2
        image = np.array([[40, 160, 40], [200, 30, 30], [30, 30, 200]], np.float32)[label] + rng.normal(
            0, 8, (*size, 3)
        )
        label[:2] = 255
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{number}.png")
        Image.fromarray(label).save(folder / "labels" / f"{number}.png")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    squares(folder / "train", 12, 0)
    squares(folder / "val", 5, 1)
    (folder / "classes.json").write_text(json.dumps({"classes": ["grass", "red <b>", "blue"], "ignore_index": 255}))
    return folder


@pytest.fixture(scope="module")
def poodle(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    config = PoodleConfig(backbone_config={"model_type": "resnet", **RESNET}, decoder_reduction=2)
    PoodleModel(config).save_pretrained(folder / "model")
    return folder


# --- data ---


def test_folder_layouts(tmp_path, shapes):
    data = load_dataset("folder", str(shapes)).with_groups()
    assert data.classes == ("grass", "red <b>", "blue") and (len(data.train), len(data.test)) == (12, 5)
    assert data.groups["large"] == ["grass", "red <b>", "blue"] and data.groups["rare"] == []
    squares(tmp_path, 7, 0)
    (tmp_path / "classes.json").write_text('["a", "b", "c"]')
    flat = load_dataset("folder", str(tmp_path))
    assert [e.name for e in flat.test] == ["2", "5"] and len(flat.train) == 5
    assert len(flat.limit(3, 1).train) == 3 and len(flat.limit(3, 1).test) == 1
    label = np.asarray(Image.open(tmp_path / "labels" / "3.png")).copy()
    label[9, 9] = 7
    Image.fromarray(label).save(tmp_path / "labels" / "3.png")
    with pytest.raises(ValueError, match=r"labels/3.png has the label 7, but there are classes 0 to 2"):
        flat.label(flat.train[2])
    (tmp_path / "labels" / "4.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 7 images .* have no label .*4.png"):
        load_dataset("folder", str(tmp_path))
    (tmp_path / "classes.json").write_text('{"classes": ["a", "a"]}')
    with pytest.raises(ValueError, match="different names"):
        load_dataset("folder", str(tmp_path))


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
        write(tmp_path / "wt/images" / split / "venice/1.jpg", picture)
        write(tmp_path / "wt/annotations" / split / "venice/1.png", [[0, 1, 2, 2, 0, 1]] * 4)
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
        ("wt_sem", "wt", [255, 0, 1, 1, 255, 0]),
    ):
        data = load_dataset(name, str(tmp_path / folder))
        data.check()
        assert data.label(data.test[0])[0].tolist() == row, name
    assert load_dataset("ade20k", str(tmp_path / "ade")).classes[:2] == ("name 1", "name 2")
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


# --- encoders ---


@pytest.mark.parametrize(
    ("model", "channels", "name"),
    [
        (lambda: ResNetForImageClassification(ResNetConfig(**RESNET)), 32, "stage4"),
        (
            lambda: ConvNextForImageClassification(ConvNextConfig(depths=[1] * 4, hidden_sizes=[8, 8, 16, 24])),
            24,
            "stage4",
        ),
        (lambda: SwinModel(SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, image_size=64)), 64, "stage4"),
        (lambda: Dinov2Model(Dinov2Config(hidden_size=24, num_hidden_layers=3, num_attention_heads=2)), 24, "stage3"),
        (
            lambda: ViTModel(
                ViTConfig(
                    hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, image_size=64
                )
            ),
            24,
            "stage3",
        ),
    ],
    ids=["resnet", "convnext", "swin", "dinov2", "vit"],
)
def test_any_encoder_gives_dense_features(tmp_path, model, channels, name):
    torch.manual_seed(5)  # not the seed of the untrained twin
    model = model().eval()
    model.save_pretrained(tmp_path)
    encoder = build(str(tmp_path), 5)
    assert (encoder.channels, encoder.features_name) == (channels, name)
    image = np.random.default_rng(0).integers(0, 256, (96, 150, 3), dtype=np.uint8)
    with torch.no_grad():
        features = encoder(encoder.normalise(image))
        again = build(str(tmp_path), 5, seed=9)(encoder.normalise(image))
        untrained = build(f"random:{tmp_path}", 5)(encoder.normalise(image))
    assert features.shape[:2] == (1, channels) and features.shape[2] >= 3
    assert torch.equal(features, again) and not torch.allclose(features, untrained)
    if name == "stage4" and channels == 32:
        with torch.no_grad():
            whole = model.resnet(encoder.normalise(image)).last_hidden_state
        assert torch.equal(features, whole)


def test_vits_are_read_by_sliding_windows(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=64)
    vit = ViTModel(config, add_pooling_layer=False).eval()
    vit.save_pretrained(tmp_path)
    encoder = build(str(tmp_path), 3)
    assert encoder.inference == "sliding window of 64, stride 32 (a saved readout reads the whole image)"
    image = torch.rand(1, 3, 64, 112)
    with torch.no_grad():
        ours = encoder(image)
        total, count = torch.zeros(1, 24, 4, 7), torch.zeros(7)
        for left in (0, 32, 48):
            tokens = vit(image[..., left : left + 64]).last_hidden_state[:, 1:]
            total[..., left // 16 : left // 16 + 4] += tokens.transpose(1, 2).unflatten(2, (4, 4))
            count[left // 16 : left // 16 + 4] += 1
    torch.testing.assert_close(ours, total / count, rtol=1e-5, atol=1e-5)
    assert encoder(torch.rand(1, 3, 40, 50)).shape[2:] == (3, 4)  # smaller than a window: padded


def test_timm(tmp_path):
    pytest.importorskip("timm")
    config = {"backbone": "resnet18", "out_indices": [4], "model_type": "timm_backbone"}
    model = PoodleForSemanticSegmentation(PoodleConfig(backbone_config=config, num_decoder_blocks=0, num_labels=4))
    encoder = Encoder("timm/resnet18", model.eval())
    assert encoder(torch.rand(1, 3, 64, 96)).shape == (1, 512, 2, 3)


def test_timm_s_pretrained_weights_are_read_and_its_vits_in_windows(monkeypatch):
    timm = pytest.importorskip("timm")
    original, made = timm.create_model, []

    def create(name, pretrained=False, **kwargs):  # what a download would bring
        model = original(name, pretrained=False, **kwargs)
        if pretrained:
            made.append(model)
            for key, value in model.state_dict().items():
                if key.endswith("running_mean"):
                    value.fill_(0.25)
        return model

    monkeypatch.setattr(timm, "create_model", create)
    encoder = build("timm/resnet18", 4)
    ours = encoder.model.poodle.encoder._backbone.state_dict()
    assert len(made) == 1 and all(torch.equal(value, ours[key]) for key, value in made[0].state_dict().items())
    assert encoder.features_name == "last stage"
    build("random:timm/resnet18", 4)
    assert len(made) == 1  # the untrained twin asks for no weights
    vit = build("random:timm/vit_tiny_patch16_224", 4)
    assert vit.inference.startswith("sliding window of 224")
    assert vit(torch.rand(1, 3, 230, 240)).shape[2:] == (15, 15)


def test_earlier_stages_of_encoders_with_norms_for_each_map(tmp_path):
    """ConvNeXt's checkpoint has a norm for the maps that were read; those of others begin as the identity."""
    config = ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
    ConvNextForImageClassification(config).save_pretrained(tmp_path)
    assert build(str(tmp_path), 3, features="stage2")(torch.rand(1, 3, 64, 96)).shape == (1, 16, 8, 12)


def test_maps_of_images_off_the_patch_cover_the_whole_image(tmp_path):
    """An image whose left half is dark: the map's step is where the image's is, whatever the patch."""
    torch.manual_seed(0)
    Dinov2Model(
        Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, patch_size=14, image_size=56)
    ).save_pretrained(tmp_path)
    encoder = build(str(tmp_path), 3)
    with torch.no_grad():
        features = encoder(torch.rand(1, 3, 60, 100))
        resized = encoder(F.interpolate(torch.rand(1, 3, 60, 100), size=(70, 112), mode="bilinear"))
    assert features.shape == resized.shape == (1, 24, 5, 8)


def test_wrong_models_are_named(tmp_path, poodle):
    with pytest.raises(ValueError, match="no such map|must be one of stem, stage1"):
        build(str(poodle), 3, features="stage9")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no model"):
        build(str(tmp_path / "empty"), 3)
    ResNetForImageClassification(ResNetConfig(**RESNET)).save_pretrained(tmp_path / "resnet")
    other = ResNetConfig(**{**RESNET, "depths": [2, 1, 1, 1]})
    other.save_pretrained(tmp_path / "resnet")  # the config of one, the weights of another
    with pytest.raises(ValueError, match="another architecture"):
        build(str(tmp_path / "resnet"), 3)
    from transformers import BertConfig, BertModel

    BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="is no encoder that can be loaded"):
        build(str(tmp_path / "bert"), 3)


# --- readouts ---


def recipe(**values) -> EvaluationRecipe:
    return EvaluationRecipe(model=["x"], **values)


def test_the_points_loss_is_the_cross_entropy_of_the_upsampled_logits(shapes, poodle):
    data = load_dataset("folder", str(shapes))
    readout = LinearReadout(build(str(poodle), 3), data, recipe())
    readout.prepare(list(data.train[:2]))
    batch = readout.batch(list(data.train[:2]), torch.Generator().manual_seed(0))
    torch.nn.init.normal_(readout.classifier.weight)
    estimates = [
        readout(**readout.batch(list(data.train[:2]), torch.Generator().manual_seed(s))).item() for s in range(8)
    ]
    full = []
    for features, example in zip(batch["features"], data.train[:2]):
        logits = F.interpolate(readout.classifier(features[None]), size=(64, 96), mode="bilinear", align_corners=False)
        label = torch.from_numpy(data.label(example).astype(np.int64))[None]
        full.append(F.cross_entropy(logits, label, ignore_index=255).item())
    assert np.mean(estimates) == pytest.approx(np.mean(full), rel=0.01)


def test_saved_linear_readout_predicts_alike_and_leaves_the_encoder(shapes, poodle, tmp_path):
    data = load_dataset("folder", str(shapes))
    encoder = build(str(poodle), 3, data.classes)
    before = fingerprint(encoder.model.poodle)
    readout = LinearReadout(encoder, data, recipe())
    readout.prepare(list(data.train))
    torch.nn.init.normal_(readout.classifier.weight)
    image = data.image(data.test[0])
    predicted = readout.predict(image)
    readout.save(tmp_path)
    assert (readout.predict(image) == predicted).all()  # saving changes nothing
    saved = PoodleForSemanticSegmentation.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = saved(encoder.normalise(image)).logits
    again = F.interpolate(logits, size=(64, 96), mode="bilinear", align_corners=False).argmax(1)[0]
    assert (again.numpy() == predicted).mean() > 0.999
    assert fingerprint(saved.poodle) == before == fingerprint(encoder.model.poodle)


def test_feature_cache_holds_what_is_computed_and_keeps_its_limit(shapes, poodle):
    data = load_dataset("folder", str(shapes))
    kept, anew = (LinearReadout(build(str(poodle), 3), data, recipe(feature_cache_gb=g)) for g in (1.0, 1e-6))
    for readout in (kept, anew):
        readout.prepare(list(data.train))
    assert kept.cached and not anew.cached
    ours, theirs = (r.batch(list(data.train[3:5]), torch.Generator().manual_seed(0)) for r in (kept, anew))
    for a, b in zip(ours["features"], theirs["features"]):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)  # half precision


def test_knn_finds_the_training_images_themselves(shapes, poodle):
    data = load_dataset("folder", str(shapes))
    readout = KnnReadout(build(str(poodle), 3), data, recipe(num_neighbours=1))
    readout.prepare([])
    example = data.train[0]
    predicted = majority(readout.predict(data.image(example)), (8, 12), 3)
    truth = majority(data.label(example), (8, 12), 3)
    assert (predicted == truth)[truth != 255].float().mean() > 0.97


def test_every_image_is_drawn_once_an_epoch():
    drawn = [index for step in range(6) for index in draw(8, 4, step, seed=1)]
    assert [sorted(drawn[k : k + 8]) for k in (0, 8, 16)] == [list(range(8))] * 3
    assert drawn[:8] != drawn[8:16]


# --- the script ---


def flags(shapes, output_dir, *models, readout="linear", **more):
    values = [item for key, value in more.items() for item in (f"--{key}", str(value))]
    named = [item for model in models for item in ("--model", str(model))]
    return [
        *named,
        "--dataset",
        "folder",
        "--data_dir",
        str(shapes),
        "--readout",
        readout,
        "--output_dir",
        str(output_dir),
        *values,
    ]


def test_linear_learns_is_reproducible_and_resumes(shapes, poodle, tmp_path, monkeypatch, capsys):
    options = {"num_train_epochs": 30, "save_steps": 7, "logging_steps": 5}
    (first,) = main(flags(shapes, tmp_path / "a", poodle, **options))
    assert first["miou"] > 0.5 and first["features"] == "decoder" and first["steps"] == 45
    saved = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    assert saved["miou"] == first["miou"] and set(saved["versions"]) == {"python", "torch", "transformers"}
    report = (tmp_path / "a" / "report.html").read_text()
    assert "red &lt;b&gt;" in report and "red <b>" not in report and report.count("<img") == 3 and "polyline" in report
    (second,) = main(flags(shapes, tmp_path / "b", poodle, **options))
    assert second["per_class"] == first["per_class"]
    # Interrupted after a save, then resumed.
    from evaluation import engine

    original, calls = LinearReadout.forward, []

    def stop(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 24:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LinearReadout, "forward", stop)
    with pytest.raises(KeyboardInterrupt):
        main(flags(shapes, tmp_path / "c", poodle, **options))
    assert not (tmp_path / "c" / "evaluation.json").exists() and (tmp_path / "c" / "fit.safetensors").exists()
    monkeypatch.setattr(LinearReadout, "forward", original)
    with pytest.raises(ValueError, match="holds an interrupted evaluation"):
        main(flags(shapes, tmp_path / "c", poodle, **options))
    with pytest.raises(ValueError, match="is of another evaluation"):
        main(flags(shapes, tmp_path / "c", poodle, **{**options, "seed": 2}, resume_from_checkpoint="latest"))
    starts = []
    load = engine.load_fit
    monkeypatch.setattr(engine, "load_fit", lambda *a: (starts.append(load(*a)), starts[-1])[1])
    (third,) = main(flags(shapes, tmp_path / "c", poodle, **options, resume_from_checkpoint="latest"))
    assert starts[0][0] == 21 and third["per_class"] == first["per_class"]
    assert not (tmp_path / "c" / "fit.safetensors").exists()
    capsys.readouterr()


def test_a_finished_evaluation_is_replaced_only_once_the_input_is_right(shapes, poodle, tmp_path):
    main(flags(shapes, tmp_path / "run", poodle, max_steps=2))
    other = tmp_path / "run" / "other"  # somebody else's, below
    main(flags(shapes, other, poodle, readout="knn"))
    with pytest.raises(ValueError, match="no such model|holds no model"):
        main(flags(shapes, tmp_path / "run", tmp_path / "nothing", max_steps=2))
    assert (tmp_path / "run" / "evaluation.json").is_file() and (tmp_path / "run" / "readout").is_dir()
    main(flags(shapes, tmp_path / "run", poodle, readout="knn"))
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["readout"] == "knn"
    assert not (tmp_path / "run" / "readout").exists()  # it was the linear one's
    assert (other / "evaluation.json").is_file()


def test_the_fit_of_other_weights_is_not_gone_on_with(shapes, poodle, tmp_path, monkeypatch):
    from evaluation import segment

    folder = tmp_path / "model"
    config = PoodleConfig.from_pretrained(poodle / "model")
    PoodleModel(config).save_pretrained(folder)
    monkeypatch.setattr(segment, "evaluate", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        main(flags(shapes, tmp_path / "run", folder, max_steps=2))
    assert (tmp_path / "run" / "fit.safetensors").is_file()  # the last step is saved too
    PoodleModel(config).save_pretrained(folder)  # trained on in between
    with pytest.raises(ValueError, match="is the fit of other weights"):
        main(flags(shapes, tmp_path / "run", folder, max_steps=2, resume_from_checkpoint="latest"))


def test_a_label_of_another_size_is_found_before_anything_is_fitted(tmp_path):
    squares(tmp_path, 9, 0)
    (tmp_path / "classes.json").write_text(json.dumps(["grass", "red", "blue"]))
    label = tmp_path / "labels" / "4.png"
    Image.open(label).resize((48, 32), Image.NEAREST).save(label)
    with pytest.raises(ValueError, match="4.png is 48x32, its image 4.png 96x64"):
        load_dataset("folder", str(tmp_path)).check()


def test_readout_runs_in_a_pipeline(shapes, poodle, tmp_path):
    main(flags(shapes, tmp_path / "run", poodle, num_train_epochs=30))
    segment = pipeline("image-segmentation", model=str(tmp_path / "run" / "readout"))
    found = segment(str(shapes / "val" / "images" / "0.png"))
    assert "grass" in {entry["label"] for entry in found}
    assert np.asarray(found[0]["mask"]).shape == (64, 96)


def test_several_models_and_processes_give_the_figures_of_one(shapes, poodle, tmp_path):
    random = f"random:{poodle}"
    both = main(flags(shapes, tmp_path / "one", poodle, random, readout="knn"))
    assert [r["model"] for r in both] == [str(poodle), random] and both[0]["miou"] != both[1]["miou"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["evaluation/segment.py", *flags(shapes, tmp_path / "two", poodle, random, readout="knn")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "two" / "evaluation.json").read_text())["results"]
    for ours, theirs in zip(results, both):  # 5 test images on 2 processes
        assert ours["per_class"] == pytest.approx(theirs["per_class"], abs=1e-3)
    assert results[0]["model"] in done.stdout and "mIoU" in done.stdout


def test_upernet_overfits_four_street_images(tmp_path):
    folder = tmp_path / "street"
    write_folder(folder / "train", 4, 64, 128, seed=3, num_processes=2)
    os.symlink(folder / "train", folder / "val")
    (folder / "classes.json").write_text((folder / "train" / "classes.json").read_text())
    for name in ("train",):  # the four largest classes: a wall of three pixels proves nothing
        for path in (folder / name / "labels").iterdir():
            label = np.asarray(Image.open(path)).copy()
            label[~np.isin(label, [0, 2, 8, 10])] = 255
            Image.fromarray(label).save(path)
    ResNetForImageClassification(ResNetConfig(**RESNET)).save_pretrained(tmp_path / "resnet")
    arguments = flags(
        folder, tmp_path / "run", tmp_path / "resnet", readout="upernet", max_steps=120, learning_rate=3e-3,
        per_device_train_batch_size=4, weight_decay=0.0,
    )  # fmt: skip
    (result,) = main([*arguments, "--crop_size", "64", "128"])
    assert result["miou"] > 0.9, result["per_class"]
    model = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "run" / "readout")
    assert model.config.id2label[10] == "sky"
    assert list(AutoImageProcessor.from_pretrained(tmp_path / "run" / "readout").image_mean)


@pytest.mark.parametrize("kind", ["resnet", "timm", "swin"])
def test_upernet_reads_four_stages_and_trains_all_that_they_depend_on(shapes, tmp_path, kind):
    """DistributedDataParallel waits for a gradient of every parameter that requires one."""
    if kind == "timm":
        pytest.importorskip("timm")
        encoder_config = {"backbone": "resnet18", "model_type": "timm_backbone"}
    elif kind == "swin":
        encoder_config = SwinConfig(
            embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2, image_size=64
        )
    else:
        encoder_config = {"model_type": "resnet", **RESNET}
    config = PoodleConfig(backbone_config=encoder_config, num_decoder_blocks=0, num_labels=3)
    data = load_dataset("folder", str(shapes))
    encoder = Encoder("x", PoodleForSemanticSegmentation(config))
    readout = UperNetReadout(encoder, data, recipe(crop_size=[64, 96])).train()
    assert len(readout.model.backbone.channels) == 4
    readout(**readout.batch(list(data.train[:2]), torch.Generator().manual_seed(0))).backward()
    assert all(p.grad is not None for p in readout.trained())
    frozen = [name for name, p in readout.named_parameters() if not p.requires_grad]
    assert all("norm" in name for name in frozen) and bool(frozen) == (kind == "swin")


def test_an_interrupted_upernet_goes_on_bit_for_bit(shapes, tmp_path, monkeypatch):
    """BatchNorm's statistics are part of what a fit changes."""
    ResNetForImageClassification(ResNetConfig(**RESNET)).save_pretrained(tmp_path / "resnet")

    def arguments(name):
        return [
            *flags(shapes, tmp_path / name, tmp_path / "resnet", readout="upernet", max_steps=4, save_steps=2),
            "--crop_size", "64", "96", "--per_device_train_batch_size", "2",
        ]  # fmt: skip

    main(arguments("whole"))
    original, count = UperNetReadout.forward, []

    def interrupted(self, *args, **kwargs):
        count.append(1)
        if len(count) == 4:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(UperNetReadout, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(arguments("parts"))
    monkeypatch.setattr(UperNetReadout, "forward", original)
    main([*arguments("parts"), "--resume_from_checkpoint", "latest"])
    whole, parts = (load_file(tmp_path / name / "readout" / "model.safetensors") for name in ("whole", "parts"))
    assert any("running_mean" in name for name in whole)
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--readout", "linar"], "did you mean 'linear'"),
        (["--learning_rat", "1"], "did you mean 'learning_rate'"),
        (["--dataset", "cityscapes"], "there is no folder .*leftImg8bit.* Expected"),
        (["--model", "no/such-model"], "no such model|cannot be loaded"),
        (["--features", "stage7"], "--features stage7"),
    ],
)
def test_wrong_input_is_a_sentence(shapes, poodle, tmp_path, change, message):
    done = subprocess.run(
        [sys.executable, "evaluation/segment.py", *flags(shapes, tmp_path / "run", poodle), *change],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 1 and re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run" / "evaluation.json").exists()


def test_recipes_say_how_to_launch(tmp_path):
    for path in (REPOSITORY / "evaluation" / "recipes").glob("*.yaml"):
        assert "Launch:" in path.read_text() and "Hardware:" in path.read_text()
    assert parse_recipe(["--model", "a", "--model", "b", "c"]).model == ["a", "b", "c"]
    assert data_module.DRIVING_CLASSES[13] == "car"
