"""Random views and subcrops against torchvision, naive twins and the method's statistics."""

import colorsys
import dataclasses
import math

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torchvision.transforms.v2 import functional as TF

from modeling_poodle.geometry_poodle import apply_affine, flow_valid_mask
from training import views
from training.recipe import Recipe


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_colour_adjustments_equal_torchvision_image_by_image(name):
    images = torch.rand(5, 3, 13, 17, generator=generator())
    images[1] = 0.4  # grey, for which hue and saturation are undefined
    factor = torch.tensor([0.2, 1.8, 0.9, 1.0, 1.3]) if name != "hue" else torch.tensor([-0.2, 0.2, 0.05, 0.0, -0.11])
    ours = getattr(views, f"adjust_{name}")(images, factor)
    theirs = torch.stack([getattr(TF, f"adjust_{name}")(image, f.item()) for image, f in zip(images, factor)])
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_normalise_equals_torchvision():
    images = torch.rand(2, 3, 5, 7, dtype=torch.float64, generator=generator())
    expected = TF.normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(views.normalise(images), expected, atol=1e-12, rtol=0)


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
    assert views.blur_kernel_size(50, 40) == 5 and views.blur_kernel_size(9, 90) == 3
    ours = views.gaussian_blur(image, torch.tensor([2.0]), torch.tensor([True]), 17)
    torch.testing.assert_close(ours[0], TF.gaussian_blur(image[0], [51, 51], [2.0, 2.0]), atol=1e-3, rtol=0)


def test_augmentation_rates_match_the_method():
    images = torch.rand(1, 3, 8, 10, generator=generator(1)).expand(2000, 3, 8, 10).contiguous()
    out = views.photometric_augmentation(images, generator(3))
    grey = (out.amax(1) - out.amin(1)).amax(dim=(1, 2)) < 1e-4
    assert grey.float().mean().item() == pytest.approx(0.2, abs=0.03)
    untouched = (out - images).abs().amax(dim=(1, 2, 3)) < 1e-4
    # No jitter (0.2), no grey (0.8), and no blur (0.5) or one of sigma under about 0.21, which changes nothing visible (0.06 of all blurs).
    assert untouched.float().mean().item() == pytest.approx(0.2 * 0.8 * (0.5 + 0.5 * 0.06), abs=0.02)
    assert 0 <= out.min() and out.max() <= 1 + 1e-6


def test_augmentation_ranges_match_the_method():
    n = 1000
    # Only brightness changes a constant grey image.
    factor = views.photometric_augmentation(torch.full((n, 3, 8, 8), 0.4), generator(1))[:, 0, 4, 4] / 0.4
    assert ((factor - 1).abs() > 1e-3).float().mean().item() == pytest.approx(0.8, abs=0.04)
    assert factor.min().item() == pytest.approx(0.2, abs=0.01) and factor.max().item() == pytest.approx(1.8, abs=0.01)
    assert factor.mean().item() == pytest.approx(1, abs=0.05)
    # A constant, slightly red image has hue 0, which only the hue shift changes.
    red = torch.tensor([0.45, 0.4, 0.4])[:, None, None].expand(n, 3, 8, 8).contiguous()
    colours = views.photometric_augmentation(red, generator(2))[:, :, 4, 4]
    coloured = colours.amax(1) - colours.amin(1) > 1e-4  # not greyscale
    hue = torch.tensor([colorsys.rgb_to_hsv(*colour)[0] for colour in colours[coloured].tolist()])
    hue = (hue + 0.5) % 1 - 0.5
    assert (hue.abs() > 1e-3).float().mean().item() == pytest.approx(0.8, abs=0.04)
    assert hue.min().item() == pytest.approx(-0.2, abs=0.01) and hue.max().item() == pytest.approx(0.2, abs=0.01)
    # For a grey point on grey, the ratio of the blurred values beside and at the point is exp(-1 / (2 sigma^2)), whatever the jitter.
    point = torch.full((n, 3, 12, 12), 0.2)
    point[:, :, 6, 6] = 0.3
    out = views.photometric_augmentation(point, generator(3))[:, 0]
    ratio = (out[:, 6, 7] - out[:, 1, 1]) / (out[:, 6, 6] - out[:, 1, 1])
    sigma = (-0.5 / ratio[ratio > 0.01].log()).sqrt()  # only sigmas above 0.33
    assert len(sigma) / n == pytest.approx(0.5 * (2 - 0.33) / (2 - 0.1), abs=0.05)
    assert sigma.min().item() == pytest.approx(0.33, abs=0.02) and sigma.max().item() == pytest.approx(2, abs=0.02)


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
    # In pixels, up to scale and flip, the matrix is a rotation: orthogonal columns of equal length.
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


def test_a_frame_lower_or_narrower_than_a_cell_has_one_row_or_column_of_them():
    low, narrow = (views.grid_centres(50, 2, *size, 50, generator()) for size in ((30, 100), (100, 30)))
    assert ((low[..., 0] > 50).sum(-1) == 1).all() and ((narrow[..., 1] > 50).sum(-1) == 1).all()


def test_subcrop_sizes_aspects_and_areas_match_the_method():
    height, width = 64, 128
    out = views.draw_subcrops(torch.zeros(200, 2, 2, height, width), 6, generator())
    sizes, aspects = {}, []
    for who in ("student", "teacher"):
        box = out[f"{who}_boxes"]
        assert box.min() >= 0 and box[..., 2].max() <= width + 1e-3 and box[..., 3].max() <= height + 1e-3
        size = box[..., 2:] - box[..., :2]
        sizes[who] = (size.prod(-1) / (height * width)).flatten()
        aspect = (size[..., 0] / size[..., 1]).flatten()
        assert aspect.min() >= 0.75 - 1e-3 and aspect.max() <= 4 / 3 + 1e-3
        assert aspect.log().mean().item() == pytest.approx(0, abs=0.02)
        aspects.append(aspect.log())
    assert torch.corrcoef(torch.stack(aspects))[0, 1].abs() < 0.06
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


def test_subcrops_start_from_cells_as_large_as_a_mean_subcrop():
    # There are 50 cells with sides of sqrt(0.04) * 100 = 20 pixels. A box that is moved inside keeps its centre in its cell.
    out = views.draw_subcrops(torch.zeros(4, 2, 2, 100, 200), 50, generator(), area=(0.03, 0.05))
    centre = (out["student_boxes"][..., :2] + out["student_boxes"][..., 2:]) / 2
    cells = (centre[..., 1] // 20) * 10 + centre[..., 0] // 20
    assert torch.equal(cells.flatten(0, 1).sort()[0], torch.arange(50.0).expand(8, 50))


def test_without_jitter_the_teacher_s_centre_is_where_the_flow_leads_to_the_very_edge():
    flow = torch.zeros(100, 2, 2, 8, 16)
    flow[:, 0, 0], flow[:, 0, 1], flow[:, 1, 0] = 3.0, -1.0, -3.0
    out = views.draw_subcrops(flow, 4, generator(), area=(1e-5, 1e-5), jitter=0.0)
    student, teacher = (
        (out[f"{who}_boxes"][..., :2] + out[f"{who}_boxes"][..., 2:]) / 2 for who in ("student", "teacher")
    )
    target = student + flow[:, :, None, :, 0, 0]
    frame = torch.tensor([16.0, 8.0])
    inside = ((target > 0.05) & (target < frame - 0.05)).all(-1)
    outside = ((target < -0.05) | (target > frame + 0.05)).any(-1)
    assert out["matched"][inside].all() and not out["matched"][outside].any()
    torch.testing.assert_close(teacher[inside], target[inside], atol=0.02, rtol=0)
    torch.testing.assert_close(teacher[outside], student[outside], atol=0.02, rtol=0)


def test_the_teacher_s_centre_is_jittered_by_a_tenth_of_the_frame():
    out = views.draw_subcrops(torch.zeros(300, 2, 2, 20, 40), 4, generator(), area=(1e-4, 1e-4))
    away = ((out["teacher_boxes"] - out["student_boxes"])[..., :2]).abs().amax(dim=(0, 1, 2))
    torch.testing.assert_close(away, torch.tensor([4.0, 2.0]), atol=0.06, rtol=0)


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
    # The flow leads exactly to the right edge, so the jitter of each try lands inside with probability 1/2.
    height, width = 40, 80
    x = torch.arange(width) + 0.5
    flow = torch.zeros(2000, 2, 2, height, width)
    flow[:, :, 0] = width - x
    for tries in (1, 5):
        out = views.draw_subcrops(flow, 1, generator(), area=(0.9, 0.95), jitter=0.001, tries=tries)
        assert out["matched"].float().mean().item() == pytest.approx(1 - 0.5**tries, abs=0.03)
    by_default = views.draw_subcrops(flow, 1, generator(), area=(0.9, 0.95), jitter=0.001)
    assert torch.equal(by_default["matched"], out["matched"])


# --- all together ---


@pytest.mark.parametrize("paper", [True, False])
def test_model_inputs_are_the_parts_in_their_order(paper):
    recipe = Recipe(
        crop_size=[64, 96], num_subcrops=3, subcrop_size=32, subcrop_area=[0.1, 0.2], subcrop_jitter=0.3,
        affine_views=paper, subcrops_follow_flow=paper,
    )  # fmt: skip
    frames = torch.randint(0, 256, (2, 2, 3, 64, 96), dtype=torch.uint8, generator=generator())
    flow = frames[:, :, :2] / 127.5 - 1  # up to a pixel each way, so that the consistency check keeps a part
    made = views.model_inputs({"frames": frames}, recipe, generator(5), lambda frames: frames[:, :, :2] / 127.5 - 1)

    draws = generator(5)
    images = views.photometric_augmentation(frames.flatten(0, 1) / 255, draws)
    valid = [flow_valid_mask(flow[:, k], flow[:, 1 - k]) for k in range(2)]
    expected = {
        "pixel_values": TF.normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]).view(2, 2, 3, 64, 96),
        "flow": flow,
        "valid_mask": torch.stack(valid, dim=1),
        "student_views": views.draw_views((2, 2), 64, 96, draws, paper),
        "teacher_views": views.draw_views((2, 2), 64, 96, draws, paper),
        **views.draw_subcrops(flow, 3, draws, (0.1, 0.2), 0.3, follow_flow=paper),
    }
    assert 0.1 < expected["valid_mask"].float().mean() < 0.9
    assert list(made) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(made[name], value, msg=name)

    # FlowE's error bound is the same for all flow lengths.
    made = views.model_inputs(
        {"frames": frames, "flow": flow}, dataclasses.replace(recipe, flow_max_error=0.9), generator(5)
    )
    error = [flow_valid_mask(flow[:, k], flow[:, 1 - k], 0.0, 0.81) for k in range(2)]
    assert torch.equal(made["valid_mask"], torch.stack(error, dim=1))
    assert 0.1 < made["valid_mask"].float().mean() < 0.9 and not torch.equal(
        made["valid_mask"], expected["valid_mask"]
    )

    # The loader's flow, in half precision, and its mask replace the estimates.
    mask = torch.rand(2, 2, 64, 96, generator=generator(1)) < 0.5
    given = {"frames": frames, "flow": flow.half(), "valid_mask": mask}
    made = views.model_inputs(given, recipe, generator(5))
    assert made["flow"].dtype == torch.float32 and torch.equal(made["flow"], flow.half().float())
    assert torch.equal(made["valid_mask"], mask) and torch.equal(made["student_views"], expected["student_views"])


def test_flow_that_is_not_finite_is_zero_invalid_and_followed_by_no_subcrop():
    flow = torch.ones(1, 2, 2, 64, 96)
    flow[0, 0, 0], flow[0, 1, 1, :20, :32] = math.nan, math.inf
    flow[0, 1, 0, 40:, 64:] = -math.inf
    batch = {"frames": torch.zeros(1, 2, 3, 64, 96, dtype=torch.uint8), "flow": flow}
    recipe = Recipe(crop_size=[64, 96], num_subcrops=3, subcrop_size=32)
    made = views.model_inputs({**batch, "valid_mask": torch.ones(1, 2, 64, 96, dtype=torch.bool)}, recipe, generator())
    usable = torch.ones(2, 64, 96, dtype=torch.bool)
    usable[0], usable[1, :20, :32], usable[1, 40:, 64:] = False, False, False
    assert torch.equal(made["valid_mask"][0], usable)
    assert torch.equal(made["flow"], torch.where(flow.isfinite(), flow, 0.0))
    assert not made["matched"][0, 0].any() and made["teacher_box_frames"][0, 0].eq(0).all()
    for who in ("student", "teacher"):
        assert made[f"{who}_boxes"].isfinite().all()


def test_everything_is_made_on_the_device_of_the_generator():
    """With another default device, a tensor created without `device=` would not match the others."""
    frames, flow = torch.zeros(1, 2, 3, 64, 96, dtype=torch.uint8), torch.zeros(1, 2, 2, 64, 96)
    recipes = [
        Recipe(crop_size=[64, 96], num_subcrops=3, subcrop_size=32, affine_views=affine, subcrops_follow_flow=affine)
        for affine in (True, False)
    ]
    with torch.device("meta"):
        made = [views.model_inputs({"frames": frames, "flow": flow}, recipe, generator()) for recipe in recipes]
    assert {value.device.type for inputs in made for value in inputs.values()} == {"cpu"}


def test_each_jitter_has_a_factor_of_its_own_and_grey_is_the_luma(monkeypatch):
    factors = {}

    def noting(name):
        def note(images, factor):
            factors.setdefault(name, factor)
            return images

        return note

    for name in ("brightness", "contrast", "saturation", "hue"):
        monkeypatch.setattr(views, f"adjust_{name}", noting(name))
    images = torch.tensor([0.9, 0.5, 0.1])[:, None, None].expand(2000, 3, 4, 4)
    out = views.photometric_augmentation(images, generator())[:, :, 1, 1]
    jittered = factors["hue"] != 0
    drawn = torch.stack([factor[jittered] for factor in factors.values()])
    off_diagonal = torch.corrcoef(drawn)[~torch.eye(4, dtype=torch.bool)]
    assert len(factors) == 4 and off_diagonal.abs().max() < 0.1
    grey = out.amax(1) - out.amin(1) < 1e-4
    luma = 0.2989 * 0.9 + 0.587 * 0.5 + 0.114 * 0.1
    assert grey.any() and out[grey].sub(luma).abs().max() < 1e-4


def test_the_teacher_s_centre_is_jittered_along_each_side_for_itself():
    out = views.draw_subcrops(torch.zeros(300, 2, 2, 20, 40), 4, generator(), area=(1e-4, 1e-4))
    shift = (out["teacher_boxes"] - out["student_boxes"])[..., :2].flatten(0, 2)
    torch.testing.assert_close(shift.abs().amax(dim=0), torch.tensor([4.0, 2.0]), atol=0.06, rtol=0)
    assert torch.corrcoef(shift.T)[0, 1].abs() < 0.1


@pytest.mark.parametrize("kind, waits", [("mps", True), ("cuda", False), ("xpu", False)])
def test_the_host_waits_for_copies_to_apple_s_gpus_alone(kind, waits):
    """The copies are caught before they reach a device, because this machine may have none."""
    copies = []

    class Copies(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is not torch.Tensor.to:
                return function(*args, **(kwargs or {}))
            copies.append((args[1], kwargs))
            return args[0]

    with Copies():
        views.to_device(torch.zeros(2), torch.device(kind))
    assert copies == [(torch.device(kind), {"non_blocking": not waits})]
