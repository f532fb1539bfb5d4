"""Checks of untrusted configs: absurdly large numbers, references to code, and misspelt fields."""

import dataclasses
import difflib
import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Keys that transformers itself writes to or reads from a config, besides the dataclass fields of PreTrainedConfig.
TRANSFORMERS_KEYS = {
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "dtype",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}

# Keys that transformers before version 5 wrote into every config, including those of encoders. Today's configs accept and ignore them.
EARLIER_KEYS = {
    "add_cross_attention",
    "bos_token_id",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "eos_token_id",
    "finetuning_task",
    "is_decoder",
    "pad_token_id",
    "prefix",
    "pruned_heads",
    "sep_token_id",
    "task_specific_params",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tie_word_embeddings",
    "tokenizer_class",
    "torchscript",
    "use_bfloat16",
    "use_pretrained_backbone",
    "use_timm_backbone",
}

# Far above any encoder in use. Larger numbers would exhaust the memory before any other check could reject them.
MAX_LAYERS, MAX_SIZE, MAX_DECODER_BLOCKS = 1000, 1 << 20, 8


def check_config(values: Mapping[str, Any], where: str) -> None:
    """
    Check an untrusted config before anything is built from it.

    Args:
        values: the config as a mapping.
        where: prefix of the field names in error messages, such as "PoodleConfig".

    Raises:
        ValueError: a number exceeds `MAX_LAYERS` (fields that count layers, blocks, stages or depths) or `MAX_SIZE` (all others), or
            the config names code to be fetched and run (only a config as a whole may have an `auto_map`). The message names the field.
    """

    def look(value: Any, path: str, name: str) -> None:
        if isinstance(value, (dict, list, tuple)):
            if name in ("id2label", "label2id"):  # class names; their number is bounded by the size of the file
                return
            layers = [item for item in value if isinstance(item, int)] if isinstance(value, (list, tuple)) else []
            if _counts_layers(name) and sum(layers) > MAX_LAYERS:
                raise ValueError(f"{path} must be at most {MAX_LAYERS} together, got {reprlib.repr(list(value))}")
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                inner = f"{path}.{key}" if isinstance(value, dict) else f"{path}[{key}]"
                if key == "auto_map" and path != where:
                    raise ValueError(f"{inner} names code to be run, which only a config as a whole may do")
                look(item, inner, str(key) if isinstance(value, dict) else name)
        elif isinstance(value, int):
            limit = MAX_LAYERS if _counts_layers(name) else MAX_SIZE
            if abs(value) > limit:
                raise ValueError(f"{path} must be at most {limit}, got {reprlib.repr(value)}")
        elif isinstance(value, str) and "_implementation" in path and "/" in value:
            # transformers would fetch the kernel of this name, which is compiled code, from the Hub and run it.
            raise ValueError(f"{path} must be one of transformers' own implementations, got {reprlib.repr(value)}")

    look(dict(values), where, "")


def check_timm_name(name: Any) -> None:
    """
    Check that timm, if it is installed, has a network of this name.

    Raises:
        ValueError: timm is installed and has no such network.
    """
    if name is None or ":" in str(name):  # hf-hub:ORG/NAME is looked up when the network is built
        return
    try:
        import timm
    except ImportError:  # transformers reports this when it builds the network
        return
    if not isinstance(name, str) or not timm.is_model(name):
        raise ValueError(f"timm has no network {name!r}.{nearest(str(name), timm.list_models())}")


def is_int(value: Any) -> bool:
    """Whether `value` is an integer and not a bool, which Python also counts as an integer."""
    return isinstance(value, int) and not isinstance(value, bool)


def _counts_layers(name: str) -> bool:
    """Whether a field of this name counts layers: `depths` and `num_blocks` do, `stage_in_channels` and `block_configs` do not."""
    return bool(re.search("depth|layer|block|stage", name)) and not re.search(
        "channel|size|stride|kernel|config", name
    )


def refuse_unknown(config: PreTrainedConfig, kwargs: dict[str, Any]) -> None:
    """
    Refuse fields that `config` does not have, and another `model_type`.

    An unknown key of a config read from a file is kept, with a warning, unless it looks like a misspelt field: a later version of
    transformers may write it into every config.

    Raises:
        ValueError: an unknown field (the nearest name is suggested), or another `model_type`.
    """
    own = type(config).model_type
    if (kind := kwargs.get("model_type", config.model_type)) != own:
        raise ValueError(f"{type(config).__name__}.model_type must be {own!r}, got {kind!r}")
    known = {field.name for field in dataclasses.fields(config)} | TRANSFORMERS_KEYS
    for key in kwargs:
        if key in known or key.startswith("_"):
            continue
        name = type(config).__name__
        if config.transformers_version is not None and not nearest(key, known, MISSPELT):
            logger.warning("%s has no field %r: it is left alone (written by a later version?)", name, key)
            continue
        raise ValueError(f"{name} has no field {key!r}.{nearest(key, known)}")


MISSPELT = 0.8  # likeness from which one name counts as a misspelling of the other


def nearest(key: str, known: Iterable[str], likeness: float = 0.6) -> str:
    """The text ` Did you mean 'x'?` for the name in `known` that is most like `key`, or an empty string if none reaches `likeness`."""
    found = difflib.get_close_matches(key, sorted(known), n=1, cutoff=likeness)
    return f" Did you mean {found[0]!r}?" if found else ""
