"""Checkpoints of a run, and its exported folders `encoder/` and `model/`. safetensors and JSON only, no pickle."""

import dataclasses
import errno
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel, SegformerImageProcessor

from modeling_poodle import PoodleConfig, PoodleFlowModel, PoodleForPreTraining, PoodleModel
from modeling_poodle.cpu import usable_cores
from modeling_poodle.folders import folder_aside
from modeling_poodle.processes import on_all, on_main
from modeling_poodle.recipe_files import read_yaml_mapping
from modeling_poodle.remote_code import add_code
from training.addresses import is_dataset_id
from training.cards import Facts, flow_card, run_card
from training.checkpoint_files import (
    damage,
    finish,
    list_checkpoints,
    rank_files,
    read_fields,
    read_state,
    rotate,
    sweep,
    write_tensors,
    write_text,
)
from training.recipe import Recipe
from training.run_recipe import RunRecipe
from training.views import IMAGENET_MEAN, IMAGENET_STD


def save_checkpoint(
    accelerator: Accelerator,
    recipe: RunRecipe,
    step: int,
    model: PreTrainedModel,
    optimizer,
    rank_state: dict,
    keep_all: bool = False,
) -> Path:
    """
    Write `checkpoints/step-N/` under a temporary name, then rename it, so that an incomplete checkpoint is never taken for a whole one.

    Args:
        rank_state: what this rank needs to resume: tensors and JSON-able values, by name.
        keep_all: delete no older checkpoint.

    Raises:
        OSError: a rank could not write. Raised on all ranks; earlier checkpoints are unchanged.
    """
    folder = Path(recipe.output_dir, "checkpoints")
    final, partial = folder / f"step-{step}", folder / f".step-{step}.partial"
    rank, main = accelerator.process_index, accelerator.is_main_process

    def begin() -> None:
        sweep(folder)
        partial.mkdir(parents=True)

    def write() -> None:
        tensors = {name: value for name, value in rank_state.items() if isinstance(value, torch.Tensor)}
        others = {name: value for name, value in rank_state.items() if name not in tensors}
        write_tensors(partial / f"rank-{rank}.safetensors", tensors)
        write_text(partial / f"rank-{rank}.json", json.dumps(others))
        if main:
            write_tensors(partial / "model.safetensors", model.state_dict())
            write_text(partial / "config.json", model.config.to_json_string())
            write_tensors(partial / "optimizer.safetensors", _optimizer_tensors(model, optimizer))

    def end() -> None:
        state = {"step": step, "num_processes": accelerator.num_processes, "torch": torch.__version__}
        state["pairs_per_step"] = recipe.pairs_per_process * accelerator.num_processes
        state["hardware"] = hardware(accelerator.device, accelerator.num_processes)
        # For cards written later on another machine: a local path such as my/clips does not exist there and looks like a Hub id.
        names = [*recipe.videos, getattr(recipe, "init_encoder", None)]
        state["hub_names"] = [name for name in names if name is not None and is_dataset_id(name)]
        write_text(partial / "state.json", json.dumps(state))
        for name in rank_files(accelerator.num_processes):  # checks that all machines share the folder
            if not (partial / name).is_file():
                raise FileNotFoundError(
                    errno.ENOENT,
                    "another process has written it, and it is not seen here: do all share the folder?",
                    name,
                )
        finish(partial, final)
        if not keep_all:
            rotate(recipe.output_dir, recipe.save_total_limit)

    try:
        on_main(accelerator, begin)
        on_all(accelerator, write)
        on_main(accelerator, end)
    except OSError as error:
        if main:
            shutil.rmtree(partial, ignore_errors=True)  # makes room on a full disk
        raise OSError(
            f"the checkpoint of step {step} could not be written ({error}). The checkpoints before it in {folder} are as they were: "
            "mend the disk, then --resume_from_checkpoint latest"
        ) from error
    return final


def load_checkpoint(
    accelerator: Accelerator, checkpoint: Path, model: PreTrainedModel, optimizer, like: dict, inexact: bool = False
) -> tuple[int, dict]:
    """
    Load a checkpoint of [`save_checkpoint`] into `model` and `optimizer`, in place.

    Args:
        like: this rank's current state. The checkpoint's must have tensors of the same names, shapes and types.
        inexact: the workers or batches differ from the run's, so the stream begins anew, at the same place on all ranks.

    Returns:
        The step and this rank's state.

    Raises:
        ValueError: a file is unreadable.
    """
    try:
        state = read_state(checkpoint)
        model.load_state_dict(load_file(checkpoint / "model.safetensors"))
        _load_optimizer_tensors(model, optimizer, load_file(checkpoint / "optimizer.safetensors"))
        rank, saved = accelerator.process_index, state["num_processes"]
        return state["step"], read_rank_state(checkpoint, saved, rank, accelerator.num_processes, like, inexact)
    except (SafetensorError, OSError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"checkpoint {checkpoint} cannot be read ({error}); name an earlier one with --resume_from_checkpoint PATH"
        ) from error


def read_rank_state(checkpoint: Path, saved: int, rank: int, ranks: int, like: dict, inexact: bool) -> dict:
    """Read the state from which rank `rank` of `ranks` resumes, of a checkpoint of `saved` ranks. For the rest see [`load_checkpoint`]."""
    if ranks == saved and not inexact:
        return _read_rank(checkpoint, rank, like)
    states = [_read_rank(checkpoint, number, like) for number in range(saved)]
    state = states[rank] if ranks == saved else _merged(states)
    # Ranks enter a span at different steps (sooner if they skip videos). All resume after the furthest span that any rank has entered.
    openings = max(other["loader"]["openings"] for other in states)
    return {**state, "loader": {**state["loader"], "openings": openings}}


_LOADER = {
    "span": int, "openings": int, "num_workers": int, "world_size": int, "batch_size": int, "paths": int, "first_path": str,
    "estimator": dict | None, "loader": dict | None,
}  # fmt: skip
_RANK = {"loader": _LOADER, "skipped": dict[str, str], "streaks": {"feature_std": int, "valid_fraction": int}}


def _read_rank(checkpoint: Path, rank: int, like: dict) -> dict:
    path = checkpoint / f"rank-{rank}.safetensors"
    tensors = load_file(path)
    for name, expected in like.items():
        if not isinstance(expected, torch.Tensor):
            continue
        found = tensors.get(name)
        if found is None or (found.shape, found.dtype) != (expected.shape, expected.dtype):
            got = "nothing" if found is None else f"{found.dtype} {tuple(found.shape)}"
            raise ValueError(f"{path}: {name} must be {expected.dtype} {tuple(expected.shape)}, got {got}")
    return {**tensors, **read_fields(path.with_suffix(".json"), _RANK)}


def _merged(ranks: list[dict]) -> dict:
    """Merge the states of all ranks into one, for a run that resumes with another number of ranks. The log window's sums are averaged."""
    sums = torch.stack([rank["sums"] for rank in ranks]).mean(dim=0)
    skipped = {path: reason for rank in ranks for path, reason in rank["skipped"].items()}
    return {**ranks[0], "sums": sums, "skipped": skipped}


def _optimizer_tensors(model, optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state by parameter name: `exp_avg.student.encoder...`."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {f"{key}.{names[p]}": value for p, values in optimizer.state.items() for key, value in values.items()}


def _load_optimizer_tensors(model, optimizer, tensors: dict[str, torch.Tensor]) -> None:
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if f"step.{names[parameter]}" not in tensors:
                continue  # it never had a gradient (a ViT's mask token)
            for key in ("exp_avg", "exp_avg_sq", "step"):
                value = tensors[f"{key}.{names[parameter]}"]
                if value.shape != (parameter.shape if key != "step" else ()):
                    raise ValueError(
                        f"optimizer.safetensors: {key}.{names[parameter]} is of shape {tuple(value.shape)}"
                    )
                if key == "step":  # on the device where the optimizer would create it
                    value = value.to(parameter.device if group["fused"] else "cpu")
                else:  # in the parameter's memory format
                    value = torch.empty_like(parameter).copy_(value)
                optimizer.state[parameter][key] = value


def export(model: PoodleForPreTraining, recipe: Recipe, step: int, num_processes: int = 1) -> None:
    """
    Write `encoder/` (the teacher's encoder in its own architecture's format) and `model/` (PoodleModel with its decoder).

    The teacher is the network that the method evaluates.

    Args:
        step: optimizer steps done, for the card.
        num_processes: of the run, for the card.
    """
    facts = Facts(step, "teacher", hardware(model.device, num_processes), num_processes, Path(recipe.output_dir))
    config, fields = model.teacher.config.to_dict(), dataclasses.asdict(recipe)
    write_folders(model.teacher, Path(recipe.output_dir), lambda part: run_card(part, config, fields, facts))


def export_network(run: str | Path, output_dir: Path, network: str) -> None:
    """
    Write `encoder/` and `model/` of the student (or teacher) in a run's last checkpoint.

    Raises:
        ValueError: the run has no finished checkpoint, or its last is damaged or unreadable.
    """
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        raise ValueError(f"{run}: no finished checkpoint there, and the {network}'s weights are only in checkpoints")
    folder = checkpoints[-1]
    wrong = damage(folder)
    if wrong:
        raise ValueError(f"checkpoint {folder} is damaged: {wrong}")
    try:
        state = read_state(folder)
        model = PoodleModel(PoodleConfig.from_pretrained(folder))
        weights, prefix = load_file(folder / "model.safetensors"), f"{network}."
        model.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"checkpoint {folder} cannot be read ({error})") from error
    fields = {**dataclasses.asdict(Recipe()), **read_yaml_mapping(Path(run, "config.yaml"))}
    fields = _with_local_names(fields, state.get("hub_names"))
    facts = Facts(
        state["step"], network, str(state.get("hardware", "not recorded")), state["num_processes"], Path(run)
    )
    write_folders(model, output_dir, lambda part: run_card(part, model.config.to_dict(), fields, facts))


def _with_local_names(fields: dict, on_hub) -> dict:
    """
    Prefix local paths in a recipe's fields with `./`, so that a card does not take a relative path of two parts for a Hub id.

    Args:
        on_hub: `hub_names` of a checkpoint's state, the names that are Hub ids.
    """
    if not isinstance(on_hub, list):  # the checkpoint of an earlier version has none
        return fields

    def local(name: str | None) -> str | None:
        return f"./{name}" if name is not None and is_dataset_id(name) and name not in on_hub else name

    videos, encoder = [local(source) for source in fields["videos"]], local(fields["init_encoder"])
    return {**fields, "videos": videos, "init_encoder": encoder}


def hardware(device: torch.device, num_processes: int) -> str:
    """Describe in words the hardware on which a run computes."""
    if device.type == "cpu":
        return f"CPU, {usable_cores()} cores" + (f", {num_processes} processes" if num_processes > 1 else "")
    name = getattr(torch.get_device_module(device), "get_device_name", None)  # PyTorch has no names of Apple GPUs
    return f"{num_processes} x {device.type if name is None else name(device)}"


def write_folders(
    model: PoodleModel, output_dir: Path, card: Callable[[str], str], parts: Sequence[str] = ("model", "encoder")
) -> None:
    """
    Write `encoder/` and `model/`, each under a temporary name and then renamed. `model/` includes its code, for users without this package.

    Args:
        card: function that returns the text of the model card of "encoder" or "model".
        parts: which of the two.
    """
    # do_resize=False, because dense features are wanted at the image's own size.
    processor = SegformerImageProcessor(
        do_convert_rgb=True, do_resize=False, image_mean=list(IMAGENET_MEAN), image_std=list(IMAGENET_STD)
    )
    encoder_config = model.encoder.config
    stages = [name for name in getattr(encoder_config, "stage_names", None) or [] if name != "stem"]
    for name in parts:
        module = model if name == "model" else model.encoder
        state = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in module.state_dict().items()}
        with folder_aside(output_dir / name) as partial:
            if encoder_config.model_type != "resnet":
                module.save_pretrained(partial, state_dict=state)
            else:
                kept = list(encoder_config.out_features)
                if name == "encoder":
                    encoder_config.out_features = stages  # all four stages, which UperNet and similar heads need
                module.save_pretrained(partial, state_dict=state)
                encoder_config.out_features = kept
            processor.save_pretrained(partial)
            add_code(partial)
            (partial / "README.md").write_text(card(name), encoding="utf-8")


def export_flow(model: PoodleFlowModel, recipe: RunRecipe, step: int, num_processes: int = 1) -> None:
    """Write `model/` of a run of train_flow.py under a temporary name, then rename it."""
    facts = Facts(step, "network", hardware(model.device, num_processes), num_processes, Path(recipe.output_dir))
    with folder_aside(Path(recipe.output_dir, "model")) as partial:
        model.save_pretrained(partial)
        add_code(partial)
        (partial / "README.md").write_text(flow_card(dataclasses.asdict(recipe), facts), encoding="utf-8")
