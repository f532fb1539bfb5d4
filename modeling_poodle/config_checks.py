"""Checks of configs from elsewhere: numbers that no network has, code to be run, and fields that are misspelt."""

import dataclasses
import difflib
import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Keys that transformers itself writes into, or reads from, a config beside the dataclass fields of PreTrainedConfig.
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
}

# What transformers before version 5 wrote into every config, encoders' included; configs of today take them and leave them alone.
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

# Far above any encoder in use; larger numbers would fill the memory before any other check finds them wrong.
MAX_LAYERS, MAX_SIZE, MAX_DECODER_BLOCKS = 1000, 1 << 20, 8


def check_config(values: Mapping[str, Any], where: str) -> None:
    """
    Look at a config from elsewhere, as a mapping, before anything is made of it.

    Args:
        where: what the fields are named after, such as "PoodleConfig".

    Raises:
        ValueError: a number beyond `MAX_LAYERS` (fields of layers, blocks, stages and depths) or `MAX_SIZE`, or a part of it that
            names code to be fetched and run; the message names the field.
    """

    def look(value: Any, path: str, name: str) -> None:
        if isinstance(value, (dict, list, tuple)):
            if name in ("id2label", "label2id"):  # names of classes; as many as the file has lines
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
            # transformers would fetch a kernel of this name from the Hub, compiled code, and run it.
            raise ValueError(f"{path} must be one of transformers' own implementations, got {reprlib.repr(value)}")

    look(dict(values), where, "")


def check_timm_name(name: Any) -> None:
    """
    Raises:
        ValueError: timm is installed, and has no network of this name.
    """
    if name is None or ":" in str(name):  # hf-hub:ORG/NAME is looked for when it is built
        return
    try:
        import timm
    except ImportError:  # of which transformers tells when it builds the network
        return
    if not isinstance(name, str) or not timm.is_model(name):
        raise ValueError(f"timm has no network {name!r}.{nearest(str(name), timm.list_models())}")


def is_int(value: Any) -> bool:
    """True and False are integers to Python alone."""
    return isinstance(value, int) and not isinstance(value, bool)


def _counts_layers(name: str) -> bool:
    """`depths` and `num_blocks` do, `stage_in_channels` and `block_configs` do not."""
    return bool(re.search("depth|layer|block|stage", name)) and not re.search(
        "channel|size|stride|kernel|config", name
    )


def refuse_unknown(config: PreTrainedConfig, kwargs: dict[str, Any]) -> None:
    """
    Raises ValueError for a field that `config` does not have; the nearest name is suggested. An unknown key of a file that is no misspelling
    of a field is kept, with a warning: a later transformers may write it into every config. Also for another `model_type`.
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


MISSPELT = 0.8  # of two names: one is the other misspelt


def nearest(key: str, known: Iterable[str], likeness: float = 0.6) -> str:
    """A question that ends a sentence, for the name of `known` that is most like `key`; nothing where none is like enough."""
    found = difflib.get_close_matches(key, sorted(known), n=1, cutoff=likeness)
    return f" Did you mean {found[0]!r}?" if found else ""
