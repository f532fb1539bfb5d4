"""Files of checkpoints: found, written whole or not at all, checked against their checksums, rotated. safetensors and JSON, no pickle."""

import hashlib
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

CHECKSUMS = "SHA256SUMS"  # lines of `sha256sum`, so that `sha256sum -c SHA256SUMS` checks a checkpoint too
_NAME = re.compile(r"step-(\d+)")


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first. Unfinished ones (written aside, not renamed) do not count."""
    found = [path for path in Path(output_dir, "checkpoints").glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted((path for path in found if (path / "state.json").is_file()), key=step_of)


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


def replace_text(path: Path, text: str) -> None:
    """Write aside, then rename: whoever reads `path` finds the old text or the new, whenever this process is killed."""
    partial = path.with_suffix(".partial")
    write_text(partial, text)
    os.replace(partial, path)


def sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def finish(partial: Path, final: Path) -> None:
    """Seal `partial` with its checksums and give it its name: from here on it counts, and not a moment before."""
    sums = [f"{_digest(path)}  {path.name}\n" for path in sorted(partial.iterdir())]
    write_text(partial / CHECKSUMS, "".join(sums))
    _sync_folder(partial)
    _put_aside(final)  # of an earlier try at the same step
    os.replace(partial, final)
    _sync_folder(final.parent)
    sweep(final.parent)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files: one is missing, or its bytes are not those that were written. `None`: nothing."""
    try:
        lines = (checkpoint / CHECKSUMS).read_text().splitlines()
        expected = dict(reversed(line.split("  ", 1)) for line in lines)
        missing = {"state.json", "model.safetensors", "optimizer.safetensors"} - expected.keys()
        if missing:
            return f"{CHECKSUMS} does not name {', '.join(sorted(missing))}"
        for name, digest in expected.items():
            if _digest(checkpoint / name) != digest:
                return f"{name} is not what was written (its SHA-256 differs)"
    except OSError as error:
        return f"{Path(error.filename or checkpoint).name} cannot be read ({error.strerror})"
    except ValueError:
        return f"{CHECKSUMS} is not a list of checksums"
    return None


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rotate(output_dir: str | Path, step: int, limit: int) -> None:
    """
    Keep the checkpoint of `step`, just written, and the newest before it, `limit` in all.

    Those of later steps are of a future that this run, resumed from before it, has left: they go first, never in its place.
    """
    checkpoints = list_checkpoints(output_dir)
    later = [path for path in checkpoints if step_of(path) > step]
    for old in later + [path for path in checkpoints if step_of(path) <= step][:-limit]:
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
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)
