"""Sampling grids against naive loops, and the whole alignment end to end with the exact flow of the rendered street."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from modeling_poodle.geometry_poodle import (
    affine_view,
    alignment_grids,
    apply_affine,
    cell_centres,
    crop_boxes,
    flow_valid_mask,
    inside,
    invert_affine,
    normalise_flow,
    sample,
    see_through,
)
from training.street import SKY, Street


def bilinear(image: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """Read a (C, H, W) image at pixel (x, y), with edges at integers and the border replicated: the slow twin of all sampling."""
    _, height, width = image.shape
    x, y = min(max(x - 0.5, 0), width - 1), min(max(y - 0.5, 0), height - 1)
    i, j = min(int(y), height - 2), min(int(x), width - 2)
    fy, fx = y - i, x - j
    top = (1 - fx) * image[:, i, j] + fx * image[:, i, j + 1]
    return (1 - fy) * top + fy * ((1 - fx) * image[:, i + 1, j] + fx * image[:, i + 1, j + 1])


def to_pixels(point, height, width):
    return (point[0].item() + 1) * width / 2, (point[1].item() + 1) * height / 2


def random_views(n, height, width, seed=0):
    g = torch.Generator().manual_seed(seed)
    angle = (torch.rand(n, generator=g) - 0.5) * math.radians(20)
    return affine_view(angle, 0.9 + 0.2 * torch.rand(n, generator=g), torch.rand(n, generator=g) < 0.5, height, width)


@pytest.mark.parametrize("flip", [False, True])
def test_affine_view_is_a_rotation_in_pixels(flip):
    height, width, angle, scale = 60, 200, math.radians(10), 1.1
    view = affine_view(torch.tensor([angle]), torch.tensor([scale]), torch.tensor([flip]), height, width)
    x, y = 17.0, -9.0  # pixels from the centre of the view
    mirrored = -x if flip else x
    expected_x = (math.cos(angle) * mirrored - math.sin(angle) * y) / scale
    expected_y = (math.sin(angle) * mirrored + math.cos(angle) * y) / scale
    point = torch.tensor([[[x / width * 2, y / height * 2]]])
    moved = apply_affine(view, point)[0, 0]
    assert moved[0].item() * width / 2 == pytest.approx(expected_x, abs=1e-4)
    assert moved[1].item() * height / 2 == pytest.approx(expected_y, abs=1e-4)


def test_inverse_undoes_the_view():
    view = random_views(16, 40, 90)
    points = torch.rand(16, 5, 7, 2) * 2 - 1
    torch.testing.assert_close(
        apply_affine(invert_affine(view), apply_affine(view, points)), points, atol=1e-5, rtol=0
    )


def test_any_affine_map_is_applied_and_inverted():
    """Views only turn about the frame's centre; these maps also shift, and have several batch dimensions."""
    maps = torch.randn(3, 4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    square = torch.cat([maps, torch.tensor([0.0, 0, 1]).expand(3, 4, 1, 3)], dim=-2)
    torch.testing.assert_close(invert_affine(maps), torch.linalg.inv(square)[..., :2, :])
    points = torch.randn(4, 5, 2, dtype=torch.float64)
    expected = torch.cat([points, torch.ones(4, 5, 1)], dim=-1) @ maps[0].transpose(1, 2)
    torch.testing.assert_close(apply_affine(maps[0], points), expected)


def test_the_frame_s_edge_is_inside():
    assert inside(torch.tensor([[1.0, -1.0], [1.001, 0.0], [0.0, -1.001]])).tolist() == [True, False, False]


def test_flow_in_pixels_and_maps_of_any_precision():
    flow = torch.randn(2, 2, 3, 7, dtype=torch.float64)
    expected = torch.stack([flow[:, 0] * 2 / 7, flow[:, 1] * 2 / 3], dim=-1)
    torch.testing.assert_close(normalise_flow(flow), expected, atol=1e-12, rtol=0)
    maps, points = torch.rand(2, 3, 4, 5), torch.rand(2, 6, 7, 2) * 3 - 1.5
    for padding in ("zeros", "border"):
        read = sample(maps.double(), points, padding)
        assert read.dtype == torch.float64
        torch.testing.assert_close(read.float(), sample(maps, points, padding), atol=1e-5, rtol=0)


def test_see_through_equals_a_loop():
    images, view = torch.rand(2, 3, 12, 20), random_views(2, 12, 20)
    ours = see_through(images, view)
    for n, row, column in ((0, 5, 9), (1, 6, 10), (0, 3, 14), (1, 8, 5)):
        point = torch.tensor([(2 * column + 1) / 20 - 1, (2 * row + 1) / 12 - 1])
        x, y = to_pixels(view[n, :, :2] @ point + view[n, :, 2], 12, 20)
        torch.testing.assert_close(ours[n, :, row, column], bilinear(images[n], x, y), atol=1e-4, rtol=0)


def test_autocast_leaves_the_geometry_as_it_is():
    """Under autocast, matrix products give bfloat16, which locates a point in a frame 1,024 pixels wide only to within 2 pixels."""
    height, width = 32, 1024
    # On a ramp, each value read tells its position: it is the pixel's column.
    images = torch.arange(width, dtype=torch.float32).expand(2, 3, height, width).contiguous()
    student, teacher = random_views(2, height, width, 1), random_views(2, height, width, 2)
    flow, mask = torch.full((2, 2, height, width), 3.7), torch.ones(2, height, width, dtype=torch.bool)
    points = torch.rand(2, 8, 9, 2) * 1.8 - 0.9
    calls = (
        lambda: see_through(images, student),
        lambda: alignment_grids(flow, mask, student, teacher, (8, 128)),
        lambda: sample(images, points),
    )
    expected = [call() for call in calls]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for call, plain in zip(calls, expected):
            torch.testing.assert_close(call(), plain, atol=0, rtol=0)
        columns = torch.linspace(-1, 1, 65).bfloat16().expand(2, 3, height, 65).contiguous()
        read = sample(columns, points)  # as a model's prediction
        assert read.dtype == torch.float32
        torch.testing.assert_close(read, sample(columns.float(), points), atol=0, rtol=0)
    assert see_through(images.bfloat16(), student).dtype == torch.bfloat16  # all in bfloat16


@pytest.mark.parametrize("size", [(24, 40), (3, 5), (6, 11)])
def test_alignment_grids_equal_a_loop(size):
    height, width, n = 24, 40, 2
    torch.manual_seed(0)
    flow, mask = torch.randn(n, 2, height, width) * 4, torch.rand(n, height, width) > 0.05
    student, teacher = random_views(n, height, width, 1), random_views(n, height, width, 2)
    student_points, teacher_points, valid = alignment_grids(flow, mask, student, teacher, size)
    h, w = size
    for i in range(n):
        inverse = [torch.linalg.inv(torch.cat([v[i], torch.tensor([[0.0, 0, 1]])])) for v in (student, teacher)]
        for row in range(h):
            for column in range(w):
                x, y = (column + 0.5) * width / w, (row + 0.5) * height / h
                motion = bilinear(flow[i], x, y)
                corners = bilinear(mask[i][None].float(), x, y)
                u = torch.tensor([x / width * 2 - 1, y / height * 2 - 1, 1])
                v = torch.tensor([(x + motion[0]) / width * 2 - 1, (y + motion[1]) / height * 2 - 1, 1])
                a, b = (inverse[0] @ u)[:2], (inverse[1] @ v)[:2]
                torch.testing.assert_close(student_points[i, row, column], a, atol=1e-4, rtol=0)
                torch.testing.assert_close(teacher_points[i, row, column], b, atol=1e-4, rtol=0)
                expected = corners.item() > 0.999 and a.abs().max() <= 1 and b.abs().max() <= 1
                if min(abs(1 - a.abs().max()), abs(1 - b.abs().max())) > 1e-4:
                    assert valid[i, row, column].item() == expected


def test_occlusion_equals_a_loop():
    torch.manual_seed(0)
    height, width = 11, 17
    forward = F.interpolate(torch.randn(2, 2, 4, 5) * 4, (height, width), mode="bilinear")
    backward = -forward + 0.5 * torch.randn(2, 2, height, width)
    ours = flow_valid_mask(forward, backward)
    for n in range(2):
        for row in range(height):
            for column in range(width):
                f = forward[n, :, row, column]
                x, y = column + 0.5 + f[0].item(), row + 0.5 + f[1].item()
                b = bilinear(backward[n], x, y)
                limit = 0.1 * (f.square().sum() + b.square().sum()) + 0.5
                expected = 0 <= x <= width and 0 <= y <= height and (f + b).square().sum() <= limit
                assert ours[n, row, column].item() == bool(expected)
    assert 0.05 < ours.float().mean() < 0.95
    still, one = torch.zeros(1, 2, 4, 4), torch.tensor([1.0, 0])[None, :, None, None].expand(1, 2, 4, 4)
    assert flow_valid_mask(still, one, alpha_1=0, alpha_2=1).all()  # exactly at the limit
    assert not flow_valid_mask(torch.full((1, 2, 4, 4), math.nan), torch.zeros(1, 2, 4, 4)).any()


def test_crops_of_whole_pixels_equal_the_antialiased_resize_of_the_cut():
    torch.manual_seed(0)
    frames = torch.rand(2, 2, 3, 20, 33)
    boxes = torch.tensor([[0, 0, 33, 20], [3, 2, 17, 11], [20, 0, 33, 6], [0, 14, 9, 20]]).expand(2, 4, 4)
    index = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0]])
    crops = crop_boxes(frames, boxes.float(), index, 7)
    for b in range(2):
        for m in range(4):
            x0, y0, x1, y1 = boxes[b, m].tolist()
            cut = frames[b, index[b, m], :, y0:y1, x0:x1]
            expected = F.interpolate(cut[None], size=(7, 7), mode="bilinear", antialias=True)[0]
            torch.testing.assert_close(crops[b, m], expected, atol=1e-5, rtol=0)
    # Boxes of another precision, or of integers, cut the same.
    for other in (boxes, boxes.float()):
        torch.testing.assert_close(
            crop_boxes(frames.double(), other, index, 7), crop_boxes(frames.double(), boxes.double(), index, 7)
        )


def test_crops_between_pixels_read_where_they_lie():
    """On a ramp, away from the box's edges, each antialiased read gives the value at the centre of its cell."""
    y, x = torch.meshgrid(torch.arange(40.0) + 0.5, torch.arange(60.0) + 0.5, indexing="ij")
    frames = torch.stack([x, y]).expand(1, 2, 2, 40, 60)
    box = torch.tensor([[[7.3, 5.6, 47.3, 29.6]]])
    crop = crop_boxes(frames, box, torch.tensor([[1]]), 8)[0, 0]
    centres = torch.arange(1, 7) + 0.5
    torch.testing.assert_close(crop[0, 1:-1, 1:-1], (7.3 + 5 * centres).expand(6, 6), atol=0.06, rtol=0)
    torch.testing.assert_close(crop[1, 1:-1, 1:-1], (5.6 + 3 * centres)[:, None].expand(6, 6), atol=0.06, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_crops_of_frames_in_half_precision_lie_where_those_of_single_do(dtype):
    torch.manual_seed(0)
    frames = (
        F.interpolate(torch.rand(1, 6, 32, 64), scale_factor=16, mode="bilinear").view(1, 2, 3, 512, 1024).to(dtype)
    )
    boxes = torch.tensor([[[700.0, 100, 1000, 400], [100.3, 50.2, 300.7, 250.9], [830.4, 200.3, 1020.1, 390.2]]])
    index = torch.tensor([[0, 1, 1]])
    expected = crop_boxes(frames.float(), boxes, index, 192)
    torch.testing.assert_close(crop_boxes(frames, boxes, index, 192).float(), expected, atol=0.02, rtol=0)


def test_full_frame_box_of_its_own_size_is_the_frame():
    frames = torch.rand(1, 2, 3, 16, 16)
    crops = crop_boxes(frames, torch.tensor([[[0.0, 0, 16, 16]] * 2]), torch.tensor([[0, 1]]), 16)
    torch.testing.assert_close(crops[0], frames[0], atol=1e-5, rtol=0)


def test_everything_is_made_on_the_device_of_the_inputs():
    """With another default device, a tensor created without `device=` would not match its inputs."""
    flow, mask, views = torch.randn(1, 2, 6, 8), torch.ones(1, 6, 8, dtype=torch.bool), random_views(1, 6, 8)
    frames, boxes = torch.rand(1, 2, 3, 6, 8), torch.tensor([[[1.0, 1, 5, 4]]])
    index = torch.zeros(1, 1, dtype=torch.long)
    with torch.device("meta"):
        made = [flow_valid_mask(flow, -flow), see_through(flow, views), crop_boxes(frames, boxes, index, 4)]
        made.extend(alignment_grids(flow, mask, views, views, (3, 4)))
    assert {value.device.type for value in made} == {"cpu"}


# --- end to end: surface coordinates in place of features ---


def oracle(street, t):
    """Feature map and surface ids: the map holds each surface point's coordinates, smooth wherever the surface is (sky left out)."""
    coordinates, surface = street.surface(t)
    return torch.from_numpy(coordinates), torch.from_numpy(surface)


def aligned_error(
    order: str = "ours", reverse: bool = False, skip_inverse: bool = False, stride: int = 1, everywhere: bool = False
):
    """Mean error between aligned student and teacher features, as a share of their range; by default only within surfaces."""
    height, width, n = 96, 192, 6
    errors, counted = [], 0
    for seed in range(n):
        street = Street(seed, height, width, speed=5.0)
        (source, surface_0), (target, surface_1) = oracle(street, 1.0), oracle(street, 1.3)
        flow, visible = (torch.from_numpy(a)[None] for a in street.flow(1.0, 1.3))
        if reverse:
            flow = -flow
        # Only facades and ground near the camera: their coordinates are smooth and span tens of metres.
        near = ((surface_0 >= 1) & (surface_0 <= 3) & (source[2] - street.pose(1.0).position[2] < 25))[None]
        views = random_views(2, height, width, seed)
        maps = []
        for k, (image, surface) in enumerate(((source, surface_0), (target, surface_1))):
            planes = torch.cat([image, F.one_hot((surface.long() + 1).clamp(max=5), 6).permute(2, 0, 1).float()])
            seen = see_through(planes[None], views[k : k + 1])
            maps.append(F.avg_pool2d(seen, stride) if stride > 1 else seen)
        used = [torch.tensor([[[1.0, 0, 0], [0, 1.0, 0]]])] * 2 if skip_inverse else [views[:1], views[1:]]
        size = (height // stride, width // stride)
        if order == "ours":
            a, b, mask = alignment_grids(flow, visible & near, used[0], used[1], size)
            student, teacher = sample(maps[0], a, "border"), sample(maps[1], b, "border")
        else:  # as in the released code: the teacher's map is warped by the flow before its view is undone
            centres = cell_centres(*size)[None]
            a = apply_affine(invert_affine(views[:1]), centres)
            warped = sample(maps[1], centres + normalise_flow(flow), "border")
            b = apply_affine(invert_affine(views[1:]), centres)
            student, teacher = sample(maps[0], a, "border"), sample(warped, b, "border")
            mask = visible & near & inside(a) & inside(b)
        # A read across the edge between two surfaces mixes their coordinates, which is meaningless: such points are left out.
        pure = (student[:, 3:].amax(1) > 0.999) & (teacher[:, 3:].amax(1) > 0.999)
        keep = mask if everywhere else mask & pure
        span = (source[:, near[0]].amax(1) - source[:, near[0]].amin(1)).clamp(min=1e-3)
        difference = ((student - teacher)[0, :3].abs() / span[:, None, None]).mean(0)
        errors.append(difference[keep[0]])
        counted += int(keep.sum())
    assert counted > 100
    return torch.cat(errors).mean().item()


def test_student_and_teacher_meet_at_stride_1():
    assert aligned_error() < 0.02


def test_student_and_teacher_meet_at_stride_8_up_to_interpolation():
    assert aligned_error(stride=8) < 0.05


@pytest.mark.parametrize("wrong", [{"reverse": True}, {"skip_inverse": True}, {"order": "released"}])
def test_a_wrong_composition_fails_clearly(wrong):
    # Both errors are over all valid points, including the edges of surfaces, where our own reads mix two surfaces (5 %).
    assert aligned_error(**wrong, everywhere=True) > 4 * aligned_error(everywhere=True)
    if "order" not in wrong:
        assert aligned_error(**wrong) > 0.1


def test_sky_is_at_infinity():
    street = Street(2, 64, 128, sway=0.0)
    flow, visible = street.flow(0.0, 1.0)
    sky = street.surface(0.0)[1] == SKY
    assert np.abs(flow[:, sky]).max() < 1e-3 and visible[sky].mean() > 0.5


def test_flow_in_half_precision_is_used_as_in_single():
    """In float16, the square of 256 pixels overflows, and rounding a long displacement by 1/2,048 costs a fraction of a pixel."""
    torch.manual_seed(0)
    forward = (300 * torch.randn(2, 2, 24, 1024)).half()
    backward, views = (-forward + torch.randn(2, 2, 24, 1024)).half(), random_views(2, 24, 1024)
    mask = flow_valid_mask(forward, backward)
    assert mask.any() and torch.equal(mask, flow_valid_mask(forward.float(), backward.float()))
    for size in ((24, 1024), (3, 128)):
        ours, theirs = (alignment_grids(flow, mask, views, views, size) for flow in (forward, forward.float()))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
