"""Student, teacher and both objectives: parameter counts, gradients, files, and inputs that do not fit."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, ResNetBackbone, ResNetModel

from modeling_poodle import (
    PoodleBackbone,
    PoodleConfig,
    PoodleForPreTraining,
    PoodleForSemanticSegmentation,
    PoodleModel,
)
from modeling_poodle.geometry_poodle import affine_view, alignment_grids, crop_boxes, sample, see_through
from modeling_poodle.modeling_poodle_pretraining import PointwiseConv
from modeling_poodle.objectives_poodle import dense_loss, pooled_loss
from training.assembly import synchronise_batch_norm

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


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_pointwise_convolution_is_a_convolution(memory_format):
    conv = PointwiseConv(6, 5)
    images = torch.randn(2, 6, 3, 4).to(memory_format=memory_format).requires_grad_()
    expected = F.conv2d(images, conv.weight, conv.bias)
    found = conv(images)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    wrt = (images, conv.weight, conv.bias)
    for ours, theirs in zip(
        torch.autograd.grad((found * weights).sum(), wrt), torch.autograd.grad((expected * weights).sum(), wrt)
    ):
        torch.testing.assert_close(ours, theirs)


def gradient_checkpointing_enable(model) -> None:
    """Call the method by its name in the installed version of transformers."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


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
    )  # torchvision's ResNet-50 without its classifier
    block = 2048 * 256 + 256 * 256 * 9 + 256 * 2048 + 2 * (256 + 256 + 2048)
    laterals = (1024 * 2048 + 2048) + (512 * 2048 + 2048)
    assert count(model.student.decoder) == 2 * block + laterals
    for name in ("dense_projector", "pooled_projector"):
        assert count(getattr(model, name)) == (2048 * 4096 + 4096) + 2 * 4096 + (4096 * 256 + 256)
    for name in ("dense_predictor", "pooled_predictor"):
        assert count(getattr(model, name)) == (256 * 4096 + 4096) + 2 * 4096 + (4096 * 256 + 256)


def test_forward_equals_its_parts_one_pair_at_a_time():
    """A slow twin runs each frame, view and subcrop alone, in eval mode (no batch statistics)."""
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
        elif "mask_token" not in name:  # a ViT has one for masked image modelling
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_an_objective_of_weight_zero_has_no_heads():
    names = dict(PoodleForPreTraining(config(pooled_weight=0)).named_children())
    assert "dense_projector" in names and not any("pooled" in name for name in names)


def test_without_the_dense_objective_there_is_no_decoder(tmp_path):
    given = config(dense_weight=0)
    model = PoodleForPreTraining(given).train()
    model(**inputs()).loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(gradient is not None for gradient in trained.values())
    assert not any("dense" in name or "decoder" in name for name in trained)
    # Users of the saved model get the encoder's map, not the map of an untrained decoder.
    assert (given.num_decoder_blocks, model.config.num_decoder_blocks, model.config.out_features) == (2, 0, ["stage4"])
    model.save_pretrained(tmp_path)
    again = PoodleForPreTraining.from_pretrained(tmp_path)
    assert again.config.num_decoder_blocks == 0 and again.state_dict().keys() == model.state_dict().keys()


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

    for other in (AutoModel, PoodleModel, PoodleBackbone, PoodleForSemanticSegmentation):
        with pytest.raises(ValueError, match=r"holds a PoodleForPreTraining.*'\)\.teacher"):
            other.from_pretrained(tmp_path / "all")

    # The checkpoint still loads with a config that leaves out some of its parts.
    for change in ({"num_decoder_blocks": 1}, {"decoder_laterals": False}, {"dense_weight": 0}):
        less, info = PoodleForPreTraining.from_pretrained(tmp_path / "all", output_loading_info=True, **change)
        assert info["unexpected_keys"] and not info["missing_keys"]
        assert all(
            torch.equal(value, model.state_dict()[name])
            for name, value in less.student.encoder.state_dict(prefix="student.encoder.").items()
        )

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
def test_a_teacher_that_the_checkpoint_lacks_is_the_student(tmp_path, changes, caplog):
    """The checkpoint has no teacher at all, lacks one tensor of it, lacks nothing, or is that of a plain model."""
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
    # save_pretrained empties the dict, so it gets a copy.
    model.student.save_pretrained(tmp_path / "model", state_dict=dict(student))
    caplog.clear()
    again = PoodleForPreTraining.from_pretrained(tmp_path / "model")
    assert "the teacher's weights that the checkpoint lacks were copied from the student" in caplog.text
    assert all(torch.equal(value, student[name]) for name, value in again.student.state_dict().items())
    values = again.state_dict()
    assert all(torch.equal(values[name], values[twin]) for name, twin in twins.items())


# False and True: synchronised BatchNorm, as on several GPUs, without and with torch.compile.
@pytest.mark.parametrize("synchronised", [None, False, True])
def test_gradient_checkpointing_gives_the_same_gradients(synchronised):
    torch.manual_seed(0)
    plain = PoodleForPreTraining(config()).train()
    saving = PoodleForPreTraining(config()).train()
    saving.load_state_dict(plain.state_dict())
    gradient_checkpointing_enable(saving.student)
    if synchronised is not None:
        saving = synchronise_batch_norm(saving, synchronised)
    for model in (plain, saving):
        model(**inputs()).loss.backward()
    for a, b in zip(plain.student.parameters(), saving.student.parameters()):
        torch.testing.assert_close(a.grad, b.grad)
    # Each block is computed twice, but the statistics of its BatchNorms move only once.
    moved = dict(saving.named_buffers())
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(moved[name], buffer, msg=name)
    norms = [m for m in saving.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms and all(m.momentum == 0.1 for m in norms)


def test_gradient_checkpointing_of_a_vit():
    torch.manual_seed(0)
    vit = {
        "model_type": "vit",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    plain = PoodleModel(
        PoodleConfig(
            backbone_config={**vit, "image_size": 32, "patch_size": 8}, num_decoder_blocks=1, decoder_reduction=2
        )
    )
    saving = PoodleModel(plain.config)
    saving.load_state_dict(plain.state_dict())
    gradient_checkpointing_enable(saving)
    assert [m for m in saving.encoder.modules() if getattr(m, "gradient_checkpointing", False)]
    image = torch.rand(2, 3, 32, 32)
    for model in (plain, saving):
        model.train()(image).last_hidden_state.square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_the_teacher_s_targets_are_without_noise_of_its_own():
    encoder = {"model_type": "swin", "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}
    noise = {"drop_path_rate": 0.5, "hidden_dropout_prob": 0.5}
    model = PoodleForPreTraining(
        config(backbone_config={**encoder, "window_size": 2, "image_size": 64, **noise})
    ).train()
    images = torch.rand(4, 3, 64, 64)
    assert not torch.equal(model.student(images)[0], model.student(images)[0])
    assert torch.equal(model.teacher(images)[0], model.teacher(images)[0])
    norms = [m for m in model.teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(norm.training for norm in norms)
    assert not any(module.training for module in model.eval().modules())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"num_decoder_blocks": 0, "output_stride": 8}, marks=pytest.mark.long),
        {"backbone_config": CONVNEXT},
    ],
    ids=str,
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
    torch._dynamo.reset()  # else sizes that differ between tests make later compilations dynamic
    assert output.loss.item() == pytest.approx(expected, abs=1e-4) and len(graphs) == 1


def test_what_is_weighed_and_logged_is_what_it_is_called():
    """Checked with different weights and a dense stride that does not divide the frame; the features returned are the student's."""
    torch.manual_seed(0)
    model = PoodleForPreTraining(config(dense_weight=0.25, pooled_weight=1.5, dense_stride=10)).eval()
    batch = inputs()
    with torch.no_grad():
        output = model(**batch)
        frames, views = batch["pixel_values"].flatten(0, 1), batch["student_views"].flatten(0, 1)
        features = model.student(see_through(frames, views)).last_hidden_state
        crops = crop_boxes(
            frames[:, None], batch["student_boxes"].flatten(0, 1), torch.zeros(4, 3, dtype=torch.long), 64
        )
        others = batch["teacher_views"].flip(1).flatten(0, 1)
        mask = alignment_grids(batch["flow"].flatten(0, 1), batch["valid_mask"].flatten(0, 1), views, others, (7, 10))[
            2
        ]
        pooled = model.student(crops.flatten(0, 1)).pooler_output
    assert output.loss.item() == pytest.approx((0.25 * output.dense_loss + 1.5 * output.pooled_loss).item(), abs=1e-5)
    assert output.valid_fraction.item() == pytest.approx(mask.float().mean().item())
    torch.testing.assert_close(output.dense_features, features, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.pooled_features, pooled, atol=1e-4, rtol=1e-4)


def test_heads_of_another_size_than_the_checkpoint_s_are_alike_in_teacher_and_student(tmp_path):
    torch.manual_seed(0)
    PoodleForPreTraining(config()).save_pretrained(tmp_path)
    again = PoodleForPreTraining.from_pretrained(
        tmp_path, config=config(projection_size=8), ignore_mismatched_sizes=True
    )
    values = again.state_dict()
    for name in ("dense", "pooled"):
        ours, theirs = (values[f"{who}{name}_projector.3.weight"] for who in ("", "teacher_"))
        assert ours.shape == (8, 32, 1, 1) and ours.std() > 0 and torch.equal(ours, theirs)


def test_a_teacher_that_is_reset_has_the_student_s_statistics():
    model = PoodleForPreTraining(config())
    for value in model.student.buffers():
        value.fill_(3)
    model.reset_teacher()
    pairs = zip(model.student.state_dict().values(), model.teacher.state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs)


def test_statistics_move_once_a_step_without_checkpointing():
    model = PoodleForPreTraining(config()).train()
    model(**inputs()).loss.backward()
    counts = {name: int(value) for name, value in model.student.decoder.named_buffers() if "num_batches" in name}
    assert counts and set(counts.values()) == {1}
