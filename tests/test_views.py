"""Random draws against torchvision, naive twins and the method's statistics."""

import math

import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from modeling_poodle.geometry_poodle import apply_affine
from training import views


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_colour_adjustments_equal_torchvision_image_by_image(name):
    images = torch.rand(5, 3, 13, 17, generator=generator())
    images[1] = 0.4  # grey: hue and saturation are undefined there
    factor = torch.tensor([0.2, 1.8, 0.9, 1.0, 1.3]) if name != "hue" else torch.tensor([-0.2, 0.2, 0.05, 0.0, -0.11])
    ours = getattr(views, f"adjust_{name}")(images, factor)
    theirs = torch.stack([getattr(TF, f"adjust_{name}")(image, f.item()) for image, f in zip(images, factor)])
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_blur_equals_torchvision_and_leaves_unchosen_images_alone():
    images = torch.rand(3, 3, 40, 50, generator=generator())
    sigma, apply = torch.tensor([0.1, 1.3, 2.0]), torch.tensor([True, False, True])
    ours = views.gaussian_blur(images, sigma, apply, 9)
    for index in (0, 2):
        theirs = TF.gaussian_blur(images[index], [9, 9], [sigma[index].item()] * 2)
        torch.testing.assert_close(ours[index], theirs, atol=1e-5, rtol=0)
    assert torch.equal(ours[1], images[1])


def test_blur_cut_at_17_taps_equals_the_long_kernel():
    image = torch.rand(1, 3, 128, 160, generator=generator())
    assert views.blur_kernel_size(512, 1024) == 17
    assert views.blur_kernel_size(128, 256) == 13
    ours = views.gaussian_blur(image, torch.tensor([2.0]), torch.tensor([True]), 17)
    torch.testing.assert_close(ours[0], TF.gaussian_blur(image[0], [51, 51], [2.0, 2.0]), atol=1e-3, rtol=0)


def test_augmentation_rates_match_the_method():
    images = torch.rand(1, 3, 8, 10, generator=generator(1)).expand(2000, 3, 8, 10).contiguous()
    out = views.photometric_augmentation(images, generator(3))
    grey = (out.amax(1) - out.amin(1)).amax(dim=(1, 2)) < 1e-4
    assert grey.float().mean().item() == pytest.approx(0.2, abs=0.03)
    untouched = (out - images).abs().amax(dim=(1, 2, 3)) < 1e-4
    # no jitter (0.2), no grey (0.8), no blur (0.5); a blur of sigma under 0.2 changes nothing visible (0.05 of all blurs)
    assert untouched.float().mean().item() == pytest.approx(0.2 * 0.8 * (0.5 + 0.5 * 0.06), abs=0.02)
    assert 0 <= out.min() and out.max() <= 1 + 1e-6


def test_augmentation_is_a_function_of_the_seed():
    images = torch.rand(4, 3, 16, 16)
    assert torch.equal(
        views.photometric_augmentation(images, generator(7)), views.photometric_augmentation(images, generator(7))
    )
    assert not torch.equal(
        views.photometric_augmentation(images, generator(7)), views.photometric_augmentation(images, generator(8))
    )


def test_views_have_the_methods_angles_scales_and_flips():
    height, width, n = 64, 160, 4000
    drawn = views.draw_views((n,), height, width, generator())
    to_pixels = torch.diag(torch.tensor([width / 2, height / 2]))
    matrix = to_pixels @ drawn[:, :, :2] @ torch.linalg.inv(to_pixels)  # view pixels -> frame pixels
    determinant = torch.linalg.det(matrix)
    assert (determinant < 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
    scale = determinant.abs().rsqrt()
    assert (
        scale.min() >= 0.9 - 1e-4
        and scale.max() <= 1.1 + 1e-4
        and scale.mean().item() == pytest.approx(1.0, abs=0.005)
    )
    angle = torch.rad2deg(torch.asin(matrix[:, 0, 1] * scale))
    assert angle.abs().max() <= 10 + 1e-3 and angle.std().item() == pytest.approx(20 / math.sqrt(12), abs=0.2)
    # a rotation in pixels, up to scale and flip: orthogonal columns of equal length
    gram = matrix.transpose(1, 2) @ matrix * scale[:, None, None] ** 2
    torch.testing.assert_close(gram, torch.eye(2).expand_as(gram), atol=1e-4, rtol=0)


def test_no_affine_gives_the_identity():
    drawn = views.draw_views((2, 2), 8, 8, generator(), affine=False)
    points = torch.rand(4, 3, 5, 2)
    assert torch.equal(apply_affine(drawn.flatten(0, 1), points), points)


def test_centres_are_drawn_from_cells_without_replacement():
    height, width, cell = 128, 256, 54
    centres = views.grid_centres(500, 6, height, width, cell, generator())
    rows, columns = height // cell, width // cell  # 2 x 4 cells of 64 x 64
    index = (centres[..., 1] // (height / rows)).long() * columns + (centres[..., 0] // (width / columns)).long()
    assert all(len(set(row.tolist())) == 6 for row in index)
    counts = torch.bincount(index.flatten(), minlength=8) / 500
    torch.testing.assert_close(counts, torch.full((8,), 6 / 8), atol=0.07, rtol=0)
    inner = centres % 64 / 64
    assert inner.mean().item() == pytest.approx(0.5, abs=0.01) and inner.var().item() == pytest.approx(
        1 / 12, abs=0.005
    )


def test_more_centres_than_cells_use_every_cell_before_repeating():
    centres = views.grid_centres(50, 10, 100, 200, 50, generator())  # 8 cells
    index = (centres[..., 1] // 50).long() * 4 + (centres[..., 0] // 50).long()
    counts = torch.stack([torch.bincount(row, minlength=8) for row in index])
    assert counts.min() == 1 and counts.max() == 2


def test_subcrop_sizes_aspects_and_areas_match_the_method():
    height, width = 512, 1024
    out = views.draw_subcrops(torch.zeros(200, 2, 2, height, width), 6, generator())
    sizes = {}
    for who in ("student", "teacher"):
        box = out[f"{who}_boxes"]
        assert box.min() >= 0 and box[..., 2].max() <= width + 1e-3 and box[..., 3].max() <= height + 1e-3
        size = box[..., 2:] - box[..., :2]
        sizes[who] = (size.prod(-1) / (height * width)).flatten()
        aspect = (size[..., 0] / size[..., 1]).flatten()
        assert aspect.min() >= 0.75 - 1e-3 and aspect.max() <= 4 / 3 + 1e-3
        assert aspect.log().mean().item() == pytest.approx(0, abs=0.02)
    assert sizes["student"].min() >= 0.05 - 1e-4 and sizes["student"].max() <= 0.3 + 1e-4
    assert sizes["student"].mean().item() == pytest.approx(0.175, abs=0.005)
    assert (sizes["teacher"] >= sizes["student"] - 1e-4).all()
    assert sizes["teacher"].mean().item() == pytest.approx((0.175 + 0.3) / 2, abs=0.005)


def test_matched_subcrops_follow_the_flow_with_jitter():
    height, width = 200, 400
    flow = torch.zeros(300, 2, 2, height, width)
    flow[:, 0, 0], flow[:, 1, 0] = 30.0, -30.0
    out = views.draw_subcrops(flow, 4, generator(), area=(0.01, 0.012), jitter=0.05)
    centre = {who: (out[f"{who}_boxes"][..., :2] + out[f"{who}_boxes"][..., 2:]) / 2 for who in ("student", "teacher")}
    away = centre["teacher"] - centre["student"]
    interior = (
        (centre["student"][..., 0] > 120)
        & (centre["student"][..., 0] < 280)
        & (centre["student"][..., 1] > 40)
        & (centre["student"][..., 1] < 160)
    )
    assert out["matched"][interior].all()
    shift = away[:, 0][interior[:, 0]]
    assert shift[:, 0].mean().item() == pytest.approx(30, abs=1.5) and shift[:, 1].mean().item() == pytest.approx(
        0, abs=0.8
    )
    assert (shift[:, 0] - 30).abs().max() <= 0.05 * width + 1e-2 and shift[:, 1].abs().max() <= 0.05 * height + 1e-2
    assert shift[:, 0].std().item() == pytest.approx(0.1 * width / math.sqrt(12), rel=0.15)


def test_pairs_whose_flow_leaves_the_frame_come_from_the_same_frame():
    flow = torch.full((3, 2, 2, 64, 128), 1000.0)
    out = views.draw_subcrops(flow, 5, generator())
    assert not out["matched"].any()
    assert torch.equal(out["teacher_box_frames"], torch.arange(2)[None, :, None].expand(3, 2, 5))
    out = views.draw_subcrops(torch.zeros_like(flow), 5, generator())
    frames = torch.arange(2)[None, :, None].expand(3, 2, 5)
    assert torch.equal(out["teacher_box_frames"], torch.where(out["matched"], 1 - frames, frames))


def test_subcrops_that_do_not_follow_the_flow_lie_anywhere_in_the_other_frame():
    flow = torch.full((400, 2, 2, 64, 128), 1000.0)
    out = views.draw_subcrops(flow, 4, generator(), area=(0.01, 0.012), follow_flow=False)
    assert out["matched"].all()
    assert torch.equal(out["teacher_box_frames"], 1 - torch.arange(2)[None, :, None].expand(400, 2, 4))
    x = {who: (out[f"{who}_boxes"][..., 0] + out[f"{who}_boxes"][..., 2]) / 2 for who in ("student", "teacher")}
    assert x["teacher"].mean().item() == pytest.approx(64, abs=2)
    assert torch.corrcoef(torch.stack([x["student"].flatten(), x["teacher"].flatten()]))[0, 1].abs() < 0.06


def test_the_number_of_tries_gives_the_expected_matched_fraction():
    # The point is moved exactly onto the right edge: each try lands inside with probability 1/2.
    height, width = 40, 80
    x = torch.arange(width) + 0.5
    flow = torch.zeros(2000, 2, 2, height, width)
    flow[:, :, 0] = width - x
    for tries in (1, 5):
        out = views.draw_subcrops(flow, 1, generator(), area=(0.9, 0.95), jitter=0.001, tries=tries)
        assert out["matched"].float().mean().item() == pytest.approx(1 - 0.5**tries, abs=0.03)
