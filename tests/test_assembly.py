"""The parts of a run, as they are built before its first step."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, DistributedType
from small_runs import MODEL, RESNET
from torch import nn

from evaluation import outputs
from modeling_poodle import PoodleConfig, PoodleForPreTraining, PoodleForSemanticSegmentation, PoodleModel
from training.assembly import (
    build_model,
    build_optimizer,
    check_torch_of,
    load_into,
    make_accelerator,
    may_idle,
    prepared,
    synchronise_batch_norm,
)
from training.batch_norm import EqualSyncBatchNorm2d
from training.recipe import Recipe, check_crop_size


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
@pytest.mark.parametrize("make", [lambda: make_accelerator(Recipe()), outputs.make_accelerator])
def test_sharded_models_are_refused_before_the_first_step(monkeypatch, kind, make):
    """
    Otherwise the first checkpoint would fail, because each process holds only a part of each tensor.

    The distributed type is patched, since Accelerate accepts these settings only on GPUs.
    """
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType(kind)))
    with pytest.raises(ValueError, match=f"Accelerate is configured for {kind}; here each process has the whole"):
        make()


@pytest.mark.parametrize("version", ["2.9.0", "2.12.1"])
def test_a_torch_that_cannot_train_on_apple_s_gpus_is_refused_there_alone(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(
        ValueError, match=rf"torch {version} cannot train on an Apple GPU \(mps\), which needs 2\.13.*--cpu"
    ):
        check_torch_of(torch.device("mps"))
    check_torch_of(torch.device("cuda"))
    monkeypatch.setattr(torch, "__version__", "2.13.0a0+git1")
    check_torch_of(torch.device("mps"))


@pytest.mark.parametrize(
    "kind, named",
    [
        ("FSDP", "FSDP"),
        ("DEEPSPEED", "DEEPSPEED"),
        ("MEGATRON_LM", "MEGATRON_LM"),
        ("PARALLELISM_CONFIG", "a parallel"),
    ],
)
@pytest.mark.parametrize("make", [lambda: make_accelerator(Recipe()), outputs.make_accelerator])
def test_sharding_that_accelerate_launch_asks_for_is_refused(monkeypatch, fresh_accelerator, kind, named, make):
    """Without GPUs, Accelerate itself ends with a stack trace (FSDP 1, packages that are missing) or ignores the setting (FSDP 2)."""
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match=f"Accelerate is configured for {named}.*; here each process has the whole"):
        make()


@pytest.mark.parametrize("make", [lambda: make_accelerator(Recipe()), outputs.make_accelerator])
def test_precision_and_compilation_of_accelerate_config_are_not_used(monkeypatch, fresh_accelerator, make):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    accelerator, model = make(), nn.Linear(1, 1)
    assert accelerator.mixed_precision == "no"
    assert accelerator.prepare_model(model) is model


@pytest.mark.parametrize("name", ["regnety_002", "mobilenetv3_small_050", "resnet18"])
def test_batch_norm_over_processes_keeps_timm_s_activations(name):
    pytest.importorskip("timm")
    torch.manual_seed(0)
    encoder = {"model_type": "timm_backbone", "backbone": name, "out_indices": [1, 2, 3, 4]}
    model = PoodleModel(PoodleConfig(backbone_config=encoder, decoder_reduction=2)).eval()
    images = torch.randn(1, 3, 64, 64)
    expected = model(images).last_hidden_state
    spread = synchronise_batch_norm(model, compiled=False).eval()
    torch.testing.assert_close(spread(images).last_hidden_state, expected)
    kinds = {type(m) for m in spread.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert kinds and all(issubclass(kind, nn.SyncBatchNorm) for kind in kinds)


@pytest.mark.parametrize("processes", [1, 2])
def test_batch_norm_is_synchronised_on_devices_of_any_kind(processes):
    """Not only on those that PyTorch calls cuda. The device here is one without memory."""
    accelerator = SimpleNamespace(num_processes=processes, device=torch.device("meta"))
    model = build_model(accelerator, Recipe(model={**MODEL, "pooled_weight": 0}, crop_size=[64, 128]))
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(norm, nn.SyncBatchNorm) is (processes == 2) for norm in norms)


def test_what_is_compiled_keeps_the_batch_norm_that_compiles():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm1d(4)))
    names = list(model.state_dict())
    spread = synchronise_batch_norm(model, compiled=True)
    assert [type(m) for m in (spread[1], *spread[2])] == [EqualSyncBatchNorm2d, EqualSyncBatchNorm2d, nn.SyncBatchNorm]
    assert list(spread.state_dict()) == names


def test_what_a_step_keeps_is_not_copied_to_float32(fresh_accelerator):
    """Under bf16, Accelerate converts all outputs to float32."""

    class Halved(nn.Module):
        def forward(self, images):
            return images.bfloat16()

    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    images = torch.ones(2)
    assert accelerator.prepare_model(Halved())(images).dtype == torch.float32
    assert prepared(accelerator, Halved())(images).dtype == torch.bfloat16


VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 64}


def test_the_optimizer_has_the_recipe_s_numbers_and_decays_matrices_alone(fresh_accelerator):
    recipe = Recipe(learning_rate=0.1, weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.7, adam_epsilon=1e-6)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2), nn.Linear(2, 2).requires_grad_(False)
    )
    decayed, others = build_optimizer(recipe, model).param_groups
    assert {id(p) for p in decayed["params"]} == {id(model[0].weight), id(model[2].weight)}
    rest = (model[0].bias, model[1].weight, model[1].bias, model[2].bias)
    assert {id(p) for p in others["params"]} == {id(p) for p in rest}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    for group in (decayed, others):
        assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (0.1, (0.8, 0.7), 1e-6, True)


def test_a_model_is_built_as_the_recipe_says(fresh_accelerator, tmp_path):
    torch.manual_seed(1)
    encoder = PoodleModel(Recipe(model=MODEL).model_config()).encoder
    for value in encoder.buffers():
        value.add_(1)
    encoder.save_pretrained(tmp_path)
    for checkpointing in (True, False):
        recipe = Recipe(
            model=MODEL, init_encoder=str(tmp_path), gradient_checkpointing=checkpointing, crop_size=[64, 64]
        )
        model = build_model(Accelerator(cpu=True), recipe)
        for network, recomputed in ((model.student, checkpointing), (model.teacher, False)):
            layers = [m.gradient_checkpointing for m in network.modules() if hasattr(m, "gradient_checkpointing")]
            assert layers and set(layers) == {recomputed}
        for network in (model.student, model.teacher):
            state = network.encoder.state_dict()
            assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())
        kernel = model.student.decoder[0].conv2.weight
        assert kernel.is_contiguous(memory_format=torch.channels_last) and not kernel.is_contiguous()


def test_an_encoder_of_other_statistics_than_imagenet_s_is_warned_of(fresh_accelerator, tmp_path, caplog):
    encoder = PoodleModel(Recipe(model=MODEL).model_config()).encoder
    encoder.save_pretrained(tmp_path)
    recipe = Recipe(model=MODEL, init_encoder=str(tmp_path), crop_size=[64, 64])
    for mean, std, warned in (([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], False), ([0.5] * 3, [0.5] * 3, True)):
        values = {"image_processor_type": "ViTImageProcessor", "image_mean": mean, "image_std": std}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
        caplog.clear()
        with caplog.at_level("WARNING", logger="poodle"):
            build_model(Accelerator(cpu=True), recipe)
        assert ("was trained on images of mean (0.5, 0.5, 0.5)" in caplog.text) is warned
    (tmp_path / "preprocessor_config.json").write_text("{")
    build_model(Accelerator(cpu=True), recipe)  # a run does not need it
    assert f"init_encoder {tmp_path}: its preprocessor_config.json cannot be read" in caplog.text


def test_stages_that_are_not_read_are_known():
    read = {**RESNET, "model_type": "resnet", "out_features": ["stage2", "stage3"]}
    for backbone, idle in ((RESNET, False), (read, True), ({"model_type": "dinov2", **VIT}, True)):
        assert may_idle(PoodleConfig(backbone_config=backbone, num_decoder_blocks=0)) is idle


def test_crops_are_whole_cells_of_the_coarsest_map():
    slow = {**RESNET, "model_type": "resnet", "downsample_in_first_stage": True}
    for encoder, stride in (
        (RESNET, 32),
        (slow, 64),
        ({"model_type": "dinov2", **VIT}, 8),
        ({"model_type": "convnext"}, 32),
    ):
        config = PoodleConfig(backbone_config=encoder, decoder_reduction=2, num_decoder_blocks=0)
        check_crop_size(config, [stride, 3 * stride])
        for wrong in ([stride, 3 * stride + stride // 2], [stride // 2, stride]):
            with pytest.raises(ValueError, match=f"crop_size must be multiples of the .* encoder's {stride}, got"):
                check_crop_size(config, wrong)


HIERA = {
    "model_type": "hiera", "image_size": [64, 64], "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "masked_unit_size": [8, 8],
}  # fmt: skip


@pytest.mark.parametrize(
    ("encoder", "flags", "message"),
    [
        (HIERA, {"crop_size": [128, 256]}, r"crop_size \[128, 256\] does not fit the hiera encoder: "),
        ({"model_type": "convnext"}, {"subcrop_size": 8}, r"subcrop_size \[8, 8\] does not fit the convnext encoder: "),
        ({"model_type": "timm_backbone", "backbone": "resnet18"}, {"crop_size": [80, 160]}, "gives a map of 3x5 cells, which are no"),
        ({"model_type": "dinov2", **VIT}, {"subcrop_size": 36}, "subcrop_size 36: the dinov2 encoder would not read the last row"),
        ({"model_type": "convnext"}, {"subcrop_size": 34}, "subcrop_size 34: the convnext encoder would not read"),
    ],
)  # fmt: skip
def test_sizes_that_an_encoder_cannot_take_are_a_sentence(fresh_accelerator, encoder, flags, message):
    model = {"backbone_config": encoder, "decoder_reduction": 2, "num_decoder_blocks": 0}
    with pytest.raises(ValueError, match=message):
        build_model(
            Accelerator(cpu=True), Recipe(**{"crop_size": [64, 64], "subcrop_size": 32, "model": model, **flags})
        )


def test_sizes_are_tried_without_a_trace(fresh_accelerator):
    torch.manual_seed(3)
    recipe = Recipe(model=MODEL, crop_size=[64, 64])
    model = build_model(Accelerator(cpu=True), recipe)
    after = torch.rand(1)
    torch.manual_seed(3)
    expected = PoodleForPreTraining(recipe.model_config())
    assert torch.equal(torch.rand(1), after)
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in expected.state_dict().items())
    modes = {name: module.training for name, module in model.named_modules()}
    assert modes == {name: module.training for name, module in expected.named_modules()}


def test_weights_that_an_encoder_has_no_place_for_are_refused():
    student = PoodleModel(PoodleConfig(backbone_config=RESNET, decoder_reduction=2))
    state = {f"encoder.{key}": value for key, value in student.encoder.state_dict().items()}
    load_into(student, state, "mine")
    with pytest.raises(ValueError, match=r"init_encoder mine does not fit model.backbone_config.*\(other.weight\)"):
        load_into(student, {**state, "other.weight": torch.zeros(1)}, "mine")
    with pytest.raises(ValueError, match=r"init_encoder mine does not fit .*\(decoder.1.bn1.bias\)"):
        load_into(student, {k: v for k, v in student.state_dict().items() if k != "decoder.1.bn1.bias"}, "mine")


@pytest.mark.parametrize("kind", [PoodleModel, PoodleForSemanticSegmentation])
def test_a_run_begins_from_a_model_with_its_sdm(fresh_accelerator, tmp_path, caplog, kind):
    """The recipe's own SDM has other sizes, which is said."""
    torch.manual_seed(1)
    begun = kind(PoodleConfig(backbone_config=RESNET, decoder_reduction=4, num_decoder_blocks=1))
    begun.save_pretrained(tmp_path)
    own = getattr(begun, "poodle", begun).state_dict()
    heads = {name: value for name, value in MODEL.items() if name != "backbone_config"}
    for more in ({}, {"dense_weight": 0.0}):
        recipe = Recipe(model={**heads, **more}, init_encoder=str(tmp_path), crop_size=[64, 64])
        with caplog.at_level("WARNING", logger="poodle"):
            model = build_model(Accelerator(cpu=True), recipe)
        assert len(model.student.decoder) == (0 if more else 1)
        for network in (model.student, model.teacher):
            state = network.state_dict()
            assert state and all(torch.equal(value, own[name]) for name, value in state.items())
    assert f"init_encoder {tmp_path} brings its own SDM: decoder_reduction is 4, not 2" in caplog.text
    with pytest.raises(ValueError, match="does not fit model.backbone_config"):
        wider = {**RESNET, "hidden_sizes": [8, 8, 16, 32]}
        recipe = Recipe(model={**heads, "backbone_config": wider}, init_encoder=str(tmp_path), crop_size=[64, 64])
        build_model(Accelerator(cpu=True), recipe)
