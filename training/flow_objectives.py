"""
Losses for learning flow without labels (Jonschkowski et al. 2020, UFlow), as pure functions.

Flow is (N, 2, H, W), x then y, in pixels (or cells) of the images that it is given with.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeling_poodle.geometry_poodle import (
    affine_view,
    apply_affine,
    cell_centres,
    filled,
    flow_valid_mask,
    inside,
    invert_affine,
    normalise_flow,
    see_through,
)
from modeling_poodle.modeling_poodle_flow import warp

# Of the forward-backward check. It is stricter than the check by which PooDLe uses flow (alpha_1 = 0.1).
ALPHA_1, ALPHA_2 = 0.01, 0.5


def charbonnier(values: Tensor) -> Tensor:
    """sqrt(values^2 + 0.001^2): |values| with a gradient at 0."""
    return (values.square() + 1e-6).sqrt()


def ssim_distance(first: Tensor, second: Tensor) -> Tensor:
    """
    Return (1 - SSIM) / 2 of all 3x3 windows inside the images (Wang et al. 2004), averaged over channels.

    Unlike UFlow's, this SSIM includes the luminance term. Its constants are 0.01^2 and 0.003^2 for a range of 1. The second is usually
    0.03^2, but the texture of asphalt vanishes next to that.

    Args:
        first, second: (N, C, H, W) in [0, 1].

    Returns:
        (N, H - 2, W - 2) in [0, 1].
    """
    c1, c2 = 0.01**2, 0.003**2
    pool = lambda maps: F.avg_pool2d(maps, kernel_size=3, stride=1)  # noqa: E731
    mean_1, mean_2 = pool(first), pool(second)
    variance_1, variance_2 = pool(first.square()) - mean_1.square(), pool(second.square()) - mean_2.square()
    covariance = pool(first * second) - mean_1 * mean_2
    luminance = (2 * mean_1 * mean_2 + c1) / (mean_1.square() + mean_2.square() + c1)
    # Rounding can leave variances a little below zero.
    structure = (2 * covariance + c2) / (variance_1.clamp(min=0) + variance_2.clamp(min=0) + c2)
    return ((1 - luminance * structure) / 2).clamp(0, 1).mean(dim=1)


def photometric_loss(first: Tensor, second: Tensor, flow: Tensor, mask: Tensor) -> Tensor:
    """
    Return how much the second image, read at the matches, differs from the first.

    This is the weighted mean of [`ssim_distance`] over the windows. A pixel's weight is `mask` if its match lies inside the second image,
    else 0. A window has the smallest weight of its pixels.

    Args:
        first, second: (N, 3, H, W) in [0, 1].
        flow: (N, 2, H, W), from the first image to the second.
        mask: (N, H, W), 0 to 1; no gradient flows into it.

    Returns:
        Scalar; 0 if all weights are 0.
    """
    points = cell_centres(*flow.shape[-2:], device=flow.device) + normalise_flow(flow.detach().float())
    counts = mask.detach().float() * inside(points)
    weight = -F.max_pool2d(-counts[:, None], kernel_size=3, stride=1)[:, 0]
    distance = ssim_distance(first.float(), warp(second, flow))
    return (distance * weight).sum() / weight.sum().clamp(min=1e-6)


def smoothness_loss(flow: Tensor, images: Tensor, edge_weight: float = 150.0) -> Tensor:
    """
    Return the second-order smoothness of the flow, with less weight at edges of the image.

    This is the mean of exp(-edge_weight * |dI|) * charbonnier(d²flow). dI is the difference between the two neighbours along a row (or
    column), and |dI| is averaged over channels. Rows and columns have equal weight.

    Args:
        flow: at the resolution of the features, in cells.
        images: (N, 3, H, W) in [0, 1], of the same size.
    """
    total = 0.0
    for dim in (-1, -2):
        size = flow.shape[dim]
        before, here, after = (flow.narrow(dim, start, size - 2) for start in (0, 1, 2))
        edges = (images.narrow(dim, 2, size - 2) - images.narrow(dim, 0, size - 2)).abs().mean(dim=1, keepdim=True)
        total = total + (torch.exp(-edge_weight * edges) * charbonnier(before - 2 * here + after)).mean()
    return total / 2


@torch.no_grad()
def visible_mask(flow: Tensor) -> Tensor:
    """
    Return the pixels that pass the forward-backward check (see [`~modeling_poodle.geometry_poodle.flow_valid_mask`]), without gradient.

    Args:
        flow: (B, 2, 2, H, W), both directions.

    Returns:
        (B, 2, H, W) bool, True where a pixel is seen in the other frame.
    """
    other = flow.flip(1).flatten(0, 1)
    return flow_valid_mask(flow.flatten(0, 1), other, ALPHA_1, ALPHA_2).unflatten(0, flow.shape[:2])


def self_supervision_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """
    Return the distance between the flow of a crop (student) and the flow of the whole frames, cut to that crop (teacher).

    Near the border of the crop, the teacher saw what the student could not. The loss is the sum of [`charbonnier`] over the pixels of
    `mask` (mean of both components), divided by the number of all pixels. So a few doubtful pixels weigh little, as in UFlow. When it was
    divided by the number of pixels in `mask`, it outweighed the photometric loss, and fewer pixels were consistent from step to step.

    Args:
        student, teacher: (N, 2, H, W); no gradient flows into the teacher.
        mask: (N, H, W) bool.
    """
    distance = charbonnier(student - teacher.detach()).mean(dim=1)
    return torch.where(mask, distance, 0.0).mean()


@dataclass
class FlowLosses:
    """The weighted sum of the losses, each loss before its weight, and the share of pixels that pass the forward-backward check."""

    loss: Tensor
    photometric_loss: Tensor
    smoothness_loss: Tensor
    self_supervision_loss: Tensor
    valid_fraction: Tensor


def flow_losses(
    model: nn.Module,
    frames: Tensor,
    coarse_weight: float,
    smoothness_weight: float,
    self_supervision_weight: float,
    border: int,
    occlusion: bool,
) -> FlowLosses:
    """
    Compute all losses of a batch of pairs. Both directions are treated alike.

    Args:
        model: a [`~modeling_poodle.PoodleFlowModel`], or accelerate's wrapper around it.
        frames: (B, 2, 3, H, W) in [0, 1].
        coarse_weight: of the photometric loss of each level coarser than the finest, at that level's own size. UFlow has no such losses.
            With them, large motion is learned in far fewer steps, because the gradient of a 3x3 window reaches only a few pixels.
        smoothness_weight, self_supervision_weight: relative to 1 for the photometric loss of the full frames. If the latter is 0,
            self-supervision is not computed.
        border: pixels by which the student's crop is smaller at each side; a multiple of 4.
        occlusion: leave out pixels that the forward-backward check finds hidden. While the flow is poor, it finds too many.
    """
    output = model(frames=frames)
    images, others = frames.flatten(0, 1), frames.flip(1).flatten(0, 1)  # (2B, 3, H, W)
    visible = visible_mask(output.flow)  # (B, 2, H, W)
    mask = (visible if occlusion else torch.ones_like(visible)).flatten(0, 1).float()
    photometric = total = photometric_loss(images, others, output.flow.flatten(0, 1), mask)
    for flow in output.level_flows[1:]:
        stride = images.shape[-1] // flow.shape[-1]
        small, small_others, counts = (F.avg_pool2d(m, stride) for m in (images, others, mask[:, None]))
        if min(small.shape[-2:]) >= 3:
            total = total + coarse_weight * photometric_loss(small, small_others, flow.flatten(0, 1), counts[:, 0])
    finest = output.level_flows[0]  # (B, 2, 2, H / 4, W / 4)
    smoothness = smoothness_loss(finest.flatten(0, 1), F.avg_pool2d(images, 4))
    total = total + smoothness_weight * smoothness
    self_supervision = torch.zeros_like(photometric)
    if self_supervision_weight > 0:
        inner = (..., slice(border, -border), slice(border, -border))
        cells = (..., slice(border // 4, -border // 4), slice(border // 4, -border // 4))
        student = model(frames=frames[inner])
        # As in UFlow, the student learns where its own flow is not consistent but the teacher's is.
        teacher_sure = F.avg_pool2d(visible[inner].float(), 4) > 0.5
        student_sure = F.avg_pool2d(visible_mask(student.flow).float(), 4) > 0.5
        self_supervision = self_supervision_loss(
            student.level_flows[0].flatten(0, 1),
            finest[cells].flatten(0, 1),
            (teacher_sure & ~student_sure).flatten(0, 1),
        )
        total = total + self_supervision_weight * self_supervision
    return FlowLosses(total, photometric, smoothness, self_supervision, visible.float().mean())


# Largest rotation (radians), zoom (log of the scale) and shift (halves of the frame) of a view, in either direction.
MAX_ANGLE, MAX_ZOOM, MAX_SHIFT = 0.05, 0.25, 0.1


def draw_views(n: int, height: int, width: int, generator: torch.Generator, device=None) -> Tensor:
    """Draw views (n, 2, 3) that rotate, zoom and shift a frame."""
    turn, zoom, x, y = torch.rand(4, n, generator=generator, device=device) * 2 - 1
    view = affine_view(turn * MAX_ANGLE, (zoom * MAX_ZOOM).exp(), torch.zeros_like(turn).bool(), height, width)
    view[:, :, 2] = torch.stack([x, y], dim=1) * MAX_SHIFT
    return view


def view_flow(source: Tensor, target: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
    """
    Return the flow between two views (N, 2, 3) of the same frame, and where both show the point.

    Returns:
        Flow (N, 2, h, w) in cells, and a mask (N, h, w), True where the point lies inside the frame and inside the target view.
    """
    centres = cell_centres(h, w, source.device).expand(len(source), h, w, 2)
    points = apply_affine(source, centres)
    matches = apply_affine(invert_affine(target), points)
    flow = (matches - centres) * filled((w / 2, h / 2), source.device)
    return flow.permute(0, 3, 1, 2), inside(points) & inside(matches)


def known_motion_loss(model: nn.Module, frames: Tensor, generator: torch.Generator) -> FlowLosses:
    """
    Return the loss on pairs of views of a single frame, between which the flow is known.

    This is [`charbonnier`] of the error where both views show the point, divided by the number of all cells, averaged over both directions
    and summed over levels. UFlow has no such loss. If training begins with a share of such steps, a small network learns to match in
    hundreds of steps instead of the thousands that the photometric loss takes.

    Args:
        frames: (B, 2, 3, H, W) in [0, 1]; each frame is used on its own.
    """
    images = frames.flatten(0, 1)  # (2B, 3, H, W)
    views = [draw_views(len(images), *images.shape[-2:], generator, images.device) for _ in range(2)]
    output = model(frames=torch.stack([see_through(images, view) for view in views], dim=1))
    loss = zero = output.flow.new_zeros(())
    for flow in output.level_flows:
        for direction, (source, target) in enumerate((views, views[::-1])):
            known, mask = view_flow(source, target, *flow.shape[-2:])
            loss = loss + self_supervision_loss(flow[:, direction], known, mask) / 2
    return FlowLosses(loss, zero, zero, zero, visible_mask(output.flow).float().mean())
