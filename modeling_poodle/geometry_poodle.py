"""
Sampling grids: affine views, optical flow, their composition, occlusion and crops.

All functions use one convention. Pixel i covers [i, i + 1) and has its centre at i + 0.5; normalised coordinates run from -1 at
the left (top) edge of the first pixel to +1 at the right (bottom) edge of the last one: x_norm = 2 * (i + 0.5) / W - 1.
This is `align_corners=False` of `grid_sample` and `affine_grid`. The released code computes its warp coordinates for
`align_corners=True` and samples with False, which shifts them by up to half a cell at the border.

A *view* is an affine (2, 3) matrix from view to frame coordinates, both normalised. Flow is in pixels, x then y.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def filled(values: tuple[float, ...], device=None, dtype=torch.float32) -> Tensor:
    """Make a vector of these numbers on the device, without the host wait that the copy in `torch.tensor(..., device="cuda")` causes."""
    return torch.stack([torch.full((), value, device=device, dtype=dtype) for value in values])


def cell_centres(h: int, w: int, device=None) -> Tensor:
    """Normalised centres of an h x w grid of cells that tiles the frame. Returns (h, w, 2), x then y."""
    y = (torch.arange(h, device=device, dtype=torch.float32) + 0.5) * (2 / h) - 1
    x = (torch.arange(w, device=device, dtype=torch.float32) + 0.5) * (2 / w) - 1
    return torch.stack([x.expand(h, w), y[:, None].expand(h, w)], dim=-1)


def affine_view(angle: Tensor, scale: Tensor, flip: Tensor, height: int, width: int) -> Tensor:
    """
    Views that rotate, zoom and mirror about the frame's centre.

    The rotation is defined in *pixels*: for H != W its matrix in normalised coordinates is not orthogonal.

    Args:
        angle: (...,) radians, positive turns the content of the view counter-clockwise on the screen.
        scale: (...,) above 1 magnifies the content.
        flip: (...,) bool, mirror left-right.
        height, width: size of the frame in pixels.

    Returns:
        (..., 2, 3) affine from view to frame coordinates, normalised.
    """
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    mirror = torch.where(flip, -1.0, 1.0).to(cos.dtype)
    zero = torch.zeros_like(cos)
    # In pixels, the map from view to frame is R(angle) / scale; D = diag(W, H) / 2 converts normalised coordinates to pixels.
    ratio = height / width
    row_x = torch.stack([cos * mirror, -sin * ratio, zero], dim=-1)
    row_y = torch.stack([sin / ratio * mirror, cos, zero], dim=-1)
    return torch.stack([row_x, row_y], dim=-2)


def invert_affine(view: Tensor) -> Tensor:
    """Invert affine maps (..., 2, 3) in closed form, without a solver or host synchronisation. Returns (..., 2, 3)."""
    (a, b, tx), (c, d, ty) = view[..., 0, :].unbind(-1), view[..., 1, :].unbind(-1)
    determinant = a * d - b * c
    a, b, c, d = d / determinant, -b / determinant, -c / determinant, a / determinant
    return torch.stack(
        [torch.stack([a, b, -(a * tx + b * ty)], dim=-1), torch.stack([c, d, -(c * tx + d * ty)], dim=-1)], dim=-2
    )


def apply_affine(view: Tensor, points: Tensor) -> Tensor:
    """Map points (N, ..., 2) by affine maps (N, 2, 3)."""
    # Elementwise: under autocast a matrix product would be in bfloat16, which at 1024 pixels is off by up to 2 pixels.
    a, b, tx, c, d, ty = view.reshape(-1, 6, *[1] * (points.ndim - 2)).unbind(1)
    x, y = points.unbind(-1)
    return torch.stack([a * x + b * y + tx, c * x + d * y + ty], dim=-1)


def inside(points: Tensor) -> Tensor:
    """True where normalised points (..., 2) lie within the frame."""
    return (points.abs() <= 1).all(dim=-1)


def sample(maps: Tensor, points: Tensor, padding_mode: str = "zeros") -> Tensor:
    """
    Sample maps (N, C, H, W) bilinearly at normalised points (N, h, w, 2), in the wider of their dtypes. Returns (N, C, h, w).

    In bfloat16, normalised points would be accurate to only 2 pixels of 1024, so the maps are widened rather than the points narrowed.
    """
    kind = torch.promote_types(maps.dtype, points.dtype)
    return F.grid_sample(
        maps.to(kind), points.to(kind), mode="bilinear", padding_mode=padding_mode, align_corners=False
    )


def normalise_flow(flow: Tensor) -> Tensor:
    """Convert flow (N, 2, H, W) in pixels to displacements (N, H, W, 2) in normalised coordinates."""
    height, width = flow.shape[-2:]
    size = filled((2 / width, 2 / height), flow.device, flow.dtype)
    return flow.permute(0, 2, 3, 1) * size


def flow_valid_mask(forward: Tensor, backward: Tensor, alpha_1: float = 0.1, alpha_2: float = 0.5) -> Tensor:
    """
    Forward-backward occlusion check (arXiv 2408.11208, section 3; Sundaram et al. 2010 with UFlow's constants).

    A pixel p is valid if p + f(p) stays inside the frame and
    |f(p) + b(p + f(p))|^2 <= alpha_1 (|f(p)|^2 + |b(p + f(p))|^2) + alpha_2.

    Args:
        forward: (N, 2, H, W) pixels, from the frame that the mask belongs to.
        backward: (N, 2, H, W) pixels, back to that frame.

    Returns:
        (N, H, W) bool, True where the flow may be used. Flow that is not finite is invalid.
    """
    forward, backward = forward.float(), backward.float()
    height, width = forward.shape[-2:]
    target = cell_centres(height, width, forward.device) + normalise_flow(forward)
    # Border padding, because zero padding would mix zeros into reads just inside the edge, and these would look inconsistent.
    returned = sample(backward, target, padding_mode="border")
    difference = (forward + returned).square().sum(dim=1)
    magnitude = forward.square().sum(dim=1) + returned.square().sum(dim=1)
    return inside(target) & (difference <= alpha_1 * magnitude + alpha_2)


def alignment_grids(
    flow: Tensor, valid_mask: Tensor, student_view: Tensor, teacher_view: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """
    Points at which the student's and the teacher's map show the same surface point.

    For each cell centre u of the source frame, the student's map is read at student_view^-1(u) and the teacher's at
    teacher_view^-1(u + flow(u)). The released code warps the teacher's map by the flow *before* it undoes the view;
    here the two mappings are composed, so that each network's map is sampled bilinearly only once.

    Args:
        flow: (N, 2, H, W) pixels, from the source frame (the student's) to the target frame (the teacher's).
        valid_mask: (N, H, W) bool, True where the flow may be used.
        student_view: (N, 2, 3), from view to frame coordinates, of the source frame.
        teacher_view: (N, 2, 3), from view to frame coordinates, of the target frame.
        size: (h, w) number of points.

    Returns:
        student points (N, h, w, 2), teacher points (N, h, w, 2), mask (N, h, w) bool. The mask is True if the flow is valid
        at every pixel that the bilinear read at u touches, and both points lie inside their views.
    """
    n, height, width = flow.shape[0], *flow.shape[-2:]
    h, w = size
    centres = cell_centres(h, w, flow.device).expand(n, h, w, 2)
    displacement = normalise_flow(flow.float())
    if (h, w) == (height, width):
        usable = valid_mask
    else:
        displacement = sample(displacement.permute(0, 3, 1, 2), centres).permute(0, 2, 3, 1)
        # A read of valid pixels only gives 1 up to rounding; each invalid neighbour reduces it by its bilinear weight.
        usable = sample(valid_mask[:, None].float(), centres)[:, 0] > 1 - 1e-3
    student_points = apply_affine(invert_affine(student_view.float()), centres)
    teacher_points = apply_affine(invert_affine(teacher_view.float()), centres + displacement)
    return student_points, teacher_points, usable & inside(student_points) & inside(teacher_points)


def see_through(images: Tensor, view: Tensor) -> Tensor:
    """Render images (N, C, H, W) as seen through views (N, 2, 3), at the same size. Outside the frame it is 0, the mean colour."""
    n, _, height, width = images.shape
    centres = cell_centres(height, width, images.device).expand(n, height, width, 2)
    return sample(images, apply_affine(view.float(), centres)).to(images.dtype)


def resize_weights(low: Tensor, high: Tensor, length: int, size: int) -> Tensor:
    """
    Weights that resize the interval low..high of a row of `length` pixels to `size` cells: bilinear, and antialiased when shrinking.

    If the edges are whole pixels, the weights are those of `F.interpolate(..., mode="bilinear", antialias=True)` on the cut interval.

    Args:
        low, high: (...) edges of the interval in pixels, low < high.
        length: pixels of the row.
        size: number of cells.

    Returns:
        (..., size, length). Each row sums to 1, or is 0 if its cell lies outside the row of pixels.
    """
    steps = torch.arange(size, device=low.device, dtype=low.dtype) + 0.5
    pixels = torch.arange(length, device=low.device, dtype=low.dtype) + 0.5
    scale = ((high - low) / size)[..., None]
    centres = low[..., None] + scale * steps
    weights = (1 - (pixels - centres[..., None]).abs() / scale.clamp(min=1)[..., None]).clamp(min=0)
    # Only pixels that the interval touches count, so nothing outside the box bleeds in.
    touched = (pixels > low[..., None] - 0.5) & (pixels < high[..., None] + 0.5)
    weights = weights * touched[..., None, :]
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-6)


def crop_boxes(frames: Tensor, boxes: Tensor, frame_index: Tensor, size: int) -> Tensor:
    """
    Cut boxes out of frame pairs and resize them to squares, antialiased, with two matrix products for the whole batch.

    A subcrop is up to 2.4 times as wide as its square (area 0.3, aspect 4/3, 512x1024 to 192). `grid_sample` reads only four
    neighbouring pixels and would miss most small details. On one core, the 8 boxes of a pair of 128x256 take 3.3 ms for the student
    and 4.1 ms for the teacher, compared with 0.3 ms for bilinear sampling; a step takes 160 ms of processor time.

    `boxes` and `frame_index` are not checked, because the host would have to wait for the device. Values out of range give zeros.

    Args:
        frames: (B, F, C, H, W), the frames that boxes may be cut from: the two of a pair, or one.
        boxes: (B, M, 4) xyxy in pixels (edges, so that a full frame is (0, 0, W, H)), x0 < x1 and y0 < y1.
        frame_index: (B, M) integer from 0 to F - 1, the frame that each box is cut from.
        size: side of the crops in pixels.

    Returns:
        (B, M, C, size, size)
    """
    b, f, c, height, width = frames.shape
    m = boxes.shape[1]
    kind = torch.promote_types(frames.dtype, torch.float32)  # near 1024, bfloat16 represents only every fourth pixel
    x0, y0, x1, y1 = boxes.to(kind).unbind(-1)  # each (B, M)
    rows = resize_weights(y0, y1, height, size).to(frames.dtype)  # (B, M, size, H)
    # The frames are stacked vertically, so that one product reads all of them without a copy for each box.
    own = (frame_index[..., None] == torch.arange(f, device=frames.device)).to(rows.dtype)  # (B, M, F)
    rows = (own[:, :, None, :, None] * rows[:, :, :, None]).view(b, m * size, f * height)
    stacked = frames.permute(0, 1, 3, 2, 4).reshape(b, f * height, c * width)
    strips = (rows @ stacked).view(b, m, size * c, width)  # for each row of a crop, its channels one below the other
    columns = resize_weights(x0, x1, width, size).to(frames.dtype)  # (B, M, size, W)
    return (strips @ columns.transpose(-1, -2)).view(b, m, size, c, size).transpose(2, 3)
