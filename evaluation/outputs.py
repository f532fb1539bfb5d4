"""What the evaluation scripts share around their work: processes, the output folder, and one model after the other."""

import dataclasses
import json
import logging
import platform
import re
import shlex
import shutil
import sys
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
    on_main,
    refuse_sharding,
    same_fields,
    same_on_all,
    sums_in_one_order,
)

logger = logging.getLogger("poodle")
# May differ between the processes of an evaluation: places. What was built of the models is compared.
_OF_A_MACHINE = frozenset(("model", "data_dir", "output_dir"))
# May change where an evaluation goes on: they change no figure.
FREE_ON_RESUME = frozenset(("resume_from_checkpoint", "feature_cache_gb", "save_steps"))
FITTED = ("readout", "detector")  # folders of what was fitted


def make_accelerator() -> Accelerator:
    # cpu is given because without it Accelerate overlooks the other processes that torchrun started on CPUs; mixed_precision because
    # `accelerate config` may ask for another, which would change the figures without a trace in them.
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision="no",
        # While the first process renders the street or fetches a data set, the others wait; PyTorch's own bound is ten minutes on GPUs. (One
        # that has ended is noticed at once, by the launcher.)
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
    What a script of several processes does first: look at its folder, and see to it that all were given the same.

    Raises:
        ValueError: as [`check_output_dir`] and [`make_accelerator`], and where the processes were given different recipes.
    """
    check_output_dir(recipe)
    accelerator = make_accelerator()
    same_fields(accelerator, dataclasses.asdict(recipe), _OF_A_MACHINE)
    return accelerator


def check_output_dir(recipe) -> None:
    """
    Raises:
        ValueError: the folder is a file, or holds an evaluation of other values, another run, an interrupted evaluation that is not to be
            resumed, or files of another origin that have an evaluation's names; or two models would share one folder in it.
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
    """The fields in which a kept config.yaml is not this recipe, in words; those that change no figure are no difference."""
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
    """Where an evaluation writes: its folder, and of several models one for each in it."""
    return [folder, *(folder / slug(name) for name in recipe.model)]


def left_in(recipe, folder: Path) -> list[str]:
    """What people look for in an output folder, and in those of several models in it."""
    names = ("evaluation.json", "report.html", *FITTED)
    found = [
        place / name for name in names for place in dict.fromkeys(places(recipe, folder)) if (place / name).exists()
    ]
    return [f"{path.relative_to(folder)}{'/' if path.name in FITTED else ''}" for path in found]


def finished(accelerator: Accelerator, recipe, built: dict[str, str]) -> list[dict] | None:
    """
    The results of an evaluation that is to be resumed and has ended already; said where it is so. [`check_output_dir`] comes before.

    Args:
        built: fingerprint of each model as it is now; what was measured on other weights is measured again.

    Raises:
        ValueError: the processes have other weights.
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
    On the first process, once all input is checked: a finished evaluation of the same values is replaced, and the recipe is kept.

    Raises:
        ValueError: another process writes there, or has meanwhile: as [`check_output_dir`].
    """
    lock_output_dir(folder)
    check_output_dir(recipe)  # again: until now nothing kept others from it
    if getattr(recipe, "resume_from_checkpoint", None) is None and (folder / "config.yaml").exists():
        for place in places(recipe, folder):
            for name in ("evaluation.json", "report.html", "fit.safetensors"):
                (place / name).unlink(missing_ok=True)
            for name in FITTED:
                shutil.rmtree(place / name, ignore_errors=True)
    for place in places(recipe, folder):
        sweep_aside(place)
    (folder / "config.yaml").write_text(recipe.to_yaml())


def end_output_dir(recipe, folder: Path) -> None:
    """On the first process, once everything is written: the states of the fits are needed no more."""
    for place in places(recipe, folder):
        (place / "fit.safetensors").unlink(missing_ok=True)


def slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def provenance() -> dict:
    """The command and the versions, for evaluation.json."""
    return {
        "command": shlex.join([*_started(Path(sys.argv[0])), *sys.argv[1:]]),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _started(script: Path) -> list[str]:
    """How a script of evaluation/ is started in the repository, whose place on this machine is nobody else's."""
    if script.name in ("segment.py", "detect.py"):
        return ["accelerate", "launch", f"evaluation/{script.name}"]
    return ["python", "-m", f"evaluation.{script.stem}"]


def measure_all(accelerator: Accelerator, recipe, measure, report, summary) -> list[dict]:
    """
    Measure the recipe's models one after the other, and write what is of all of them.

    Args:
        measure: (name, folder) -> its result (on the first process at least), its loss curve, and (caption, picture) pairs.
        report: (results, curves by model, pictures by model) -> report.html. summary: results -> what is printed.

    Returns:
        The results of this process.
    """
    output_dir = Path(recipe.output_dir)
    on_main(accelerator, lambda: begin_output_dir(recipe, output_dir))
    results, curves, pictures = [], {}, {}
    for name in recipe.model:
        folder = output_dir / slug(name) if len(recipe.model) > 1 else output_dir
        folder.mkdir(parents=True, exist_ok=True)
        result, curves[name], pictures[name] = measure(name, folder)
        accelerator.free_memory()  # or it would hold every model, and its features, to the end
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
