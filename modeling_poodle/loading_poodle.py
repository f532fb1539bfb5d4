"""Loads pretrained encoders by Hub id, folder or timm name, as weights for a PooDLe encoder."""

import pickle
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel, TimmBackbone, TimmBackboneConfig

from .config_checks import check_config, nearest
from .configuration_poodle import PLAIN_VITS
from .encoder_poodle import auto_class, refuse_giant


def config_values(name: str) -> dict:
    """
    Read the config.json of a model, given by Hub id or folder, as a dict.

    Raises:
        OSError: the model is neither a local folder nor on the Hub.
    """
    own = Path(name)
    if own.is_file() and own.suffix != ".json":
        raise OSError(
            f"{name} is a file: python -m training.convert {name} DIR makes DIR/encoder of a ResNet's weights"
        )
    if own.is_dir() and not (own / "config.json").is_file():
        inside = [
            part for part in ("encoder", "model", "readout", "detector") if (own / part / "config.json").is_file()
        ]
        raise OSError("the folder holds no model (no config.json)" + (f": give {own / inside[0]}" if inside else ""))
    try:
        return PreTrainedConfig.get_config_dict(name)[0]
    except OSError as error:
        if Path(name).exists():
            raise
        folder, near = Path(name).parent, ""  # a path may be misspelt
        if "/" in name and folder.is_dir():
            near = nearest(Path(name).name, [entry.name for entry in folder.iterdir() if entry.is_dir()])
            near = near and f" ({near.strip()})"
        raise OSError(f"there is no folder {name}{near}, and on the Hub: {error}") from error


def read_config(name: str) -> PreTrainedConfig:
    """
    Read the config of a model by Hub id or folder. Code that the config names is not run: the architecture must be installed here.

    Raises:
        OSError: the model is neither a local folder nor on the Hub.
        ValueError: there is no such folder, `check_config` refuses the config, or the architecture needs code that is not installed.
    """
    # A name with several slashes is no Hub id, and an unreachable Hub would take half a minute to refuse it.
    if name.count("/") > 1 and not Path(name).exists():
        raise ValueError(f"there is no folder {name}")
    values = config_values(name)
    check_config(values, f"config.json of {name}")
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if hasattr(config, "auto_map"):
        del config.auto_map
    return config


def required_keys(keys: Iterable[str]) -> list[str]:
    """
    Select the names of the weights that a checkpoint must contain.

    Left out are the norms that ConvNeXt and Swin backbones add to each map that is read: checkpoints of classifiers do not have them, and
    they start as the identity.
    """
    return [key for key in keys if "hidden_states_norms" not in key.split(".")]


def from_pretrained_whole(model_class, name: str, **kwargs):
    """
    Call `model_class.from_pretrained` and refuse incomplete checkpoints, whose missing weights transformers would leave random.

    Args:
        model_class: a model class or an Auto class.
        name: id on the Hub or local folder.
        kwargs: passed to `from_pretrained`; `config` is read from `name` if it is not given.

    Raises:
        ValueError: the checkpoint lacks weights of the model, is for another architecture or is damaged, or its config is refused.
    """
    config = kwargs.pop("config", None) or read_config(name)
    if config.model_type != "poodle":  # PooDLe models check the size of their encoder when they build it
        build = getattr(model_class, "from_config", None) or model_class._from_config  # an Auto class has the former
        refuse_giant(config, lambda: build(config))
    try:
        model, report = model_class.from_pretrained(name, config=config, output_loading_info=True, **kwargs)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{name} has its weights in a pickle that holds more than tensors, and so could be code"
        ) from None
    except SafetensorError as error:
        raise ValueError(
            f"{name}: its weights cannot be read ({error}); the file is damaged or half copied"
        ) from error
    missing = required_keys(report["missing_keys"])
    if missing or report["mismatched_keys"]:
        first = missing[0] if missing else next(iter(report["mismatched_keys"]))
        raise ValueError(
            f"{name} holds a checkpoint of another architecture: {model_class.__name__} finds no fit for {first}"
        )
    return model


class _SavedTimmBackbone(TimmBackbone):
    """TimmBackbone that loads what `save_pretrained` wrote. Its own `from_pretrained` takes every name for a timm name."""

    from_pretrained = classmethod(PreTrainedModel.from_pretrained.__func__)


def load_encoder(name: str, weights: bool = True, timm_stages: int = 1) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
    """
    Load the config and the state dict of a pretrained encoder. The keys are the parameter names of `PoodleModel.encoder`.

    Args:
        name: id on the Hub or local folder of any backbone that `AutoBackbone` builds or of a plain ViT; `timm/NAME` for timm's.
        weights: False reads only the config and returns an empty state dict.
        timm_stages: number of last stages that a timm network returns. It is fixed when the network is built; a decoder reads several.

    Raises:
        ValueError: the encoder is not found, cannot be loaded, or has no spatial features.
    """
    try:
        if name.startswith("timm/") and not Path(name).exists():
            config = TimmBackboneConfig(backbone=name.removeprefix("timm/"), out_indices=list(range(-timm_stages, 0)))
            encoder = AutoBackbone.from_config(config, trust_remote_code=False)
            if weights:
                # transformers builds timm models with random weights, whatever the config says about pretraining.
                import timm

                pretrained = timm.create_model(
                    config.backbone, pretrained=True, features_only=True, out_indices=config.out_indices
                )
                encoder._backbone.load_state_dict(pretrained.state_dict())
            return config, encoder.state_dict()
        config = read_config(name)
        if config.model_type == "poodle":
            raise ValueError("it is a PooDLe model, with a decoder; give its plain encoder (a run's encoder/)")
        if config.model_type == "timm_backbone":
            state = from_pretrained_whole(_SavedTimmBackbone, name, config=config).state_dict() if weights else {}
            return config, state
        with torch.device("meta"):  # finds the class without allocating weights
            encoder_class = type(auto_class(config).from_config(config, trust_remote_code=False))
        if not weights:
            return config, {}
        if config.model_type in PLAIN_VITS:
            vit = from_pretrained_whole(encoder_class, name, config=config, add_pooling_layer=False)
            return config, {f"vit.{key}": value for key, value in vit.state_dict().items()}
        # Not AutoBackbone.from_pretrained, which takes a local folder for a Hub id.
        return config, from_pretrained_whole(encoder_class, name, config=config).state_dict()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ValueError(f"{name!r} is no encoder that can be loaded: {error}") from error


__all__ = ["config_values", "from_pretrained_whole", "load_encoder", "required_keys", "read_config"]
