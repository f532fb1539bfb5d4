import math

import pytest
import torch

from modeling_poodle.objectives_poodle import dense_loss, feature_std, pooled_loss


def test_dense_loss_equals_a_loop():
    torch.manual_seed(0)
    prediction, target, mask = torch.randn(3, 8, 5, 7), torch.randn(3, 8, 5, 7), torch.rand(3, 5, 7) > 0.4
    images = []
    for n in range(3):
        values = []
        for row in range(5):
            for column in range(7):
                if mask[n, row, column]:
                    p, t = prediction[n, :, row, column], target[n, :, row, column]
                    values.append((p / p.norm() - t / t.norm()).square().sum().item())
        images.append(sum(values) / len(values))
    assert dense_loss(prediction, target, mask).item() == pytest.approx(sum(images) / 3, abs=1e-5)


def test_an_image_without_valid_points_adds_nothing():
    torch.manual_seed(0)
    prediction = torch.randn(2, 4, 3, 3, requires_grad=True)
    mask = torch.ones(2, 3, 3, dtype=torch.bool)
    mask[1] = False
    target = torch.randn(2, 4, 3, 3)
    target[1] = math.nan
    loss = dense_loss(prediction, target, mask)
    loss.backward()
    assert loss.item() == pytest.approx(dense_loss(prediction[:1], target[:1], mask[:1]).item() / 2, abs=1e-6)
    assert prediction.grad[0].abs().sum() > 0
    mask[1, 0, 2] = True  # one valid point weighs as much as all points of an image
    opposite = torch.stack([target[0], -prediction[1].detach()])
    assert dense_loss(prediction, opposite, mask).item() == pytest.approx(loss.item() + 4 / 2, abs=1e-6)
    mask[:] = False
    assert dense_loss(torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), mask).item() == 0


def test_gradient_is_finite_with_an_empty_mask_and_no_gradient_reaches_the_target():
    prediction, target = torch.randn(1, 4, 2, 2, requires_grad=True), torch.randn(1, 4, 2, 2, requires_grad=True)
    dense_loss(prediction, target, torch.zeros(1, 2, 2, dtype=torch.bool)).backward()
    assert torch.equal(prediction.grad, torch.zeros_like(prediction)) and target.grad is None


def test_pooled_loss_has_its_closed_values():
    a = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    assert pooled_loss(a, a * 5).item() == pytest.approx(0, abs=1e-6)
    assert pooled_loss(a, -a).item() == pytest.approx(4, abs=1e-6)
    assert pooled_loss(a, torch.tensor([[0.0, 2.0], [1.0, -1.0]])).item() == pytest.approx(2, abs=1e-6)


def test_vectors_shorter_than_eps_lose_their_weight():
    """Lengths below 1e-6 are divided by 1e-6: two equal vectors of 3e-7 have a cosine of 0.09."""
    a = torch.tensor([[3e-7, 0.0]])
    assert pooled_loss(a, a).item() == pytest.approx(2 - 2 * 0.09, abs=1e-5)
    points = a[:, :, None, None]
    mask = torch.ones(1, 1, 1, dtype=torch.bool)
    assert dense_loss(points, points, mask).item() == pytest.approx(2 - 2 * 0.09, abs=1e-5)
    short = torch.tensor([[0.03, 0.04]])  # above eps, a short vector is normalised to length 1
    assert pooled_loss(short, short).item() == pytest.approx(0, abs=1e-6)


def test_feature_std_has_its_closed_value():
    """Unit vectors (1, 0), (1, 0), (0, 1): each channel's deviation is sqrt(2) / 3."""
    assert feature_std(torch.tensor([[5.0, 0.0], [2.0, 0.0], [0.0, 3.0]])).item() == pytest.approx(2 / 3, abs=1e-6)


def test_feature_std_is_one_on_the_sphere_and_zero_when_collapsed():
    torch.manual_seed(0)
    assert feature_std(torch.randn(20000, 32)).item() == pytest.approx(1, abs=0.01)
    assert feature_std(torch.ones(100, 32)).item() == pytest.approx(0, abs=1e-6)


def test_no_gradient_of_the_pooled_loss_reaches_the_target():
    prediction, target = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    pooled_loss(prediction, target).backward()
    assert prediction.grad.abs().sum() > 0 and target.grad is None


def test_features_in_half_precision_are_compared_in_single():
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 64, 5, 7).bfloat16()
    mask = torch.ones(3, 5, 7, dtype=torch.bool)
    for function, given in (
        (lambda x, y: dense_loss(x, y, mask), (a, b)),
        (pooled_loss, (a[..., 0, 0], b[..., 0, 0])),
        (feature_std, (a[..., 0, 0],)),
    ):
        found = function(*given)
        assert found.dtype == torch.float32 and found == function(*(value.float() for value in given))
