"""A block of the spatial decoder module (SDM), and the upsampling that keeps its maps aligned with the encoder's."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .encoder_poodle import recomputable

# PyTorch's CUDA interpolation of channels_last maps refuses outputs with more elements.
MOST_NUMBERS = 2**31 - 2


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps (N, C, h, w) bilinearly, in their own dtype: autocast's float32 would double the memory of a step's largest maps."""
    kind = maps.device.type
    # "meta" has no autocast. (torch.amp.is_autocast_available would break the graph of torch.compile before torch 2.14.)
    with torch.autocast(kind, enabled=False) if kind != "meta" else nullcontext():
        doubled, pays = size == tuple(2 * side for side in maps.shape[-2:]), maps.requires_grad or maps.is_cuda
        # Not is_compiling, which is also true under torch.export, where the slices would fix the sizes.
        if torch.compiler.is_dynamo_compiling() and doubled and pays:
            points = maps.permute(0, 2, 3, 1)  # the memory order of channels_last, which the result keeps
            return _doubled(_doubled(points, 1), 2).permute(0, 3, 1, 2)
        if (
            not torch.compiler.is_compiling()
            and maps.shape[0] > 1
            and maps.shape[:2].numel() * size[0] * size[1] > MOST_NUMBERS
        ):
            return torch.cat([upsample(part, size) for part in maps.chunk(2)])
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def _doubled(maps: Tensor, dim: int) -> Tensor:
    """
    Double the number of cells along `dim` by bilinear interpolation: 3/4 of a cell plus 1/4 of its nearer neighbour.

    Used under torch.compile, which computes the gradient of F.interpolate by single additions into float32 maps of another layout, but
    fuses the gradient of slices. For 64 to 128 rows on a CPU, forward and backward take 5.6 ms (interpolation: 80 ms compiled, 18 ms not
    compiled), the forward pass alone 2.3 ms (interpolation: 0.9 ms).
    """
    last = maps.shape[dim] - 1
    before = torch.cat([maps.narrow(dim, 0, 1), maps.narrow(dim, 0, last)], dim)
    after = torch.cat([maps.narrow(dim, 1, last), maps.narrow(dim, last, 1)], dim)
    return torch.stack([torch.lerp(maps, before, 0.25), torch.lerp(maps, after, 0.25)], dim + 1).flatten(dim, dim + 1)


def upsample_onto(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """
    Double maps (N, C, h, w) to the `size` of an earlier stage of half the stride, so that their cells stay aligned.

    If the image size is no multiple of the stride, the earlier stage has one cell less than twice as many, or one more (encoders that drop
    an edge of the image). The last cell is then cut off or repeated. Stretching the map to `size` instead would shift it by up to one
    cell, 21 pixels at the lower edge of 360 rows.
    """
    doubled = tuple(2 * own if abs(side - 2 * own) <= 1 else side for side, own in zip(size, maps.shape[-2:]))
    maps = upsample(maps, doubled)[..., : size[0], : size[1]]
    below, right = (side - own for side, own in zip(size, maps.shape[-2:]))
    return F.pad(maps, (0, right, 0, below), mode="replicate") if below or right else maps


class PoodleDecoderBlock(nn.Module):
    """
    Residual bottleneck at the incoming resolution, bilinear x2, plus a 1x1 lateral from the encoder (arXiv 2408.11208, section 3).

    Args:
        channels: channels of the incoming map and of the output.
        reduction: the bottleneck is `channels // reduction` wide.
        lateral_channels: channels of the encoder stage that the lateral reads; `None` for no lateral.
        lateral_depth: number of 1x1 convolutions in the lateral.
        top_down: whether the block has the bottleneck.
    """

    gradient_checkpointing = False

    def __init__(
        self,
        channels: int,
        reduction: int,
        lateral_channels: int | None,
        lateral_depth: int = 1,
        top_down: bool = True,
    ):
        super().__init__()
        self.top_down = top_down
        if top_down:
            if reduction > channels:
                expected = f"at most {channels}, the channels of the encoder's last stage"
                raise ValueError(f"PoodleConfig.decoder_reduction must be {expected}, got {reduction}")
            reduced = channels // reduction
            self.conv1 = nn.Conv2d(channels, reduced, kernel_size=1, bias=False)
            self.bn1 = nn.BatchNorm2d(reduced)
            self.conv2 = nn.Conv2d(reduced, reduced, kernel_size=3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(reduced)
            self.conv3 = nn.Conv2d(reduced, channels, kernel_size=1, bias=False)
            self.bn3 = nn.BatchNorm2d(channels)
        self.lateral = None
        if lateral_channels is not None:
            self.lateral = nn.Conv2d(lateral_channels, channels, kernel_size=1)
            deeper = [
                layer
                for _ in range(lateral_depth - 1)
                for layer in (nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 1))
            ]
            if deeper:
                self.lateral = nn.Sequential(self.lateral, *deeper)

    @recomputable
    def forward(self, hidden_state: Tensor, lateral: Tensor | None = None) -> Tensor:
        if self.top_down:
            residual = hidden_state
            hidden_state = F.relu(self.bn1(self.conv1(hidden_state)))
            hidden_state = F.relu(self.bn2(self.conv2(hidden_state)))
            hidden_state = F.relu(self.bn3(self.conv3(hidden_state)) + residual)
        if self.lateral is None:
            return upsample(hidden_state, tuple(2 * side for side in hidden_state.shape[-2:]))
        lateral = self.lateral(lateral)
        # All stages of a plain ViT have one resolution; its laterals are then upsampled too.
        size = tuple(
            own if own > below else 2 * below for own, below in zip(lateral.shape[-2:], hidden_state.shape[-2:])
        )
        hidden_state = upsample_onto(hidden_state, size)
        if lateral.shape[-2:] != size:
            lateral = upsample(lateral, size)
        return hidden_state + lateral


__all__ = ["PoodleDecoderBlock"]
