"""
Convert the parameter names of a plain ResNet between torchvision and transformers. timm uses torchvision's names.

This module does not import torch.
"""

import re
from pathlib import Path

from safetensors.numpy import load_file, save_file

# (torchvision, transformers). torchvision counts stages and convolutions from 1, transformers from 0; both count blocks from 0.
_NAMES = (
    ("conv1.", "embedder.embedder.convolution."),
    ("bn1.", "embedder.embedder.normalization."),
    ("layer{stage}.{block}.conv{conv}.", "encoder.stages.{stage}.layers.{block}.layer.{conv}.convolution."),
    ("layer{stage}.{block}.bn{conv}.", "encoder.stages.{stage}.layers.{block}.layer.{conv}.normalization."),
    ("layer{stage}.{block}.downsample.0.", "encoder.stages.{stage}.layers.{block}.shortcut.convolution."),
    ("layer{stage}.{block}.downsample.1.", "encoder.stages.{stage}.layers.{block}.shortcut.normalization."),
)
TIMM_FILE = "timm.safetensors"
_DEPTHS = {
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
    ("bottleneck", (3, 8, 36, 3)): "resnet152",
}
_SIZES = {"basic": [64, 128, 256, 512], "bottleneck": [256, 512, 1024, 2048]}


def _renamed(key: str, source: int, shift: int) -> str:
    for names in _NAMES:
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(names[source]))
        if match := re.match(pattern, key):
            numbers = {name: int(n) + (0 if name == "block" else shift) for name, n in match.groupdict().items()}
            return names[1 - source].format(**numbers) + key[match.end() :]
    raise ValueError(f"{key} is no parameter of a plain ResNet")


def to_transformers(key: str) -> str:
    """Rename a parameter: `layer1.0.conv1.weight` -> `encoder.stages.0.layers.0.layer.0.convolution.weight`."""
    return _renamed(key, 0, -1)


def to_torchvision(key: str) -> str:
    """Rename a parameter: the inverse of [`to_transformers`]."""
    return _renamed(key, 1, 1)


def timm_architecture(config: dict) -> str | None:
    """Return timm's name for the network of a transformers config, or `None` if [`add_timm`] cannot convert it."""
    layer = config.get("layer_type")
    if config.get("model_type") != "resnet" or layer not in _SIZES or config.get("hidden_sizes") != _SIZES[layer]:
        return None
    if config.get("hidden_act", "relu") != "relu":  # timm always builds these networks with ReLU
        return None
    if config["embedding_size"] != 64:
        return None
    if config.get("downsample_in_bottleneck") or config.get("downsample_in_first_stage"):
        return None
    if (config.get("architectures") or ["ResNetBackbone"]) != ["ResNetBackbone"] or "bfloat16" in (
        config.get("dtype"),
        config.get("torch_dtype"),
    ):
        return None  # other classes name their parameters differently, and numpy has no bfloat16
    return _DEPTHS.get((config["layer_type"], tuple(config["depths"])))


def add_timm(folder: Path, config: dict, processor: dict) -> dict:
    """
    Write a second copy of the weights to `folder`, with timm's parameter names, and return `config` with timm's fields added.

    With the returned config, `timm.create_model("hf-hub:org/name", pretrained=True)` finds the copy. The copy takes little space on the
    Hub, which stores identical chunks of files only once.
    """
    weights = {to_torchvision(key): value for key, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / TIMM_FILE, metadata={"format": "pt"})
    found = {
        "hf_hub_filename": TIMM_FILE,
        "num_classes": 0,
        "input_size": [3, 224, 224],
        "mean": processor["image_mean"],
        "std": processor["image_std"],
        "first_conv": "conv1",
        "classifier": "fc",
    }
    return {**config, "architecture": timm_architecture(config), "num_classes": 0, "pretrained_cfg": found}
