"""Model cards: they state what was done and measured, and nothing else."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from typing import get_type_hints

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from packaging.version import Version
from PIL import Image
from published import EVALUATION, RESNET, publish, python
from transformers import AutoBackbone

from modeling_poodle import PoodleBackbone, PoodleConfig, PoodleModel
from modeling_poodle.cpu import usable_cores
from training import cards
from training.checkpoints import hardware, write_folders
from training.flow_recipe import FlowRecipe
from training.publish import main as publish_main
from training.publish import parts_of, read_evaluations
from training.recipe import Recipe

# --- cards ---


def test_the_card_holds_what_was_done_and_measured(own_hub, published_run, tmp_path):
    evaluation = tmp_path / "evaluation.json"
    evaluation.write_text(
        json.dumps({**EVALUATION, "model": str(published_run)})
    )  # the folder of a run stands for its model/
    done = publish(own_hub, published_run, "--repo_id", "org/p", "--evaluation", evaluation)
    assert done.returncode == 0, done.stderr
    texts = {
        name: own_hub.repository(name).commits[-1].files["README.md"].path.read_text()
        for name in ("org/p", "org/p-sdm")
    }
    card, sdm = ModelCard(texts["org/p"]), ModelCard(texts["org/p-sdm"])
    assert card.data.license == "apache-2.0" and "poodle" in card.data.tags and card.data.eval_results is None
    assert "Nothing was measured yet" in card.text and "Nothing was measured yet" not in sdm.text
    assert "model-index" not in texts["org/p"]
    measured = {(r.dataset_type, r.metric_name): r.metric_value for r in sdm.data.eval_results}
    assert measured == {("camvid", "mIoU"): 0.25, ("camvid", "pixel accuracy"): 0.75}
    assert "| camvid, 233 test images | linear, seed 0 | decoder | mIoU 25.0 %, pixel accuracy 75.0 % |" in sdm.text
    for text, repo_id in ((card.text, "org/p"), (sdm.text, "org/p-sdm")):
        assert f'AutoBackbone.from_pretrained("{repo_id}"' in text and "ORG/NAME" not in text
        assert "2 steps" in text and "1 local source" in text and "(panel.png)" in text and "arXiv" in text
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", sdm.text, re.DOTALL).group(1))
    assert recipe["learning_rate"] == 1e-3 and not {"videos", "output_dir"} & recipe.keys()
    script = "import sys; from huggingface_hub import ModelCard; [ModelCard(open(p).read()).validate() for p in sys.argv[1:]]"
    for name, text in texts.items():
        (tmp_path / f"{name.replace('/', '-')}.md").write_text(text)
    asked = 2  # one request for each of the two pushes
    if Version(huggingface_hub.__version__) >= Version(
        "2.4"
    ):  # older clients ask the public Hub, whatever HF_ENDPOINT says
        assert python(own_hub, tmp_path, script, *sorted(tmp_path.glob("org-*.md"))).returncode == 0
        asked = 4
    assert sum(path == "/api/validate-yaml" for _, path, _ in own_hub.requests) >= asked


def test_sources_and_carbon_in_a_card(tmp_path):
    recipe = {
        "videos": ["hf://datasets/org/drives@abc/**.mp4", "https://user:secret@example.com/a.mp4?sig=secret", "/home/me/private"],
        "init_encoder": "microsoft/resnet-50", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "output_dir": "/home/me",
    }  # fmt: skip
    (tmp_path / "emissions.csv").write_text("project_name,emissions\na,0.5\nb,0.25\n")
    assert cards._emissions(tmp_path / "emissions.csv")["emissions"] == 750
    # With a run_id, the lines are snapshots of a run in progress: each line includes the one before it.
    (tmp_path / "emissions.csv").write_text("run_id,emissions\nx,0.125\nx,0.5\ny,0.25\n")
    lines = [
        {"step": 10, "pairs_per_second": 4.0},
        {"step": 20, "pairs_per_second": 8.0},
        {"step": 30, "pairs_per_second": 1.0},
    ]
    # The last line is incomplete, as after a kill.
    (tmp_path / "metrics.jsonl").write_text("\n".join([*map(json.dumps, lines), '{"step": 40, "pairs_per']))
    config = {
        "backbone_config": {"model_type": "resnet"},
        "num_decoder_blocks": 0,
        "output_stride": 8,
        "stage_names": ["stem", "stage1", "stage2", "stage3"],
    }
    card = ModelCard(cards.run_card("encoder", config, recipe, cards.Facts(20, "teacher", "2 x GPU", 2, tmp_path)))
    assert card.data.datasets == ["org/drives"] and card.data.base_model == "microsoft/resnet-50"
    assert card.data.co2_eq_emissions["emissions"] == 750  # grams
    # 10 steps of 16 pairs at 4 pairs a second, then 10 at 8. Steps after the one of these weights do not count.
    assert "| Time | 1.0 minutes |" in card.text
    assert "https://example.com/a.mp4`, 1 local source |" in card.text and "dilated to stride 8" in card.text
    assert 'out_features=["stage1", "stage3"]' in card.text
    assert "secret" not in str(card) and "/home" not in str(card)


TRANSFORMER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}


@pytest.mark.parametrize("kind", ["resnet", "dinov2", "vit", "deit"])
def test_an_encoder_s_lines_give_the_trained_features_of_an_image_of_any_size(tmp_path, monkeypatch, kind):
    """
    The code in the card must work for grey images too.

    It cannot use the encoder's own pooled output: DINOv2's is its class token, and a ViT's has weights that nothing trained.
    """
    torch.manual_seed(0)
    backbone = RESNET if kind == "resnet" else {"model_type": kind, **TRANSFORMER}
    model = PoodleModel(PoodleConfig(backbone_config=backbone, num_decoder_blocks=0)).eval()
    recipe = {**dataclasses.asdict(Recipe()), "model": {}}
    facts = cards.Facts(2, "teacher", "2 x GPU", 2, tmp_path)
    write_folders(model, tmp_path, lambda part: cards.run_card(part, model.config.to_dict(), recipe, facts))
    code = re.search(r"```python\n(.*?)```", (tmp_path / "encoder" / "README.md").read_text(), re.DOTALL).group(1)
    if kind in ("resnet", "dinov2"):  # the Auto class accepts no local folder
        own = type(model.encoder)
        monkeypatch.setattr(AutoBackbone, "from_pretrained", own.from_pretrained)
    scope = {"image": Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 72), dtype=np.uint8))}
    with torch.no_grad():
        exec(code.replace("ORG/NAME", str(tmp_path / "encoder")), scope)
        pixels = scope["processor"](scope["image"], return_tensors="pt").pixel_values
        expected = model(pixels).pooler_output
    assert pixels.shape == (1, 3, 40, 72)
    torch.testing.assert_close(scope["pooled"], expected, rtol=1e-4, atol=1e-5)
    assert "timm.create_model" not in code
    standard = {
        "layer_type": "basic",
        "depths": [2, 2, 2, 2],
        "hidden_sizes": [64, 128, 256, 512],
        "model_type": "resnet",
    }
    config = PoodleConfig(backbone_config=standard).to_dict()
    assert "what the pooled loss has trained" in code
    flowe = {**model.config.to_dict(), "pooled_weight": 0.0}
    assert "pooled loss has trained" not in cards.run_card("encoder", flowe, recipe, facts).split("```")[1]
    assert 'timm.create_model("hf-hub:ORG/NAME", pretrained=True)' in cards.run_card("encoder", config, recipe, facts)


def test_no_pipeline_is_offered_where_it_cannot_load_the_encoder(tmp_path):
    facts, recipe = cards.Facts(2, "teacher", "2 x GPU", 2, tmp_path), dataclasses.asdict(Recipe())
    config = PoodleConfig(
        backbone_config={"model_type": "timm_backbone", "backbone": "resnet18", "out_indices": [1, 2, 3, 4]}
    )
    tasks = {
        part: ModelCard(cards.run_card(part, config.to_dict(), recipe, facts)).data.pipeline_tag
        for part in ("encoder", "model")
    }
    assert tasks == {"encoder": None, "model": "image-feature-extraction"}


@pytest.mark.parametrize("stride", [8, None])
def test_a_network_without_decoder_is_shown_and_measured_as_what_it_is(tmp_path, monkeypatch, stride):
    """
    A dilated network is published beside its encoder, with code that loads it.

    Without dilation the network is its encoder, and the run's figures belong to the encoder.
    """
    torch.manual_seed(0)
    run, said = tmp_path / "run", {}
    config = PoodleConfig(backbone_config=RESNET, num_decoder_blocks=0, output_stride=stride)
    recipe = {**dataclasses.asdict(Recipe()), "model": config.to_dict()}
    facts = cards.Facts(2, "teacher", "2 x GPU", 2, run)
    run.mkdir()
    (run / "config.yaml").write_text("")
    write_folders(PoodleModel(config), run, lambda part: cards.run_card(part, config.to_dict(), recipe, facts))
    parts = {name: folder.name for folder, name in parts_of(run, "org/p")}
    assert parts == ({"org/p": "encoder", "org/p-sdm": "model"} if stride else {"org/p": "encoder"})
    digest = hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()
    result = {**EVALUATION, "model": str(run), "weights_sha256": digest}
    (tmp_path / "evaluation.json").write_text(json.dumps(result))
    found = read_evaluations([tmp_path / "evaluation.json"], [folder for folder, _ in parts_of(run, "org/p")])
    assert {folder.name: len(results) for folder, results in found.items()} == (
        {"encoder": 0, "model": 1} if stride else {"encoder": 1}
    )
    code = re.search(r"```python\n(.*?)```", (run / "model" / "README.md").read_text(), re.DOTALL).group(1)
    monkeypatch.setattr(AutoBackbone, "from_pretrained", lambda _, **how: said.update(how))
    exec(code.replace('"ORG/NAME"', repr(str(run / "model"))), {})
    assert said == {"out_features": ["stage4"], "trust_remote_code": True}
    PoodleBackbone.from_pretrained(run / "model", out_features=said["out_features"])


def test_an_evaluation_of_no_model_is_refused_in_words(tmp_path):
    (tmp_path / "evaluation.json").write_text(json.dumps({**EVALUATION, "model": 3}))
    with pytest.raises(ValueError, match="is no evaluation.json of this project"):
        read_evaluations([tmp_path / "evaluation.json"], [tmp_path])


def test_a_card_names_the_last_stage_of_its_own_encoder(tmp_path):
    vit = {"model_type": "dinov2", "hidden_size": 24, "num_hidden_layers": 6, "num_attention_heads": 2}
    config = PoodleConfig(backbone_config={**vit, "out_indices": [2, 4, 6]}, decoder_reduction=2)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert 'out_features=["stage6", "decoder"]' in cards.converted_card("model", saved, "a.pth", "teacher")


def test_a_readout_of_a_folder_names_no_base_model_of_the_hub():
    """`runs/mine` looks like a Hub id, but only results of a local folder hold a digest of the weights."""
    config = {"architectures": ["UperNetForSemanticSegmentation"], "model_type": "upernet"}
    result = {"readout": "upernet", "dataset": "camvid", "model": "runs/mine"}
    assert ModelCard(cards.folder_card(config, [result])).data.base_model == "runs/mine"
    card = ModelCard(cards.folder_card(config, [{**result, "weights_sha256": "f" * 64}]))
    assert card.data.base_model is None and "runs/mine" not in card.text


def test_each_result_is_an_entry_of_its_own():
    """The Hub's client merges results that share task, data set and config, whatever their names."""
    boxes = {"ap": 0.1, "ap50": 0.2, "dataset": "street", "num_train_images": 9, "num_test_images": 5, "seed": 0}
    changes = (
        {},
        {"readout": "knn"},
        {"num_test_images": 5},
        {"seed": 1},
        {"features": "stage4"},
        {"num_train_images": 9},
    )
    results = [{**EVALUATION, "miou": 0.1 + number / 100, **change} for number, change in enumerate(changes)]
    results += [{**boxes, "ap": 0.3 + number / 100, "detector": name} for number, name in enumerate(("fpn", "c4"))]
    config = {"architectures": ["ResNetModel"], "model_type": "resnet", "stage_names": ["stem", "stage1"]}
    card = cards.publishable_card(cards.folder_card(config, []), "org/p", results, panel=False)
    data = ModelCard(card).data
    _, read = model_index_to_eval_results(data.to_dict()["model-index"])
    entries = data.to_dict()["model-index"][0]["results"]
    assert len(entries) == len(results) == len({r.unique_identifier for r in read})
    for entry, result in zip(entries, results):
        assert entry["task"]["name"].endswith(f", {result.get('detector') or result['readout']}")
        assert entry["dataset"]["name"].endswith(f"({result['num_test_images']} images)")
        assert entry["metrics"][0]["value"] == result.get("miou", result.get("ap")) and len(entry["metrics"]) == 2
    assert entries[0]["dataset"]["config"] == "linear, decoder, 367 training images, 233 test images, seed 0"


def test_a_folder_given_as_here_is_known_by_its_name(tmp_path, monkeypatch, poodle):
    shutil.copytree(poodle / "model", tmp_path / "run" / "readout")
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps({**EVALUATION, "model": "org/other"}))
    monkeypatch.chdir(tmp_path / "run" / "readout")
    publish_main([".", "--repo_id", "org/p", "--dry_run"])
    assert "mIoU 25.0 %" in (tmp_path / "run" / "hub" / "readout" / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "org/other"}, "is of org/other, not of"),
        ({"seed": None, "model": None}, "is no evaluation.json"),
        ({"num_sequences": 3}, "is of evaluation.propagate, whose figures a card has no place for"),
        ({}, "was measured before the weights"),
        ({"weights_sha256": "0" * 64}, "was measured on other weights than those in"),
    ],
    ids=[
        "another model",
        "not an evaluation",
        "of propagation",
        "older than the weights",
        "other weights in the same place",
    ],
)
def test_what_was_not_measured_is_refused(as_script, published_run, tmp_path, change, message):
    file = tmp_path / "evaluation.json"
    content = {**EVALUATION, "model": str(published_run / "encoder"), **change}
    file.write_text(
        json.dumps({name: value for name, value in content.items() if value is not None or name == "mean_accuracy"})
    )
    if not change:
        os.utime(file, (0, 0))
    said = as_script("training/publish.py", published_run, "--repo_id", "org/p", "--evaluation", file)
    assert said.startswith("error: ") and message in said


def test_no_field_of_a_recipe_that_can_hold_a_path_is_in_a_card():
    """Whoever adds such a field either keeps it out of cards or states here that it holds no path."""
    fields = {name: str(kind) for of in (Recipe, FlowRecipe) for name, kind in get_type_hints(of).items()}
    texts = {name for name, kind in fields.items() if "str" in kind or "dict" in kind}
    assert texts - set(cards._PRIVATE_FIELDS) == {"model", "flow"}


def test_the_hardware_of_a_run_is_the_device_that_it_computes_on(monkeypatch):
    """A run on another GPU than CUDA's was said to be one on the CPU."""
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda device: f"Intel Max 1550 as {device}")
    assert hardware(torch.device("xpu", 1), 4) == "4 x Intel Max 1550 as xpu:1"
    assert hardware(torch.device("mps"), 1) == "1 x mps"
    assert hardware(torch.device("cpu"), 1) == f"CPU, {usable_cores()} cores"
    assert hardware(torch.device("cpu"), 2) == f"CPU, {usable_cores()} cores, 2 processes"
