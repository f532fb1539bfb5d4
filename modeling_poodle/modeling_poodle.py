"""PooDLe: encoder with spatial decoder module (SDM), as a model, as a backbone and with a readout."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoBackbone, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPoolingAndNoAttention,
    SemanticSegmenterOutput,
)

from .configuration_poodle import PLAIN_VITS, PoodleConfig

# PyTorch's CUDA kernel for channels_last maps writes so many numbers at most, and refuses more.
MOST_NUMBERS = 2**31 - 2


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (N, C, h, w) bilinearly to `size`, in their own type: autocast's float32 would double the largest maps that a step keeps."""
    kind = maps.device.type
    # "meta" has no autocast. (Asking torch.amp.is_autocast_available would break the graph of torch.compile before torch 2.14.)
    with torch.autocast(kind, enabled=False) if kind != "meta" else nullcontext():
        doubled, pays = size == tuple(2 * side for side in maps.shape[-2:]), maps.requires_grad or maps.is_cuda
        # Not is_compiling, which is true of torch.export as well, where slices would fix the sizes.
        if torch.compiler.is_dynamo_compiling() and doubled and pays:
            points = maps.permute(0, 2, 3, 1)  # as channels_last maps lie, and are to lie afterwards
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
    Twice as many cells along `dim`, what bilinear interpolation is then: 3/4 of a cell and 1/4 of its nearer neighbour. For torch.compile,
    which makes interpolation's gradient of additions one by one into float32 maps in another layout, and fuses this one's with what is beside it
    (64 to 128 rows on a CPU: forward and backward 5.6 ms, 80 with interpolation compiled, 18 not compiled; forward alone 2.3 and 0.9).
    """
    last = maps.shape[dim] - 1
    before = torch.cat([maps.narrow(dim, 0, 1), maps.narrow(dim, 0, last)], dim)
    after = torch.cat([maps.narrow(dim, 1, last), maps.narrow(dim, last, 1)], dim)
    return torch.stack([torch.lerp(maps, before, 0.25), torch.lerp(maps, after, 0.25)], dim + 1).flatten(dim, dim + 1)


def upsample_onto(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """
    Maps (N, C, h, w) of a stage to the `size` of an earlier one of half its stride, cell on cell. Where the image is no multiple of the
    stride, that one has a cell less than twice as many, or one more (encoders that leave an edge out): as many are cut off, or repeated.
    A map stretched to the size would lie up to a cell beside it, 21 pixels at the lower edge of 360 rows.
    """
    doubled = tuple(2 * own if abs(side - 2 * own) <= 1 else side for side, own in zip(size, maps.shape[-2:]))
    maps = upsample(maps, doubled)[..., : size[0], : size[1]]
    below, right = (side - own for side, own in zip(size, maps.shape[-2:]))
    return F.pad(maps, (0, right, 0, below), mode="replicate") if below or right else maps


class PoodleDecoderBlock(nn.Module):
    """
    Residual bottleneck at the incoming resolution, bilinear x2, plus a 1x1 lateral from the encoder (arXiv 2408.11208, section 3).

    Args:
        channels: of the incoming map, kept. reduction: the bottleneck is `channels // reduction` wide.
        lateral_channels: of the encoder's stage; `None`: no lateral.
        lateral_depth: 1x1 convolutions in the lateral. top_down: False leaves the bottleneck out.
    """

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

    def forward(self, hidden_state: Tensor, lateral: Tensor | None = None) -> Tensor:
        if self.top_down:
            residual = hidden_state
            hidden_state = F.relu(self.bn1(self.conv1(hidden_state)))
            hidden_state = F.relu(self.bn2(self.conv2(hidden_state)))
            hidden_state = F.relu(self.bn3(self.conv3(hidden_state)) + residual)
        if self.lateral is None:
            return upsample(hidden_state, tuple(2 * side for side in hidden_state.shape[-2:]))
        lateral = self.lateral(lateral)
        # A plain ViT has one resolution for all its stages.
        size = tuple(
            own if own > below else 2 * below for own, below in zip(lateral.shape[-2:], hidden_state.shape[-2:])
        )
        hidden_state = upsample_onto(hidden_state, size)
        if lateral.shape[-2:] != size:
            lateral = upsample(lateral, size)
        return hidden_state + lateral


class PoodlePreTrainedModel(PreTrainedModel):
    config_class = PoodleConfig
    base_model_prefix = "poodle"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = False

    @classmethod
    def from_pretrained(cls, name, *args, output_loading_info: bool = False, **kwargs):
        """
        Raises:
            ValueError: a checkpoint of [`PoodleForPreTraining`], none of whose names this class has: all weights would be random.
        """
        model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        if any(key.startswith("teacher.") for key in info["unexpected_keys"]):
            raise ValueError(
                f"{name} holds a PoodleForPreTraining, of student, teacher and heads; {cls.__name__} reads one network. Load the model/ "
                f"of the run, or save PoodleForPreTraining.from_pretrained({str(name)!r}).teacher and load that"
            )
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The encoder is a PreTrainedModel of its own and initialises itself; this is for the decoder and the heads.
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)


class PlainVitEncoder(nn.Module):
    """A plain ViT, which transformers does not have as a backbone, read like one: its layers are the stages."""

    def __init__(self, config, stages: list[str]):
        super().__init__()
        self.config, self.out_features = config, stages
        self.channels = [config.hidden_size] * len(stages)
        self.vit = AutoModel.from_config(config, trust_remote_code=False, add_pooling_layer=False)

    def forward(self, pixel_values: Tensor) -> BackboneOutput:
        patch = self.config.patch_size
        size = [side // patch for side in pixel_values.shape[-2:]]
        # Positions are interpolated where the image is not of the size that the model was trained on.
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

    def save_pretrained(self, folder, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save the ViT itself, in its own architecture's format."""
        state = self.state_dict() if state_dict is None else state_dict
        self.vit.save_pretrained(folder, state_dict={key.removeprefix("vit."): value for key, value in state.items()})


MAX_PARAMETERS = 20e9  # 80 GB; the largest vision transformers have as many
WIDE = 1024  # a config without a number above it is not worth a look


def auto_class(config: PreTrainedConfig) -> type:
    """The Auto class that builds the encoder of `config`."""
    return AutoModel if config.model_type in PLAIN_VITS else AutoBackbone


def refuse_giant(config: PreTrainedConfig, build: Callable[[], nn.Module]) -> None:
    """
    Count the parameters of the network that `build()` makes of a config from elsewhere, without memory for them.

    Raises:
        ValueError: more than `MAX_PARAMETERS`.
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
    """The encoder of `config` as a backbone that returns `stages`; dilated where the config asks for a smaller stride."""
    backbone_config = type(config.backbone_config).from_dict(config.backbone_config.to_dict())
    # That of the whole model, not that in which the encoder's own checkpoint is stored.
    backbone_config.dtype = torch.get_default_dtype()
    auto = auto_class(backbone_config)
    refuse_giant(backbone_config, lambda: auto.from_config(backbone_config, trust_remote_code=False))
    if backbone_config.model_type in PLAIN_VITS:
        return PlainVitEncoder(backbone_config, stages)
    if backbone_config.model_type != "timm_backbone":  # timm fixes its stages when it is built
        backbone_config.out_features = stages
    encoder = AutoBackbone.from_config(backbone_config, trust_remote_code=False)
    if config.output_stride is not None:
        _dilate_resnet(encoder, config.output_stride)
    return encoder


def _dilate_resnet(encoder: nn.Module, output_stride: int) -> None:
    """Trade the stride of the late stages of a ResNet for dilation. The weights stay those of the plain network."""
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
                    # torchvision's rule: a stage's first block still has the dilation of the stage before it.
                    rate = first_dilation if index == 0 else dilation
                    conv.dilation = conv.padding = (rate, rate)


class PoodleModel(PoodlePreTrainedModel):
    """
    Encoder and spatial decoder module without the pretraining heads.

    `forward(pixel_values (B, 3, H, W))` gives `last_hidden_state` (B, C, H/8, W/8), the decoder's features (the
    encoder's last stage where there is no decoder), and `pooler_output` (B, C), the encoder's last stage averaged.
    """

    def __init__(self, config: PoodleConfig, stages: list[str] | None = None):
        super().__init__(config)
        wanted = [name for name in config.stage_names if name in {*config.decoder_inputs, *(stages or ())}]
        self.encoder = build_encoder(config, [name for name in wanted if name != "decoder"])
        channels = dict(zip(self.encoder_stages, self.encoder.channels))
        *laterals, last = config.decoder_inputs
        self.num_features = channels[last]
        self.decoder = nn.ModuleList(
            PoodleDecoderBlock(
                channels[last],
                config.decoder_reduction,
                channels[laterals[-1 - index]] if config.decoder_laterals else None,
                config.decoder_lateral_depth,
                config.decoder_top_down,
            )
            for index in range(config.num_decoder_blocks)
        )
        self.checkpoint_activations = False
        self.post_init()

    @property
    def encoder_stages(self) -> list[str]:
        """Names of the feature maps that the encoder returns."""
        if self.config.backbone_config.model_type == "timm_backbone":
            return [name for name in self.config.stage_names if name != "decoder"]
        return list(self.encoder.out_features)

    def encode(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """The encoder's feature maps by stage name."""
        return dict(zip(self.encoder_stages, self.encoder(pixel_values).feature_maps))

    def decode(self, features: dict[str, Tensor]) -> Tensor:
        """The SDM: dense features (B, C, H/8, W/8) from the encoder's maps."""
        *laterals, last = self.config.decoder_inputs
        hidden_state = features[last]
        for index, block in enumerate(self.decoder):
            lateral = features[laterals[-1 - index]] if self.config.decoder_laterals else None
            if self.checkpoint_activations and self.training:
                hidden_state = recomputed(block, block, hidden_state, lateral)
            else:
                hidden_state = block(hidden_state, lateral)
        return hidden_state

    def pool(self, features: dict[str, Tensor]) -> Tensor:
        """Global average of the encoder's last stage, (B, C)."""
        return features[self.config.decoder_inputs[-1]].mean(dim=(2, 3))

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, return_dict: bool | None = None, **kwargs
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        features = self.encode(pixel_values)
        dense = self.decode(features)
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=dense,
            pooler_output=self.pool(features),
            hidden_states=(*features.values(), *((dense,) if len(self.decoder) else ())) if keep else None,
        )
        return output if return_dict is not False else output.to_tuple()

    def checkpoint_gradients(self) -> None:
        """Recompute activations block by block in the backward pass: less memory for about a third more time."""
        self.checkpoint_activations = True
        if getattr(self.encoder, "supports_gradient_checkpointing", False):
            self.encoder.gradient_checkpointing_enable({"use_reentrant": False})
            return
        blocks = [
            m for m in self.encoder.modules() if type(m).__name__ in ("ResNetBottleNeckLayer", "ResNetBasicLayer")
        ]
        if not blocks:
            raise ValueError(
                f"gradient_checkpointing is not available for a {self.config.backbone_config.model_type!r} encoder"
            )
        for block in blocks:
            block.forward = _Checkpointed(block)


class _Checkpointed:
    """Stands in for a block's `forward`. transformers' ResNet has no gradient checkpointing of its own."""

    def __init__(self, block: nn.Module):
        self.block, self.plain = block, block.forward

    def __call__(self, hidden_state: Tensor) -> Tensor:
        if self.block.training and torch.is_grad_enabled():
            return recomputed(self.block, self.plain, hidden_state)
        return self.plain(hidden_state)


def recomputed(block: nn.Module, forward: Callable, *inputs: Tensor | None) -> Tensor:
    """`forward(*inputs)` of a block, computed again in the backward pass, where its BatchNorms' statistics do not move a second time."""
    if torch.compiler.is_compiling():  # which writes statistics once by itself
        return checkpoint(forward, *inputs, use_reentrant=False)
    return checkpoint(
        forward, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _still_statistics(block))
    )


@contextmanager
def _still_statistics(block: nn.Module) -> Iterator[None]:
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = (
            0.0,
            None,
        )  # a share of 0 is taken of the batch's, and no batch counted
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before):
            norm.momentum, norm.num_batches_tracked = momentum, batches


class PoodleBackbone(BackboneMixin, PoodlePreTrainedModel):
    """`AutoBackbone` for UperNet, Mask2Former, DETR and the like: feature maps of the encoder's stages and `decoder`."""

    has_attentions = False
    base_model_prefix = ""

    def __init__(self, config: PoodleConfig):
        super().__init__(config)
        body = PoodleModel(config, stages=[name for name in config.out_features if name != "decoder"])
        # The same parameter names as PoodleModel's, so that one checkpoint serves both.
        self.encoder, self.decoder, self._body = body.encoder, body.decoder, (body,)
        channels = dict(zip(body.encoder_stages, body.encoder.channels), decoder=body.num_features)
        self.num_features = [channels.get(name) for name in self.stage_names]
        self.post_init()

    def post_init(self) -> None:
        # Not BackboneMixin's, which has every layer below it record its output: the encoder's have that already, and recorded twice
        # one layer's map would be read as another's.
        PreTrainedModel.post_init(self)

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, return_dict: bool | None = None, **kwargs
    ) -> BackboneOutput:
        body = self._body[0]
        # from_pretrained and .to() may replace these modules or their tensors; the body reads ours.
        body.encoder, body.decoder = self.encoder, self.decoder
        features = body.encode(pixel_values)
        if "decoder" in self.out_features:
            features["decoder"] = body.decode(features)
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = BackboneOutput(
            feature_maps=tuple(features[name] for name in self.stage_names if name in self.out_features),
            hidden_states=tuple(features.values()) if keep else None,
        )
        return output if return_dict is not False else output.to_tuple()


class PoodleForSemanticSegmentation(PoodlePreTrainedModel):
    """
    Linear readout: one 1x1 convolution on the dense features, or on `config.readout_stage`.

    `forward(pixel_values (B, 3, H, W), labels (B, H, W) long, optional)` gives `logits` (B, num_labels, h, w) and,
    with labels, the cross entropy at the labels' own size (`config.semantic_loss_ignore_index` is left out).
    """

    def __init__(self, config: PoodleConfig):
        super().__init__(config)
        stage = config.readout_stage
        stages = None if stage in (None, "decoder") else [stage]
        self.poodle = PoodleModel(config, stages=stages)
        channels = dict(zip(self.poodle.encoder_stages, self.poodle.encoder.channels))
        width = self.poodle.num_features if stages is None else channels[stage]
        self.classifier = nn.Conv2d(width, config.num_labels, kernel_size=1)
        self.post_init()

    def features(self, pixel_values: Tensor) -> Tensor:
        """What the readout reads, (B, C, h, w)."""
        maps = self.poodle.encode(pixel_values)
        stage = self.config.readout_stage
        return self.poodle.decode(maps) if stage in (None, "decoder") else maps[stage]

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None, **kwargs
    ) -> SemanticSegmenterOutput:
        logits = self.classifier(self.features(pixel_values))
        loss = None
        if labels is not None:
            full = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
            loss = F.cross_entropy(full, labels.long(), ignore_index=self.config.semantic_loss_ignore_index)
        output = SemanticSegmenterOutput(loss=loss, logits=logits)
        return output if return_dict is not False else output.to_tuple()


__all__ = ["PoodleBackbone", "PoodleForSemanticSegmentation", "PoodleModel", "PoodlePreTrainedModel"]
