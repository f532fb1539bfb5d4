"""Find, write, verify and rotate checkpoints, which are written whole or not at all. safetensors and JSON, no pickle."""

import json
import os
import re
import shutil
import stat
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from modeling_poodle.folders import sha256_of
from modeling_poodle.recipe_files import fits, shown, type_in_words

CHECKSUMS = "SHA256SUMS"  # lines of `sha256sum`, so that `sha256sum -c SHA256SUMS` checks a checkpoint too
_NAME = re.compile(r"step-(\d+)")
_FILE = re.compile(r"\w[\w.-]*", re.ASCII)  # a file of a checkpoint: no folder, no control character
_STATE = {"step": int, "num_processes": int, "pairs_per_step": int}


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """List the checkpoints of a run, whole or damaged, oldest first. Unfinished ones (not yet renamed to their final name) do not count."""
    found = [path for path in Path(output_dir, "checkpoints").glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name[len("step-") :])


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors to a safetensors file. Raises OSError if it cannot be written."""
    # Copy each tensor: safetensors needs tensors without shared storage, dense and in the default memory format.
    copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    try:
        save_file(copies, path)
    except SafetensorError as error:  # its message contains the system's error
        raise OSError(f"{path}: {error}") from error
    sync_file(path)


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync_file(path)


def sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def finish(partial: Path, final: Path) -> None:
    """Add the checksums to `partial` and rename it to `final`. The checkpoint counts only from the rename on."""
    sums = [f"{sha256_of([path])}  {path.name}\n" for path in sorted(partial.iterdir())]
    write_text(partial / CHECKSUMS, "".join(sums))
    _sync_folder(partial)
    _put_aside(final)  # from an earlier attempt at the same step
    os.replace(partial, final)
    _sync_folder(final.parent)
    sweep(final.parent)


def rank_files(ranks: int) -> list[str]:
    """Return the names of the files that the processes of a run write, two for each rank."""
    return [f"rank-{rank}.{ending}" for rank in range(ranks) for ending in ("json", "safetensors")]


def damage(checkpoint: Path) -> str | None:
    """
    Return what is wrong with a checkpoint's files, or `None` if they are sound. A file can be missing, or differ from what was written.

    Only regular files directly in the folder are opened, because a checkpoint from elsewhere could name a device, or link to one. Files
    that file browsers and servers leave there (`.ipynb_checkpoints`, `._NAME`, `@eaDir`) do not belong to it and are never opened.
    """
    try:
        found = sorted(path.name for path in checkpoint.iterdir() if not path.name.startswith((".", "@")))
        for name in found:
            if not stat.S_ISREG(os.lstat(checkpoint / name).st_mode):
                return f"{name!r} is not a regular file"
        lines = (checkpoint / CHECKSUMS).read_text(encoding="utf-8").splitlines()
        expected = dict(reversed(line.split("  ", 1)) for line in lines)
        for name in expected:
            if not _FILE.fullmatch(name):
                return f"{CHECKSUMS} names {shown(name)}, which is no file of a checkpoint"
        read = {name for name in found if name.endswith((".json", ".safetensors"))}
        missing = {"state.json", "model.safetensors", "optimizer.safetensors", *read} - expected.keys()
        if missing:
            return f"{CHECKSUMS} does not name {', '.join(map(repr, sorted(missing)))}"
        for name, digest in expected.items():
            if sha256_of([checkpoint / name]) != digest:
                return f"{name} is not what was written (its SHA-256 differs)"
    except OSError as error:
        return f"{Path(error.filename or checkpoint).name} cannot be read ({error.strerror})"
    except ValueError:
        return f"{CHECKSUMS} is not a list of checksums"
    try:
        ranks = read_state(checkpoint)["num_processes"]
    except ValueError:
        return None  # the files are as written, but state.json is not valid: loading it raises the error
    missing = [name for name in rank_files(min(ranks, len(found) + 1)) if name not in expected]
    return f"it is of {ranks} processes, and has no {missing[0]}" if missing else None


def read_state(checkpoint: Path) -> dict:
    """Read `state.json`. Raises the errors of [`read_fields`]."""
    return read_fields(checkpoint / "state.json", _STATE)


def read_fields(path: Path, kinds: dict) -> dict:
    """
    Read a JSON file of a checkpoint, which may come from elsewhere and is not trusted.

    Args:
        kinds: the required fields, each with its type or, for a nested mapping, with the fields inside. Integers must not be negative.

    Raises:
        ValueError: the file cannot be read, or a field is missing or of another type; names the file and the field.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    _check_fields(values, kinds, f"{path}:")
    return values


def _check_fields(values, kinds: dict, where: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{where} expected a mapping with {', '.join(kinds)}, got {shown(values)}")
    for name, kind in kinds.items():
        if name not in values:
            raise ValueError(f"{where} {name} is missing")
        value = values[name]
        if isinstance(kind, dict):
            _check_fields(value, kind, f"{where} {name}:")
        elif not fits(value, kind) or (kind is int and value < 0):
            expected = "an integer of at least 0" if kind is int else type_in_words(kind)
            raise ValueError(f"{where} {name} must be {expected}, got {shown(value)}")


def leave_later(output_dir: str | Path, step: int) -> None:
    """
    Rename the checkpoints after `step` to `left-step-N`.

    A run that resumes from an earlier checkpoint abandons the later ones, so `latest` must not select them. They can still be named until
    the run saves a checkpoint of its own.
    """
    for checkpoint in list_checkpoints(output_dir):
        if step_of(checkpoint) > step:
            left = checkpoint.with_name(f"left-{checkpoint.name}")
            shutil.rmtree(left, ignore_errors=True)
            os.replace(checkpoint, left)


def rotate(output_dir: str | Path, limit: int) -> None:
    """Keep the newest `limit` checkpoints. Delete older ones, and those that the run has abandoned ([`leave_later`])."""
    for old in [*list_checkpoints(output_dir)[:-limit], *Path(output_dir, "checkpoints").glob("left-step-*")]:
        _put_aside(old)
    sweep(Path(output_dir, "checkpoints"))


def _put_aside(checkpoint: Path) -> None:
    """Rename a checkpoint that [`sweep`] will delete: if that is interrupted, no incomplete checkpoint keeps the name of a whole one."""
    if checkpoint.exists():
        aside = checkpoint.parent / f".{checkpoint.name}.old"
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(checkpoint, aside)


def sweep(folder: Path) -> None:
    """Delete checkpoints that were put aside or are only partly written."""
    for path in (*folder.glob(".step-*"), *folder.glob(".left-step-*")):
        shutil.rmtree(path, ignore_errors=True)
