"""
Model, backbone and readout.

The backbone's maps equal the model's, the decoder's maps are aligned with the encoder's, and a dilated ResNet equals torchvision's.
"""

import itertools

import pytest
import torch
from PIL import Image
from test_modeling_pretraining import RESNET, config
from torch import nn
from transformers import (
    AutoModelForSemanticSegmentation,
    Dinov2Backbone,
    ResNetBackbone,
    SegformerImageProcessor,
    ViTModel,
    pipeline,
)
from transformers.utils import logging

from modeling_poodle import (
    PoodleBackbone,
    PoodleConfig,
    PoodleForPreTraining,
    PoodleForSemanticSegmentation,
    PoodleModel,
    decoder_poodle,
)
from modeling_poodle.decoder_poodle import upsample

TRANSFORMER = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 6, "image_size": 64}
HIERARCHY = {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 12, 16, 24]}


@pytest.mark.parametrize(
    "backbone_config",
    [
        {"model_type": "resnet", "embedding_size": 8, **HIERARCHY},
        {"model_type": "convnext", **HIERARCHY},
        {"model_type": "convnextv2", **HIERARCHY},
        {"model_type": "swin", "embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2], "window_size": 4},
        {"model_type": "vit", "intermediate_size": 48, "patch_size": 16, **TRANSFORMER},
        {"model_type": "dinov2", **TRANSFORMER},
        {"model_type": "dinov2_with_registers", **TRANSFORMER},
        {"model_type": "dinov3_vit", "intermediate_size": 48, "patch_size": 16, **TRANSFORMER},
        {"model_type": "dinov3_convnext", **HIERARCHY},
        {"model_type": "beit", "intermediate_size": 48, "patch_size": 16, **TRANSFORMER},
        {"model_type": "vitdet", "patch_size": 16, **TRANSFORMER},
    ],
    ids=lambda values: values["model_type"],
)
def test_a_backbone_s_maps_are_the_model_s(backbone_config, tmp_path):
    torch.manual_seed(0)
    shape = PoodleConfig(backbone_config=backbone_config, decoder_reduction=2)
    names = shape.stage_names
    model = PoodleModel(shape, stages=names[:-1]).eval()  # the last name is the decoder
    for parameter in model.parameters():  # else some layers are the identity at first (layer scale)
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model.encode(pixel_values)
        expected["decoder"] = model.decode(expected)
        widths = [expected[name].shape[1] for name in names]  # also known for stages that are not asked for
        for wanted in (names, names[1::2], names[-2:]):
            backbone = PoodleBackbone.from_pretrained(tmp_path, out_features=wanted).eval()
            maps = backbone(pixel_values).feature_maps
            assert [m.shape[1] for m in maps] == backbone.channels and backbone.num_features == widths
            for name, values in zip(wanted, maps):
                assert torch.equal(values, expected[name]), name
    assert not any(torch.equal(expected[a], expected[b]) for a, b in itertools.combinations(names, 2))


@pytest.mark.parametrize("image", [(256, 480), (360, 480), (720, 1280), (350, 500), (417, 609), (32, 32), (33, 65)])
@pytest.mark.parametrize("model_type", ["resnet", "convnext"])
def test_decoder_maps_lie_on_the_encoder_s_at_any_size(model_type, image):
    """A ramp of pixel coordinates goes up through the decoder blocks and agrees with the coordinates at each lateral."""
    backbone_config = {"model_type": model_type, "depths": [1] * 4, "hidden_sizes": [4] * 4}
    model = PoodleModel(
        PoodleConfig(backbone_config=backbone_config, decoder_reduction=2, decoder_top_down=False)
    ).eval()
    with torch.no_grad():
        sizes = {name: maps.shape[-2:] for name, maps in model.encode(torch.zeros(1, 3, *image)).items()}
    assert sizes["stage4"] != sizes["stage3"] or image == (32, 32)

    def coordinates(name):
        stride = 4 * 2 ** (int(name[-1]) - 1)
        rows, columns = ((torch.arange(side) + 0.5) * stride for side in sizes[name])
        return torch.stack([rows[:, None].expand(sizes[name]), columns.expand(sizes[name])])[None]

    hidden_state = coordinates("stage4")
    for block, name in zip(model.decoder, ("stage3", "stage2")):
        nn.init.zeros_(block.lateral.weight), nn.init.zeros_(block.lateral.bias)
        lateral = torch.zeros(1, 4, *sizes[name])
        with torch.no_grad():
            hidden_state = block(torch.cat([hidden_state] * 2, 1)[:, :4], lateral)[:, :2]
        drift = (hidden_state - coordinates(name)).abs()
        edge = 32 * 2  # there interpolation repeats the last value of the ramp
        stride = 4 * 2 ** (int(name[-1]) - 1)
        inside = drift[
            ..., edge // stride : sizes[name][0] - edge // stride, edge // stride : sizes[name][1] - edge // stride
        ]
        assert inside.numel() == 0 or inside.max() < 1e-2, name
        assert drift.max() <= 40, name  # reached on maps of one cell and at the edge that ConvNeXt leaves out


@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 2, 1, 5), (3, 1, 2, 1)])
def test_compiled_upsampling_is_bilinear_interpolation(shape):
    graphs = []
    maps = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(*shape[:2], 2 * shape[2], 2 * shape[3], dtype=torch.float64)
    compiled = torch.compile(upsample, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    results = []
    for function in (compiled, upsample):
        result = function(maps, tuple(weights.shape[-2:]))
        if function is compiled and min(shape[1:]) > 1:
            lying = function(maps.contiguous(memory_format=torch.channels_last), tuple(weights.shape[-2:]))
            assert lying.is_contiguous(memory_format=torch.channels_last)
        results.append((result, *torch.autograd.grad((result * weights).sum(), maps)))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)
    assert graphs and not any("interpolate" in str(node.target) for graph in graphs for node in graph.graph.nodes)


@pytest.mark.parametrize("strict", [False, True])
def test_a_model_exports_with_sizes_that_are_not_fixed(strict):
    model = PoodleModel(config()).eval().requires_grad_(not strict)
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(
        model, (torch.randn(2, 3, 64, 96),), dynamic_shapes={"pixel_values": sizes}, strict=strict
    )
    # Without guards where strict: torch 2.9 writes some there that cannot be run (NameError: name 'L' is not defined).
    exported = program.module(check_guards=not strict)
    for shape in ((2, 3, 64, 96), (3, 3, 128, 160), (1, 3, 192, 64)):
        images = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(
                exported(images).last_hidden_state, model(images).last_hidden_state, atol=1e-5, rtol=1e-5
            )


def test_maps_larger_than_a_kernel_takes_are_upsampled_in_parts(monkeypatch):
    maps = torch.randn(5, 3, 4, 6)
    whole = upsample(maps, (9, 7))
    monkeypatch.setattr(decoder_poodle, "MOST_NUMBERS", 2 * 3 * 9 * 7)
    interpolate, parts = nn.functional.interpolate, []
    monkeypatch.setattr(
        nn.functional, "interpolate", lambda part, **options: parts.append(len(part)) or interpolate(part, **options)
    )
    assert torch.equal(upsample(maps, (9, 7)), whole)
    assert sorted(parts) == [1, 2, 2]


def test_readout_loss_files_and_pipeline(tmp_path, caplog):
    model = PoodleForSemanticSegmentation(config(num_labels=5)).eval()
    labels = torch.randint(0, 5, (2, 64, 96))
    labels[:, :8] = 255
    output = model(torch.randn(2, 3, 64, 96), labels)
    full = nn.functional.interpolate(output.logits, size=(64, 96), mode="bilinear")
    keep = labels != 255
    probability = full.log_softmax(1).gather(1, labels.clamp(max=4)[:, None])[:, 0]
    assert output.loss.item() == pytest.approx(-probability[keep].mean().item(), abs=1e-5)
    model.save_pretrained(tmp_path)
    SegformerImageProcessor(do_resize=False).save_pretrained(tmp_path)
    assert isinstance(AutoModelForSemanticSegmentation.from_pretrained(tmp_path), PoodleForSemanticSegmentation)
    logging.enable_propagation()
    result = pipeline("image-segmentation", model=str(tmp_path))(Image.new("RGB", (96, 64), (90, 120, 30)))
    logging.disable_propagation()
    assert result[0]["mask"].size == (96, 64) and "not supported" not in caplog.text


def test_dilated_resnet_equals_torchvision():
    from torchvision.models import ResNet
    from torchvision.models.resnet import Bottleneck

    theirs = ResNet(Bottleneck, [1, 2, 2, 2], replace_stride_with_dilation=[False, True, True]).eval()
    ours = PoodleModel(
        PoodleConfig(
            backbone_config={"model_type": "resnet", "depths": [1, 2, 2, 2]}, output_stride=8, num_decoder_blocks=0
        )
    ).eval()
    source = [
        value for name, value in theirs.state_dict().items() if not name.startswith("fc.") and "downsample" not in name
    ]
    target = [value for name, value in ours.encoder.state_dict().items() if "shortcut" not in name]
    shortcuts = [value for name, value in theirs.state_dict().items() if "downsample" in name]
    target_shortcuts = [value for name, value in ours.encoder.state_dict().items() if "shortcut" in name]
    for a, b in zip(source + shortcuts, target + target_shortcuts, strict=True):
        b.copy_(a)
    images = torch.randn(1, 3, 64, 64)
    x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))
    x = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(x))))
    torch.testing.assert_close(ours(images).last_hidden_state, x, atol=1e-4, rtol=1e-4)


def test_one_map_larger_than_a_kernel_takes_is_upsampled_whole(monkeypatch):
    maps = torch.randn(2, 3, 4, 6)
    whole = upsample(maps, (9, 7))
    monkeypatch.setattr(decoder_poodle, "MOST_NUMBERS", 3 * 9 * 7 - 1)
    assert torch.equal(upsample(maps, (9, 7)), whole)


def test_a_dilated_resnet_has_the_stride_that_is_asked_for():
    for first, stride in ((False, 8), (False, 16), (True, 8), (True, 16)):
        backbone = {**RESNET, "downsample_in_first_stage": first}
        model = PoodleModel(config(backbone_config=backbone, output_stride=stride, num_decoder_blocks=0)).eval()
        assert model(torch.zeros(1, 3, 64, 96)).last_hidden_state.shape[-2:] == (64 // stride, 96 // stride)


def test_hidden_states_are_the_stages_and_the_decoder_s_map_where_there_is_one():
    images = torch.randn(1, 3, 64, 96)
    for blocks, count in ((2, 4), (0, 1)):
        output = PoodleModel(config(num_decoder_blocks=blocks)).eval()(images, output_hidden_states=True)
        assert len(output.hidden_states) == count and torch.equal(output.hidden_states[-1], output.last_hidden_state)


def test_single_hidden_states_can_be_asked_for():
    images, wanted = torch.randn(1, 3, 64, 96), config(num_labels=3)
    for model in (PoodleModel(wanted), PoodleBackbone(wanted), PoodleForSemanticSegmentation(wanted)):
        every = model.eval()(images, output_hidden_states=True).hidden_states
        some = model(images, output_hidden_states=[0, -1]).hidden_states
        assert [maps is None for maps in some] == [False, True, True, False] and len(every) == 4
        assert torch.equal(some[0], every[0]) and torch.equal(some[-1], every[-1])
        assert model(images, output_hidden_states=[]).hidden_states == (None,) * 4


@pytest.mark.parametrize(
    "encoder",
    [
        {"model_type": "dinov2", **TRANSFORMER},
        {"model_type": "vit", "intermediate_size": 48, "patch_size": 16, **TRANSFORMER},
        {"model_type": "resnet", "embedding_size": 8, **HIERARCHY},
    ],
    ids=lambda values: values["model_type"],
)
@pytest.mark.parametrize("kind", [PoodleModel, PoodleForSemanticSegmentation, PoodleForPreTraining])
def test_the_attention_of_the_encoder_is_set_by_name_or_as_a_whole(kind, encoder):
    sizes = {"decoder_reduction": 2, "projection_hidden_size": 8, "projection_size": 4}
    model = kind(PoodleConfig(backbone_config=encoder, **sizes))
    attends = encoder["model_type"] != "resnet"
    encoders = [module for module in model.modules() if isinstance(module, (Dinov2Backbone, ResNetBackbone, ViTModel))]
    assert len(encoders) == (2 if kind is PoodleForPreTraining else 1)
    for given, expected in (
        ({"backbone_config": "eager"}, "eager"), ({"backbone_config": "sdpa"}, "sdpa"), ("eager", "eager"), ({"": "sdpa"}, "eager"),
    ):  # fmt: skip
        if attends or expected == "eager":
            model.set_attn_implementation(given)
            assert {each.config._attn_implementation for each in encoders} == {expected}
            assert model.config.backbone_config._attn_implementation == expected


def test_every_second_block_can_be_checkpointed():
    model = PoodleModel(config())
    enable = getattr(model, "_activation_checkpointing_enable", None)
    if enable is None:
        pytest.skip("transformers before 5.24 checkpoints every layer")
    model.activation_checkpointing_enable(every_n_layers=2)
    flags = [module.gradient_checkpointing for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    assert flags == [True, False] * (len(flags) // 2) + [True] * (len(flags) % 2) and len(flags) > 4
    model.activation_checkpointing_enable()
    assert {m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing")} == {True}


def test_a_readout_ignores_the_id_that_its_config_names():
    model = PoodleForSemanticSegmentation(config(num_labels=5, semantic_loss_ignore_index=4)).eval()
    labels = torch.randint(0, 5, (2, 64, 96))
    output = model(torch.randn(2, 3, 64, 96), labels)
    full = nn.functional.interpolate(output.logits, size=(64, 96), mode="bilinear")
    kept = full.log_softmax(1).gather(1, labels[:, None])[:, 0][labels != 4]
    assert output.loss.item() == pytest.approx(-kept.mean().item(), abs=1e-5)


@pytest.mark.parametrize("classes", [1, 3])
def test_labels_of_void_alone_have_the_loss_0_and_no_gradient(classes):
    model = PoodleForSemanticSegmentation(config(num_labels=classes)).eval()
    loss = model(torch.randn(2, 3, 64, 96), torch.full((2, 64, 96), 255)).loss
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_backbone_reads_the_networks_that_it_is_given():
    one, other = (PoodleBackbone(config(out_features=["stage4", "decoder"])).eval() for _ in range(2))
    images = torch.randn(1, 3, 64, 96)
    one.encoder, one.decoder = other.encoder, other.decoder
    for ours, theirs in zip(one(images).feature_maps, other(images).feature_maps, strict=True):
        assert torch.equal(ours, theirs)
