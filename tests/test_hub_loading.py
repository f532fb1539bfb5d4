"""Published models load with one line in a process that does not have this package."""

import json

import torch
from huggingface_hub import ModelCard
from published import EVALUATION, SAME, publish
from safetensors.torch import save_file

from modeling_poodle import PoodleForPreTraining, PoodleForSemanticSegmentation, PoodleModel
from modeling_poodle.remote_code import add_code

# --- use without this package ---


def test_a_clean_environment_loads_what_was_published(shared_hub, clean, published_run, tmp_path):
    """AutoBackbone, AutoModel, processor, pipeline and three models with it as their backbone; the features equal those of training."""
    model = PoodleForPreTraining.from_pretrained(published_run / "checkpoints" / "step-2").eval().teacher
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        output = model(image, output_hidden_states=True)
        stages = (
            PoodleModel.from_pretrained(published_run / "model", stages=["stage1", "stage2", "stage3", "stage4"])
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


def test_a_readout_is_one_line_for_others(shared_hub, clean, published_run, tmp_path):
    from transformers import SegformerImageProcessor

    config = PoodleModel.from_pretrained(published_run / "model").config
    config.num_labels = 3
    config.id2label = {0: "road", 1: "sky", 2: "car"}
    config.label2id = {"road": 0, "sky": 1, "car": 2}
    torch.manual_seed(0)
    readout = PoodleForSemanticSegmentation(config).eval()
    readout.save_pretrained(tmp_path / "readout")
    SegformerImageProcessor(do_resize=False).save_pretrained(tmp_path / "readout")
    add_code(tmp_path / "readout")  # as an evaluation leaves it
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
for name in ("readout", "org/poodle-r18-camvid-linear"):
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


def test_a_run_s_model_loads_without_this_package_before_it_is_published(clean, published_run, tmp_path):
    expected = PoodleModel.from_pretrained(published_run / "model").eval()
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        save_file({"image": image, "decoder": expected(image).last_hidden_state}, tmp_path / "expected.safetensors")
    (tmp_path / "folder.txt").write_text(str(published_run / "model"))
    clean(
        tmp_path,
        SAME
        + """
from transformers import AutoModel
expected, folder = load_file("expected.safetensors"), Path("folder.txt").read_text()
same(AutoModel.from_pretrained(folder, trust_remote_code=True).eval()(expected["image"]).last_hidden_state, expected["decoder"])
try:
    AutoModel.from_pretrained(folder, trust_remote_code=False)
    raise SystemExit("custom code ran though nobody trusted it")
except ValueError as error:
    assert "trust_remote_code" in str(error), error
""",
    )
