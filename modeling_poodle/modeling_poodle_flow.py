"""
PyTorch model for the optical flow of frame pairs, with a pyramid, warping and cost volumes (Sun et al. 2018, PWC-Net). It is trained
without labels (Jonschkowski et al. 2020, UFlow).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_poodle_flow import PoodleFlowConfig
from .geometry_poodle import cell_centres, normalise_flow, sample

MIN_CELLS = 4  # smallest side of a coarser level; below it hardly anything is left to correlate


@dataclass
class PoodleFlowOutput(ModelOutput):
    """
    Args:
        flow: (B, 2, 2, H, W) float32, pixels, x then y; index 0 earlier to later, 1 later to earlier.
        level_flows: the flow of each level, finest (stride 4) first, (B, 2, 2, H / stride, W / stride), in cells of that level.
    """

    flow: Tensor | None = None
    level_flows: tuple[Tensor, ...] | None = None


class Correlation(torch.autograd.Function):
    """
    Cost volume of two maps (N, C, h, w), of shape (N, (2 radius + 1)^2, h, w).

    Each value is the mean over C of the products of a cell of the first map with a cell around the same place in the second. The
    displacements are in row-major order; outside the map, cells are zero.

    The forward pass loops over the displacements and keeps no product; the backward pass computes them again and adds in place. On one
    CPU core, for 8 x 32 x 32 x 64 and radius 4, forward and backward take 0.20 s, the same loop through autograd 0.59 s, and one banded
    matrix product for each row 0.35 s.
    """

    @staticmethod
    def forward(ctx, first: Tensor, second: Tensor, radius: int) -> Tensor:
        ctx.save_for_backward(first, second)
        ctx.radius = radius
        shifted = Correlation._shifted(F.pad(second, (radius,) * 4), radius, *first.shape[-2:])
        return torch.stack([(first * other).mean(dim=1) for other in shifted], dim=1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (first, second), radius = ctx.saved_tensors, ctx.radius
        size = first.shape[-2:]
        padded = F.pad(second, (radius,) * 4)
        first_gradient, padded_gradient = torch.zeros_like(first), torch.zeros_like(padded)
        others, other_gradients = (Correlation._shifted(t, radius, *size) for t in (padded, padded_gradient))
        parts = (gradient / first.shape[1]).split(1, dim=1)
        for part, other, other_gradient in zip(parts, others, other_gradients, strict=True):
            first_gradient.addcmul_(part, other)
            other_gradient.addcmul_(part, first)
        return first_gradient, padded_gradient[..., radius:-radius, radius:-radius], None

    @staticmethod
    def _shifted(padded: Tensor, radius: int, h: int, w: int):
        steps = range(2 * radius + 1)
        return (padded[..., y : y + h, x : x + w] for y in steps for x in steps)


def warp(maps: Tensor, flow: Tensor) -> Tensor:
    """Sample maps (N, C, H, W) at p + flow(p) for each pixel p, flow (N, 2, H, W) in pixels. Border values continue outside. float32."""
    points = cell_centres(*flow.shape[-2:], device=flow.device) + normalise_flow(flow.float())
    return sample(maps.float(), points, padding_mode="border")


class PoodleFlowEncoder(nn.Module):
    """Convolutions that turn images (N, 3, H, W) into features (N, C, H / 4, W / 4)."""

    def __init__(self, config: PoodleFlowConfig):
        super().__init__()
        sizes = [3, config.stem_size, config.stem_size, config.hidden_size, config.hidden_size]
        self.convs = nn.ModuleList(
            nn.Conv2d(sizes[i], sizes[i + 1], kernel_size=3, stride=1 + (i + 1) % 2, padding=1) for i in range(4)
        )

    def forward(self, hidden_state: Tensor) -> Tensor:
        for conv in self.convs:
            hidden_state = F.leaky_relu(conv(hidden_state), 0.1)
        return hidden_state


class PoodleFlowDecoder(nn.Module):
    """Computes a level's change of the flow, and the context for the finer level, from cost volume, features, flow and context."""

    def __init__(self, config: PoodleFlowConfig):
        super().__init__()
        volume = (2 * config.correlation_radius + 1) ** 2
        sizes = [volume + 2 * config.hidden_size + 2, *config.decoder_sizes, config.hidden_size]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, kernel_size=3, padding=1) for a, b in zip(sizes[:-1], sizes[1:]))
        self.head = nn.Conv2d(config.hidden_size, 2, kernel_size=3, padding=1)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        # Flow and costs are float32 even if the weights are not.
        hidden_state = torch.cat(inputs, dim=1).to(self.head.weight.dtype)
        for conv in self.convs:
            hidden_state = F.leaky_relu(conv(hidden_state), 0.1)
        return self.head(hidden_state).float(), hidden_state


class PoodleFlowPreTrainedModel(PreTrainedModel):
    config_class = PoodleFlowConfig
    base_model_prefix = "poodle_flow"
    main_input_name = "frames"
    input_modalities = ("video",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, a=0.1)
            init.zeros_(module.bias)
        if isinstance(module, PoodleFlowDecoder):
            init.normal_(module.head.weight, std=1e-3)  # training begins near zero flow


class PoodleFlowModel(PoodleFlowPreTrainedModel):
    """
    Optical flow of both directions of a frame pair.

    The pyramid of each image is computed once, and both directions pass through the levels as one batch. All levels share one encoder,
    which reads the image at successively halved sizes, and one decoder, whose flow is in cells. What they learn from small motion at a
    fine level therefore also serves large motion at a coarse level. Frames of half size train the whole network except its finest level.
    """

    def __init__(self, config: PoodleFlowConfig):
        super().__init__(config)
        self.encoder = PoodleFlowEncoder(config)
        self.decoder = PoodleFlowDecoder(config)
        self.post_init()

    @can_return_tuple
    def forward(self, frames: Tensor) -> PoodleFlowOutput:
        """
        Estimate the flow of frame pairs, from earlier to later and back.

        Args:
            frames: (B, 2, 3, H, W) in [0, 1]; index 0 earlier, 1 later; sides are multiples of `config.stride`.

        Raises:
            ValueError: `frames` has another shape.
        """
        if (
            frames.ndim != 5
            or frames.shape[1:3] != (2, 3)
            or any(side % self.config.stride for side in frames.shape[-2:])
        ):
            raise ValueError(
                f"frames must be pairs (B, 2, 3, H, W) with sides that are multiples of {self.config.stride}, got {tuple(frames.shape)}"
            )
        b = frames.shape[0]
        images = frames.transpose(0, 1).flatten(0, 1) * 2 - 1  # (2B, 3, H, W): all earlier, then all later
        features = self.pyramid(images)
        flow = features[-1].new_zeros((2 * b, 2, *features[-1].shape[-2:]), dtype=torch.float32)
        context = torch.zeros_like(features[-1])
        level_flows = []
        for source in reversed(features):  # (2B, C, h, w), coarsest first
            if level_flows:
                flow, context = double(flow) * 2, double(context)
            matched = warp(torch.cat(source.chunk(2)[::-1]), flow)
            # Without normalisation, the volume is nearly constant at first and the flow stays zero (Jonschkowski et al. 2020).
            volume = Correlation.apply(normalise(source), normalise(matched), self.config.correlation_radius)
            change, context = self.decoder(F.leaky_relu(volume, 0.1), source, flow, context)
            flow = flow + change
            level_flows.insert(0, flow.unflatten(0, (2, b)).transpose(0, 1))  # (B, 2, 2, h, w)
        return PoodleFlowOutput(
            flow=(4 * double(double(flow))).unflatten(0, (2, b)).transpose(0, 1), level_flows=tuple(level_flows)
        )

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Features of images (N, 3, H, W) at strides 4, 8, ..., finest first. No level but the finest has a side below MIN_CELLS."""
        features = [self.encoder(images)]
        while len(features) < self.config.num_levels - 1 and min(features[-1].shape[-2:]) >= 2 * MIN_CELLS:
            images = F.avg_pool2d(images, 2)
            features.append(self.encoder(images))
        return features


def double(maps: Tensor) -> Tensor:
    return F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=False)


def normalise(features: Tensor) -> Tensor:
    """Normalise each channel of features (N, C, h, w) over each image to mean 0 and standard deviation 1, in float32."""
    return F.instance_norm(features.float())


__all__ = ["PoodleFlowModel", "PoodleFlowOutput", "PoodleFlowPreTrainedModel"]
