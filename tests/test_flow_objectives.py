"""The losses of unsupervised flow compared with loops, and the cost volume compared with its definition."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from modeling_poodle.geometry_poodle import see_through
from modeling_poodle.modeling_poodle_flow import Correlation, warp
from training.flow_objectives import (
    draw_views,
    known_motion_loss,
    photometric_loss,
    self_supervision_loss,
    smoothness_loss,
    ssim_distance,
    view_flow,
    visible_mask,
)


def test_correlation_equals_loops_and_its_gradient_is_right():
    torch.manual_seed(0)
    first, second = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    volume = Correlation.apply(first, second, 2)
    assert volume.shape == (2, 25, 4, 5)
    for n, row, column, y, x in np.ndindex(2, 4, 5, 5, 5):
        other_row, other_column = row + y - 2, column + x - 2
        inside = 0 <= other_row < 4 and 0 <= other_column < 5
        product = (first[n, :, row, column] * second[n, :, other_row, other_column]).mean() if inside else 0.0
        assert volume[n, 5 * y + x, row, column].item() == pytest.approx(float(product), abs=1e-12)
    small = [torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, b: Correlation.apply(a, b, 1), small)


def naive_ssim_distance(first, second):
    n, c, height, width = first.shape
    out = np.zeros((n, height - 2, width - 2))
    for i, row, column in np.ndindex(*out.shape):
        total = 0.0
        for channel in range(c):
            a, b = (m[i, channel, row : row + 3, column : column + 3] for m in (first, second))
            luminance = (2 * a.mean() * b.mean() + 1e-4) / (a.mean() ** 2 + b.mean() ** 2 + 1e-4)
            covariance = ((a - a.mean()) * (b - b.mean())).mean()
            total += (1 - luminance * (2 * covariance + 9e-6) / (a.var() + b.var() + 9e-6)) / 2
        out[i, row, column] = total / c
    return out


def test_ssim_distance_equals_loops():
    rng = np.random.default_rng(0)
    first, second = rng.random((2, 2, 3, 5, 6))
    expected = naive_ssim_distance(first, second)
    np.testing.assert_allclose(ssim_distance(*map(torch.tensor, (first, second))), expected, atol=1e-9)
    assert ssim_distance(torch.tensor(first), torch.tensor(first)).max() < 1e-6
    assert ssim_distance(torch.tensor(first), 1 - torch.tensor(first)).mean() > 0.8  # all edges are reversed


def test_photometric_loss_is_zero_for_the_true_motion_and_leaves_out_what_does_not_count():
    rng = np.random.default_rng(1)
    wide = torch.tensor(rng.random((1, 3, 8, 14)), dtype=torch.float32)
    first, second = wide[..., 2:12], wide[..., 0:10]  # everything moves two pixels to the right
    flow = torch.zeros(1, 2, 8, 10)
    flow[:, 0] = 2
    everywhere = torch.ones(1, 8, 10)
    assert photometric_loss(first, second, flow, everywhere) < 1e-6  # the last two columns leave the frame
    expected = naive_ssim_distance(first.numpy(), second.numpy())
    assert photometric_loss(first, second, 0 * flow, everywhere).item() == pytest.approx(expected.mean(), rel=1e-4)
    half = everywhere.clone()
    half[:, :, :5], half[:, :3, 7] = 0, 0.5
    weights = np.array([half[0, r : r + 3, c : c + 3].min().item() for r, c in np.ndindex(6, 8)]).reshape(6, 8)
    weighted = (expected[0] * weights).sum() / weights.sum()
    assert photometric_loss(first, second, 0 * flow, half).item() == pytest.approx(weighted, rel=1e-4)
    assert photometric_loss(first, second, flow, 0 * everywhere) == 0
    moving = flow.clone().requires_grad_()
    photometric_loss(first, second, moving - 0.3, everywhere).backward()
    assert moving.grad[:, 0, 1:-1, 1:-3].mean() < 0  # further to the right is better
    assert torch.equal(moving.grad[..., -1], torch.zeros(1, 2, 8))  # the last column leaves the frame


def test_smoothness_equals_loops():
    rng = np.random.default_rng(2)
    flow, images = rng.normal(size=(2, 2, 5, 6)), rng.random((2, 3, 5, 6)) * 0.02
    total = 0.0
    for dy, dx in ((0, 1), (1, 0)):
        values = []
        for n, c, row, column in np.ndindex(2, 2, 5 - 2 * dy, 6 - 2 * dx):
            a, b, d = (flow[n, c, row + k * dy, column + k * dx] for k in range(3))
            edge = np.abs(images[n, :, row + 2 * dy, column + 2 * dx] - images[n, :, row, column]).mean()
            values.append(math.exp(-150 * edge) * math.sqrt((a - 2 * b + d) ** 2 + 1e-6))
        total += np.mean(values) / 2
    assert smoothness_loss(torch.tensor(flow), torch.tensor(images)).item() == pytest.approx(total, rel=1e-9)
    ramp = torch.arange(6.0).expand(1, 2, 5, 6)
    assert smoothness_loss(ramp, torch.zeros(1, 3, 5, 6)).item() == pytest.approx(1e-3)  # first-order motion is free


def test_self_supervision_equals_loops_and_teaches_the_student_alone():
    rng = np.random.default_rng(3)
    student, teacher = (torch.tensor(rng.normal(size=(2, 2, 3, 4)), requires_grad=True) for _ in range(2))
    mask = torch.tensor(rng.random((2, 3, 4)) < 0.5)
    loss = self_supervision_loss(student, teacher, mask)
    difference = (student - teacher).detach().numpy()
    found = [
        np.mean([math.sqrt(difference[n, c, row, column] ** 2 + 1e-6) for c in range(2)])
        for n, row, column in np.argwhere(mask.numpy())
    ]
    assert loss.item() == pytest.approx(np.sum(found) / 24, rel=1e-9)
    loss.backward()
    assert teacher.grad is None and torch.equal((student.grad != 0).any(dim=1), mask)
    assert self_supervision_loss(student, teacher, torch.zeros_like(mask)) == 0


def test_visible_mask_is_of_each_frame_and_takes_no_gradient():
    flow = torch.zeros(1, 2, 2, 4, 8, requires_grad=True)
    with torch.no_grad():
        flow[0, 0, 0], flow[0, 1, 0] = 2.0, -2.0
        flow[0, 1, 0, :, 6:] = 3.0  # wrong, and points outside the frame
    mask = visible_mask(flow)
    assert not mask.requires_grad
    assert (
        mask[0, 0].tolist() == [[True] * 4 + [False] * 4] * 4
    )  # two columns point at wrong flow, two leave the frame
    assert mask[0, 1].tolist() == [[False] * 2 + [True] * 4 + [False] * 2] * 4


def test_known_flow_between_two_views_brings_one_onto_the_other():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    images = F.interpolate(torch.rand(4, 3, 6, 10), (48, 80), mode="bicubic").clamp(0, 1)
    views = draw_views(8, 48, 80, generator).chunk(2)
    flow, mask = view_flow(*views, 48, 80)
    assert 0.4 < mask.float().mean() < 1 and flow.norm(dim=1).mean() > 3
    first, second = (see_through(images, view) for view in views)
    # Near the edge of the frame, bilinear sampling mixes in the zeros outside.
    inner = -F.max_pool2d(-mask[:, None].float(), 5, stride=1, padding=2)[:, 0] > 0
    assert (warp(second, flow) - first).abs().mean(dim=1)[inner].mean() < 0.01
    assert (second - first).abs().mean(dim=1)[inner].mean() > 0.05


def test_visible_mask_allows_an_error_of_a_tenth_of_the_motion():
    flow = torch.zeros(1, 2, 2, 4, 96)
    flow[0, 0, 0], flow[0, 1, 0] = 20.0, -20.0
    assert visible_mask(flow)[0, 0, :, :76].all()
    flow[0, 1, 0] = -17.5  # squared error 6.25, limit 0.01 (20^2 + 17.5^2) + 0.5 = 7.6
    assert visible_mask(flow)[0, 0, :, :76].all()
    flow[0, 1, 0] = -17.0  # squared error 9, limit 7.4
    assert not visible_mask(flow).any()


def test_what_lies_beside_the_frame_has_no_known_flow():
    view = torch.tensor([[[1.0, 0, 0.5], [0, 1, 0]]])
    flow, mask = view_flow(view, view, 4, 8)
    torch.testing.assert_close(flow, torch.zeros(1, 2, 4, 8))
    assert mask.tolist() == [[[True] * 6 + [False] * 2] * 4]


def test_the_known_motion_of_both_directions_has_no_loss():
    frames, asked = torch.rand(2, 2, 3, 32, 48), []
    generator = torch.Generator().manual_seed(3)
    views = [draw_views(4, 32, 48, generator) for _ in range(2)]

    def network(frames):
        asked.append(frames.shape)
        both = (views, views[::-1])
        known = [torch.stack([view_flow(*pair, *size)[0] for pair in both], 1) for size in ((32, 48), (8, 12))]
        return SimpleNamespace(flow=known[0], level_flows=known)

    losses = known_motion_loss(network, frames, torch.Generator().manual_seed(3))
    assert asked == [(4, 2, 3, 32, 48)] and 0 < losses.loss <= 2 * 1e-3  # the Charbonnier loss of 0 at two levels
