"""The benchmarks' reference model agrees with our step wherever their definitions agree."""

import sys
from pathlib import Path

import pytest
import torch
from test_modeling_pretraining import RESNET
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/ is not installed

from benchmarks import reference
from benchmarks.reference import ReferenceModel, cut, draw_subcrops, draw_view, flow_is_valid, invert
from modeling_poodle import PoodleConfig, PoodleForPreTraining
from modeling_poodle.geometry_poodle import affine_view, flow_valid_mask, invert_affine
from training.flow import RaftFlow
from training.recipe import Recipe

TINY = {"backbone_config": RESNET, "projection_hidden_size": 32, "projection_size": 16}


def twins() -> tuple[PoodleForPreTraining, ReferenceModel]:
    """Our model at dense stride 1 and the reference with the same weights; the teacher differs from the student."""
    torch.manual_seed(0)
    ours = PoodleForPreTraining(PoodleConfig(**TINY, dense_stride=1)).train()
    with torch.no_grad():
        for parameter in ours.teacher.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return ours, ReferenceModel(ours, align_corners_mistake=False).train()


def odd_inputs(height: int = 64, width: int = 96, whole: bool = False, seed: int = 0) -> dict:
    """Inputs with identity views, smooth flow that also leaves the frame, masks with holes, and unscaled subcrops of whole pixels."""
    b, k, size = 2, 3, 32
    g = torch.Generator().manual_seed(seed)
    coarse = 12 * torch.randn(2 * b, 2, 3, 4, generator=g)
    flow = F.interpolate(coarse, (height, width), mode="bicubic").unflatten(0, (b, 2))
    flow = flow.round() if whole else flow
    x = flow[:, :, 0] + torch.arange(width) + 0.5
    y = flow[:, :, 1] + torch.arange(height)[:, None] + 0.5
    stays = (x >= 0) & (x <= width) & (y >= 0) & (y <= height)
    corner = torch.stack(
        [torch.randint(0, side - size + 1, (2, b, 2, k), generator=g) for side in (width, height)], dim=-1
    )
    boxes = torch.cat([corner, corner + size], dim=-1).float()
    identity = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).expand(b, 2, 2, 3).contiguous()
    return {
        "pixel_values": torch.randn(b, 2, 3, height, width, generator=g),
        "flow": flow,
        "valid_mask": stays & (torch.rand(b, 2, height, width, generator=g) > 0.3),
        "student_views": identity,
        "teacher_views": identity,
        "student_boxes": boxes[0],
        "teacher_boxes": boxes[1],
        "teacher_box_frames": torch.randint(0, 2, (b, 2, k), generator=g),
        "subcrop_size": size,
    }


@pytest.mark.parametrize(
    ("size", "whole", "tolerance"), [((64, 96), True, 1e-5), ((64, 96), False, 1e-3), ((71, 83), False, 1e-3)]
)
def test_reference_and_ours_compute_the_same_losses_and_gradients(size, whole, tolerance):
    ours, reference = twins()
    inputs = odd_inputs(*size, whole=whole)
    output = ours(**inputs)
    loss, dense, pooled = reference(**inputs)
    assert 0.1 < output.valid_fraction < 0.9 and 0.5 < dense < 3.5
    assert abs(output.dense_loss - dense) < tolerance
    assert abs(output.pooled_loss - pooled) < 1e-5
    assert abs(output.loss - loss) < tolerance
    output.loss.backward()
    loss.backward()
    own = dict(ours.named_parameters())
    for name, parameter in reference.named_parameters():
        if parameter.requires_grad:
            difference = (parameter.grad - own[name].grad).norm()
            assert difference <= max(100 * tolerance, 1e-3) * own[name].grad.norm() + 1e-6, name


def test_what_a_gpu_cannot_take_at_once_the_reference_takes_in_pieces(monkeypatch):
    (_, model), inputs = twins(), odd_inputs()
    whole = model(**inputs)
    pieces = []
    monkeypatch.setattr(reference, "MOST_NUMBERS", 2 * TINY["projection_size"] * inputs["valid_mask"][0, 0].numel())
    dense_losses = model.dense_losses
    monkeypatch.setattr(model, "dense_losses", lambda *maps: (pieces.append(len(maps[0])), dense_losses(*maps))[1])
    torch.testing.assert_close(model(**inputs), whole)
    assert len(pieces) > 1 and sum(pieces) == 2 * len(inputs["pixel_values"])
    raft = RaftFlow("raft_small", "random", 2).raft
    frames = torch.randint(0, 256, (3, 2, 3, 128, 128), dtype=torch.uint8)
    whole = reference.torchvision_twice(raft, frames, 2)
    monkeypatch.setattr(reference, "MOST_SAMPLED", 2 * 16 * 16)
    forward, pieces = raft.forward, []
    monkeypatch.setattr(raft, "forward", lambda a, b, **more: (pieces.append(len(a)), forward(a, b, **more))[1])
    torch.testing.assert_close(reference.torchvision_twice(raft, frames, 2), whole, rtol=1e-4, atol=1e-4)
    assert pieces == [2, 2, 1, 1]


def test_the_warps_mistake_is_small_but_there():
    ours, reference = twins()
    inputs = odd_inputs(whole=True)
    right = reference(**inputs)[1]
    reference.align_corners_mistake = True
    assert 1e-6 < abs(reference(**inputs)[1] - right) < 0.05


def test_teacher_moves_equally():
    ours, reference = twins()
    ours.update_teacher(0.9)
    reference.update_teacher(0.9)
    own = dict(ours.named_parameters())
    moved = [name for name, _ in reference.named_parameters() if name.startswith("teacher")]
    assert len(moved) > 20
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(parameter, own[name], rtol=1e-6, atol=1e-7)


def test_an_image_without_valid_points_adds_nothing():
    ours, reference = twins()
    inputs = odd_inputs(whole=True)
    inputs["valid_mask"][0, 1] = False
    output, (_, dense, _) = ours(**inputs), reference(**inputs)
    assert abs(output.dense_loss - dense) < 1e-5


def test_reference_geometry_against_ours():
    views = torch.tensor([draw_view(64, 96) for _ in range(20)])
    torch.testing.assert_close(invert(views), invert_affine(views), rtol=1e-4, atol=1e-5)
    # affine_view gives each drawn view again from the angle and scale read back from it.
    cos, sin, flip = views[:, 1, 1], views[:, 1, 0] * 64 / 96, torch.sign(views[:, 0, 0])
    angle, scale = torch.atan2(sin * flip, cos), 1 / torch.hypot(cos, sin)
    torch.testing.assert_close(affine_view(angle, scale, flip < 0, 64, 96), views, rtol=1e-4, atol=1e-5)
    assert angle.abs().max() < 0.1746 and 0.9 <= scale.min() and scale.max() <= 1.1 + 1e-6
    flow = torch.zeros(1, 2, 32, 48)
    flow[:, 0] = 5
    # The outermost pixels are left out: the reference's coordinates reach beyond the frame there.
    found, own = flow_is_valid(flow, -flow)[0, 1:-1], flow_valid_mask(flow, -flow)[0, 1:-1]
    assert found[:, :42].all() and not found[:, 43:].any() and torch.equal(found[:, :42], own[:, :42])
    assert not flow_is_valid(flow, flow).any()


def test_reference_subcrops_follow_the_flow():
    recipe = Recipe(subcrop_jitter=0.0, num_subcrops=4)
    flow = torch.zeros(1, 2, 2, 128, 256)
    flow[:, :, 0], flow[:, :, 1] = 8, -4
    drawn = draw_subcrops(flow, recipe)
    matched = drawn["teacher_box_frames"] == torch.tensor([1, 0])[None, :, None]
    assert matched.float().mean() > 0.5
    for boxes in (drawn["student_boxes"], drawn["teacher_boxes"]):
        assert boxes.shape == (1, 2, 4, 4) and boxes.min() >= 0 and (boxes <= torch.tensor([256, 128] * 2)).all()
    box = torch.tensor([8.0, 4, 40, 36])
    image = torch.rand(3, 64, 64)
    assert torch.equal(cut(image, box, 32), image[:, 4:36, 8:40])
