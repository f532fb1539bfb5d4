"""Builds the encoder of a PoodleConfig as a backbone, and adds gradient checkpointing to ResNet."""

import copy
import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoBackbone, AutoModel, PreTrainedConfig
from transformers.modeling_outputs import BackboneOutput
from transformers.models.resnet.modeling_resnet import ResNetBasicLayer, ResNetBottleNeckLayer

from .configuration_poodle import PLAIN_VITS, PoodleConfig


class PlainVitEncoder(nn.Module):
    """Backbone interface for a plain ViT, which transformers does not provide as a backbone. The ViT's layers are the stages."""

    def __init__(self, config, stages: list[str]):
        super().__init__()
        self.config, self.out_features = config, stages
        self.channels = [config.hidden_size] * len(stages)
        self.vit = AutoModel.from_config(config, trust_remote_code=False, add_pooling_layer=False)
        self._no_split_modules = self.vit._no_split_modules  # transformers reads this of each part, for device_map

    def forward(self, pixel_values: Tensor) -> BackboneOutput:
        patch = self.config.patch_size
        patch = (patch, patch) if isinstance(patch, int) else patch
        size = [side // cell for side, cell in zip(pixel_values.shape[-2:], patch)]
        # Position embeddings are interpolated if the image size differs from that of the training.
        hidden = self.vit(pixel_values, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
        maps = []
        for name in self.out_features:
            index = int(name.removeprefix("stage"))
            tokens = hidden[index]
            if index == self.config.num_hidden_layers:
                tokens = self.vit.layernorm(tokens)
            tokens = tokens[:, tokens.shape[1] - size[0] * size[1] :]  # class tokens come first
            maps.append(tokens.transpose(1, 2).unflatten(2, size))
        return BackboneOutput(feature_maps=tuple(maps))

    def save_pretrained(self, folder, state_dict: dict[str, Tensor] | None = None, **kwargs) -> None:
        """Save the ViT itself, in the format of its own architecture; `kwargs` are passed to the ViT's `save_pretrained`."""
        state = self.state_dict() if state_dict is None else state_dict
        state = {key.removeprefix("vit."): value for key, value in state.items()}
        self.vit.save_pretrained(folder, state_dict=state, **kwargs)


MAX_PARAMETERS = 20e9  # 80 GB; as many as the largest vision transformers have
WIDE = 1024  # a config in which no number is larger is accepted without counting its parameters


def auto_class(config: PreTrainedConfig) -> type:
    """The Auto class that builds the encoder of `config`."""
    return AutoModel if config.model_type in PLAIN_VITS else AutoBackbone


def refuse_giant(config: PreTrainedConfig, build: Callable[[], nn.Module]) -> None:
    """
    Refuse an untrusted config whose network would not fit into memory. The parameters are counted on the meta device.

    Args:
        build: builds the network of `config`.

    Raises:
        ValueError: the network has more than `MAX_PARAMETERS` parameters.
    """
    if not any(int(number) > WIDE for number in re.findall(r"\b\d+\b", config.to_json_string(use_diff=False))):
        return
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in build().parameters())
    if count > MAX_PARAMETERS:
        raise ValueError(
            f"the config asks for a {config.model_type!r} network of {count:.3g} parameters; "
            f"at most {MAX_PARAMETERS:.0e} are built"
        )


def build_encoder(config: PoodleConfig, stages: list[str]) -> nn.Module:
    """Build the encoder of `config` as a backbone that returns `stages`, dilated if the config asks for a smaller stride."""
    # deepcopy, because to_dict() omits the attention implementation.
    backbone_config = copy.deepcopy(config.backbone_config)
    # Use the dtype of the whole model, not the (half) precision in which the encoder's own checkpoint is stored.
    backbone_config.dtype = torch.get_default_dtype()
    auto = auto_class(backbone_config)
    refuse_giant(backbone_config, lambda: auto.from_config(backbone_config, trust_remote_code=False))
    if backbone_config.model_type in PLAIN_VITS:
        return PlainVitEncoder(backbone_config, stages)
    if backbone_config.model_type != "timm_backbone":  # timm fixes its stages when it is built
        backbone_config.out_features = stages
    encoder = AutoBackbone.from_config(backbone_config, trust_remote_code=False)
    for layer in encoder.modules():  # transformers' ResNet builds its layers itself; these differ in `forward` alone
        layer.__class__ = RECOMPUTABLE.get(type(layer), type(layer))
    if getattr(getattr(encoder, "_backbone", None), "output_fmt", None) == "NHWC":
        encoder.register_forward_hook(_channels_first)
    if config.output_stride is not None:
        _dilate_resnet(encoder, config.output_stride)
    return encoder


def _channels_first(encoder: nn.Module, inputs: tuple, output: BackboneOutput) -> BackboneOutput:
    """Forward hook for timm's Swin, whose maps are (B, H, W, C) and which transformers passes on unchanged."""
    output.feature_maps = tuple(features.permute(0, 3, 1, 2) for features in output.feature_maps)
    return output


def _dilate_resnet(encoder: nn.Module, output_stride: int) -> None:
    """Replace the stride of a ResNet's late stages by dilation. The weights are unchanged and remain those of the plain network."""
    stride, dilation = 4 * (2 if encoder.config.downsample_in_first_stage else 1), 1
    for stage in encoder.encoder.stages[1:]:
        stride *= 2
        first_dilation = dilation
        shrink = stride > output_stride
        if shrink:
            dilation, stride = dilation * 2, stride // 2
        for index, layer in enumerate(stage.layers):
            for conv in (module for module in layer.modules() if isinstance(module, nn.Conv2d)):
                if shrink:
                    conv.stride = (1, 1)
                if conv.kernel_size == (3, 3):
                    # As in torchvision, a stage's first block keeps the dilation of the previous stage.
                    rate = first_dilation if index == 0 else dilation
                    conv.dilation = conv.padding = (rate, rate)


def recomputable(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """
    Decorate the `forward` of a block to support gradient checkpointing, which computes the block again in the backward pass.

    transformers' `gradient_checkpointing_enable`, and so Trainer's `gradient_checkpointing`, sets attributes of modules that have an
    attribute `gradient_checkpointing`. Unlike in transformers' own layers, BatchNorm statistics are not updated a second time.
    """

    @functools.wraps(forward)
    def run(block: nn.Module, *inputs: Tensor | None) -> Tensor:
        if not (block.gradient_checkpointing and block.training and torch.is_grad_enabled()):
            return forward(block, *inputs)
        if torch.compiler.is_compiling():  # compiled code updates the statistics only once
            return checkpoint(forward, block, *inputs, use_reentrant=False)
        return block._gradient_checkpointing_func(
            forward, block, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _still_statistics(block))
        )

    return run


class RecomputableBasicLayer(ResNetBasicLayer):
    """ResNet basic layer with gradient checkpointing, which transformers' own layer does not support."""

    gradient_checkpointing = False
    forward = recomputable(ResNetBasicLayer.forward)


class RecomputableBottleNeckLayer(ResNetBottleNeckLayer):
    """ResNet bottleneck layer with gradient checkpointing, like [`RecomputableBasicLayer`]."""

    gradient_checkpointing = False
    forward = recomputable(ResNetBottleNeckLayer.forward)


RECOMPUTABLE = {ResNetBasicLayer: RecomputableBasicLayer, ResNetBottleNeckLayer: RecomputableBottleNeckLayer}


@contextmanager
def _still_statistics(block: nn.Module) -> Iterator[None]:
    """Keep the BatchNorm statistics of `block` unchanged within the context."""
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # Momentum 0 keeps the statistics, and batches are counted in a copy. (Not None, which PyTorch's SyncBatchNorm refuses.)
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before):
            norm.momentum, norm.num_batches_tracked = momentum, batches
