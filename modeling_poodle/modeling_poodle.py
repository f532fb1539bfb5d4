"""PyTorch PooDLe model: an encoder with the spatial decoder module (SDM), as a plain model, as a backbone and with a linear readout."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPoolingAndNoAttention,
    SemanticSegmenterOutput,
)
from transformers.utils import can_return_tuple

from .configuration_poodle import PoodleConfig
from .encoder_poodle import PlainVitEncoder, build_encoder, recomputable

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


class PoodlePreTrainedModel(PreTrainedModel):
    config_class = PoodleConfig
    base_model_prefix = "poodle"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    # The loss is a mean over the batch. With True, which Trainer infers from `**kwargs`, Trainer would not divide the loss by the number
    # of accumulated batches.
    accepts_loss_kwargs = False
    _no_split_modules = ["PoodleDecoderBlock"]
    # The encoder declares which of these it supports; no other part has attention.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """
        Load a checkpoint as transformers does, and refuse checkpoints of another PooDLe class, whose weights would all stay random.

        Raises:
            ValueError: the checkpoint is one of [`PoodleForPreTraining`], or `cls` is that class and the checkpoint is one of
                [`PoodleForSemanticSegmentation`].
        """
        name = pretrained_model_name_or_path  # None if `config` and `state_dict` are given instead
        model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        unexpected = info["unexpected_keys"]
        # Other unexpected keys are no error: a given config may leave out, say, the decoder. transformers lists them in a warning.
        if not hasattr(model, "teacher") and any(key.startswith("teacher.") for key in unexpected):
            raise ValueError(
                f"{name} holds a PoodleForPreTraining, of student, teacher and heads; {cls.__name__} reads one network. Load the model/ "
                f"of the run, or save PoodleForPreTraining.from_pretrained({str(name)!r}).teacher and load that"
            )
        if cls.base_model_prefix != "poodle" and any(key.startswith("poodle.") for key in unexpected):
            raise ValueError(
                f"{name} holds a PoodleForSemanticSegmentation; {cls.__name__} begins with its network alone: save PoodleModel.from_pretrained({str(name)!r}) "
                "and load that"
            )
        return (model, info) if output_loading_info else model

    def _set_gradient_checkpointing(self, enable: bool = True, *args, **kwargs) -> None:
        for module in self.modules() if enable else ():
            encoder = getattr(module, "encoder", None) if isinstance(module, PoodlePreTrainedModel) else None
            if encoder is not None and not any(
                hasattr(layer, "gradient_checkpointing") for layer in encoder.modules()
            ):
                kind = self.config.backbone_config.model_type
                raise ValueError(f"gradient_checkpointing is not available for a {kind!r} encoder")
        super()._set_gradient_checkpointing(enable, *args, **kwargs)

    def get_input_embeddings(self) -> None:
        """Return `None`, because images have no embeddings. Quantisation calls this method of every model."""
        return None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # For the decoder and the heads. The encoder is itself a PreTrainedModel and initialises its own weights.
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)


class PoodleModel(PoodlePreTrainedModel):
    """
    Encoder and spatial decoder module without the pretraining heads.

    `forward(pixel_values (B, 3, H, W))` returns `last_hidden_state` (B, C, H/s, W/s), the decoder's features (the encoder's last stage if
    there is no decoder), and `pooler_output` (B, C), the average of the encoder's last stage. s is the encoder's stride /
    2**num_decoder_blocks: 8 for a ResNet with two blocks. With `output_hidden_states=True`, `hidden_states` holds the maps of the stages
    that the decoder reads, in the order of the stages, followed by the decoder's map.

    For torch.export, declare sizes that are multiples of the encoder's stride, `{2: 32 * Dim("height"), 3: 32 * Dim("width")}`. For other
    sizes, it depends on the size whether the SDM cuts off or repeats a cell.
    """

    def __init__(self, config: PoodleConfig, stages: list[str] | None = None):
        super().__init__(config)
        wanted = {*config.decoder_inputs, *(stages or ())}
        self.encoder = build_encoder(config, [name for name in config.stage_names if name in wanted])
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
        self.post_init()

    @property
    def encoder_stages(self) -> list[str]:
        """Names of the feature maps that the encoder returns."""
        if self.config.backbone_config.model_type == "timm_backbone":
            return [name for name in self.config.stage_names if name != "decoder"]
        return list(self.encoder.out_features)

    def encode(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """
        Compute the encoder's feature maps (B, C, h, w), by stage name.

        Raises:
            ValueError: the encoder returns something other than maps, such as a ViT's sequence of tokens.
        """
        maps = dict(zip(self.encoder_stages, self.encoder(pixel_values).feature_maps))
        for name, features in maps.items():
            if features.ndim != 4:
                raise ValueError(
                    f"{name} of a {self.config.backbone_config.model_type!r} encoder must be maps (B, C, h, w), got {tuple(features.shape)}"
                )
        return maps

    def decode(self, features: dict[str, Tensor]) -> Tensor:
        """Compute the dense features (B, C, H/s, W/s) from the encoder's maps by stage name. s is as in [`PoodleModel`]."""
        *laterals, last = self.config.decoder_inputs
        hidden_state = features[last]
        for index, block in enumerate(self.decoder):
            lateral = features[laterals[-1 - index]] if self.config.decoder_laterals else None
            hidden_state = block(hidden_state, lateral)
        return hidden_state

    def pool(self, features: dict[str, Tensor]) -> Tensor:
        """Global average of the encoder's last stage, (B, C)."""
        return features[self.config.decoder_inputs[-1]].mean(dim=(2, 3))

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        features = self.encode(pixel_values)
        dense = self.decode(features)
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=dense,
            pooler_output=self.pool(features),
            hidden_states=(*features.values(), *((dense,) if len(self.decoder) else ())) if keep else None,
        )


class PoodleBackbone(BackboneMixin, PoodlePreTrainedModel):
    """
    PooDLe backbone for frameworks such as UperNet, Mask2Former and DETR, built by `AutoBackbone`.

    `forward(pixel_values (B, 3, H, W))` returns `feature_maps`, a tuple of (B, C, h, w) for `out_features` (encoder stages and `decoder`),
    in the order of `stage_names`; `channels` holds each C. With `output_hidden_states=True`, `hidden_states` holds all maps that were
    computed for them.
    """

    has_attentions = False
    # The parts have the same names as in PoodleModel, so that one checkpoint serves both classes.
    encode, decode, encoder_stages = PoodleModel.encode, PoodleModel.decode, PoodleModel.encoder_stages

    def __init__(self, config: PoodleConfig):
        super().__init__(config)
        body = PoodleModel(config, stages=[name for name in config.out_features if name != "decoder"])
        self.encoder, self.decoder = body.encoder, body.decoder
        channels = dict(zip(self.encoder_stages, body.encoder.channels), decoder=body.num_features)
        if isinstance(self.encoder, BackboneMixin):  # also knows the channels of stages that it does not return
            channels = dict(zip(self.encoder.stage_names, self.encoder.num_features)) | channels
        elif isinstance(self.encoder, PlainVitEncoder):
            channels = dict.fromkeys(self.stage_names, self.encoder.config.hidden_size) | channels
        self.num_features = [channels.get(name) for name in self.stage_names]
        self.post_init()

    # As for any backbone, these setters can choose other stages after the model is built.
    @property
    def out_features(self) -> list[str]:
        return self.config.out_features

    @out_features.setter
    def out_features(self, names: list[str]) -> None:
        self._choose_stages(out_features=names)

    @property
    def out_indices(self) -> list[int]:
        return self.config.out_indices

    @out_indices.setter
    def out_indices(self, indices: list[int]) -> None:
        self._choose_stages(out_indices=indices)

    def _choose_stages(self, **chosen) -> None:
        before = self.config.out_features
        self.config.set_output_features_output_indices(**{"out_features": None, "out_indices": None, **chosen})
        try:
            self._ask_encoder_for_stages()
        except ValueError:
            self.config.set_output_features_output_indices(out_features=before, out_indices=None)
            raise

    def _ask_encoder_for_stages(self) -> None:
        wanted = {*self.out_features, *self.config.decoder_inputs} - {"decoder"}
        # ConvNeXt, Swin and others have a norm for each stage.
        norms = getattr(self.encoder, "hidden_states_norms", None)
        if isinstance(norms, nn.ModuleDict) and (missing := wanted - {*norms}):
            raise ValueError(
                f"a {self.config.backbone_config.model_type!r} encoder has norms only for the stages chosen when it was built, {[*norms]}, "
                f"not for {sorted(missing)[0]!r}: give out_features to from_pretrained or to the config"
            )
        if self.config.backbone_config.model_type != "timm_backbone":
            self.encoder.out_features = [name for name in self.stage_names if name in wanted]
        elif missing := wanted - {*self.encoder_stages}:
            raise ValueError(
                f"timm fixes an encoder's stages when it is built: {sorted(missing)[0]!r} is none of {self.encoder_stages}"
            )

    def post_init(self) -> None:
        # Not BackboneMixin's, which makes every layer of the model record its output. The encoder's layers already do; if they recorded
        # twice, the maps would be assigned to the wrong layers.
        PreTrainedModel.post_init(self)

    @can_return_tuple
    def forward(self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs) -> BackboneOutput:
        features = self.encode(pixel_values)
        if "decoder" in self.out_features:
            features["decoder"] = self.decode(features)
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BackboneOutput(
            feature_maps=tuple(features[name] for name in self.stage_names if name in self.out_features),
            hidden_states=tuple(features.values()) if keep else None,
        )


class PoodleForSemanticSegmentation(PoodlePreTrainedModel):
    """
    Linear readout: one 1x1 convolution on the dense features, or on `config.readout_stage`.

    `forward(pixel_values (B, 3, H, W), labels (B, H, W) long, optional)` returns `logits` (B, num_labels, h, w) and, with labels, the cross
    entropy at the size of the labels. The label `config.semantic_loss_ignore_index` is ignored; if no other label occurs, the loss is 0.
    With `output_hidden_states=True`, `hidden_states` is as for [`PoodleModel`] and includes the map that the readout reads.
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
        """Compute the map (B, C, h, w) that the readout reads."""
        return self._read(self.poodle.encode(pixel_values))

    def _read(self, maps: dict[str, Tensor]) -> Tensor:
        """Return the map that the readout reads. If it comes from the decoder, also add it to `maps`."""
        stage = self.config.readout_stage
        if stage not in (None, "decoder"):
            return maps[stage]
        decoded = self.poodle.decode(maps)
        if len(self.poodle.decoder):
            maps["decoder"] = decoded
        return decoded

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, output_hidden_states: bool | None = None, **kwargs
    ) -> SemanticSegmenterOutput:
        maps = self.poodle.encode(pixel_values)
        logits = self.classifier(self._read(maps))
        loss = None if labels is None else self._loss(logits, labels)
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return SemanticSegmenterOutput(loss=loss, logits=logits, hidden_states=tuple(maps.values()) if keep else None)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        full = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
        # long, because a byte cannot hold an ignore index such as -100.
        labels, ignored = labels.long(), self.config.semantic_loss_ignore_index
        kept = labels != ignored
        if self.config.num_labels > 1:
            total = F.cross_entropy(full, labels, ignore_index=ignored, reduction="sum")
        else:  # one class against background, as in transformers' SegFormer: labels are 0 and 1
            losses = F.binary_cross_entropy_with_logits(full[:, 0], labels.float().clamp(max=1), reduction="none")
            total = (losses * kept).sum()
        # The loss of a batch in which every label is ignored is 0: 0/0 would make all weights NaN.
        return total / kept.sum().clamp(min=1)


__all__ = ["PoodleBackbone", "PoodleForSemanticSegmentation", "PoodleModel", "PoodlePreTrainedModel"]
