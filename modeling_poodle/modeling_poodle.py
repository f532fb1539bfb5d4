"""PyTorch PooDLe model: an encoder with the spatial decoder module (SDM), as a plain model, as a backbone and with a linear readout."""

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
from .decoder_poodle import PoodleDecoderBlock
from .encoder_poodle import RECOMPUTABLE, PlainVitEncoder, build_encoder


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

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs) -> None:
        """
        Set the attention of the encoder, the only part that has any.

        The encoder's config is a copy of `config.backbone_config`, because its stages are chosen in it. transformers therefore does not
        find the encoder by the name `backbone_config` in a mapping.
        """
        if isinstance(attn_implementation, dict):
            attn_implementation = attn_implementation.get("backbone_config", {})
            for module in self.modules():
                if attn_implementation and module is not self and isinstance(module, PreTrainedModel):
                    if isinstance(module.config, type(self.config.backbone_config)):
                        module.set_attn_implementation(attn_implementation, *args, **kwargs)
                        self.config.backbone_config._attn_implementation = module.config._attn_implementation
            return
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def _set_gradient_checkpointing(self, enable: bool = True, *args, every_n_layers: int = 1, **kwargs) -> None:
        for module in self.modules() if enable else ():
            encoder = getattr(module, "encoder", None) if isinstance(module, PoodlePreTrainedModel) else None
            if encoder is not None and not any(
                hasattr(layer, "gradient_checkpointing") for layer in encoder.modules()
            ):
                kind = self.config.backbone_config.model_type
                raise ValueError(f"gradient_checkpointing is not available for a {kind!r} encoder")
        if every_n_layers != 1:  # transformers before 5.24 has no such argument
            kwargs["every_n_layers"] = every_n_layers
        super()._set_gradient_checkpointing(enable, *args, **kwargs)
        # transformers counts only its own kind of layers.
        own = (PoodleDecoderBlock, *RECOMPUTABLE.values())
        for index, block in enumerate(module for module in self.modules() if isinstance(module, own)):
            block.gradient_checkpointing = enable and index % every_n_layers == 0

    def get_input_embeddings(self) -> None:
        """Return `None`, because images have no embeddings. Some quantisation methods ask every model, and transformers' own raises."""
        return None

    def _asked_for(
        self, maps: dict[str, Tensor], output_hidden_states: bool | list[int] | None
    ) -> tuple[Tensor | None, ...] | None:
        """Return the maps that `output_hidden_states` (or else the config) asks for, as transformers 5.24 defines it."""
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if isinstance(wanted, (list, tuple)):
            indices = {index % len(maps) for index in wanted}
            return tuple(features if index in indices else None for index, features in enumerate(maps.values()))
        return tuple(maps.values()) if wanted else None

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

    For torch.export, declare sizes that are multiples of the encoder's stride, `{2: 32 * Dim("height"), 3: 32 * Dim("width")}`. For other
    sizes, it depends on the size whether the SDM cuts off or repeats a cell.
    With `strict=True`, export on a CPU, after `requires_grad_(False)`: the upsampling that torch.compile uses in other cases fixes the sizes.

    Args:
        stages: stages that the encoder returns besides those that the decoder reads. For the classes that build on this one; not saved.
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
        self, pixel_values: Tensor, output_hidden_states: bool | list[int] | None = None, **kwargs
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        """
        Compute the features of images. Attentions are not returned, whatever the encoder.

        Args:
            pixel_values: (B, 3, H, W) normalised images.
            output_hidden_states: return the maps that were computed too; with a list of indices only those, and `None` for the others.

        Returns:
            `last_hidden_state` (B, C, H/s, W/s), the decoder's features (the encoder's last stage if there is no decoder), where s is the
            encoder's stride / 2**num_decoder_blocks: 8 for a ResNet with two blocks. `pooler_output` (B, C), the average of the encoder's
            last stage. `hidden_states`, the maps of the stages that the decoder reads, in the order of the stages, then the decoder's.
        """
        features = self.encode(pixel_values)
        dense, pooled = self.decode(features), self.pool(features)
        if len(self.decoder):
            features["decoder"] = dense
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=dense,
            pooler_output=pooled,
            hidden_states=self._asked_for(features, output_hidden_states),
        )


class PoodleBackbone(BackboneMixin, PoodlePreTrainedModel):
    """
    PooDLe backbone for frameworks such as UperNet, Mask2Former and DETR, built by `AutoBackbone`.

    `channels` holds the channels of each map in `out_features`. Without `decoder` among them the decoder is idle: DistributedDataParallel
    then needs `find_unused_parameters=True` (Trainer: `ddp_find_unused_parameters`).
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
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | list[int] | None = None, **kwargs
    ) -> BackboneOutput:
        """
        Compute the feature maps of images. Attentions are not returned, whatever the encoder.

        Args:
            pixel_values: (B, 3, H, W) normalised images.
            output_hidden_states: as for [`PoodleModel`].

        Returns:
            `feature_maps`, a tuple of (B, C, h, w) for `out_features` (encoder stages and `decoder`), in the order of `stage_names`, and
            `hidden_states`, all maps that were computed for them.
        """
        features = self.encode(pixel_values)
        if "decoder" in self.out_features:
            features["decoder"] = self.decode(features)
        return BackboneOutput(
            feature_maps=tuple(features[name] for name in self.stage_names if name in self.out_features),
            hidden_states=self._asked_for(features, output_hidden_states),
        )


class PoodleForSemanticSegmentation(PoodlePreTrainedModel):
    """
    Linear readout: one 1x1 convolution on the dense features, or on `config.readout_stage`.

    With `readout_stage` the later stages and the decoder are idle, see [`PoodleBackbone`].
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
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | list[int] | None = None,
        **kwargs,
    ) -> SemanticSegmenterOutput:
        """
        Compute the logits of images and, with labels, the loss. Attentions are not returned, whatever the encoder.

        Args:
            pixel_values: (B, 3, H, W) normalised images.
            labels: (B, H, W) integers; with one class, 0 and 1 or shares between them. `config.semantic_loss_ignore_index` is ignored, with
                one class also negative labels and NaN; if no other label occurs, the loss is 0.
            output_hidden_states: as for [`PoodleModel`].

        Returns:
            `logits` (B, num_labels, h, w); `loss`, the cross entropy at the size of the labels; `hidden_states` as for [`PoodleModel`],
            with the map that the readout reads.

        Raises:
            ValueError: the labels of several classes are not integers.
        """
        maps = self.poodle.encode(pixel_values)
        logits = self.classifier(self._read(maps))
        loss = None if labels is None else self._loss(logits, labels)
        return SemanticSegmenterOutput(
            loss=loss, logits=logits, hidden_states=self._asked_for(maps, output_hidden_states)
        )

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        several, ignored = self.config.num_labels > 1, self.config.semantic_loss_ignore_index
        if several and labels.is_floating_point():  # masks scaled to [0, 1] would all become class 0
            raise ValueError(f"labels must be integers, the number of a class for each pixel, got {labels.dtype}")
        full = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
        labels = labels.long() if several else labels.float()  # a byte cannot hold an ignore index such as -100
        kept = labels != ignored
        if several:
            total = F.cross_entropy(full, labels, ignore_index=ignored, reduction="sum")
        else:  # one class against background, as in transformers' SegFormer: labels are 0 and 1, negative ones are void
            kept &= labels >= 0
            # Void labels may be NaN, and so would be the product below.
            shares = labels.where(kept, 0.0).clamp(max=1)
            losses = F.binary_cross_entropy_with_logits(full[:, 0], shares, reduction="none")
            total = (losses * kept).sum()
        # The loss of a batch in which every label is ignored is 0: 0/0 would make all weights NaN.
        return total / kept.sum().clamp(min=1)


__all__ = ["PoodleBackbone", "PoodleForSemanticSegmentation", "PoodleModel", "PoodlePreTrainedModel"]
