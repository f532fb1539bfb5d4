"""Code shared by the evaluation scripts: processes, the output folder, and the loop over models."""

import dataclasses
import json
import logging
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import transformers
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from modeling_poodle.cpu import share_cpu
from modeling_poodle.folders import sweep_aside, write_aside
from modeling_poodle.locks import lock_output_dir
from modeling_poodle.processes import (
    log_plainly,
    lost_process,
    on_main,
    refuse_sharding,
    same_fields,
    same_on_all,
    sums_in_one_order,
)

logger = logging.getLogger("poodle")
# Fields that may differ between the processes of an evaluation, as paths differ between machines. The models' weights are compared instead.
_OF_A_MACHINE = frozenset(("model", "data_dir", "output_dir"))
# Fields that may change when an evaluation is resumed, because they change no figure.
FREE_ON_RESUME = frozenset(("resume_from_checkpoint", "feature_cache_gb", "save_steps"))
FITTED = ("readout", "detector")  # folders of fitted models


def make_accelerator() -> Accelerator:
    refuse_sharding()
    # Without `cpu`, Accelerate overlooks the other processes that torchrun started on CPUs. `mixed_precision` and `dynamo_backend` override
    # `accelerate config`, whose precision and compilation would change the figures without being recorded.
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision="no",
        dynamo_backend="no",
        # The others wait while the first process renders the street or downloads a data set; PyTorch's own limit on GPUs is ten minutes.
        # (The launcher notices at once if a process has ended.)
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )
    refuse_sharding(accelerator)
    if sums_in_one_order(accelerator):
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    if accelerator.device.type == "cpu":
        share_cpu(accelerator.num_processes)
    log_plainly(accelerator)
    return accelerator


def begin_processes(recipe) -> Accelerator:
    """
    Check the output folder, start the processes, and check that all were given the same recipe.

    Raises:
        ValueError: as [`check_output_dir`] and [`make_accelerator`], or the processes were given different recipes.
    """
    check_output_dir(recipe)
    accelerator = make_accelerator()
    same_fields(accelerator, dataclasses.asdict(recipe), _OF_A_MACHINE)
    return accelerator


def check_output_dir(recipe) -> None:
    """
    Check that the evaluation may write to its output folder.

    Raises:
        ValueError: the folder is a file, or holds an evaluation with other values, another run, an interrupted evaluation that is not to be
            resumed, or other files with an evaluation's names; or two models would be written to the same folder.
    """
    folder = Path(recipe.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file; it must be a folder")
    by_folder: dict[str, str] = {}
    for model in recipe.model:
        if by_folder.setdefault(slug(model), model) != model:
            raise ValueError(
                f"model: {by_folder[slug(model)]} and {model} would both be written to {folder / slug(model)}; give one by its absolute path"
            )
    saved = folder / "config.yaml"
    if not saved.exists():
        if left := left_in(recipe, folder):
            raise ValueError(
                f"output_dir {folder} holds {', '.join(left)}, which are no evaluation's that could be replaced (there is no config.yaml); "
                "choose another"
            )
        return
    changed = changed_fields(saved.read_text(encoding="utf-8"), recipe)
    if getattr(recipe, "resume_from_checkpoint", None):
        if changed:
            raise ValueError(
                f"{saved} is of another evaluation ({changed}); resume with its own values, or choose another output_dir"
            )
    elif not (folder / "evaluation.json").exists():
        if changed:
            raise ValueError(
                f"output_dir {folder} holds a run, or an interrupted evaluation, of other values ({changed}); choose another"
            )
        if hasattr(recipe, "resume_from_checkpoint"):
            raise ValueError(
                f"output_dir {folder} holds an interrupted evaluation: go on with --resume_from_checkpoint latest, or choose another"
            )
    elif changed:
        raise ValueError(
            f"output_dir {folder} holds a finished evaluation of other values ({changed}); choose another, or delete it first"
        )


def changed_fields(saved: str, recipe) -> str:
    """Name the fields in which a saved config.yaml differs from this recipe; fields that change no figure are not compared."""
    try:
        then = yaml.safe_load(saved)
    except yaml.YAMLError:
        then = None
    if not isinstance(then, dict):
        return "its config.yaml cannot be read"
    now = yaml.safe_load(recipe.to_yaml())
    names = [name for name in {**now, **then} if name not in FREE_ON_RESUME]
    changed = [str(name) for name in names if name not in then or name not in now or then[name] != now[name]]
    return ", ".join([*changed[:8], *([f"{len(changed) - 8} more"] if len(changed) > 8 else [])])


def places(recipe, folder: Path) -> list[Path]:
    """Return the folders an evaluation may write to: its output folder, and a folder in it for each model."""
    return [folder, *(folder / slug(name) for name in recipe.model)]


def left_in(recipe, folder: Path) -> list[str]:
    """Return the results and fitted models in an output folder and in its folders of single models."""
    names = ("evaluation.json", "report.html", *FITTED)
    found = [
        place / name for name in names for place in dict.fromkeys(places(recipe, folder)) if (place / name).exists()
    ]
    return [f"{path.relative_to(folder)}{'/' if path.name in FITTED else ''}" for path in found]


def finished(accelerator: Accelerator, recipe, built: dict[str, str]) -> list[dict] | None:
    """
    Return the results of an evaluation that is to be resumed but has already finished, else `None`. [`check_output_dir`] must come before.

    Args:
        built: present fingerprint of each model. If other weights were measured, the result is `None`.

    Raises:
        ValueError: the processes have different weights.
    """
    same_on_all(accelerator, "weights of the models", ", ".join(digest[:12] for digest in built.values()))
    return on_main(accelerator, lambda: _finished(recipe, built))


def _finished(recipe, built: dict[str, str]) -> list[dict] | None:
    folder = Path(recipe.output_dir)
    written = [folder / name for name in ("config.yaml", "evaluation.json", "report.html")]
    going_on = recipe.resume_from_checkpoint is not None and all(path.is_file() for path in written)
    if not going_on or any((place / "fit.safetensors").exists() for place in places(recipe, folder)):
        return None
    result = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    results = result.get("results", [result])
    if {entry.get("model"): entry.get("built_sha256") for entry in results} != built:
        return None
    logger.info("%s holds this evaluation, finished: %s", folder, ", ".join(left_in(recipe, folder)))
    return results


def begin_output_dir(recipe, folder: Path) -> None:
    """
    Prepare the output folder, on the first process, once all input is checked.

    A finished evaluation of the same values is removed, and the recipe is saved.

    Raises:
        ValueError: another evaluation is writing there, or has meanwhile written there (see [`check_output_dir`]).
    """
    lock_output_dir(folder)
    check_output_dir(recipe)  # again, because the folder was not locked until now
    if getattr(recipe, "resume_from_checkpoint", None) is None and (folder / "config.yaml").exists():
        for place in places(recipe, folder):
            for name in ("evaluation.json", "report.html", "fit.safetensors"):
                (place / name).unlink(missing_ok=True)
            for name in FITTED:
                shutil.rmtree(place / name, ignore_errors=True)
    for place in places(recipe, folder):
        sweep_aside(place)
    (folder / "config.yaml").write_text(recipe.to_yaml(), encoding="utf-8")


def end_output_dir(recipe, folder: Path) -> None:
    """Remove the saved states of the fits, on the first process, once everything is written."""
    for place in places(recipe, folder):
        (place / "fit.safetensors").unlink(missing_ok=True)


def slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def provenance(accelerator: Accelerator | None = None) -> dict:
    """Return the command, the number of processes and the versions, for evaluation.json. `None`: the script has one process."""
    return {
        "command": shlex.join([*_started(Path(sys.argv[0]), accelerator), *sys.argv[1:]]),
        "num_processes": 1 if accelerator is None else accelerator.num_processes,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _started(script: Path, accelerator: Accelerator | None) -> list[str]:
    """Return the words that start a script of evaluation/ from the repository's root, without paths of this machine."""
    if script.name in ("segment.py", "detect.py"):
        count = 1 if accelerator is None else accelerator.num_processes
        if count > 1 and accelerator.device.type == "cpu":  # where accelerate launch starts one process
            return ["torchrun", "--standalone", "--nproc_per_node", str(count), f"evaluation/{script.name}"]
        several = ["--num_processes", str(count)] if count > 1 else []
        return ["accelerate", "launch", *several, f"evaluation/{script.name}"]
    return ["python", "-m", f"evaluation.{script.stem}"]


@contextmanager
def _lost_processes_in_words() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        lost = lost_process(error, "did not answer for two hours", "go on with --resume_from_checkpoint latest")
        if lost is None:
            raise
        raise lost from error


@_lost_processes_in_words()
def measure_all(accelerator: Accelerator, recipe, measure, report, summary) -> list[dict]:
    """
    Measure the recipe's models one after the other, and write the results and a common report.

    Args:
        measure: (name, folder) -> the model's result (on the first process at least), its loss curve, and (caption, picture) pairs.
        report: (results, curves by model, pictures by model) -> text of report.html.
        summary: results -> text that is printed.

    Returns:
        The results that this process has.

    Raises:
        ConnectionError: another process has died or does not respond.
    """
    output_dir = Path(recipe.output_dir)
    on_main(accelerator, lambda: begin_output_dir(recipe, output_dir))
    results, curves, pictures = [], {}, {}
    for name in recipe.model:
        folder = output_dir / slug(name) if len(recipe.model) > 1 else output_dir
        folder.mkdir(parents=True, exist_ok=True)
        result, curves[name], pictures[name] = measure(name, folder)
        accelerator.free_memory()  # otherwise it would hold all models and their features to the end
        if result is not None:
            results.append(result)
            if accelerator.is_main_process:
                write_aside(folder / "evaluation.json", json.dumps(result, indent=1))
    if accelerator.is_main_process:
        write_aside(output_dir / "report.html", report(results, curves, pictures))
        if len(results) > 1:
            write_aside(output_dir / "evaluation.json", json.dumps({"results": results}, indent=1))
        end_output_dir(recipe, output_dir)
        print(f"\n{summary(results)}\n\n{output_dir}: {', '.join(left_in(recipe, output_dir))}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return results
