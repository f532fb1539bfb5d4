"""Runs with other encoders than the recipe's, runs of the baselines, and runs from existing weights."""

import shutil

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from small_runs import EACH_STEP, MODEL, RESNET, train, without_timings
from transformers import AutoBackbone, AutoConfig, ConvNextConfig, ConvNextForImageClassification

from evaluation.encoders import build
from modeling_poodle import PoodleConfig, PoodleModel
from modeling_poodle.loading_poodle import from_pretrained_whole, load_encoder
from training.assembly import build_model
from training.recipe import Recipe

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
VIT = {
    "model_type": "dinov2", "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 8, "image_size": 64,
    "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip
DINOV3 = {
    "model_type": "dinov3_vit", "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 64,
}  # fmt: skip
CONVNEXT = {"model_type": "convnext", "depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16]}


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        (
            {"output_stride": 8, "num_decoder_blocks": 0, "pooled_weight": 0, "dense_weight": 1.0},
            "pooled_loss",
        ),  # FlowE
        ({"dense_weight": 0, "pooled_weight": 1.0, "num_decoder_blocks": 0}, "dense_loss"),
        ({"pooled_weight": 0}, "pooled_loss"),
        ({"decoder_laterals": False}, None),
        ({"dense_stride": 1}, None),
        ({"backbone_config": VIT}, None),
        ({"backbone_config": CONVNEXT}, None),
        ({"backbone_config": DINOV3}, None),  # without register tokens, so with an empty parameter
    ],
    ids=["flowe", "pooled only", "dense only", "no laterals", "stride 1", "vit", "convnext", "dinov3"],
)
def test_baselines_and_encoders_train_and_load(drives, tmp_path, change, missing):
    lines = train(drives, tmp_path / "run", model={**MODEL, **change}, steps=2)
    assert lines[-1]["loss"] < 4 and lines[-1]["grad_norm"] > 0
    for name in ("dense_loss", "pooled_loss"):
        assert (lines[-1][name] is None) == (name == missing)
    model = PoodleModel.from_pretrained(tmp_path / "run" / "model").eval()
    image = torch.rand(1, 3, 64, 128)
    output = model(image)
    strides = {"dinov2": 2, "dinov3_vit": 4}  # a quarter of the patch
    stride = strides.get(change.get("backbone_config", RESNET)["model_type"], 32 if missing == "dense_loss" else 8)
    assert output.last_hidden_state.shape[-2:] == (64 // stride, 128 // stride)
    folder = tmp_path / "run" / "encoder"
    config = AutoConfig.from_pretrained(folder)
    assert config.model_type == change.get("backbone_config", RESNET)["model_type"]
    encoder = type(AutoBackbone.from_config(config)).from_pretrained(folder).eval()
    if change.get("output_stride") is None:  # the folder's plain architecture is not dilated
        assert torch.equal(encoder(image).feature_maps[-1].mean(dim=(2, 3)), output.pooler_output)


def test_init_encoder_starts_from_its_weights(drives, tmp_path):
    train(drives, tmp_path / "first", steps=1)
    AcceleratorState._reset_state(True)
    first = load_file(tmp_path / "first" / "encoder" / "model.safetensors")
    # The encoder brings its config.
    heads = {name: value for name, value in MODEL.items() if name != "backbone_config"}
    more = ("--init_encoder", str(tmp_path / "first" / "encoder"), "--teacher_momentum", "1.0", "--seed", "3")
    train(drives, tmp_path / "second", *more, model=heads, steps=1)
    second = load_file(tmp_path / "second" / "encoder" / "model.safetensors")  # the teacher, which stood still
    weights = [name for name in first if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert weights and all(torch.equal(first[name], second[name]) for name in weights)


@pytest.mark.parametrize("kind", ["resnet", "dinov2", "poodle"])
def test_a_run_resumes_without_its_init_encoder(drives, tmp_path, kind):
    """A checkpoint holds all weights. The encoder that a run began from may be deleted by then, or the Hub out of reach."""
    start, run = tmp_path / "start", tmp_path / "run"
    if kind == "poodle":
        PoodleModel(PoodleConfig(backbone_config=RESNET, decoder_reduction=2)).save_pretrained(start)
    else:
        values = {key: value for key, value in {"resnet": RESNET, "dinov2": VIT}[kind].items() if key != "model_type"}
        AutoBackbone.from_config(AutoConfig.for_model(kind, **values)).save_pretrained(start)
    heads = {name: value for name, value in MODEL.items() if name != "backbone_config"}
    more = (*EACH_STEP, "--init_encoder", str(start))
    whole = train(drives, run, *more, model=heads, steps=3)
    weights = load_file(run / "model" / "model.safetensors")
    for step in (2, 3):
        shutil.rmtree(run / "checkpoints" / f"step-{step}")
    shutil.rmtree(start)
    AcceleratorState._reset_state(True)
    again = train(drives, run, *more, "--resume_from_checkpoint", "latest", model=heads, steps=3)
    assert without_timings(again) == without_timings(whole)
    resumed = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in resumed.items())
    (run / "config.yaml").unlink()  # then only the checkpoint itself says what its network is
    alone = (*more, "--resume_from_checkpoint", str(run / "checkpoints" / "step-2"))
    AcceleratorState._reset_state(True)
    with pytest.raises(ValueError, match=r"another configuration: model\.dense_weight is 0\.5, not 0\.9"):
        train(drives, tmp_path / "other", *alone, model={**heads, "dense_weight": 0.9}, steps=3)
    AcceleratorState._reset_state(True)
    assert (
        without_timings(train(drives, tmp_path / "other", *alone, model=heads, steps=3)) == without_timings(whole)[2:]
    )


def test_init_encoder_takes_convnext_with_the_decoder(drives, tmp_path):
    """The decoder reads stages whose norms a classifier's checkpoint does not have."""
    config = ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16])
    ConvNextForImageClassification(config).save_pretrained(tmp_path / "convnext")
    heads = {name: value for name, value in MODEL.items() if name != "backbone_config"}
    lines = train(drives, tmp_path / "run", "--init_encoder", str(tmp_path / "convnext"), model=heads, steps=1)
    assert lines[-1]["loss"] > 0
    config.hidden_sizes = [8, 8, 16, 24]
    config.save_pretrained(tmp_path / "convnext")
    AcceleratorState._reset_state(True)
    with pytest.raises(ValueError, match="init_encoder"):
        train(drives, tmp_path / "other", "--init_encoder", str(tmp_path / "convnext"), model=heads, steps=1)


def test_init_encoder_takes_timm_s_networks_with_the_decoder(drives, tmp_path, monkeypatch):
    """All four stages get the pretrained weights, for which a stub of timm stands in here."""
    timm = pytest.importorskip("timm")
    original = timm.create_model
    brought = {key: value.clone() for key, value in original("resnet18", features_only=True).state_dict().items()}

    def create(name, pretrained=False, **kwargs):
        model = original(name, pretrained=False, **kwargs)
        if pretrained:
            model.load_state_dict(brought)
        return model

    monkeypatch.setattr(timm, "create_model", create)
    heads = {name: value for name, value in MODEL.items() if name != "backbone_config"}
    more = ("--init_encoder", "timm/resnet18", "--teacher_momentum", "1.0")
    lines = train(drives, tmp_path, *more, model=heads, steps=1)
    assert lines[-1]["loss"] > 0
    model = from_pretrained_whole(PoodleModel, str(tmp_path / "model")).eval()  # the teacher, which stood still
    assert model.config.stage_names == ["stage1", "stage2", "stage3", "stage4", "decoder"]
    assert model(torch.rand(1, 3, 64, 128)).last_hidden_state.shape == (1, 512, 8, 16)
    state = model.encoder._backbone.state_dict()
    weights = [name for name in brought if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert weights and all(torch.equal(brought[name], state[name]) for name in weights)

    # A run that resumes does not ask timm for the weights.
    recipe, checkpoint = Recipe(model=heads, init_encoder="timm/nowhere"), tmp_path / "checkpoints" / "step-1"
    resumed = build_model(Accelerator(cpu=True), recipe, checkpoint=checkpoint)
    resumed.load_state_dict(load_file(checkpoint / "model.safetensors"))

    # A new run or an evaluation that loads encoder/ gets the exported weights, not timm's weights of that name.
    _, exported = load_encoder(str(tmp_path / "encoder"))
    assert exported and all(torch.equal(value, model.encoder.state_dict()[name]) for name, value in exported.items())
    measured = build(str(tmp_path / "encoder"), 3)
    image = torch.rand(1, 3, 64, 128)
    with torch.no_grad():
        model.to(memory_format=torch.channels_last)  # as in an evaluation
        assert torch.equal(measured(image), model.encode(image)["stage4"])
    # The code on the card loads them too; the folder stands in for the Hub.
    lines = (tmp_path / "encoder" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    lines = lines.replace("ORG/NAME", str(tmp_path / "encoder"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, name: f"{repo}/{name}")
    scope = {}
    exec(lines, scope)
    with torch.no_grad():
        backbone = scope["backbone"].eval().to(memory_format=torch.channels_last)
        assert torch.equal(backbone(image).feature_maps[-1], measured(image))


def test_a_vit_goes_on_from_its_checkpoint(drives, tmp_path):
    """A ViT's mask token never gets a gradient, so the optimizer has no state for it."""
    model = {**MODEL, "backbone_config": VIT}
    whole = train(drives, tmp_path / "run", "--save_steps", "1", "--save_total_limit", "9", model=model, steps=2)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-2")
    shutil.rmtree(tmp_path / "run" / "model")
    AcceleratorState._reset_state(True)
    more = ("--save_steps", "1", "--save_total_limit", "9", "--resume_from_checkpoint", "latest")
    resumed = train(drives, tmp_path / "run", *more, model=model, steps=2)
    assert [line["loss"] for line in resumed] == [line["loss"] for line in whole]
    # A run that was killed after its last checkpoint, before it wrote its folders, writes them when it is resumed.
    shutil.rmtree(tmp_path / "run" / "model")
    AcceleratorState._reset_state(True)
    train(drives, tmp_path / "run", *more, model=model, steps=2)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_crops_must_be_whole_patches(drives, tmp_path):
    with pytest.raises(ValueError, match="crop_size must be multiples of the dinov2 encoder's 12"):
        train(drives, tmp_path / "run", model={**MODEL, "backbone_config": {**VIT, "patch_size": 12}}, steps=1)
