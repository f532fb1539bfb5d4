"""
The inner loop of RAFT (Teed & Deng 2020) with torchvision's weights: correlation pyramid, lookups and the update block.

It computes the same function as torchvision's modules, with fewer operations and less memory traffic. Each operation runs in the precision
of its inputs, except that coordinates are always float32.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def correlation_pyramid(queries: Tensor, keys: Tensor, num_levels: int) -> list[Tensor]:
    """
    Correlate every query pixel with every key pixel, at strides 1, 2, 4, ... of the keys.

    Averaging commutes with the product, so the function pools the keys instead of the volume. At 512x1024 the volume has 32 times as many
    numbers. The keys get a border of zeros, so that look-ups outside the frame read a correlation of zero without a special case.

    The backward direction of a pair is a separate product, which takes 1 % of RAFT's operations. Transposing the forward volume instead
    would mean copying and pooling it, which moves more data than the product. Computing both directions as products takes 0.49 of the time
    of one direction and its transpose (one CPU core, 512x1024, measured alternately in one process).

    Args:
        queries: features (N, C, h, w).
        keys: features (N, C, h, w).

    Returns:
        For each level l, a tensor (N * h * w, (h >> l) + 2, (w >> l) + 2) with one row for each query pixel.
    """
    n, channels, h, w = queries.shape
    rows = queries.flatten(2).transpose(1, 2) / channels**0.5  # (N, h * w, C)
    levels = []
    for level in range(num_levels):
        keys = F.avg_pool2d(keys, kernel_size=2, stride=2) if level else keys
        bordered = F.pad(keys, (1, 1, 1, 1))
        cells = bordered.shape[-2] * bordered.shape[-1]
        # Pad the rows to a multiple of 16 bytes, so that half-precision products can use the fast loads of tensor cores.
        volume = torch.bmm(rows, F.pad(bordered.flatten(2), (0, -cells % 8)))[:, :, :cells]
        levels.append(volume.view(n * h * w, *bordered.shape[-2:]))
    return levels


def look_up(pyramid: list[Tensor], points: Tensor, radius: int) -> Tensor:
    """
    Read the correlations around each query pixel's current match, bilinearly, with zeros outside the frame.

    In each level the function reads a window of (2 radius + 1)^2 points, which all have the same fractional offset. It therefore gathers
    (2 radius + 2)^2 whole cells and interpolates them twice, in the pyramid's own precision. (grid_sample would need a coordinate for each
    point and, under autocast, a float32 copy of the volume in each call.)

    Args:
        pyramid: from [`correlation_pyramid`].
        points: (N, 2, h, w) float32 positions in the keys, x then y, in cells from the centre of the first cell.

    Returns:
        (N, levels * (2 radius + 1)^2, h, w). Within a level, x varies slowest, as in torchvision.
    """
    n, _, h, w = points.shape
    centres = points.permute(0, 2, 3, 1).reshape(-1, 2)
    # Offsets from a match's cell to the cells of its window, plus 1 for the border of zeros.
    offsets = torch.arange(1 - radius, radius + 3, device=points.device)
    found = []
    for level, volume in enumerate(pyramid):
        scaled = centres / 2**level
        corner = scaled.floor()
        right, below = (scaled - corner).to(volume.dtype)[:, :, None, None].unbind(1)  # each (M, 1, 1)
        x, y = (corner.long()[:, :, None] + offsets).unbind(1)  # each (M, 2 radius + 2)
        x, y = x.clamp(0, volume.shape[2] - 1), y.clamp(0, volume.shape[1] - 1)
        # Use one flat index for each cell. Indexing by query, row and column would make a GPU write three indices a cell first, and would
        # take a CPU 1.4 to 1.7 times as long.
        cells = y[:, None, :] * volume.shape[2] + x[:, :, None]  # (M, x, y)
        window = volume.flatten(1).gather(1, cells.flatten(1)).view_as(cells)
        window = torch.lerp(window[:, :-1], window[:, 1:], right)
        found.append(torch.lerp(window[:, :, :-1], window[:, :, 1:], below).flatten(1))
    return torch.cat(found, dim=1).view(n, h, w, -1).permute(0, 3, 1, 2)  # channels-last in memory


class GatedUnit:
    """
    A convolutional GRU of torchvision's RAFT, made faster for many updates with the same context.

    Each convolution reads [hidden state, context, motion]. The context never changes, so its contribution is computed once. The two gates
    read the same input, so they share one convolution.
    """

    def __init__(self, unit: nn.Module, context: Tensor):
        hidden, dtype = unit.convz.out_channels, context.dtype
        self.padding = unit.convz.padding
        rest = hidden + context.shape[1]
        weights = [conv.weight.to(dtype) for conv in (unit.convz, unit.convr, unit.convq)]
        biases = torch.cat([conv.bias for conv in (unit.convz, unit.convr, unit.convq)]).to(dtype)
        of_context = torch.cat([weight[:, hidden:rest] for weight in weights])
        shares = F.conv2d(context, of_context, biases, padding=self.padding)
        self.gates_of_context, self.candidate_of_context = shares.split([2 * hidden, hidden], dim=1)
        others = [torch.cat([weight[:, :hidden], weight[:, rest:]], dim=1) for weight in weights]
        self.gates = torch.cat(others[:2]).contiguous(memory_format=torch.channels_last)
        self.candidate = others[2].contiguous(memory_format=torch.channels_last)

    def __call__(self, hidden: Tensor, motion: Tensor) -> Tensor:
        gates = F.conv2d(torch.cat([hidden, motion], dim=1), self.gates, padding=self.padding)
        update, reset = (gates + self.gates_of_context).sigmoid_().chunk(2, dim=1)
        candidate = F.conv2d(torch.cat([reset * hidden, motion], dim=1), self.candidate, padding=self.padding)
        return torch.lerp(hidden, (candidate + self.candidate_of_context).tanh_(), update)


def update(
    block: nn.Module,
    units: list[GatedUnit],
    pyramid: list[Tensor],
    radius: int,
    start: Tensor,
    points: Tensor,
    hidden: Tensor,
) -> tuple[Tensor, Tensor]:
    """
    Run one of RAFT's updates: look up the correlations around the current points, then move the points.

    Args:
        block: torchvision's update block, in the dtype of `hidden`.
        units: the block's GRUs, which hold the context.
        pyramid: from [`correlation_pyramid`].
        radius: radius of the look-up window in cells.
        start: (N, 2, h, w) float32 positions of the queries, x then y, in cells.
        points: (N, 2, h, w) float32 current positions of the queries' matches, as `start`.
        hidden: (N, C, h, w) hidden state.

    Returns:
        The new points and the new hidden state.
    """
    motion = block.motion_encoder((points - start).to(hidden.dtype), look_up(pyramid, points, radius))
    for unit in units:
        hidden = unit(hidden, motion)
    return points + block.flow_head(hidden).float(), hidden
