"""Sharing: publish to a Hub on 127.0.0.1 with the real client, load in a process without this package, and every fault as a sentence."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard
from loopback import serve
from loopback_hub import TOKEN, HubServer, Interpreter
from safetensors.torch import load_file, save_file

from modeling_poodle import PoodleForPreTraining, PoodleForSemanticSegmentation, PoodleModel
from training import cards
from training.hub import belongs
from training.pretrain import main as pretrain
from training.publish import main as publish_main
from training.street_files import write_videos

REPOSITORY = Path(__file__).resolve().parent.parent
RESNET = {
    "model_type": "resnet", "layer_type": "basic", "depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "embedding_size": 8,
}  # fmt: skip
MODEL = {"backbone_config": RESNET, "decoder_reduction": 2, "projection_hidden_size": 16, "projection_size": 8}
# Of the editable installation, which puts the package on every path of this interpreter.
WITHOUT_THE_PACKAGE = """
import sys
from pathlib import Path
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
sys.path = [path for path in sys.path if path and not Path(path, "modeling_poodle").is_dir()]
try:
    import modeling_poodle
    raise SystemExit("modeling_poodle is on the path: this test would prove nothing")
except ModuleNotFoundError:
    pass
"""
SAME = """
from pathlib import Path
import torch
from safetensors.torch import load_file
torch.set_grad_enabled(False)
def same(ours, theirs):
    assert torch.equal(ours, theirs), (ours - theirs).abs().max()
"""


@pytest.fixture(scope="module")
def drives(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drives")
    write_videos(folder, num_videos=2, duration=1.5, fps=4, height=64, width=128, num_processes=2)
    return folder


def flags(videos, output_dir, *more, steps=2):
    return [
        "--config", "street", "--videos", str(videos), "--output_dir", str(output_dir), "--model", json.dumps(MODEL),
        "--crop_size", "64", "128", "--subcrop_size", "32", "--num_subcrops", "2", "--per_device_train_batch_size", "2",
        "--max_steps", str(steps), "--warmup_steps", "1", "--logging_steps", "1", "--panel_steps", "1000", "--save_steps", "1",
        "--dataloader_num_workers", "0", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(drives, tmp_path_factory) -> Path:
    """A finished run, as any user has one. Its teacher has moved away from its student."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    AcceleratorState._reset_state(True)
    pretrain(flags(drives, folder, "--teacher_momentum", "0.5"))
    AcceleratorState._reset_state(True)
    return folder


@pytest.fixture(scope="module")
def shared_hub(run, tmp_path_factory):
    """A Hub on which the run is published."""
    with serve(tmp_path_factory.mktemp("hub"), HubServer) as server:
        done = publish(server, run, "--repo_id", "org/poodle-r18")
        assert done.returncode == 0, done.stderr
        server.first_revision = server.repository("org/poodle-r18").commits[-1].oid
        yield server


@pytest.fixture
def hub(tmp_path):
    (tmp_path / "hub").mkdir()
    with serve(tmp_path / "hub", HubServer) as server:
        yield server


def python(hub, home: Path, *arguments, token=TOKEN, **variables) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=home, capture_output=True, text=True, timeout=600,
        env={**hub.environment(home / "hf", token), **variables}, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def publish(hub, folder, *arguments, token=TOKEN) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "training.publish", str(folder), *map(str, arguments)]
    return subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600, env=hub.environment(hub.folder / "home", token)
    )  # fmt: skip


@pytest.fixture(scope="module")
def clean(shared_hub, tmp_path_factory):
    """A process with an empty cache and a path without this package."""
    interpreter = Interpreter(shared_hub, tmp_path_factory.mktemp("clean"), WITHOUT_THE_PACKAGE)
    yield interpreter
    interpreter.close()


@pytest.fixture(scope="module")
def installed(shared_hub, tmp_path_factory):
    """A process with an empty cache that imports this package."""
    interpreter = Interpreter(shared_hub, tmp_path_factory.mktemp("installed"))
    yield interpreter
    interpreter.close()


# --- what is sent ---


def test_what_is_sent_is_weights_configs_card_and_code_alone(shared_hub, run):
    common = {
        ".gitattributes",
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "panel.png",
    }
    encoder, sdm = (shared_hub.repository(name).commits for name in ("org/poodle-r18", "org/poodle-r18-sdm"))
    assert len(encoder) == len(sdm) == 2  # the first is the Hub's own
    assert set(encoder[-1].files) == common
    assert set(sdm[-1].files) == common | {"configuration_poodle.py", "modeling_poodle.py"}
    for name in ("configuration_poodle.py", "modeling_poodle.py"):
        assert sdm[-1].files[name].path.read_bytes() == (REPOSITORY / "modeling_poodle" / name).read_bytes()
    for name, blob in {**encoder[-1].files, **sdm[-1].files}.items():
        data = blob.path.read_bytes()
        for secret in (TOKEN, str(run), str(Path.home()) + "/", "/tmp/"):
            assert secret.encode() not in data, (name, secret)
    teacher = load_file(run / "checkpoints" / "step-2" / "model.safetensors")
    published = load_file(sdm[-1].files["model.safetensors"].path)
    assert published.keys() == {key.removeprefix("teacher.") for key in teacher if key.startswith("teacher.")} - {
        key.removeprefix("teacher.") for key in teacher if "projector" in key
    }
    assert all(torch.equal(value, teacher[f"teacher.{key}"]) for key, value in published.items())


def test_publishing_again_makes_one_commit_where_something_changed(hub, run, tmp_path):
    folder = tmp_path / "encoder"
    folder.mkdir()
    for path in (run / "encoder").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for name in ("optimizer.pt", "training_args.bin", ".env", "notes.txt"):
        (folder / name).write_text("not to be sent")
    for _ in range(2):
        assert publish(hub, folder, "--repo_id", "org/a").returncode == 0
        assert len(hub.repository("org/a").commits) == 2
    sent = sum(size for (method, path), size in hub.received.items() if path.startswith("/lfs/") and method == "PUT")
    assert sent == (folder / "model.safetensors").stat().st_size  # once
    first = hub.repository("org/a").commits[-1]
    weights = load_file(folder / "model.safetensors")
    changed_weights = {name: value + 1 for name, value in weights.items()}
    save_file(changed_weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert publish(hub, folder, "--repo_id", "org/a").returncode == 0
    commits = hub.repository("org/a").commits
    assert len(commits) == 3
    changed = {name for name, blob in commits[-1].files.items() if first.files.get(name) != blob}
    assert changed == {"model.safetensors"}
    script = """
import sys
from huggingface_hub import hf_hub_download
for revision in sys.argv[1:]:
    print(hf_hub_download("org/a", "model.safetensors", revision=revision))
"""
    old, new = map(load_file, python(hub, tmp_path, "-c", script, first.oid, "main").stdout.split())
    assert all(torch.equal(old[name], weights[name]) for name in weights)
    assert all(torch.equal(new[name], changed_weights[name]) for name in weights)


def test_files_in_folders_of_a_repository_are_not_ours_to_delete():
    assert belongs("config.json") and belongs("model.safetensors") and belongs("modeling_poodle.py")
    assert not belongs("onnx/config.json") and not belongs("old/model.safetensors") and not belongs("notes.txt")


def test_a_dry_run_writes_the_folder_and_sends_nothing(hub, run):
    done = publish(hub, run, "--repo_id", "org/dry", "--dry_run")
    assert done.returncode == 0 and not hub.requests
    assert "model.safetensors" in done.stdout and "would be sent to org/dry-sdm" in done.stdout
    config = json.loads((run / "hub" / "model" / "config.json").read_text())
    assert config["auto_map"]["AutoBackbone"] == "modeling_poodle.PoodleBackbone"
    assert "org/dry-sdm" in (run / "hub" / "model" / "README.md").read_text()


def test_the_student_on_request(run):
    publish_main([str(run / "model"), "--repo_id", "org/student", "--which", "student", "--dry_run"])
    checkpoint = load_file(run / "checkpoints" / "step-2" / "model.safetensors")
    sent = load_file(run / "hub" / "model" / "model.safetensors")
    assert all(torch.equal(value, checkpoint[f"student.{key}"]) for key, value in sent.items())
    first = "encoder.embedder.embedder.convolution.weight"
    assert not torch.equal(sent[first], checkpoint[f"teacher.{first}"])
    text = (run / "hub" / "model" / "README.md").read_text()
    assert "Weights of the student after 2 steps" in text and "cores" in text and "(panel.png)" in text


# --- use without this package ---


def test_a_clean_environment_loads_what_was_published(shared_hub, clean, run, tmp_path):
    """AutoBackbone, AutoModel, processor, pipeline and three models on it; the features are training's."""
    model = PoodleForPreTraining.from_pretrained(run / "checkpoints" / "step-2").eval().teacher
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        output = model(image, output_hidden_states=True)
        stages = (
            PoodleModel.from_pretrained(run / "model", stages=["stage1", "stage2", "stage3", "stage4"])
            .eval()
            .encode(image)
        )
    expected = {"image": image, "decoder": output.last_hidden_state, **stages}
    save_file(
        {name: value.detach().contiguous() for name, value in expected.items()}, tmp_path / "expected.safetensors"
    )
    (tmp_path / "revision.txt").write_text(shared_hub.first_revision)
    printed = clean(
        tmp_path,
        SAME
        + """
import numpy as np
from PIL import Image
from transformers import (
    AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, DetrConfig, DetrForObjectDetection, Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation, UperNetConfig, UperNetForSemanticSegmentation, pipeline,
)
expected = load_file("expected.safetensors")
image = expected["image"]

plain = AutoBackbone.from_pretrained("org/poodle-r18").eval()
assert type(plain).__name__ == "ResNetBackbone" and plain.channels == [8, 8, 16, 16]
for ours, name in zip(plain(image).feature_maps, ("stage1", "stage2", "stage3", "stage4"), strict=True):
    same(ours, expected[name])
revision = Path("revision.txt").read_text()
chosen = AutoBackbone.from_pretrained("org/poodle-r18", out_features=["stage2", "stage4"], revision=revision).eval()
for ours, name in zip(chosen(image).feature_maps, ("stage2", "stage4"), strict=True):
    same(ours, expected[name])
same(AutoModel.from_pretrained("org/poodle-r18").eval()(image).last_hidden_state, expected["stage4"])

processor = AutoImageProcessor.from_pretrained("org/poodle-r18")
picture = Image.fromarray((np.random.default_rng(0).random((64, 96, 3)) * 255).astype(np.uint8))
pixels = processor(picture, return_tensors="pt")["pixel_values"]
assert pixels.shape == (1, 3, 64, 96)
by_hand = (torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None])
torch.testing.assert_close(pixels[0], by_hand / torch.tensor([0.229, 0.224, 0.225])[:, None, None], rtol=1e-4, atol=1e-5)
features = pipeline("image-feature-extraction", model="org/poodle-r18")(picture)
torch.testing.assert_close(torch.tensor(features), plain(pixels).feature_maps[-1], rtol=1e-4, atol=1e-5)

config = AutoConfig.from_pretrained("org/poodle-r18")
tiny = {"num_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 2}
upernet = UperNetForSemanticSegmentation(UperNetConfig(backbone="org/poodle-r18", hidden_size=16, auxiliary_in_channels=16, auxiliary_channels=8))
mask2former = Mask2FormerForUniversalSegmentation(
    Mask2FormerConfig(backbone_config=config, feature_size=32, mask_feature_size=32, hidden_dim=32, dim_feedforward=16, encoder_feedforward_dim=16, **tiny)
)
detr = DetrForObjectDetection(
    DetrConfig(backbone_config=config, use_timm_backbone=False, d_model=16, encoder_attention_heads=2, decoder_attention_heads=2,
               encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_layers=1, decoder_layers=1)
)
for whole, inside in ((upernet, upernet.backbone), (mask2former, mask2former.model.pixel_level_module.encoder), (detr, detr.model.backbone.model)):
    report = inside.load_state_dict(plain.state_dict(), strict=False)
    assert not report.missing_keys and all(key.endswith("num_batches_tracked") for key in report.unexpected_keys)
    assert inside.config.model_type == "resnet" and torch.isfinite(whole.eval()(image)[0]).all()
    # DETR's frozen BatchNorm multiplies in another order.
    torch.testing.assert_close(inside(image).feature_maps[-1], expected["stage4"], rtol=1e-4, atol=1e-5)

sdm = AutoBackbone.from_pretrained("org/poodle-r18-sdm", trust_remote_code=True).eval()
same(sdm(image).feature_maps[0], expected["decoder"])
sdm = AutoBackbone.from_pretrained("org/poodle-r18-sdm", trust_remote_code=True, out_features=["stage4", "decoder"]).eval()
assert type(sdm).__module__.startswith("transformers_modules.org.")
same(sdm(image).feature_maps[0], expected["stage4"])
same(sdm(image).feature_maps[1], expected["decoder"])
same(AutoModel.from_pretrained("org/poodle-r18-sdm", trust_remote_code=True).eval()(image).last_hidden_state, expected["decoder"])
try:
    AutoBackbone.from_pretrained("org/poodle-r18-sdm")
    raise SystemExit("custom code ran though nobody trusted it")
except ValueError as error:
    print("refused:", "trust_remote_code" in str(error))
""",
    )
    assert printed.endswith("refused: True\n")


def test_where_the_package_is_installed_no_code_is_fetched(shared_hub, installed, tmp_path):
    before = len(shared_hub.requests)
    script = """
import modeling_poodle
from transformers import AutoBackbone
print(type(AutoBackbone.from_pretrained("org/poodle-r18-sdm", out_features=["stage4", "decoder"])).__module__)
"""
    assert installed(tmp_path, script) == "modeling_poodle.modeling_poodle\n"
    assert not [path for _, path, _ in shared_hub.requests[before:] if path.endswith(".py")]


def test_a_standard_resnet_is_timm_s_too(shared_hub, clean, tmp_path):
    from transformers import ResNetBackbone, ResNetConfig, SegformerImageProcessor

    torch.manual_seed(0)
    config = ResNetConfig(layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512])
    ResNetBackbone(config).save_pretrained(tmp_path / "encoder")
    SegformerImageProcessor(do_resize=False).save_pretrained(tmp_path / "encoder")
    done = publish(shared_hub, tmp_path / "encoder", "--repo_id", "org/r18")
    assert done.returncode == 0, done.stderr
    script = """
import timm
import torch
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor
AutoImageProcessor.from_pretrained("org/r18")
assert AutoConfig.from_pretrained("org/r18").model_type == "resnet"
ours = AutoBackbone.from_pretrained("org/r18").eval()
theirs = timm.create_model("hf-hub:org/r18", pretrained=True).eval()
assert type(theirs).__name__ == "ResNet" and theirs.num_classes == 0
image = torch.rand(1, 3, 64, 96)
torch.testing.assert_close(theirs.forward_features(image), ours(image).feature_maps[-1], rtol=1e-5, atol=1e-5)
print(theirs.pretrained_cfg["architecture"], theirs.pretrained_cfg["mean"])
"""
    assert clean(tmp_path, script) == "resnet18 [0.485, 0.456, 0.406]\n"
    card = ModelCard(shared_hub.repository("org/r18").commits[-1].files["README.md"].path.read_text())
    assert card.data.license is None and "Nothing was recorded." in card.text and 'pretrained("org/r18"' in card.text


EVALUATION = {
    "miou": 0.25, "accuracy": 0.75, "mean_accuracy": None, "per_class": {}, "groups": {}, "dataset": "camvid", "readout": "linear",
    "features": "decoder", "inference": "whole image", "num_train_images": 367, "num_test_images": 233, "seed": 0, "steps": 10,
}  # fmt: skip


def test_a_readout_is_one_line_for_others(shared_hub, clean, run, tmp_path):
    from transformers import SegformerImageProcessor

    config = PoodleModel.from_pretrained(run / "model").config
    config.num_labels = 3
    config.id2label = {0: "road", 1: "sky", 2: "car"}
    config.label2id = {"road": 0, "sky": 1, "car": 2}
    torch.manual_seed(0)
    readout = PoodleForSemanticSegmentation(config).eval()
    readout.save_pretrained(tmp_path / "readout")
    SegformerImageProcessor(do_resize=False).save_pretrained(tmp_path / "readout")
    (tmp_path / "evaluation.json").write_text(json.dumps({**EVALUATION, "model": "org/poodle-r18-sdm"}))
    done = publish(shared_hub, tmp_path / "readout", "--repo_id", "org/poodle-r18-camvid-linear")
    assert done.returncode == 0, done.stderr
    image = torch.rand(1, 3, 64, 96)
    save_file({"image": image, "logits": readout(image).logits.detach()}, tmp_path / "expected.safetensors")
    printed = clean(
        tmp_path,
        SAME
        + """
import numpy as np
from PIL import Image
from transformers import AutoModelForSemanticSegmentation, pipeline
expected = load_file("expected.safetensors")
name = "org/poodle-r18-camvid-linear"
model = AutoModelForSemanticSegmentation.from_pretrained(name, trust_remote_code=True).eval()
same(model(expected["image"]).logits, expected["logits"])
segments = pipeline("image-segmentation", model=name, trust_remote_code=True)(Image.new("RGB", (96, 64)))
covered = sum(np.array(segment["mask"]).astype(bool).astype(int) for segment in segments)
assert covered.shape == (64, 96) and (covered == 1).all()
print(sorted({segment["label"] for segment in segments} - {"road", "sky", "car"}))
""",
    )
    assert printed == "[]\n"
    card = ModelCard(
        shared_hub.repository("org/poodle-r18-camvid-linear").commits[-1].files["README.md"].path.read_text()
    )
    assert card.data.base_model == "org/poodle-r18-sdm" and card.data.pipeline_tag == "image-segmentation"
    assert {(r.metric_type, r.metric_value) for r in card.data.eval_results} == {
        ("mean_iou", 0.25),
        ("accuracy", 0.75),
    }
    assert "trust_remote_code=True" in card.text and "fitted on camvid" in card.text


# --- cards ---


def test_the_card_holds_what_was_done_and_measured(hub, run, tmp_path):
    evaluation = tmp_path / "evaluation.json"
    evaluation.write_text(json.dumps({**EVALUATION, "model": str(run)}))  # a run's name stands for its model/
    done = publish(hub, run, "--repo_id", "org/p", "--evaluation", evaluation)
    assert done.returncode == 0, done.stderr
    texts = {
        name: hub.repository(name).commits[-1].files["README.md"].path.read_text() for name in ("org/p", "org/p-sdm")
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
    assert python(hub, tmp_path, "-c", script, "org-p.md", "org-p-sdm.md").returncode == 0
    assert sum(path == "/api/validate-yaml" for _, path, _ in hub.requests) >= 4


def test_sources_and_carbon_in_a_card(tmp_path):
    recipe = {
        "videos": ["hf://datasets/org/drives@abc/**.mp4", "https://user:secret@example.com/a.mp4?sig=secret", "/home/me/private"],
        "init_encoder": "microsoft/resnet-50", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "output_dir": "/home/me",
    }  # fmt: skip
    (tmp_path / "emissions.csv").write_text("project_name,emissions\na,0.5\nb,0.25\n")
    lines = [
        {"step": 10, "pairs_per_second": 4.0},
        {"step": 20, "pairs_per_second": 8.0},
        {"step": 30, "pairs_per_second": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = {"backbone_config": {"model_type": "resnet"}, "num_decoder_blocks": 0, "output_stride": 8}
    card = ModelCard(cards.run_card("encoder", config, recipe, cards.Facts(20, "teacher", "2 x GPU", 2, tmp_path)))
    assert card.data.datasets == ["org/drives"] and card.data.base_model == "microsoft/resnet-50"
    assert card.data.co2_eq_emissions["emissions"] == 750  # grams
    # 10 steps of 16 pairs at 4 pairs a second, then at 8; what came after the step of these weights does not count.
    assert "| Time | 1.0 minutes |" in card.text
    assert "https://example.com/a.mp4`, 1 local source |" in card.text and "dilated to stride 8" in card.text
    assert "secret" not in str(card) and "/home" not in str(card)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "org/other"}, "is of org/other, not of"),
        ({"seed": None, "model": None}, "is no evaluation.json"),
        ({}, "was measured before the weights"),
    ],
    ids=["another model", "not an evaluation", "older than the weights"],
)
def test_what_was_not_measured_is_refused(hub, run, tmp_path, change, message):
    file = tmp_path / "evaluation.json"
    content = {**EVALUATION, "model": str(run / "encoder"), **change}
    file.write_text(
        json.dumps({name: value for name, value in content.items() if value is not None or name == "mean_accuracy"})
    )
    if not change:
        os.utime(file, (0, 0))
    done = publish(hub, run, "--repo_id", "org/p", "--evaluation", file)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert not hub.requests


# --- faults ---


@pytest.mark.parametrize(
    ("pattern", "outcome", "message"),
    [
        ("POST .*/preupload/", 401, "401, the Hub does not accept the token"),
        ("POST .*/commit/", 403, "403, the token may not write there: it needs write permission for org"),
        ("POST .*/commit/", 409, "409, another commit was made at the same time: publish again"),
        ("POST .*/commit/", 429, "429, the Hub takes no more requests for now"),
        ("POST .*/commit/", 500, "500, the Hub fails at the moment"),
        ("POST .*/commit/", "drop", "the connection failed or broke off"),
        ("PUT /lfs/", 403, "403, the token may not write there"),
    ],
)
def test_a_fault_is_a_sentence_and_leaves_the_earlier_revision(shared_hub, run, pattern, outcome, message):
    repository = shared_hub.repository("org/poodle-r18")
    before = list(repository.commits)
    weights = {
        name: value + outcome_number(outcome, pattern)
        for name, value in load_file(run / "encoder" / "model.safetensors").items()
    }
    folder = shared_hub.folder / "changed"
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "preprocessor_config.json", "README.md"):
        (folder / name).write_bytes((run / "encoder" / name).read_bytes())
    shared_hub.fail(pattern, outcome)
    try:
        done = publish(shared_hub, folder, "--repo_id", "org/poodle-r18")
    finally:
        shared_hub.faults.clear()
    assert done.returncode == 1 and message in done.stderr
    assert "Traceback" not in done.stderr and TOKEN not in done.stderr + done.stdout
    assert repository.commits == before


def outcome_number(outcome, pattern: str) -> float:
    """Other weights for each case: what the Hub has already is not sent again."""
    return float(sum(map(ord, f"{outcome}{pattern}")))


def test_a_passing_fault_passes_unseen(hub, run):
    hub.fail("PUT /lfs/", "drop", 1)
    hub.fail("PUT /lfs/", 500, 1)
    hub.fail("POST .*/preupload/", 429, 1)
    done = publish(hub, run / "encoder", "--repo_id", "org/p")
    assert done.returncode == 0 and len(hub.repository("org/p").commits) == 2
    assert [fault[2] for fault in hub.faults] == [0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        (("--repo_id", "other/p"), TOKEN, "403, the token may not write there: it needs write permission for other"),
        (
            ("--repo_id", "org/p"),
            None,
            "401, the Hub does not accept the token, or there is none: log in with `hf auth login`",
        ),
        (("--repo_id", "org/p"), "hf_wrong", "401, the Hub does not accept the token"),
        (("--repo_id", "a b/c"), TOKEN, "--repo_id must be a name on the Hub such as org/poodle-r50, got 'a b/c'"),
    ],
    ids=["namespace", "no token", "wrong token", "name"],
)
def test_wrong_names_and_tokens(hub, run, arguments, token, message):
    done = publish(hub, run / "encoder", *arguments, token=token)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert not hub.repositories


def test_a_hub_that_is_not_there(hub, run, tmp_path):
    command = [sys.executable, "-m", "training.publish", str(run / "encoder"), "--repo_id", "org/p"]
    for change, message in (
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the connection failed or broke off"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set: unset it"),
    ):
        env = {**hub.environment(tmp_path), **change}
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, env=env)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_folders_that_cannot_be_published(hub, run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine").mkdir()
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        (tmp_path / "mine" / name).write_bytes((run / "encoder" / name).read_bytes())
    for folder, readme, message in (
        (tmp_path / "none", None, "no such folder; give a run"),
        (tmp_path / "empty", None, "is no run and holds no weights"),
        (tmp_path / "mine", f"---\nlicense: mit\n---\nmy token is {TOKEN}", "README.md holds your Hub token"),
        (tmp_path / "mine", "---\ntags: [a\n---\n", "README.md: its metadata"),
    ):
        if readme:
            (folder / "README.md").write_text(readme)
        done = publish(hub, folder, "--repo_id", "org/p")
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    done = publish(hub, tmp_path / "mine", "--repo_id", "org/p", "--which", "student")
    assert "--which student needs a run" in done.stderr
    assert not hub.repositories


# --- during training ---


def test_a_run_sends_its_checkpoints_and_survives_a_failing_hub(shared_hub, installed, drives, tmp_path):
    """The first uploads are refused, the last ones arrive, and the run never stops."""
    arguments = flags(drives, tmp_path / "run", "--push_to_hub", "true", "--hub_model_id", "org/live", steps=3)
    script = (
        f"import sys; sys.path[:0] = [{str(REPOSITORY)!r}]\nfrom training.pretrain import main; main({arguments!r})"
    )
    shared_hub.fail("POST /api/repos/create", 403, 2)  # encoder and model of the first checkpoint
    try:
        printed = installed(tmp_path, script)
    finally:
        shared_hub.faults.clear()
    errors = installed.errors()
    assert "was not sent to the Hub (training goes on): org/live on http://127.0.0.1" in errors
    assert "403, the token may not write there" in errors and "Traceback" not in errors
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert not (tmp_path / "run" / ".publish").exists()
    for name, folder in (("org/live", "encoder"), ("org/live-sdm", "model")):
        commits = shared_hub.repository(name).commits
        assert commits[-1].message == "Step 3" and len(commits) <= 3  # the Hub's own, and at most steps 2 and 3
        weights = load_file(commits[-1].files["model.safetensors"].path)
        ours = load_file(tmp_path / "run" / folder / "model.safetensors")
        assert all(torch.equal(weights[key], ours[key]) for key in ours)
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    assert TOKEN not in printed + errors


def test_an_unreachable_hub_does_not_stop_a_run(drives, tmp_path, monkeypatch, caplog):
    """In this process the client is offline, as all tests are: every upload fails."""
    AcceleratorState._reset_state(True)
    pretrain(
        flags(
            drives,
            tmp_path / "run",
            "--push_to_hub",
            "true",
            "--hub_model_id",
            "org/live",
            "--hub_private_repo",
            "true",
        )
    )
    AcceleratorState._reset_state(True)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert sum("HF_HUB_OFFLINE is set" in warning for warning in warnings) >= 2


def test_a_truncated_download_is_a_sentence_and_fetched_anew(shared_hub, installed, tmp_path):
    """Broken off again and again: a sentence, as `--init_encoder` and `--model` give it. Then the client goes on where it broke off."""
    script = """
from modeling_poodle.loading_poodle import load_encoder
for attempt in range(2):
    try:
        print(len(load_encoder("org/poodle-r18")[1]))
    except ValueError as error:
        print("sentence:", str(error).replace(chr(10), " "))
"""
    shared_hub.fail("GET /cdn/", "truncate", 7)
    try:
        failed, loaded = installed(tmp_path, script).splitlines()
        assert "sentence: 'org/poodle-r18' is no encoder that can be loaded" in failed
        assert int(loaded) > 20 and shared_hub.faults[0][2] == 0
    finally:
        shared_hub.faults.clear()
