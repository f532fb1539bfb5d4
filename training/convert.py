"""
Convert released PooDLe and FlowE checkpoints, or plain ResNets, to the folders that a run exports.

    python -m training.convert poodle_bdd.pth out/ [--which student] [--drop PREFIX ...]
    python -m training.convert resnet50.pth out/                        # weights of torchvision or timm
    python -m training.convert moco.pth out/ --prefix encoder_q.        # a ResNet inside another checkpoint

Writes out/encoder/ and out/model/, of a plain ResNet out/encoder/ alone. Every key of the checkpoint is either converted, dropped (the reason is printed), or an error.
"""

import argparse
import pickle
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import ResNetConfig

from modeling_poodle import PoodleConfig, PoodleModel
from modeling_poodle.recipe_files import run_script
from training.cards import converted_card
from training.checkpoints import write_folders
from training.resnet_names import to_transformers

# For each family: the student's prefixes with the parts that they become, heads to drop, and what precedes both in the teacher's keys.
_HEADS = "a head of pretraining, no part of the features"
_FAMILIES = {
    "PooDLe": {
        "student": {"backbone": "encoder", "decoder_blocks": "blocks", "decoder_laterals": "laterals"},
        "heads": ("dense_projector", "dense_predictor", "pooled_projector", "pooled_predictor"),
        "teacher_prefix": "teacher_",
    },
    "FlowE": {
        "student": {"encoder": "encoder"},
        "heads": ("projector", "predictor"),
        "teacher_prefix": "target_",
    },
}
_WRAPPERS = ("model", "state_dict", "model_state_dict", "network")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "training.convert", description="Convert a released checkpoint, or a plain ResNet, to encoder/ and model/."
    )
    parser.add_argument("checkpoint", type=Path, help="The .pth or .safetensors file.")
    parser.add_argument("output_dir", type=Path, help="Folder for encoder/ and model/.")
    parser.add_argument(
        "--which", choices=("teacher", "student"), default="teacher", help="Network; the teacher is evaluated."
    )
    parser.add_argument(
        "--prefix",
        default="",
        help="What precedes a plain ResNet's keys, after any 'module.'; all other keys are left out.",
    )
    parser.add_argument(
        "--drop", nargs="+", default=[], metavar="PREFIX", help="Keys to leave out beside the known ones."
    )
    options = parser.parse_args(arguments)
    for name in ("encoder", "model"):
        if (options.output_dir / name).exists():
            raise ValueError(f"{options.output_dir / name} exists already: choose another output folder")
    state = read_checkpoint(options.checkpoint)
    plain = bool(options.prefix) or _is_plain(state)
    model, notes = convert(_one_encoder(state, options.prefix) if plain else state, options.which, options.drop)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    config, source = model.config.to_dict(), options.checkpoint.name
    network = None if plain else options.which
    parts = ("encoder",) if plain else ("model", "encoder")
    try:
        write_folders(model, options.output_dir, lambda part: converted_card(part, config, source, network), parts)
    except SafetensorError as error:  # its message contains the system's error
        raise OSError(f"{options.output_dir} cannot be written: {error}") from error
    for reason, count in notes.items():
        print(f"{count:>6} keys {reason}")
    print(f"{options.output_dir}: {' and '.join(f'{part}/' for part in sorted(parts))}")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """
    Read the state dict in a .pth or .safetensors file without running code. Wrapping dicts and the prefix `module.` are removed.

    Raises:
        ValueError: the file does not exist, can only be opened by unsafe loading, or holds no state dict.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is no checkpoint that safetensors reads: {error}") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # holds the training's flags, only plain values
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        with path.open("rb") as file:
            begins = file.read(2)
        # torch has written zip files since version 1.6, and pickles before.
        if begins not in (b"PK", b"\x80\x02") and found is None:
            raise ValueError(
                f"{path} is no checkpoint: it is neither a zip nor a pickle, which torch.save writes"
            ) from None
        what = f" ({found.group(1)})" if found else ""
        raise ValueError(
            f"{path} holds more than tensors{what}, and opening it could run code: where you trust its source, open it yourself and "
            "save its state dict alone, torch.save({'model': checkpoint['model']}, PATH)"
        ) from None
    except Exception as error:  # the unpickler raises errors of every kind for damaged files
        raise ValueError(f"{path} is no checkpoint that torch reads: {type(error).__name__} {error}") from None
    for name in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict (looked also under {', '.join(_WRAPPERS)})")
    wrong = [name for name, value in content.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if wrong:
        raise ValueError(f"{path}: its state dict holds {wrong[0]!r}, which is no named tensor")
    return {name.removeprefix("module."): value for name, value in content.items()}


def convert(state: dict[str, Tensor], which: str = "teacher", drop: Iterable[str] = ()) -> tuple[PoodleModel, Counter]:
    """
    Convert the network `which` of a released state dict, or a plain ResNet's state dict, to a PoodleModel.

    Returns:
        The model, and the number of keys that were converted or dropped, by reason.

    Raises:
        ValueError: a key is not known, the network is not in the checkpoint, or it is not a ResNet that transformers can represent.
    """
    plain = _is_plain(state)
    if plain:
        state, which = {f"backbone.{key}": value for key, value in state.items()}, "student"
    family, parts = _family_of(state, which)
    if plain:
        family = "a plain ResNet"
    notes, ours = Counter(), {name: {} for name in ("encoder", "blocks", "laterals")}
    unknown = []
    for key, value in state.items():
        part, _, rest = key.partition(".")
        if any(key.startswith(prefix) for prefix in drop):
            notes["dropped: as asked for by --drop"] += 1
        elif part in parts["wanted"]:
            ours[parts["wanted"][part]][rest] = value
            if re.match(r"(fc|head)\.", rest) and parts["wanted"][part] == "encoder":
                del ours["encoder"][rest]
                notes["dropped: the encoder's classifier"] += 1
        elif part in parts["dropped"]:
            notes[f"dropped: {parts['dropped'][part]}"] += 1
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(
            f"{len(unknown)} keys are not those of a released {family} checkpoint, such as {', '.join(sorted(unknown)[:4])}: "
            "leave them out with --drop PREFIX if they are no part of the features"
        )
    weights = {f"encoder.{_resnet_key(key)}": value for key, value in ours["encoder"].items()}
    weights |= {f"decoder.{key}": value for key, value in ours["blocks"].items()}
    weights |= {f"decoder.{key.replace('.', '.lateral.', 1)}": value for key, value in ours["laterals"].items()}
    model = PoodleModel(_config(family, ours)).eval()
    report = model.load_state_dict(_same_shapes(weights, model), strict=False)
    # Old files lack BatchNorm's counter.
    missing = [key for key in report.missing_keys if not key.endswith("num_batches_tracked")]
    if missing or report.unexpected_keys:
        raise ValueError(
            f"the {which}'s weights are not a complete ResNet with decoder in transformers' layout: "
            + "; ".join(
                f"{what} {', '.join(keys[:4])}"
                for what, keys in (("missing", missing), ("too many", report.unexpected_keys))
                if keys
            )
        )
    return model, Counter({f"converted ({family}{'' if plain else f', {which}'})": len(weights)}) + notes


def _is_plain(state: dict[str, Tensor]) -> bool:
    """Return whether the keys are those of a ResNet in torchvision's and timm's names, without a prefix."""
    return {"conv1", "bn1", "layer1", "layer4"} <= {key.partition(".")[0] for key in state}


def _one_encoder(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """
    Select the keys that begin with `prefix`, and remove it.

    Raises:
        ValueError: they are no plain ResNet's.
    """
    found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if not _is_plain(found):
        begins = ", ".join(sorted({".".join(key.split(".")[:2]) for key in state})[:8])
        raise ValueError(
            f"--prefix {prefix} leaves no plain ResNet (conv1, bn1, layer1 to layer4); the keys begin with {begins}"
        )
    return found


def _family_of(state: dict[str, Tensor], which: str) -> tuple[str, dict]:
    found = {key.partition(".")[0] for key in state}
    for family, names in _FAMILIES.items():
        prefix = names["teacher_prefix"]
        students, teachers = names["student"], {prefix + name: part for name, part in names["student"].items()}
        if not found & {name for name, part in {**students, **teachers}.items() if part == "encoder"}:
            continue
        wanted, other = (teachers, students) if which == "teacher" else (students, teachers)
        if not found & wanted.keys():
            there = "student" if which == "teacher" else "teacher"
            raise ValueError(
                f"the checkpoint holds no {which}, only the {there}: convert that one with --which {there}"
            )
        reason = f"the {'student' if which == 'teacher' else 'teacher'}; --which converts it"
        dropped = dict.fromkeys(other, reason) | dict.fromkeys(names["heads"], _HEADS)
        dropped |= dict.fromkeys((prefix + name for name in names["heads"]), _HEADS)
        dropped["flow_model"] = "the flow estimator, which is an input here"
        return family, {"wanted": wanted, "dropped": dropped}
    known = ", ".join(
        f"{name}. ({family})" for family, names in _FAMILIES.items() for name in list(names["student"])[:1]
    )
    raise ValueError(
        f"no released checkpoint and no plain ResNet: of its keys ({', '.join(sorted(found)[:6])}, …) none begins with {known}; "
        "give what precedes a ResNet's keys by --prefix"
    )


def _resnet_key(key: str) -> str:
    try:
        return to_transformers(key)
    except ValueError as error:
        raise ValueError(f"{error}: only torchvision's and timm's plain ResNets can be converted") from None


def _config(family: str, ours: dict[str, dict[str, Tensor]]) -> PoodleConfig:
    """Read the architecture from the shapes of the weights."""
    encoder, blocks, laterals = ours["encoder"], ours["blocks"], ours["laterals"]
    depths, sizes = [], []
    last = "conv3" if any(".conv3." in key for key in encoder) else "conv2"
    for stage in range(1, 5):
        found = {int(key.split(".")[1]) for key in encoder if key.startswith(f"layer{stage}.")}
        weight = encoder.get(f"layer{stage}.0.{last}.weight")
        if weight is None or found != set(range(len(found))):
            raise ValueError(f"the encoder has no whole layer{stage}: only ResNets of four stages can be converted")
        depths.append(len(found))
        sizes.append(weight.shape[0])
    backbone = ResNetConfig(
        embedding_size=encoder["conv1.weight"].shape[0] if "conv1.weight" in encoder else sizes[0],
        hidden_sizes=sizes,
        depths=depths,
        layer_type="bottleneck" if last == "conv3" else "basic",
    )
    if family == "a plain ResNet":
        return PoodleConfig(backbone_config=backbone, num_decoder_blocks=0)
    if family == "FlowE":  # FlowE is dilated to stride 8, which the weights do not show
        return PoodleConfig(
            backbone_config=backbone, output_stride=8, num_decoder_blocks=0, dense_weight=1.0, pooled_weight=0.0
        )
    count = len({key.split(".")[0] for key in blocks})
    reduced = max(blocks["0.conv1.weight"].shape[0], 1) if "0.conv1.weight" in blocks else sizes[-1]
    return PoodleConfig(
        backbone_config=backbone,
        num_decoder_blocks=count,
        decoder_reduction=sizes[-1] // reduced,
        decoder_laterals=bool(laterals),
    )


def _same_shapes(weights: dict[str, Tensor], model: PoodleModel) -> dict[str, Tensor]:
    own = model.state_dict()
    for key, value in weights.items():
        if key in own and own[key].shape != value.shape:
            raise ValueError(
                f"{key} has the shape {tuple(value.shape)}, expected {tuple(own[key].shape)}: a wide, grouped or otherwise changed ResNet"
            )
    return {key: value.to(own[key].dtype) if key in own else value for key, value in weights.items()}


if __name__ == "__main__":
    run_script(main)
