"""Files of checkpoints: found, written whole or not at all, checked against their checksums, rotated. safetensors and JSON, no pickle."""

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
    """Checkpoints of a run, whole or damaged, oldest first. Unfinished ones (written aside, not renamed) do not count."""
    found = [path for path in Path(output_dir, "checkpoints").glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name[len("step-") :])


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Raises OSError where the file cannot be written."""
    # One copy a tensor: no shared storage, and safetensors wants it dense in the default memory format.
    copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    try:
        save_file(copies, path)
    except SafetensorError as error:  # which hides the system's error in its text
        raise OSError(f"{path}: {error}") from error
    sync_file(path)


def write_text(path: Path, text: str) -> None:
    path.write_text(text)
    sync_file(path)


def sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def finish(partial: Path, final: Path) -> None:
    """Seal `partial` with its checksums and give it its name: from here on it counts, and not a moment before."""
    sums = [f"{sha256_of([path])}  {path.name}\n" for path in sorted(partial.iterdir())]
    write_text(partial / CHECKSUMS, "".join(sums))
    _sync_folder(partial)
    _put_aside(final)  # of an earlier try at the same step
    os.replace(partial, final)
    _sync_folder(final.parent)
    sweep(final.parent)


def rank_files(ranks: int) -> list[str]:
    """The files that each of a run's processes writes."""
    return [f"rank-{rank}.{ending}" for rank in range(ranks) for ending in ("json", "safetensors")]


def damage(checkpoint: Path) -> str | None:
    """
    What is wrong with a checkpoint's files: one is missing, or its bytes are not those that were written. `None`: nothing.

    Nothing else than regular files that lie in it is opened: a checkpoint from elsewhere could name a device, or lead to one. What file
    browsers and servers leave (`.ipynb_checkpoints`, `._NAME`, `@eaDir`) is none of its files, and never opened.
    """
    try:
        found = sorted(path.name for path in checkpoint.iterdir() if not path.name.startswith((".", "@")))
        for name in found:
            if not stat.S_ISREG(os.lstat(checkpoint / name).st_mode):
                return f"{name!r} is not a regular file"
        lines = (checkpoint / CHECKSUMS).read_text().splitlines()
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
        return None  # the files are as written, but state.json is not valid: whoever loads it says so
    missing = [name for name in rank_files(min(ranks, len(found) + 1)) if name not in expected]
    return f"it is of {ranks} processes, and has no {missing[0]}" if missing else None


def read_state(checkpoint: Path) -> dict:
    """`state.json`. Raises as [`read_fields`]."""
    return read_fields(checkpoint / "state.json", _STATE)


def read_fields(path: Path, kinds: dict) -> dict:
    """
    A JSON file of a checkpoint, which may come from elsewhere.

    Args:
        kinds: the fields that it must hold, with the type of each, or with a mapping of the fields within. Integers are not negative.

    Raises:
        ValueError: names the file, and the field that is missing or of another type.
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
    Rename the checkpoints of later steps to `left-step-N`: a run that is resumed from before them has left that future, and `latest` must
    not lead into it. They can still be named, until the run saves one of its own.
    """
    for checkpoint in list_checkpoints(output_dir):
        if step_of(checkpoint) > step:
            left = checkpoint.with_name(f"left-{checkpoint.name}")
            shutil.rmtree(left, ignore_errors=True)
            os.replace(checkpoint, left)


def rotate(output_dir: str | Path, limit: int) -> None:
    """Keep the newest checkpoints, `limit` of them, and none of a future that the run has left ([`leave_later`])."""
    for old in [*list_checkpoints(output_dir)[:-limit], *Path(output_dir, "checkpoints").glob("left-step-*")]:
        _put_aside(old)
    sweep(Path(output_dir, "checkpoints"))


def _put_aside(checkpoint: Path) -> None:
    """Rename first: a kill while its files are deleted leaves no half checkpoint under a whole one's name."""
    if checkpoint.exists():
        aside = checkpoint.parent / f".{checkpoint.name}.old"
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(checkpoint, aside)


def sweep(folder: Path) -> None:
    """Delete what was put aside or left half written."""
    for path in (*folder.glob(".step-*"), *folder.glob(".left-step-*")):
        shutil.rmtree(path, ignore_errors=True)
