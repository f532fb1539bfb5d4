"""PooDLe model configuration."""

import copy
import dataclasses
import math
import re
import reprlib
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin

from .config_checks import (
    EARLIER_KEYS,
    MAX_DECODER_BLOCKS,
    MISSPELT,
    TRANSFORMERS_KEYS,
    check_config,
    check_timm_name,
    is_int,
    nearest,
    refuse_unknown,
)


class ChecksOverrides:
    """Mixin for configs that checks fields given as keywords, `from_pretrained(name, dense_stride=4)`, like the fields of the file."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """
        Build the config from the values of a file, with the fields in `kwargs` replacing them.

        Raises:
            ValueError: the config refuses a value, a keyword is misspelt or follows from other fields, or the file is of another
                `model_type`.
        """
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(
                f"this is the config of a {kind!r} network, no {cls.__name__}: load it by its own class (such as ResNetBackbone) or AutoModel, or give it as a backbone_config"
            )
        # transformers would set these keywords on the finished config and so bypass its checks.
        values, own = dict(config_dict), {field.name for field in dataclasses.fields(cls)}
        own -= {field.name for field in dataclasses.fields(PreTrainedConfig)}
        maps = {"out_features", "out_indices"}  # two ways to choose the same maps
        given = {name: kwargs.pop(name) for name in (own | maps) & {*kwargs}}
        for key in kwargs:
            if isinstance(own_property := getattr(cls, key, None), property) and own_property.fset is None:
                raise ValueError(f"{cls.__name__}.{key} follows from its other fields, and cannot be given")
            if not hasattr(cls, key) and nearest(key, own, MISSPELT):
                raise ValueError(f"{cls.__name__} has no field {key!r}.{nearest(key, own)}")
        # The file's choice of maps is then replaced, or belongs to a network with other stages.
        if given.keys() & {"backbone_config", "num_decoder_blocks", "decoder_laterals", *maps}:
            values = {name: value for name, value in values.items() if name not in maps}
        part = given.get("backbone_config")
        if isinstance(part, dict):
            whole = {**values.get("backbone_config", {}), **part} if "model_type" not in part else part
            given["backbone_config"] = _as_backbone_config(whole, saved=whole is not part)
        return super().from_dict(values | given, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        # auto_map names code files. They do not lie next to a newly saved config, nor next to the network that has this config as a part.
        # It is right only if transformers has just copied the code of a custom class there (`_auto_class`).
        values = super().to_dict()
        return values if self._auto_class is not None else {k: v for k, v in values.items() if k != "auto_map"}


class PoodleConfig(ChecksOverrides, BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of every PooDLe model: an encoder, the spatial decoder module (SDM) on it, and the pretraining heads.

    Args:
        backbone_config (`PreTrainedConfig` or `dict`, defaults to ResNet-50):
            The encoder: the config of any backbone that `AutoBackbone` builds, or of a plain ViT. By transformers' default a timm network
            returns only its last stage; if the decoder reads more stages, `out_indices` is extended to return them.
        output_stride (`int`, *optional*):
            Stride of the encoder's last stage. `None` keeps the encoder's own; 8 or 16 dilates a ResNet (FlowE uses 8).
        num_decoder_blocks (`int`, defaults to 2):
            Blocks of the SDM; each doubles the resolution. 0 leaves the encoder's last stage as the dense features.
        decoder_reduction (`int`, defaults to 8):
            The decoder's bottleneck is `channels // decoder_reduction` wide, where `channels` are those of the encoder's last stage; at
            most `channels`.
        decoder_laterals (`bool`, defaults to `True`):
            Add the encoder's stage of equal resolution to each block's output through a 1x1 convolution.
        decoder_lateral_depth (`int`, defaults to 1):
            1x1 convolutions in a lateral, with normalisation and ReLU between them.
        decoder_top_down (`bool`, defaults to `True`):
            Whether the blocks have bottlenecks. `False` leaves only the upsampling and the laterals (a row of the paper's ablation).
        projection_hidden_size, projection_size (`int`, default to 4096 and 256):
            Widths of the projectors and predictors.
        dense_weight, pooled_weight (`float`, default to 0.5):
            Weights of the two objectives. In pretraining an objective of weight 0 has no heads; with `dense_weight` 0 the model also has
            no decoder.
        dense_stride (`int`, *optional*):
            Spacing in pixels of the points at which the dense loss is taken. `None` uses the stride of the features.
        semantic_loss_ignore_index (`int`, defaults to 255):
            The label that `PoodleForSemanticSegmentation` ignores in its loss.
        readout_stage (`str`, *optional*):
            The feature map that `PoodleForSemanticSegmentation` reads. `None` selects the dense features (the SDM's, or the encoder's
            last stage if there is no SDM).
        out_features, out_indices:
            Feature maps that [`PoodleBackbone`] returns, chosen from the encoder's stages and `"decoder"`.

    Raises:
        ValueError: a field is unknown, misspelt or out of range; the message names it.
    """

    model_type = "poodle"
    sub_configs = {"backbone_config": AutoConfig}

    backbone_config: dict | PreTrainedConfig | None = None
    output_stride: int | None = None
    num_decoder_blocks: int = 2
    decoder_reduction: int = 8
    decoder_laterals: bool = True
    decoder_lateral_depth: int = 1
    decoder_top_down: bool = True
    projection_hidden_size: int = 4096
    projection_size: int = 256
    dense_weight: float = 0.5
    pooled_weight: float = 0.5
    dense_stride: int | None = None
    semantic_loss_ignore_index: int = 255
    readout_stage: str | None = None

    def __post_init__(self, **kwargs):
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        kwargs.pop("stage_names", None)  # saved in files, but derived from the other fields
        refuse_unknown(self, kwargs)
        own = {field.name: getattr(self, field.name, None) for field in dataclasses.fields(self)}
        check_config({**own, **kwargs, "backbone_config": None}, "PoodleConfig")
        self.backbone_config = _as_backbone_config(self.backbone_config, saved=self.transformers_version is not None)
        self._check_values()
        super().__post_init__(**kwargs)
        self.stage_names = self._make_stage_names()
        self._check_readout_stage(self.stage_names)
        if out_features is None and out_indices is None:
            out_features = [self.stage_names[-1]]
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)

    def __setattr__(self, name: str, value: Any) -> None:
        # Checked here because some versions of transformers check the types of these fields on assignment and raise other errors.
        if name in ("id2label", "label2id", "num_labels"):
            _check_labels(name, value)
        made = "stage_names" in vars(self)
        if made and name == "backbone_config":
            value = _as_backbone_config(value, saved=False)
        before = getattr(self, name, None)
        super().__setattr__(name, value)
        if made and name in _CHECKED:
            try:
                self._check_values()
                if name in _OF_STAGES:
                    self._follow_stages()
                else:
                    self._check_readout_stage(self.stage_names)
            except ValueError:
                super().__setattr__(name, before)
                raise

    def _follow_stages(self) -> None:
        """Update `stage_names` and `out_features` after an assignment that changes the stages, such as `num_decoder_blocks = 0`."""
        names = self._make_stage_names()
        self._check_readout_stage(names)
        default = self.out_features == self.stage_names[-1:]
        kept = [] if default else [name for name in self.out_features if name in names]
        self.stage_names = names
        self.set_output_features_output_indices(out_features=kept or names[-1:], out_indices=None)

    def set_output_features_output_indices(self, out_features: list | None, out_indices: list | None) -> None:
        if out_features is not None and not out_features:
            expected = f"some of {', '.join(self.stage_names)}"
            raise ValueError(f"PoodleConfig.out_features must be {expected}, got {out_features!r}")
        count = len(self.stage_names)
        if out_indices is not None and not (
            isinstance(out_indices, (list, tuple))
            and out_indices
            and all(is_int(index) for index in out_indices)
            # A file has the names too. transformers compares both, and its error names the missing stage.
            and (out_features is not None or all(-count <= index < count for index in out_indices))
        ):
            expected = f"integers that count {', '.join(self.stage_names)} from 0"
            raise ValueError(f"PoodleConfig.out_indices must be {expected}, got {out_indices!r}")
        super().set_output_features_output_indices(out_features=out_features, out_indices=out_indices)

    def _check_readout_stage(self, names: list[str]) -> None:
        if self.readout_stage is not None and self.readout_stage not in names:
            expected = f"one of {', '.join(names)}"
            raise ValueError(f"PoodleConfig.readout_stage must be {expected}, got {self.readout_stage!r}")

    def _check_values(self) -> None:
        def refuse(name: str, expected: str) -> None:
            raise ValueError(f"PoodleConfig.{name} must be {expected}, got {getattr(self, name)!r}")

        for name, low in (("num_decoder_blocks", 0), *((n, 1) for n in _POSITIVE)):
            if not is_int(getattr(self, name)) or getattr(self, name) < low:
                refuse(name, f"an integer of at least {low}")
        if self.num_decoder_blocks > MAX_DECODER_BLOCKS:
            refuse("num_decoder_blocks", f"at most {MAX_DECODER_BLOCKS}: each doubles the resolution")
        for name in ("decoder_laterals", "decoder_top_down"):
            if not isinstance(getattr(self, name), bool):
                refuse(name, "true or false")
        if self.num_decoder_blocks and not (self.decoder_laterals or self.decoder_top_down):
            refuse("decoder_top_down", "true where decoder_laterals is false: nothing would be learned")
        for name in ("dense_weight", "pooled_weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
                refuse(name, "a finite number of at least 0")
        if self.dense_weight == 0 and self.pooled_weight == 0:
            refuse("dense_weight", "above 0 where pooled_weight is 0: one objective must be left")
        if self.dense_stride is not None and (not is_int(self.dense_stride) or self.dense_stride < 1):
            refuse("dense_stride", "None or an integer of at least 1")
        if not is_int(self.semantic_loss_ignore_index):
            refuse("semantic_loss_ignore_index", "an integer")
        if self.output_stride is not None:
            if not is_int(self.output_stride) or self.output_stride not in (8, 16, 32):
                refuse("output_stride", "None, 8, 16 or 32")
            if self.backbone_config.model_type != "resnet":
                refuse(
                    "output_stride", f"None for a {self.backbone_config.model_type!r} encoder (only ResNet dilates)"
                )
        blocks = self.num_decoder_blocks if self.decoder_laterals else 0
        encoder = self.backbone_config
        if encoder.model_type == "timm_backbone" and list(encoder.out_indices or [-1]) == [-1] and blocks:
            encoder.out_indices = list(range(-blocks - 1, 0))
        available = len(self._encoder_stages()) - 1
        if self.decoder_laterals and self.num_decoder_blocks > available:
            expected = f"at most {available}: each lateral needs an earlier stage of the encoder"
            if self.backbone_config.model_type == "timm_backbone":
                expected += " (a backbone_config with out_indices: [1, 2, 3, 4] has four)"
            refuse("num_decoder_blocks", expected)
        # For other encoders only the built network knows the channels: PoodleDecoderBlock then checks decoder_reduction.
        sizes, last = getattr(encoder, "hidden_sizes", None), self._encoder_stages()[-1]
        if self.num_decoder_blocks and self.decoder_top_down and sizes and last in getattr(encoder, "stage_names", ()):
            # Counted from the end, because only some encoders list the stem in hidden_sizes.
            behind = len(encoder.stage_names) - encoder.stage_names.index(last)
            channels = sizes[-behind]
            if self.decoder_reduction > channels:
                refuse("decoder_reduction", f"at most {channels}, the channels of the encoder's {last}")

    def _encoder_stages(self) -> list[str]:
        """The encoder stages that a decoder may read, earliest first."""
        config = self.backbone_config
        if config.model_type == "timm_backbone":  # timm names its stages only once the network is built
            return [f"stage{index}" for index in range(1, len(config.out_indices or [0]) + 1)]
        if config.model_type in PLAIN_VITS:
            return [f"stage{index}" for index in range(1, config.num_hidden_layers + 1)][-4:]
        if len(config.out_features) > 1:  # for plain ViT backbones: the user chooses the layers of the pyramid
            return list(config.out_features)
        return [name for name in config.stage_names if name != "stem"][-4:]

    def _make_stage_names(self) -> list[str]:
        config = self.backbone_config
        if config.model_type == "timm_backbone":
            names = self._encoder_stages()
        elif config.model_type in PLAIN_VITS:
            names = [f"stage{index}" for index in range(1, config.num_hidden_layers + 1)]
        else:
            names = list(config.stage_names)
        return names + (["decoder"] if self.num_decoder_blocks else [])

    @property
    def decoder_inputs(self) -> list[str]:
        """Encoder stages from which the dense features are computed, earliest first; the last one enters the decoder at the top."""
        laterals = self.num_decoder_blocks if self.decoder_laterals else 0
        return self._encoder_stages()[-1 - laterals :]

    @property
    def num_channels(self) -> int:
        """Channels of the images. ViTMatte reads this field of a backbone's config."""
        return getattr(self.backbone_config, "num_channels", 3)

    @property
    def readout_map(self) -> str:
        """Name of the map that a readout reads: `readout_stage`, or by default the dense features."""
        return self.readout_stage or ("decoder" if self.num_decoder_blocks else self.decoder_inputs[-1])

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output["backbone_config"] = self.backbone_config.to_dict()
        return output


# Vision transformers that transformers implements as models but not as backbones (DINO's and supervised ViTs among them).
PLAIN_VITS = ("vit", "deit")
_CHECKED = set(PoodleConfig.__annotations__)
_OF_STAGES = ("backbone_config", "output_stride", "num_decoder_blocks", "decoder_laterals")
_POSITIVE = ("decoder_reduction", "decoder_lateral_depth", "projection_hidden_size", "projection_size")


def _check_labels(name: str, value: Any) -> None:
    """Check the label fields of PreTrainedConfig, which determine the size of a readout."""
    if name == "num_labels":
        fits, expected = is_int(value) and value >= 0, "an integer of at least 0"
    elif name == "id2label":
        fits = value is None or isinstance(value, dict) and all(re.fullmatch(r"-?\d+", str(key)) for key in value)
        expected = "a mapping, a name for each number"
    else:
        fits, expected = value is None or isinstance(value, dict), "a mapping, a number for each name"
    if not fits:
        raise ValueError(f"PoodleConfig.{name} must be {expected}, got {reprlib.repr(value)}")


def _as_backbone_config(value, saved: bool) -> PreTrainedConfig:
    """
    Check `value` and return it as the config of an encoder.

    Args:
        value: a config, a dict, or `None` for ResNet-50.
        saved: whether transformers wrote the config that `value` is a part of. If not, unknown keys of a dict are refused.

    Raises:
        ValueError: `value` does not describe an encoder that can be built.
    """
    if value is None:
        return AutoConfig.for_model("resnet")
    if not isinstance(value, (dict, PreTrainedConfig)):
        raise ValueError(f"PoodleConfig.backbone_config must be a config or a dict, got {type(value).__name__}")
    check_config({"backbone_config": value if isinstance(value, dict) else value.to_dict()}, "PoodleConfig")
    config = copy.deepcopy(value)
    if isinstance(config, dict):
        model_type = config.pop("model_type", None)
        if model_type is None:
            raise ValueError(
                "PoodleConfig.backbone_config must name its model_type (for example 'resnet'), got a dict without one"
            )
        if model_type not in CONFIG_MAPPING:  # transformers' own error would list all model types
            hint = nearest(str(model_type), CONFIG_MAPPING)
            raise ValueError(f"PoodleConfig.backbone_config: transformers has no model_type {model_type!r}.{hint}")
        try:
            config = AutoConfig.for_model(model_type, **config)
        except Exception as error:  # each architecture's config raises its own kind of error for a bad field
            raise ValueError(f"PoodleConfig.backbone_config is no config of {model_type!r}: {error}") from error
    # ConvNeXt's default is a tuple, but its network (transformers 5.24) adds a list to it.
    if isinstance(getattr(config, "hidden_sizes", None), tuple):
        config.hidden_sizes = list(config.hidden_sizes)
    # Test the class, not the attributes: timm's config has no out_features until the network is built.
    if config.model_type not in PLAIN_VITS and not isinstance(config, BackboneConfigMixin):
        raise ValueError(
            f"PoodleConfig.backbone_config: {config.model_type!r} is no backbone; its config names no stages to read"
        )
    if getattr(config, "reshape_hidden_states", True) is False:
        raise ValueError(
            "PoodleConfig.backbone_config.reshape_hidden_states must be true: maps are read, not sequences of tokens"
        )
    if config.model_type == "timm_backbone":
        try:
            check_timm_name(config.backbone)
        except ValueError as error:
            raise ValueError(f"PoodleConfig.backbone_config.backbone: {error}") from None
    if config.model_type == "resnet":
        depths, sizes = list(config.depths), list(config.hidden_sizes)
        if not depths or min(depths) < 1:
            raise ValueError(f"PoodleConfig.backbone_config.depths must give a block or more a stage, got {depths!r}")
        if len(sizes) < len(depths) or min(sizes) < 1:  # transformers would skip stages without a width
            expected = f"a width for each of the {len(depths)} depths"
            raise ValueError(f"PoodleConfig.backbone_config.hidden_sizes must give {expected}, got {sizes!r}")
        for name in ("embedding_size", "num_channels"):
            if getattr(config, name) < 1:
                raise ValueError(
                    f"PoodleConfig.backbone_config.{name} must be at least 1, got {getattr(config, name)!r}"
                )
        if config.hidden_act not in ACT2FN:
            hint = nearest(str(config.hidden_act), ACT2FN)
            raise ValueError(
                f"PoodleConfig.backbone_config.hidden_act must name a function of transformers, got {config.hidden_act!r}.{hint}"
            )
    if isinstance(value, dict) and not saved and "transformers_version" not in value:
        _refuse_stray(config, value)
    return config


def _refuse_stray(config: PreTrainedConfig, given: dict[str, Any]) -> None:
    """
    Refuse keys of `given`, the dict from which `config` was made, that the config's class does not know: nothing would read them.

    This is for configs typed by a person. Configs written by transformers may have keys of another version, so callers leave them out.
    Custom models may read keys that their config class does not declare, so this function skips their configs.

    Raises:
        ValueError: an unknown key; the nearest name is suggested.
    """
    kind = type(config)
    if not kind.__module__.startswith("transformers."):
        return
    default = kind()
    passed = {*TRANSFORMERS_KEYS, *EARLIER_KEYS, *kind.attribute_map.values()}
    for key in given:
        if key.startswith("_") or key in passed or key not in vars(config):
            continue
        # The class has the fields and properties; the default config also has attributes computed at construction.
        if not hasattr(kind, key) and not hasattr(default, key):
            fields = {field.name for field in dataclasses.fields(kind) if not field.name.startswith("_")}
            hint = nearest(key, {*fields, *kind.attribute_map, "out_features", "out_indices"})
            raise ValueError(f"PoodleConfig.backbone_config: {kind.__name__} has no field {key!r}.{hint}")


__all__ = ["PoodleConfig"]
