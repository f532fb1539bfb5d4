"""Checkpoints of a run, and the two folders that others load. safetensors and JSON only, no pickle."""

import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import SegformerImageProcessor

from modeling_poodle import PoodleConfig, PoodleFlowModel, PoodleForPreTraining, PoodleModel
from modeling_poodle.recipe_files import read_yaml_mapping, usable_cores
from training.cards import Facts, flow_card, run_card
from training.recipe import FREE_ON_RESUME, Recipe, RunRecipe
from training.views import IMAGENET_MEAN, IMAGENET_STD

logger = logging.getLogger("poodle")
_NAME = re.compile(r"step-(\d+)")


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first. Unfinished ones (written aside, not renamed) do not count."""
    found = [path for path in Path(output_dir, "checkpoints").glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted((path for path in found if (path / "state.json").is_file()), key=lambda path: int(path.name[5:]))


def prepare_output_dir(recipe: RunRecipe) -> Path | None:
    """
    The checkpoint to go on from, or `None` for a new run. Called before anything costly.

    Raises:
        ValueError: the folder holds another run, the checkpoint is missing, or it is one of another configuration.
    """
    output_dir, resume = Path(recipe.output_dir), recipe.resume_from_checkpoint
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir {output_dir} is a file; it must be a folder")
    saved_config = output_dir / "config.yaml"
    if resume is None:
        if saved_config.exists():
            raise ValueError(
                f"output_dir {output_dir} holds another run: go on with it by --resume_from_checkpoint latest, "
                "or choose another --output_dir"
            )
        return None
    if resume == "latest":
        checkpoints = list_checkpoints(output_dir)
        checkpoint = checkpoints[-1] if checkpoints else None
    else:
        checkpoint = Path(resume)
        if not (checkpoint / "state.json").is_file():
            raise ValueError(f"--resume_from_checkpoint {resume}: no finished checkpoint there (no state.json)")
        if output_dir.resolve() != checkpoint.resolve().parent.parent and saved_config.exists():
            raise ValueError(
                f"output_dir {output_dir} holds another run than {checkpoint}: give the checkpoint's own run, or a new --output_dir"
            )
        saved_config = checkpoint.parent.parent / "config.yaml"
    if saved_config.is_file():
        _refuse_other_configuration(recipe, saved_config)
    if checkpoint is None:
        logger.warning("no finished checkpoint in %s: starting from the beginning", output_dir)
    return checkpoint


def _refuse_other_configuration(recipe: RunRecipe, saved_config: Path) -> None:
    saved = read_yaml_mapping(saved_config)
    changed = [
        f"{name}: {saved.get(name)!r} in the run, {value!r} now"
        for name, value in dataclasses.asdict(recipe).items()
        if name not in FREE_ON_RESUME and saved.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"the checkpoint is one of another configuration ({saved_config}): "
            + "; ".join(changed)
            + ". Resume with the run's own values, or start a new run in another --output_dir"
        )


def save_checkpoint(
    accelerator: Accelerator, recipe: Recipe, step: int, model: PoodleForPreTraining, optimizer, rank_state: dict
) -> Path:
    """
    Write `checkpoints/step-N/`: aside first, then renamed, so that a half checkpoint is never taken for a whole one.

    Args:
        rank_state: what this rank needs to go on: tensors, and JSON-able values, by name.
    """
    folder = Path(recipe.output_dir, "checkpoints")
    final, partial = folder / f"step-{step}", folder / f".step-{step}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    rank = accelerator.process_index
    tensors = {name: value for name, value in rank_state.items() if isinstance(value, torch.Tensor)}
    _write_tensors(partial / f"rank-{rank}.safetensors", tensors)
    _write_text(partial / f"rank-{rank}.json", json.dumps({k: v for k, v in rank_state.items() if k not in tensors}))
    if accelerator.is_main_process:
        _write_tensors(partial / "model.safetensors", model.state_dict())
        _write_text(partial / "config.json", model.config.to_json_string())
        _write_tensors(partial / "optimizer.safetensors", _optimizer_tensors(model, optimizer))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        state = {"step": step, "num_processes": accelerator.num_processes, "torch": torch.__version__}
        state["hardware"] = hardware(accelerator.num_processes)
        _write_text(partial / "state.json", json.dumps(state))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _sync_folder(folder)
        for old in list_checkpoints(recipe.output_dir)[: -recipe.save_total_limit]:
            shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(
    accelerator: Accelerator, checkpoint: Path, model: PoodleForPreTraining, optimizer
) -> tuple[int, dict]:
    """
    Load what [`save_checkpoint`] wrote, in place. Returns the step and this rank's state.

    Raises:
        ValueError: unreadable files, or a number of processes other than the run's.
    """
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        if state["num_processes"] != accelerator.num_processes:
            raise ValueError(
                f"{checkpoint} is of a run on {state['num_processes']} processes, this one has {accelerator.num_processes}: "
                f"resume with as many (accelerate launch --num_processes {state['num_processes']})"
            )
        model.load_state_dict(load_file(checkpoint / "model.safetensors"))
        _load_optimizer_tensors(model, optimizer, load_file(checkpoint / "optimizer.safetensors"))
        rank = accelerator.process_index
        rank_state = dict(load_file(checkpoint / f"rank-{rank}.safetensors"))
        rank_state.update(json.loads((checkpoint / f"rank-{rank}.json").read_text()))
    except (SafetensorError, json.JSONDecodeError, OSError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"checkpoint {checkpoint} cannot be read ({error}); name an earlier one with --resume_from_checkpoint PATH"
        ) from error
    return state["step"], rank_state


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
                # preserve the parameter's memory format; the step counter lives where the optimizer made it
                like = (
                    torch.empty_like(parameter)
                    if key != "step"
                    else value.to(parameter.device if group["fused"] else "cpu")
                )
                optimizer.state[parameter][key] = like.copy_(value)


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    # One copy a tensor: no shared storage, and safetensors wants it dense in the default memory format.
    save_file({name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}, path)
    _sync_file(path)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)
    _sync_file(path)


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def export(model: PoodleForPreTraining, recipe: Recipe, step: int, num_processes: int = 1) -> None:
    """
    Write `encoder/` (the teacher's encoder in its own architecture's format) and `model/` (PoodleModel with its decoder).

    The teacher is what the method evaluates.
    """
    facts = Facts(step, "teacher", hardware(num_processes), num_processes, Path(recipe.output_dir))
    config, fields = model.teacher.config.to_dict(), dataclasses.asdict(recipe)
    write_folders(model.teacher, Path(recipe.output_dir), lambda part: run_card(part, config, fields, facts))


def export_network(run: str | Path, output_dir: Path, network: str) -> None:
    """
    Write `encoder/` and `model/` of the student (or teacher) of a run's last checkpoint.

    Raises:
        ValueError: the run has no finished checkpoint, or an unreadable one.
    """
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        raise ValueError(f"{run}: no finished checkpoint there, and the {network}'s weights are only in checkpoints")
    folder = checkpoints[-1]
    try:
        state = json.loads((folder / "state.json").read_text())
        model = PoodleModel(PoodleConfig.from_pretrained(folder))
        weights, prefix = load_file(folder / "model.safetensors"), f"{network}."
        model.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    except (SafetensorError, json.JSONDecodeError, OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"checkpoint {folder} cannot be read ({error})") from error
    fields = {**dataclasses.asdict(Recipe()), **read_yaml_mapping(Path(run, "config.yaml"))}
    facts = Facts(state["step"], network, state.get("hardware", "not recorded"), state["num_processes"], Path(run))
    write_folders(model, output_dir, lambda part: run_card(part, model.config.to_dict(), fields, facts))


def hardware(num_processes: int) -> str:
    """What a run computes on, in words."""
    if torch.cuda.is_available():
        return f"{num_processes} x {torch.cuda.get_device_name()}"
    return f"CPU, {usable_cores()} cores" + (f", {num_processes} processes" if num_processes > 1 else "")


def write_folders(model: PoodleModel, output_dir: Path, card: Callable[[str], str]) -> None:
    """
    Write `encoder/` and `model/`, each aside first, then renamed.

    Args:
        card: text of the model card of "encoder" and of "model".
    """
    # do_resize=False: dense features are wanted at the image's own size.
    processor = SegformerImageProcessor(do_resize=False, image_mean=list(IMAGENET_MEAN), image_std=list(IMAGENET_STD))
    encoder_config = model.encoder.config
    stages = [name for name in getattr(encoder_config, "stage_names", None) or [] if name != "stem"]
    for name, module in (("model", model), ("encoder", model.encoder)):
        partial = output_dir / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        state = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in module.state_dict().items()}
        if encoder_config.model_type != "resnet":
            module.save_pretrained(partial, state_dict=state)
        else:
            kept = list(encoder_config.out_features)
            if name == "encoder":
                encoder_config.out_features = stages  # all four: what UperNet and the like ask for
            module.save_pretrained(partial, state_dict=state)
            encoder_config.out_features = kept
        processor.save_pretrained(partial)
        (partial / "README.md").write_text(card(name))
        _put_in_place(partial, output_dir / name)


def _put_in_place(partial: Path, final: Path) -> None:
    """Rename a finished folder to its name, over an older one."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(partial, final)
    shutil.rmtree(old, ignore_errors=True)


def export_flow(model: PoodleFlowModel, recipe: RunRecipe, step: int, num_processes: int = 1) -> None:
    """Write `model/` of a run of train_flow.py: aside first, then renamed."""
    facts = Facts(step, "network", hardware(num_processes), num_processes, Path(recipe.output_dir))
    partial = Path(recipe.output_dir, ".model.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    (partial / "README.md").write_text(flow_card(dataclasses.asdict(recipe), facts))
    _put_in_place(partial, Path(recipe.output_dir, "model"))
