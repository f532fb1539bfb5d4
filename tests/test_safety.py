"""Malicious checkpoints, configs, recipes and data sets are refused by a sentence or made harmless; no code in them is run."""

import json
import os
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from huggingface_hub import ModelCard
from labelled_shapes import RESNET
from loopback_hub import TOKEN
from PIL import Image
from transformers import AutoBackbone, AutoConfig, ResNetBackbone, ResNetConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES

from evaluation import propagate, report
from evaluation.boxes import load_boxes
from evaluation.detection import load_detector
from evaluation.detection_report import write_detection_html
from evaluation.encoders import build
from evaluation.explore_features import read_clip
from evaluation.explore_views import Readout
from evaluation.labelled_images import file_size, read_image, read_label
from evaluation.outputs import slug
from evaluation.segment import main as segment
from evaluation.video_masks import load_sequences
from modeling_poodle import PoodleConfig, PoodleModel
from modeling_poodle.config_checks import check_config
from modeling_poodle.loading_poodle import load_encoder
from training import addresses, cards
from training.convert import convert, read_checkpoint
from training.flow import RaftFlow
from training.hub import check_repo_id
from training.publish import stage
from training.recipe import Recipe, parse_recipe
from training.resume import prepare_output_dir

NASTY = "</pre></code><script>alert(1)</script><img src=x onerror=alert(1)>|`[x](javascript:alert(1))"


class Payload:
    """An object that makes the folder `target` when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.fixture
def ran(tmp_path, monkeypatch) -> Path:
    """The path that a payload makes if it is run. Any question whether to run code is answered with yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    return tmp_path / "ran"


@pytest.fixture
def encoder(tmp_path) -> Path:
    torch.manual_seed(0)
    ResNetBackbone(ResNetConfig(**RESNET, out_features=["stage4"])).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def change(folder: Path, **values) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


# --- code ---


def test_a_pickle_is_read_without_running_it(ran, encoder, tmp_path):
    for name in ("released.pth", "encoder/pytorch_model.bin"):
        torch.save({"model": Payload(ran)}, tmp_path / name)
    (encoder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds more than tensors .*opening it could run code"):
        read_checkpoint(tmp_path / "released.pth")
    with pytest.raises(ValueError, match="(?s)flow_weights .* cannot be loaded"):
        RaftFlow("raft_small", str(tmp_path / "released.pth"))
    for load in (load_encoder, lambda name: build(name, 2)):
        with pytest.raises(ValueError, match="is no encoder that can be loaded"):
            load(str(encoder))
    assert not ran.exists()
    torch.load(tmp_path / "released.pth", weights_only=False)
    assert ran.exists()  # the payload does work


def test_code_beside_a_model_is_not_run(ran, encoder, shapes):
    (encoder / "evil.py").write_text(f"import os\nos.mkdir({str(ran)!r})\nclass Config: pass\nclass Model: pass\n")
    names = ("AutoModel", "AutoBackbone", "AutoModelForSemanticSegmentation", "AutoImageProcessor")
    code = {"AutoConfig": "evil.Config", **dict.fromkeys(names, "evil.Model")}
    (encoder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Evil", "auto_map": code}))
    # transformers has this architecture, so its own class reads the weights and no code is needed.
    expected = AutoBackbone.from_config(ResNetConfig(**RESNET)).state_dict().keys()
    assert load_encoder(str(change(encoder, auto_map=code)))[1].keys() == expected
    assert build(str(encoder), 2).mean == (0.485, 0.456, 0.406)
    with pytest.raises(ValueError, match="cannot be loaded"):
        Readout(str(encoder), torch.device("cpu"))  # a segmentation model only by the code
    change(encoder, model_type="evil")
    for load in (load_encoder, lambda name: build(name, 2), lambda name: Readout(name, torch.device("cpu"))):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            load(str(encoder))
    assert not ran.exists()
    # With the user's permission the code is run.
    with pytest.raises(AttributeError, match="has no attribute .register_for_auto_class"):
        AutoConfig.from_pretrained(encoder, trust_remote_code=True)
    assert ran.exists()


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        ({"auto_map": {"AutoBackbone": "evil--code.Model"}}, r"backbone_config.auto_map names code to be run"),
        ({"attn_implementation": "evil/kernel"}, r"backbone_config.attn_implementation must be one of transformers' own"),
        ({"_attn_implementation": {"": "evil/kernel"}}, r"backbone_config._attn_implementation. must be one of"),
    ],
    ids=str,
)  # fmt: skip
def test_code_that_a_config_names_within_is_refused(inner, message, poodle, tmp_path):
    backbone = {"model_type": "vit", "num_hidden_layers": 4, **inner}
    with pytest.raises(ValueError, match=message):
        PoodleConfig(backbone_config=backbone)
    config = {**json.loads((poodle / "model" / "config.json").read_text()), "backbone_config": backbone}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message.removeprefix("backbone_config")):
        build(str(tmp_path), 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output_dir: !!python/object/apply:os.mkdir [{ran}]\n", "could not determine a constructor for the tag"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nvideos: [*b, *b]\n", r"a recipe has no aliases \(\*name\)"),
        ("videos: " + "[" * 1000 + "\n", "is not valid YAML"),
        ("- street\n", "must hold a mapping of recipe fields, got list"),
        ("output_dir: 2020-02-31\n", "is not valid YAML: day is out of range"),
        ("output_dir: 2020-02-20\n", r"output_dir must be text, got datetime.date\(2020, 2, 20\)"),
        ("flow_weights: [a.pth]\n", "flow_weights must be text or unset"),
        ("seed: " + "9" * 4000 + "\n", "seed must be an integer below 2.31, got 9+[.]{3}9+$"),
        ("learning_rate: 1" + "0" * 400 + "\n", "learning_rate must be a finite number above 0"),
    ],
    ids=("tag", "aliases", "depth", "list", "no date", "date", "list of text", "integer", "float"),
)
def test_recipes_that_are_no_recipes(ran, tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text.format(ran=ran))
    with pytest.raises(ValueError, match=message):
        parse_recipe(["--config", str(tmp_path / "config.yaml")])
    assert not ran.exists()


def test_a_run_with_a_hostile_recipe_is_not_resumed(ran, tmp_path):
    (tmp_path / "config.yaml").write_text(f"seed: !!python/object/apply:os.mkdir [{ran}]\n")
    with pytest.raises(ValueError, match="could not determine a constructor"):
        prepare_output_dir(Accelerator(cpu=True), Recipe(output_dir=str(tmp_path), resume_from_checkpoint="latest"))
    assert not ran.exists()


# --- numbers ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_decoder_blocks": 10**9, "decoder_laterals": False}, "num_decoder_blocks must be at most 1000"),
        ({"num_decoder_blocks": 20, "decoder_laterals": False}, "num_decoder_blocks must be at most 8: each doubles"),
        ({"projection_hidden_size": 10**12}, "projection_hidden_size must be at most 1048576"),
        ({"num_labels": 10**9}, "num_labels must be at most 1048576"),
        ({"backbone_config": {"model_type": "resnet", "depths": [1, 10**9, 1, 1]}}, r"backbone_config.depths must be at most 1000"),
        ({"backbone_config": {"model_type": "resnet", "hidden_sizes": [8, 8, 8, 10**12]}}, r"hidden_sizes\[3\] must be at most 1048576"),
        ({"backbone_config": {"model_type": "resnet", "num_labels": 10**9}}, "backbone_config.num_labels must be at most"),
        ({"backbone_config": {"model_type": "dinov2", "num_hidden_layers": 10**9}}, "num_hidden_layers must be at most 1000"),
        ({"backbone_config": {"model_type": "dinov2", "hidden_size": "x"}}, "backbone_config is no config of 'dinov2'"),
    ],
    ids=str,
)  # fmt: skip
def test_numbers_that_no_network_has_are_refused_before_it_is_built(values, message, poodle, tmp_path):
    with pytest.raises(ValueError, match=message):
        PoodleConfig(**values)
    config = {**json.loads((poodle / "model" / "config.json").read_text()), **values}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        PoodleConfig.from_pretrained(tmp_path)


def test_networks_larger_than_any_are_refused_before_memory_is_asked_for(encoder, tmp_path):
    """Each number alone is within bounds; only the whole network is too large."""
    giant = {"depths": [1] * 4, "hidden_sizes": [1 << 18] * 4}
    with pytest.raises(ValueError, match="'resnet' network of .* parameters; at most 2e[+]10 are built"):
        PoodleModel(PoodleConfig(backbone_config={"model_type": "resnet", **RESNET, **giant}))
    (encoder / "model.safetensors").unlink()
    torch.save({}, encoder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="at most 2e[+]10 are built"):
        load_encoder(str(change(encoder, **giant)))
    for load in (load_encoder, lambda name: build(name, 2), lambda name: Readout(name, torch.device("cpu"))):
        with pytest.raises(ValueError, match=r"config.json of .*num_labels must be at most 1048576, got 1000000000"):
            load(str(change(encoder, num_labels=10**9)))
    detector = {
        "detector": "fpn", "backbone_config": {"model_type": "resnet", "depths": [10**9] * 4}, "classes": ["a"],
        "image_mean": [0, 0, 0], "image_std": [1, 1, 1], "image_size": None, "short_side": 64,
    }  # fmt: skip
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps(detector))
    with pytest.raises(ValueError, match="backbone_config.depths must be at most 1000 together"):
        load_detector(tmp_path)


def test_a_checkpoint_of_four_numbers_that_claims_a_giant_is_refused(tmp_path):
    weights = {"backbone.conv1.weight": torch.zeros(1).expand(8, 3, 7, 7)}
    for layer in range(1, 5):
        weights[f"backbone.layer{layer}.0.conv2.weight"] = torch.zeros(1).expand(1 << 40, 8, 3, 3)
    torch.save({"model": weights}, tmp_path / "giant.pth")
    assert (tmp_path / "giant.pth").stat().st_size < 10_000
    with pytest.raises(ValueError, match=r"hidden_sizes\[0\] must be at most 1048576, got 1099511627776"):
        convert(read_checkpoint(tmp_path / "giant.pth"), "student")


def test_preprocessing_that_is_none_is_refused(encoder):
    for mean in ([0.5] * 4, [0.5, float("nan"), 0.5], ["a", "b", "c"]):
        values = {"image_processor_type": "SegformerImageProcessor", "image_mean": mean, "image_std": [1.0] * 3}
        (encoder / "preprocessor_config.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match="must give three numbers of image_mean and image_std|image_mean"):
            build(str(encoder), 2)


# --- images and paths ---


def test_images_that_are_bombs_or_programs(ran, tmp_path, monkeypatch):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )
    (tmp_path / "bomb.png").write_bytes(bomb)
    (tmp_path / "program.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    )
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\nmkdir -p {ran}\n")  # stands in for Ghostscript
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    for read in (read_image, read_label, file_size, lambda path: read_clip(str(path), 0, 0, 1, 64)):
        with pytest.raises(ValueError, match="bomb.png .*read.*decompression bomb"):
            read(tmp_path / "bomb.png")
        with pytest.raises(ValueError, match="program.png .*read"):
            read(tmp_path / "program.png")
    with pytest.raises(OSError, match="Ghostscript"):  # not even if Pillow alone opens the file
        Image.open(tmp_path / "program.png").load()
    assert not ran.exists()


@pytest.mark.parametrize("name", ["../../secret.png", "a/../../../secret.png", "{root}/secret.png"])
def test_lists_of_a_data_set_lead_nowhere_else(name, tmp_path):
    name = name.format(root=tmp_path)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "secret.png")
    coco = {
        "images": [{"id": 0, "file_name": name, "height": 8, "width": 8}],
        "annotations": [{"id": 0, "image_id": 0, "category_id": 0, "bbox": [1, 1, 4, 4]}],
        "categories": [{"id": 0, "name": "a"}],
    }
    for split in ("train", "val"):
        (tmp_path / split / "images").mkdir(parents=True)
        (tmp_path / split / "annotations.json").write_text(json.dumps(coco))
        (tmp_path / "labels" / "det_20").mkdir(parents=True, exist_ok=True)
        (tmp_path / "labels" / "det_20" / f"det_{split}.json").write_text(json.dumps([{"name": name}]))
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_text(name)
    for load in (load_boxes, load_sequences):
        for dataset in ("coco_folder", "bdd100k") if load is load_boxes else ("davis",):
            with pytest.raises(ValueError, match="secret.png' leads out of .*; expected a path below it"):
                load(dataset, str(tmp_path))


def test_names_of_models_and_repositories_lead_nowhere_else():
    for name in ("../../etc/passwd", "/etc/passwd", "org/../../x", ".."):
        assert "/" not in slug(name) and not slug(name).startswith(".")
        assert not addresses.is_dataset_id(name)
        if name != "..":
            with pytest.raises(ValueError, match="--repo_id must be a name on the Hub"):
                check_repo_id(name, "--repo_id")


@pytest.mark.parametrize("name", ["model.safetensors", "README.md", "config.json"])
def test_files_from_elsewhere_are_not_published(name, encoder, tmp_path):
    (encoder / name).unlink(missing_ok=True)
    (tmp_path / "secret").write_text("secret")
    (encoder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=f"{name} is a link to .*secret: put the file itself there"):
        stage(encoder, tmp_path / "staged", "org/p", [])
    assert not any("secret" in path.read_text(errors="replace") for path in (tmp_path / "staged").iterdir())


# --- names shown to people ---


def elements(page: str) -> tuple[set[str], set[str]]:
    """Names of the elements that a browser would see in a page, and names of their attributes."""
    tags, attributes = set(), set()

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.add(tag)
            attributes.update(name for name, _ in attrs)

    Parser().feed(page)
    return tags, attributes


def test_names_in_reports_are_text():
    array = np.zeros((4, 4, 3), np.uint8)
    common = {
        "model": NASTY, "dataset": NASTY, "features": NASTY, "inference": NASTY, "command": NASTY, "seed": 0, "steps": 1,
        "num_train_images": 1, "num_test_images": 1, "train_images_seen": 1, "per_class": {NASTY: 0.5},
    }  # fmt: skip
    strips, curves = {NASTY: [(NASTY, array)]}, {NASTY: [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]}
    figures = {"miou": 0.5, "accuracy": 0.5, "mean_accuracy": 0.5, "groups": {}, "readout": NASTY}
    boxes = {key: 0.5 for key in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")}
    measures = dict.fromkeys(("j_and_f", "j_mean", "j_recall", "j_decay", "f_mean", "f_recall", "f_decay"), 0.5)
    propagated = {
        **common, **measures, "seconds_per_frame": 0.1, "num_sequences": 1, "num_objects": 1, "protocol": {NASTY: NASTY},
        "sequences": {NASTY: {1: measures}},
    }  # fmt: skip
    pages = (
        report.write_html([{**common, **figures}], curves, strips),
        write_detection_html([{**common, **boxes, "detector": NASTY}], curves, strips),
        propagate.write_html([propagated], strips),
    )
    for page in pages:
        tags, attributes = elements(page)
        assert "script" not in tags and "h2" in tags and "img" in tags
        assert not {name for name in attributes if name.startswith("on")}
        assert "alert(1)" in page  # it is shown as text


def test_names_in_cards_are_text(tmp_path):
    recipe = {
        "videos": [f"https://example.com/{NASTY}\n# Title.mp4"], "init_encoder": None, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2, "model": {"id2label": {"0": f"x\n```\n{NASTY}"}},
    }  # fmt: skip
    config = {"backbone_config": {"model_type": "resnet"}, "num_decoder_blocks": 0}
    facts = cards.Facts(20, "teacher", f"CPU\n\n# Title\n{NASTY}", 1, tmp_path)
    result = {
        **dict.fromkeys(("readout", "dataset", "features", "model"), f"{NASTY}\n# Title"),
        "num_test_images": 1,
        "seed": 0,
    }
    texts = [
        cards.run_card("encoder", config, recipe, facts),
        cards.converted_card("encoder", config, f"a`\n# Title\n{NASTY}.pth", "teacher"),
        cards.publishable_card(
            cards.folder_card({"architectures": ["UperNetForSemanticSegmentation"], "model_type": "upernet"}, [result]),
            "org/p", [result], panel=False,
        ),
    ]  # fmt: skip
    for text in texts:
        body = ModelCard(text).text
        assert "\n# Title" not in body and body.count("```") % 2 == 0 and "alert(1)" in body
        assert "&#124;" not in "".join(re.findall("`[^`\n]+`", body))  # Markdown code shows entities literally
        # The text outside of code blocks and inline code, which show markup literally.
        prose = re.sub("`[^`\n]*`", "", "".join(body.split("```")[::2]))
        assert not any(piece in prose for piece in ("<script", "<img", "</pre", "[x]("))
        yaml.safe_load(text.split("---")[1])


# --- secrets ---


def test_a_token_is_in_nothing_that_an_evaluation_leaves(shapes, poodle, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    arguments = [
        "--dataset",
        "folder",
        "--data_dir",
        str(shapes),
        "--readout",
        "knn",
    ]
    segment(["--model", str(poodle), *arguments, "--output_dir", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="no such model"):
        segment(["--model", "no/such-model", *arguments, "--output_dir", str(tmp_path / "other")])
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) >= 3 and not any(TOKEN.encode() in path.read_bytes() for path in files)
    printed = capsys.readouterr()
    assert TOKEN not in printed.out + printed.err


@pytest.mark.parametrize("kind", sorted(MODEL_FOR_BACKBONE_MAPPING_NAMES))
def test_no_backbone_of_transformers_is_taken_for_a_giant(kind):
    """Some configs name lists of widths by stage or block, which must not be taken for numbers of layers."""
    check_config(AutoConfig.for_model(kind).to_dict(), kind)
