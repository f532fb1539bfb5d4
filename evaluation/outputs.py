"""What the evaluation scripts share around their work: processes, the output folder, and how a script ends."""

import logging
import os
import platform
import re
import shlex
import shutil
import sys
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator

from modeling_poodle.recipe_files import usable_cores


def make_accelerator() -> Accelerator:
    # Said outright: without it Accelerate overlooks the other processes that torchrun started on CPUs.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    if accelerator.device.type == "cpu":
        torch.set_num_threads(max(1, usable_cores() // accelerator.num_processes))
    logging.basicConfig(format="%(message)s", level=logging.INFO if accelerator.is_main_process else logging.ERROR)
    for name in ("httpx", "httpx2", "datasets"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    return accelerator


def prepare_output_dir(recipe) -> Path:
    folder = Path(recipe.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file; it must be a folder")
    saved = folder / "config.yaml"
    if saved.exists() and recipe.resume_from_checkpoint is None and not (folder / "evaluation.json").exists():
        raise ValueError(
            f"output_dir {folder} holds an interrupted evaluation: go on with --resume_from_checkpoint latest, or choose another"
        )
    if recipe.resume_from_checkpoint and saved.exists():
        now = recipe.to_yaml().replace("resume_from_checkpoint: latest", "resume_from_checkpoint: null")
        if saved.read_text().replace("resume_from_checkpoint: latest", "resume_from_checkpoint: null") != now:
            raise ValueError(
                f"{saved} is of another evaluation; resume with its own values, or choose another output_dir"
            )
    return folder


def begin_output_dir(recipe, folder: Path) -> None:
    """On the first process, once all input is checked: a finished evaluation of the same folder is replaced, and the recipe is kept."""
    if recipe.resume_from_checkpoint is None:
        for place in (folder, *(folder / slug(name) for name in recipe.model)):
            for name in ("evaluation.json", "report.html", "fit.safetensors"):
                (place / name).unlink(missing_ok=True)
            for name in ("readout", "detector"):
                shutil.rmtree(place / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(recipe.to_yaml())


def end_output_dir(recipe, folder: Path) -> None:
    """On the first process, once everything is written: the states of the fits are needed no more."""
    for place in (folder, *(folder / slug(name) for name in recipe.model)):
        (place / "fit.safetensors").unlink(missing_ok=True)


def slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def write_aside(path: Path, text: str) -> None:
    """Written aside, then renamed: an interruption leaves no half file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def provenance() -> dict:
    """The command and the versions, for evaluation.json."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
