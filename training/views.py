"""
Draw photometric augmentation, affine views and subcrops for a batch, on the device.

Everything is drawn for the whole batch as tensors, without a Python loop over images or subcrops, and without host synchronisation. On the
CPU, image by image, the photometric augmentation alone takes 330-370 ms an image at 512x1024.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from modeling_poodle.geometry_poodle import affine_view, filled, flow_valid_mask, normalise_flow, sample

IMAGENET_MEAN, IMAGENET_STD = tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD)


def uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device) * (high - low) + low


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """
    Copy a batch's tensor to the device. The host does not wait for the copy, except on Apple GPUs.

    There, a copy that is not waited for may read the batch's memory after it was freed: the step would silently train on other numbers
    (https://github.com/pytorch/pytorch/issues/189690).
    """
    return values.to(device, non_blocking=device.type != "mps")


def normalise(images: Tensor) -> Tensor:
    """Normalise images (..., 3, H, W) in [0, 1] with ImageNet's mean and standard deviation."""
    mean = filled(IMAGENET_MEAN, images.device, images.dtype)[:, None, None]
    std = filled(IMAGENET_STD, images.device, images.dtype)[:, None, None]
    return (images - mean) / std


# --- photometric augmentation (arXiv 2408.11208, section 3) ---


def _luma(images: Tensor) -> Tensor:
    # For 8 images of 128x256 on one core, this sum takes 0.3 ms and an einsum 2.2 ms.
    return 0.2989 * images[:, 0:1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:3]


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(other.expand_as(images), images, factor[:, None, None, None]).clamp_(0, 1)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """
    Scale the brightness of images (N, 3, H, W) in [0, 1] by factor (N,).

    This and the following functions are defined as in torchvision, but with one factor for each image.
    """
    return (images * factor[:, None, None, None]).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance of each pixel from its image's mean grey."""
    return _blend(images, _luma(images).mean(dim=(2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance of each pixel from its own grey."""
    return _blend(images, _luma(images), factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """
    Rotate the hue by shift (N,), in turns. Saturation and value do not change.

    For a colour of hue h (in sixths of a turn), each channel is value - chroma * clamp(min(k, 4 - k), 0, 1) with k = (n + h) mod 6, where n
    is 5 for red, 3 for green and 1 for blue. So no branch over the six sectors of hue is needed.
    """
    value, minimum = images.amax(dim=1), images.amin(dim=1)
    chroma = value - minimum
    red, green, blue = images.unbind(dim=1)
    safe = torch.where(chroma > 0, chroma, 1.0)
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    hue = hue + 6 * shift[:, None, None]
    channels = []
    for n in (5, 3, 1):
        k = (n + hue).remainder(6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(channels, dim=1)


def gaussian_blur(images: Tensor, sigma: Tensor, apply: Tensor, kernel_size: int) -> Tensor:
    """
    Blur images with a separable Gaussian kernel, one sigma for each image.

    Args:
        images: (N, C, H, W).
        sigma: (N,) pixels.
        apply: (N,) bool; the other images get the identity kernel.
        kernel_size: odd, pixels.
    """
    n, c, height, width = images.shape
    radius = kernel_size // 2
    x = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (x / sigma[:, None]) ** 2)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    kernel = torch.where(apply[:, None], kernel, (x == 0).to(images.dtype)).repeat_interleave(c, dim=0)  # (N*C, taps)
    planes = F.pad(images.reshape(1, n * c, height, width), (radius,) * 4, mode="reflect")
    planes = F.conv2d(planes, kernel[:, None, None, :], groups=n * c)
    return F.conv2d(planes, kernel[:, None, :, None], groups=n * c).view(n, c, height, width)


def blur_kernel_size(height: int, width: int) -> int:
    """
    Return the odd size of a kernel of about 10 % of the shorter side, at most 17.

    sigma is at most 2 pixels, so less than 1e-4 of the weight lies beyond 4 sigma = 8 pixels.
    """
    size = max(3, round(0.1 * min(height, width)) | 1)
    return min(size, 17)


def photometric_augmentation(images: Tensor, generator: torch.Generator) -> Tensor:
    """
    Apply colour jitter (0.8, 0.8, 0.8, 0.2) with p 0.8, greyscale with p 0.2, and Gaussian blur with p 0.5.

    Everything is drawn for each image separately, except the order of the four jitters. The order is drawn once a batch, so that the batch
    need not be split (torchvision draws it for each image).

    Args:
        images: (N, 3, H, W) in [0, 1].

    Returns:
        (N, 3, H, W) in [0, 1].
    """
    n, _, height, width = images.shape

    def chosen(probability: float) -> Tensor:
        return uniform((n,), 0, 1, generator) < probability

    jitter = chosen(0.8)
    factors = [torch.where(jitter, uniform((n,), 0.2, 1.8, generator), 1.0) for _ in range(3)]
    factors.append(torch.where(jitter, uniform((n,), -0.2, 0.2, generator), 0.0))
    operations = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    # The order is drawn on the CPU from the generator's seed, because reading it from a device tensor would make the host wait.
    order = torch.randperm(4, generator=torch.Generator().manual_seed(generator.initial_seed()), device="cpu")
    for index in order.tolist():
        images = operations[index](images, factors[index])
    images = torch.where(chosen(0.2)[:, None, None, None], _luma(images), images)
    sigma = uniform((n,), 0.1, 2.0, generator)
    return gaussian_blur(images, sigma, chosen(0.5), blur_kernel_size(height, width))


# --- views (arXiv 2408.11208, section 3) ---


def draw_views(
    shape: tuple[int, ...], height: int, width: int, generator: torch.Generator, affine: bool = True
) -> Tensor:
    """
    Draw views: a rotation of up to 10 degrees in either direction, a scale of 0.9-1.1, and a horizontal flip with p 0.5.

    Args:
        affine: if `False`, all views are the identity.

    Returns:
        (*shape, 2, 3), affine maps from view to frame in normalised coordinates.
    """
    if not affine:
        identity = torch.eye(2, 3, device=generator.device)
        return identity.expand(*shape, 2, 3).contiguous()
    angle = uniform(shape, -math.radians(10), math.radians(10), generator)
    scale = uniform(shape, 0.9, 1.1, generator)
    flip = uniform(shape, 0, 1, generator) < 0.5
    return affine_view(angle, scale, flip, height, width)


# --- subcrops (arXiv 2408.11208, section 3) ---


def grid_centres(n: int, count: int, height: int, width: int, cell: int, generator: torch.Generator) -> Tensor:
    """
    Draw centres that are spread over the frame: cells of a grid without replacement, then a uniform point in each cell.

    If there are more centres than cells, every cell is used once before any is used again.

    Args:
        n: number of frames.
        count: centres a frame.
        cell: approximate side of a cell in pixels.

    Returns:
        (n, count, 2) pixels, x then y.
    """
    rows, columns = max(height // cell, 1), max(width // cell, 1)
    cells = rows * columns
    rounds = -(-count // cells)
    order = uniform((n, rounds, cells), 0, 1, generator).argsort(dim=-1).flatten(1)[:, :count]
    corner = torch.stack([order % columns, order // columns], dim=-1).float()
    # The cells tile the frame without leaving out a strip, so they may be larger than `cell` (256 instead of 214 at 512x1024).
    size = filled((width / columns, height / rows), generator.device)
    return (corner + uniform((n, count, 2), 0, 1, generator)) * size


def place_boxes(centres: Tensor, area: Tensor, aspect: Tensor, height: int, width: int) -> Tensor:
    """
    Make boxes of the given areas and aspect ratios around the centres, and move them inside the frame.

    Args:
        centres: (..., 2) pixels.
        area: (...,) share of the frame.
        aspect: (...,) width over height.

    Returns:
        (..., 4) xyxy pixels.
    """
    pixels = area * (height * width)
    size = torch.stack([(pixels * aspect).sqrt().clamp(max=width), (pixels / aspect).sqrt().clamp(max=height)], dim=-1)
    frame = filled((width, height), centres.device, centres.dtype)
    low = torch.minimum((centres - size / 2).clamp(min=0), frame - size)
    return torch.cat([low, low + size], dim=-1)


def draw_subcrops(
    flow: Tensor,
    num_subcrops: int,
    generator: torch.Generator,
    area: tuple[float, float] = (0.05, 0.3),
    jitter: float = 0.1,
    tries: int = 5,
    follow_flow: bool = True,
) -> dict[str, Tensor]:
    """
    Draw subcrop pairs that follow the flow.

    Args:
        flow: (B, 2, 2, H, W) pixels, on the generator's device.
        num_subcrops: K, pairs a frame.
        area: range of a subcrop's share of the frame.
        jitter: largest shift of the teacher's centre in each direction, as a share of the frame's width and height.
        tries: how many jitters are drawn; the first that puts the teacher's centre inside the frame is used.
        follow_flow: if `False`, the teacher's centre is drawn anywhere in the other frame (for comparison).

    Returns:
        student_boxes, teacher_boxes: (B, 2, K, 4) xyxy pixels.
        teacher_box_frames: (B, 2, K) long, the frame (0 or 1) of each teacher's subcrop.
        matched: (B, 2, K) bool; `False` if no try landed inside the frame, so that both subcrops come from the same frame.
    """
    b, _, _, height, width = flow.shape
    n, k = 2 * b, num_subcrops
    low, high = area
    cell = max(round(math.sqrt((low + high) / 2) * min(height, width)), 1)
    centres = grid_centres(n, k, height, width, cell, generator)
    frame = filled((width, height), flow.device)

    points = (centres / frame * 2 - 1)[:, None]  # (2B, 1, K, 2), normalised
    displacement = sample(normalise_flow(flow.flatten(0, 1).float()).permute(0, 3, 1, 2), points, "border")
    followed = centres + displacement[:, :, 0].transpose(1, 2) * frame / 2
    shifts = uniform((tries, n, k, 2), -jitter, jitter, generator) * frame
    candidates = followed + shifts
    landed = ((candidates >= 0) & (candidates <= frame)).all(dim=-1)  # (tries, 2B, K)
    first = landed.int().argmax(dim=0)  # the first try that landed
    matched = landed.any(dim=0)
    chosen = candidates.gather(0, first[None, :, :, None].expand(1, n, k, 2))[0]
    # Without a match, the teacher's centre is the student's centre in the student's own frame, shifted by the first jitter.
    teacher_centres = torch.where(matched[..., None], chosen, centres + shifts[0])
    if not follow_flow:
        teacher_centres, matched = grid_centres(n, k, height, width, cell, generator), torch.ones_like(matched)

    student_area = uniform((n, k), low, high, generator)
    teacher_area = student_area + (high - student_area) * uniform((n, k), 0, 1, generator)
    # Log-uniform, as in torchvision's RandomResizedCrop, so that 3/4 and 4/3 are equally likely.
    aspect = uniform((2, n, k), math.log(3 / 4), math.log(4 / 3), generator).exp()
    own = torch.arange(2, device=flow.device).repeat(b)[:, None]
    return {
        "student_boxes": place_boxes(centres, student_area, aspect[0], height, width).view(b, 2, k, 4),
        "teacher_boxes": place_boxes(teacher_centres, teacher_area, aspect[1], height, width).view(b, 2, k, 4),
        "teacher_box_frames": torch.where(matched, 1 - own, own).view(b, 2, k),
        "matched": matched.view(b, 2, k),
    }


@torch.no_grad()
def model_inputs(batch: dict, recipe, generator: torch.Generator, flow_module=None) -> dict[str, Tensor]:
    """
    Turn a batch of the loader into the model's inputs: compute the flow, then augment the frames, and draw views and subcrops.

    Flow is computed from the frames before augmentation.

    Args:
        batch: frames (B, 2, 3, H, W) uint8; flow (B, 2, 2, H, W) if the loader computed it; valid_mask (B, 2, H, W) if it is known.
        recipe: the run's recipe.
        generator: used for all draws. Its device is also the device of the inputs.
        flow_module: maps frames to flow; needed only if the loader computed no flow.

    Returns:
        The inputs of `PoodleForPreTraining.forward`, and `matched` (B, 2, K).
    """
    device = generator.device
    frames = to_device(batch["frames"], device)
    flow = to_device(batch["flow"], device).float() if "flow" in batch else flow_module(frames)
    b, _, _, height, width = frames.shape
    if "valid_mask" in batch:
        valid_mask = to_device(batch["valid_mask"], device)
    else:
        # FlowE bounds the error by a constant. If the recipe has none, PooDLe's bound is used, which grows with the flow.
        bound = {} if recipe.flow_max_error is None else {"alpha_1": 0.0, "alpha_2": recipe.flow_max_error**2}
        valid_mask = flow_valid_mask(flow.flatten(0, 1), flow.flip(1).flatten(0, 1), **bound).unflatten(0, (b, 2))
    # Flow that is not finite is invalid. It is also set to 0, because a mask alone is not enough: 0 times NaN in a gradient is NaN.
    valid_mask = valid_mask & torch.isfinite(flow).all(dim=2)
    finite_flow = torch.nan_to_num(flow, nan=0.0, posinf=0.0, neginf=0.0)
    images = photometric_augmentation(frames.flatten(0, 1).float() / 255, generator)
    inputs = {"pixel_values": normalise(images).unflatten(0, (b, 2)), "flow": finite_flow, "valid_mask": valid_mask}
    for who in ("student", "teacher"):
        inputs[f"{who}_views"] = draw_views((b, 2), height, width, generator, recipe.affine_views)
    area = tuple(recipe.subcrop_area)
    # Subcrops take `flow`, not `finite_flow`, because they must not follow invalid flow as if it were 0.
    subcrops = draw_subcrops(
        flow, recipe.num_subcrops, generator, area, recipe.subcrop_jitter, follow_flow=recipe.subcrops_follow_flow
    )
    return {**inputs, **subcrops}
