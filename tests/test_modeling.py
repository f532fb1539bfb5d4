"""The model: parameter counts, gradients, teacher, files, encoders, and errors of the config."""

import json
import re

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSemanticSegmentation,
    BertConfig,
    ResNetBackbone,
    ResNetModel,
    SegformerImageProcessor,
    TimmBackboneConfig,
    pipeline,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES

from modeling_poodle import (
    PoodleBackbone,
    PoodleConfig,
    PoodleForPreTraining,
    PoodleForSemanticSegmentation,
    PoodleModel,
)
from modeling_poodle.configuration_poodle import PLAIN_VITS
from modeling_poodle.geometry_poodle import affine_view, alignment_grids, crop_boxes, sample, see_through
from modeling_poodle.objectives_poodle import dense_loss, pooled_loss

RESNET = {
    "model_type": "resnet",
    "layer_type": "basic",
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 16, 32, 64],
    "embedding_size": 8,
}
BOTTLENECK = {"model_type": "resnet", "depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 64, 128], "embedding_size": 8}
CONVNEXT = {"model_type": "convnext", "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 32, 64]}
VIT = {
    "model_type": "dinov2",
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
}


def config(**changes) -> PoodleConfig:
    return PoodleConfig(**{"backbone_config": RESNET, "projection_hidden_size": 32, "projection_size": 16, **changes})


def inputs(b=2, height=64, width=96, k=3, seed=0) -> dict:
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(shape, generator=g)

    corner = rand(b, 2, k, 2) * torch.tensor([width / 2, height / 2])
    boxes = torch.cat([corner, corner + torch.tensor([width / 3, height / 3])], -1)
    return {
        "pixel_values": torch.randn(b, 2, 3, height, width, generator=g),
        "flow": 3 * torch.randn(b, 2, 2, height, width, generator=g),
        "valid_mask": rand(b, 2, height, width) > 0.001,
        "student_views": affine_view(rand(b, 2) * 0.3, 0.9 + 0.2 * rand(b, 2), rand(b, 2) < 0.5, height, width),
        "teacher_views": affine_view(rand(b, 2) * 0.3, 0.9 + 0.2 * rand(b, 2), rand(b, 2) < 0.5, height, width),
        "student_boxes": boxes,
        "teacher_boxes": boxes.flip(2),
        "teacher_box_frames": torch.randint(0, 2, (b, 2, k), generator=g),
        "subcrop_size": 64,
    }


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_resnet50_has_the_methods_parameter_counts():
    with torch.device("meta"):
        model = PoodleForPreTraining(PoodleConfig())
    assert count(model.student.encoder) == 25_557_032 - (
        2048 * 1000 + 1000
    )  # torchvision's ResNet-50 less its classifier
    block = 2048 * 256 + 256 * 256 * 9 + 256 * 2048 + 2 * (256 + 256 + 2048)
    laterals = (1024 * 2048 + 2048) + (512 * 2048 + 2048)
    assert count(model.student.decoder) == 2 * block + laterals
    for name in ("dense_projector", "pooled_projector"):
        assert count(getattr(model, name)) == (2048 * 4096 + 4096) + 2 * 4096 + (4096 * 256 + 256)
    for name in ("dense_predictor", "pooled_predictor"):
        assert count(getattr(model, name)) == (256 * 4096 + 4096) + 2 * 4096 + (4096 * 256 + 256)


def test_forward_equals_its_parts_one_pair_at_a_time():
    """A slow twin in eval mode (no batch statistics): each frame, view and subcrop on its own."""
    torch.manual_seed(0)
    model, batch = PoodleForPreTraining(config()).eval(), inputs()
    output = model(**batch)
    dense, pooled = [], []
    for b in range(2):
        for source in range(2):
            target = 1 - source
            views = batch["student_views"][b, source][None], batch["teacher_views"][b, target][None]
            images = batch["pixel_values"][b, source][None], batch["pixel_values"][b, target][None]
            features = model.student(see_through(images[0], views[0])).last_hidden_state
            prediction = model.dense_predictor(model.dense_projector(features))
            features = model.teacher(see_through(images[1], views[1])).last_hidden_state
            goal = model.teacher_dense_projector(features)
            grids = alignment_grids(
                batch["flow"][b, source][None], batch["valid_mask"][b, source][None], *views, (8, 12)
            )
            dense.append(
                dense_loss(sample(prediction, grids[0], "border"), sample(goal, grids[1], "border"), grids[2])
            )
            for k in range(3):
                frames = batch["pixel_values"][b][None]
                box = batch["student_boxes"][b, source, k].view(1, 1, 4)
                crop = crop_boxes(frames, box, torch.tensor([[source]]), 64)[0]
                p = model.pooled_predictor(model.pooled_projector(model.student(crop).pooler_output[..., None, None]))
                box = batch["teacher_boxes"][b, source, k].view(1, 1, 4)
                crop = crop_boxes(frames, box, batch["teacher_box_frames"][b, source, k].view(1, 1), 64)[0]
                z = model.teacher_pooled_projector(model.teacher(crop).pooler_output[..., None, None])
                pooled.append(pooled_loss(p.flatten(1), z.flatten(1)))
    assert output.dense_loss.item() == pytest.approx(torch.stack(dense).mean().item(), abs=1e-4)
    assert output.pooled_loss.item() == pytest.approx(torch.stack(pooled).mean().item(), abs=1e-4)
    assert output.loss.item() == pytest.approx(0.5 * (output.dense_loss + output.pooled_loss).item(), abs=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"decoder_laterals": False},
        {"decoder_lateral_depth": 2},
        {"decoder_top_down": False},
        {"num_decoder_blocks": 0},
        {"num_decoder_blocks": 0, "output_stride": 8, "pooled_weight": 0, "dense_weight": 1},
        {"num_decoder_blocks": 0, "dense_weight": 0},
        {"dense_stride": 4},
        {"backbone_config": BOTTLENECK, "num_decoder_blocks": 3},
        {"backbone_config": CONVNEXT},
        {"backbone_config": VIT},
    ],
    ids=str,
)
def test_only_the_student_gets_gradients_and_all_of_it_does(changes):
    model = PoodleForPreTraining(config(**changes)).train()
    model(**inputs()).loss.backward()
    for name, parameter in model.named_parameters():
        if "teacher" in name:
            assert not parameter.requires_grad and parameter.grad is None, name
        elif "mask_token" not in name:  # a ViT's, for masked image modelling
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_an_objective_of_weight_zero_has_no_heads():
    names = dict(PoodleForPreTraining(config(pooled_weight=0)).named_children())
    assert "dense_projector" in names and not any("pooled" in name for name in names)
    with pytest.raises(ValueError, match="num_decoder_blocks must be 0 where dense_weight is 0"):
        PoodleForPreTraining(config(dense_weight=0))


def test_teacher_is_a_copy_and_follows_the_closed_form():
    torch.manual_seed(0)
    model = PoodleForPreTraining(config())
    student, teacher = model.student.encoder.embedder, model.teacher.encoder.embedder
    assert all(
        torch.equal(a, b) for a, b in zip(model.student.state_dict().values(), model.teacher.state_dict().values())
    )
    start = teacher.embedder.convolution.weight.clone()
    values = []
    for step in range(5):
        with torch.no_grad():
            student.embedder.convolution.weight.add_(0.1 * (step + 1))
        values.append(student.embedder.convolution.weight.clone())
        model.update_teacher(0.9)
    expected = 0.9**5 * start + sum(0.1 * 0.9 ** (4 - step) * value for step, value in enumerate(values))
    torch.testing.assert_close(teacher.embedder.convolution.weight, expected)


def test_teacher_batch_norm_runs_in_train_mode():
    model = PoodleForPreTraining(config()).train()
    before = model.teacher.encoder.embedder.embedder.normalization.running_mean.clone()
    model(**inputs())
    assert not torch.equal(before, model.teacher.encoder.embedder.embedder.normalization.running_mean)


def test_files_round_trip(tmp_path):
    torch.manual_seed(0)
    model = PoodleForPreTraining(config())
    model.save_pretrained(tmp_path / "all")
    again = PoodleForPreTraining.from_pretrained(tmp_path / "all")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }

    model.teacher.save_pretrained(tmp_path / "model")
    pixel_values = torch.randn(1, 3, 75, 101)  # odd sides
    expected = model.eval().teacher(pixel_values, output_hidden_states=True)
    loaded = AutoModel.from_pretrained(tmp_path / "model").eval()
    assert isinstance(loaded, PoodleModel)
    assert torch.equal(loaded(pixel_values).last_hidden_state, expected.last_hidden_state)
    backbone = PoodleBackbone.from_pretrained(tmp_path / "model", out_features=["stage1", "stage4", "decoder"]).eval()
    maps = backbone(pixel_values).feature_maps
    assert backbone.channels == [8, 64, 64] and [m.shape[1] for m in maps] == [8, 64, 64]
    assert torch.equal(maps[2], expected.last_hidden_state) and torch.equal(
        maps[1].mean((2, 3)), expected.pooler_output
    )

    model.teacher.encoder.save_pretrained(tmp_path / "encoder")
    plain = ResNetBackbone.from_pretrained(tmp_path / "encoder").eval()
    assert torch.equal(plain(pixel_values).feature_maps[-1], maps[1])
    assert torch.equal(
        ResNetModel.from_pretrained(tmp_path / "encoder").eval()(pixel_values).last_hidden_state, maps[1]
    )


@pytest.mark.parametrize("changes", [{}, {"pooled_weight": 0}, {"dense_weight": 0, "num_decoder_blocks": 0}], ids=str)
def test_a_teacher_that_the_checkpoint_lacks_is_the_student(tmp_path, changes):
    """One without any of it, one without a single tensor, and the checkpoint of a plain model."""
    torch.manual_seed(0)
    model = PoodleForPreTraining(config(**changes))
    own = {
        name: torch.rand_like(value) if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    twins = {
        f"{teacher}.{key}": f"{student}.{key}"
        for student, teacher in model._PAIRS
        if hasattr(model, teacher)
        for key in getattr(model, teacher).state_dict()
    }
    one = "teacher.encoder.encoder.stages.0.layers.0.layer.0.normalization.running_var"
    assert one in twins and len(twins) == sum(name.startswith("teacher") for name in own)
    for left_out in (set(twins), {one}, set()):
        model.save_pretrained(
            tmp_path, state_dict={name: value for name, value in own.items() if name not in left_out}
        )
        again, info = PoodleForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
        assert info["missing_keys"] == left_out
        for name, value in again.state_dict().items():
            assert torch.equal(value, own[twins[name] if name in left_out else name]), name
        assert not any(p.requires_grad == name.startswith("teacher") for name, p in again.named_parameters())

    student = {name.removeprefix("student."): value for name, value in own.items() if name.startswith("student.")}
    model.student.save_pretrained(tmp_path / "model", state_dict=dict(student))  # which it empties
    again = PoodleForPreTraining.from_pretrained(tmp_path / "model")
    assert all(torch.equal(value, student[name]) for name, value in again.student.state_dict().items())
    values = again.state_dict()
    assert all(torch.equal(values[name], values[twin]) for name, twin in twins.items())


def test_readout_loss_files_and_pipeline(tmp_path):
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
    from PIL import Image

    result = pipeline("image-segmentation", model=str(tmp_path))(Image.new("RGB", (96, 64), (90, 120, 30)))
    assert result[0]["mask"].size == (96, 64)


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


def test_gradient_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    plain = PoodleForPreTraining(config()).train()
    saving = PoodleForPreTraining(config()).train()
    saving.load_state_dict(plain.state_dict())
    saving.student.checkpoint_gradients()
    for model in (plain, saving):
        model(**inputs()).loss.backward()
    for a, b in zip(plain.student.parameters(), saving.student.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_decoder_block": 1}, "Did you mean 'num_decoder_blocks'"),
        ({"num_decoder_blocks": -1}, "num_decoder_blocks must be an integer of at least 0"),
        ({"num_decoder_blocks": 4}, "num_decoder_blocks must be at most 3"),
        ({"decoder_laterals": 1}, "decoder_laterals must be true or false"),
        ({"decoder_laterals": False, "decoder_top_down": False}, "decoder_top_down must be true where"),
        ({"decoder_lateral_depth": 0}, "decoder_lateral_depth must be an integer of at least 1"),
        ({"projection_size": 0}, "projection_size must be an integer of at least 1"),
        ({"pooled_weight": -0.1}, "pooled_weight must be a finite number"),
        ({"dense_weight": 0, "pooled_weight": 0}, "one objective must be left"),
        ({"output_stride": 7}, "output_stride must be None, 8, 16 or 32"),
        ({"backbone_config": {"depths": [1]}}, "must name its model_type"),
        ({"backbone_config": {"model_type": "bert"}}, "PoodleConfig.backbone_config: 'bert' is no backbone"),
        ({"backbone_config": {"model_type": "clip_vision_model"}}, "'clip_vision_model' is no backbone"),
        ({"backbone_config": {"model_type": "segformer"}}, "'segformer' is no backbone"),
        ({"backbone_config": BertConfig()}, "PoodleConfig.backbone_config: 'bert' is no backbone"),
        (
            {"backbone_config": {**RESNET, "depthz": [1, 1, 1, 1]}},
            "PoodleConfig.backbone_config: ResNetConfig has no field 'depthz'. Did you mean 'depths'[?]",
        ),
        (
            {"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet18", "out_indeces": [1, 2, 3, 4]}},
            "TimmBackboneConfig has no field 'out_indeces'. Did you mean 'out_indices'[?]",
        ),
        (
            {"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet18"}},
            r"num_decoder_blocks must be at most 0: .* \(a backbone_config with out_indices: \[1, 2, 3, 4\] has four\), got 2",
        ),
        (
            {"backbone_config": TimmBackboneConfig(backbone="resnet18", out_indices=[3, 4])},
            r"num_decoder_blocks must be at most 1: .* out_indices: \[1, 2, 3, 4\] has four\), got 2",
        ),
        ({"backbone_config": {**VIT, "foo": 1}}, "PoodleConfig.backbone_config: Dinov2Config has no field 'foo'.$"),
        ({"backbone_config": "resnet"}, "backbone_config must be a config or a dict, got str"),
        (
            {"backbone_config": {**RESNET, "hidden_sizes": [8, 16, 32]}},
            r"backbone_config.hidden_sizes must give a width for each of the 4 depths, got \[8, 16, 32\]",
        ),
        ({"out_features": ["stage9"]}, "stage9"),
        ({"out_features": []}, r"PoodleConfig.out_features must be some of stem, stage1, .*, decoder, got \[\]"),
        ({"out_indices": []}, r"PoodleConfig.out_indices must be integers that count stem, .* from 0, got \[\]"),
        ({"out_indices": ["a"]}, r"PoodleConfig.out_indices must be integers that count stem, .* got \['a'\]"),
        ({"out_indices": 3}, "PoodleConfig.out_indices must be integers"),
        ({"semantic_loss_ignore_index": "a"}, "semantic_loss_ignore_index must be an integer, got 'a'"),
        ({"semantic_loss_ignore_index": None}, "semantic_loss_ignore_index must be an integer, got None"),
        ({"semantic_loss_ignore_index": 1.5}, "semantic_loss_ignore_index must be an integer, got 1.5"),
        ({"num_labels": -1}, "PoodleConfig.num_labels must be an integer of at least 0, got -1"),
        ({"num_labels": "x"}, "PoodleConfig.num_labels must be an integer of at least 0, got 'x'"),
        ({"num_labels": None}, "PoodleConfig.num_labels must be an integer of at least 0, got None"),
        ({"id2label": 3}, "PoodleConfig.id2label must be a mapping, a name for each number, got 3"),
        (
            {"id2label": {"road": 0}},
            "PoodleConfig.id2label must be a mapping, a name for each number, got {'road': 0}",
        ),
        ({"label2id": ["road"]}, "PoodleConfig.label2id must be a mapping, a number for each name, got .'road'"),
    ],
    ids=str,
)
def test_config_refuses_wrong_values(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_a_timm_encoder_may_come_as_its_config():
    pytest.importorskip("timm")
    changes = {"backbone": "resnet18", "out_indices": [1, 2, 3, 4]}
    torch.manual_seed(0)
    model = PoodleModel(config(backbone_config=TimmBackboneConfig(**changes))).eval()
    twin = PoodleModel(config(backbone_config={"model_type": "timm_backbone", **changes})).eval()
    assert model.config.to_dict() == twin.config.to_dict()
    twin.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 64, 96)
    features = model(images).last_hidden_state
    assert features.shape == (1, 512, 8, 12) and torch.equal(features, twin(images).last_hidden_state)


def test_a_bottleneck_without_channels_is_refused():
    assert PoodleModel(config(decoder_reduction=64)).decoder[0].conv1.out_channels == 1
    with pytest.raises(ValueError, match="PoodleConfig.decoder_reduction must be at most 64, the channels .*, got 65"):
        PoodleModel(config(decoder_reduction=65))
    PoodleModel(config(decoder_reduction=65, decoder_top_down=False))
    PoodleModel(config(decoder_reduction=65, num_decoder_blocks=0))


def test_stages_and_labels_are_looked_at_when_they_are_set_later(tmp_path):
    changed = config(
        out_indices=(2, -1), id2label={"0": "road", "1": "sky"}, num_labels=2, semantic_loss_ignore_index=-100
    )
    assert changed.out_features == ["stage2", "decoder"] and changed.id2label == {0: "road", 1: "sky"}
    changed.out_features = ["stage1"]
    with pytest.raises(ValueError, match="PoodleConfig.out_features must be some of"):
        changed.out_features = []
    changed.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="PoodleConfig.out_indices must be integers"):
        PoodleConfig.from_pretrained(tmp_path, out_indices=["a"])
    with pytest.raises(ValueError, match="PoodleConfig.num_labels must be an integer of at least 0, got -1"):
        PoodleConfig.from_pretrained(tmp_path, num_labels=-1)
    assert PoodleConfig.from_pretrained(tmp_path, num_labels=3).id2label[2] == "LABEL_2"


@pytest.mark.parametrize("model_type", [*sorted({*MODEL_FOR_BACKBONE_MAPPING_NAMES} - {"tipsv2"}), *PLAIN_VITS])
def test_configs_that_transformers_writes_are_taken(model_type):
    """Whole, as JSON, and as another config holds them: without `transformers_version`. (The config of tipsv2 has no stages.)"""
    backbone = AutoConfig.for_model(model_type)
    for given in (backbone, backbone.to_dict(), json.loads(backbone.to_json_string())):
        taken = PoodleConfig(backbone_config=given, num_decoder_blocks=0)
        assert taken.backbone_config.to_dict() == backbone.to_dict()
        assert PoodleConfig.from_dict(taken.to_dict()).to_dict() == taken.to_dict()
        assert PoodleConfig(**json.loads(taken.to_json_string())).to_dict() == taken.to_dict()
        if isinstance(given, dict):
            del given["transformers_version"]
            assert PoodleConfig(backbone_config=given, num_decoder_blocks=0).to_dict() == taken.to_dict()
            with pytest.raises(ValueError, match=f"no field '{model_type}_'"):
                PoodleConfig(backbone_config={**given, f"{model_type}_": 1}, num_decoder_blocks=0)


def test_keys_of_other_versions_and_synonyms_are_taken(tmp_path):
    """`path_norm` is in checkpoints of Swin, and no field; the others were in every config, or stand for fields."""
    swin = {
        "model_type": "swin",
        "embed_dim": 8,
        "num_attention_heads": [1] * 4,
        "torch_dtype": "float32",
        "num_labels": 3,
    }
    swin |= {
        "output_attentions": False,
        "pruned_heads": {},
        "is_decoder": False,
        "tie_word_embeddings": True,
        "pad_token_id": None,
    }
    assert PoodleConfig(backbone_config=swin).backbone_config.num_heads == [1] * 4
    PoodleConfig(backbone_config={"model_type": "hiera", "num_layers": 4})
    with pytest.raises(ValueError, match="SwinConfig has no field 'path_norm'"):
        PoodleConfig(backbone_config={**swin, "path_norm": True})
    (tmp_path / "config.json").write_text(json.dumps({**swin, "path_norm": True, "transformers_version": "4.16.0"}))
    for _ in range(2):
        read = PoodleConfig(backbone_config=AutoConfig.from_pretrained(tmp_path))
        assert read.backbone_config.path_norm
        read.save_pretrained(tmp_path / "poodle")
        again = PoodleConfig.from_pretrained(tmp_path / "poodle")
        assert again.to_dict() == read.to_dict()
        again.backbone_config.save_pretrained(tmp_path)


def test_config_round_trip(tmp_path):
    original = config(num_decoder_blocks=1, out_features=["stage2", "decoder"])
    original.save_pretrained(tmp_path)
    assert PoodleConfig.from_pretrained(tmp_path).to_dict() == original.to_dict()


def test_shapes_that_do_not_fit_are_refused():
    model, batch = PoodleForPreTraining(config()), inputs()
    with pytest.raises(ValueError, match="flow must be"):
        model(**{**batch, "flow": batch["flow"][:1]})
    with pytest.raises(ValueError, match="frame pairs"):
        model(**{**batch, "pixel_values": batch["pixel_values"][:, 0]})
    with pytest.raises(
        ValueError, match=r"pixel_values must be frame pairs \(B, 2, 3, H, W\), got \(2, 2, 1, 64, 96\)"
    ):
        model(**{**batch, "pixel_values": batch["pixel_values"][:, :, :1]})


@pytest.mark.parametrize(
    ("name", "shape", "objective"),
    [
        ("flow", "2, 2, 2, 64, 96", "dense"),
        ("valid_mask", "2, 2, 64, 96", "dense"),
        ("student_views", "2, 2, 2, 3", "dense"),
        ("teacher_views", "2, 2, 2, 3", "dense"),
        ("student_boxes", "2, 2, (3|K), 4", "pooled"),
        ("teacher_boxes", "2, 2, 3, 4", "pooled"),
        ("teacher_box_frames", "2, 2, 3", "pooled"),
    ],
)
def test_inputs_of_each_objective_are_asked_for(name, shape, objective):
    both, batch = PoodleForPreTraining(config()), inputs()
    value = batch[name]
    for wrong in (
        None,
        value[:1],
        value[:, :1],
        value[..., :1],
        value[..., None],
        value.flatten(0, 1),
        value[:, :, :1],
    ):
        got = "None" if wrong is None else str(tuple(wrong.shape))
        if name == "student_boxes" and got == "(2, 2, 1, 4)":  # it says what K is
            continue
        with pytest.raises(ValueError) as error:
            both(**{**batch, name: wrong})
        expected = rf"{name} must be \({shape}\) to fit pixel_values, got {re.escape(got)}"
        assert re.fullmatch(expected, str(error.value))
    other = PoodleForPreTraining(
        config(dense_weight=0, num_decoder_blocks=0) if objective == "dense" else config(pooled_weight=0)
    )
    assert torch.isfinite(other(**{**batch, name: None}).loss)


@pytest.mark.parametrize(
    "changes", [{}, {"num_decoder_blocks": 0, "output_stride": 8}, {"backbone_config": CONVNEXT}], ids=str
)
def test_student_teacher_and_losses_compile_to_one_graph_that_is_kept(changes):
    """No graph breaks, and no recompilation for other values of the same shapes."""
    model, graphs = PoodleForPreTraining(config(**changes)).train(), []
    expected = model(**inputs(seed=1)).loss.item()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    for seed in (0, 1, 1):
        output = compiled(**inputs(seed=seed))
    output.loss.backward()
    torch._dynamo.reset()  # or sizes that differ between tests would make other compilations dynamic
    assert output.loss.item() == pytest.approx(expected, abs=1e-4) and len(graphs) == 1
