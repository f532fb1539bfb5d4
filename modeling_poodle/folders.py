"""List the files below a folder, pick evenly spread items, and write files and folders atomically."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np


def files_below(folder: Path, onerror: Callable[[OSError], None] | None = None) -> list[Path]:
    """
    List all files below a folder, sorted, following links to folders. Broken links are listed as files.

    Each folder is visited once, preferably by its own path rather than through a link. Links to the parents of `folder` are not followed,
    so the walk ends even if links form a cycle.

    Args:
        onerror: called with the error of each folder that cannot be listed. Without it such folders are skipped.
    """
    seen = {str(parent) for parent in Path(os.path.realpath(folder)).parents}
    found, roots = [], [str(folder)]
    for root in roots:  # grows by the links that are met
        for path, folders, files in os.walk(root, onerror=onerror):
            real = os.path.realpath(path)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            roots += [link for link in (os.path.join(path, name) for name in folders) if os.path.islink(link)]
            found += [Path(path, name) for name in files]
    return sorted(found)


def spread(items: Sequence, count: int | None) -> tuple:
    """Pick `count` items, evenly spread from the first to the last, or all items if `count` is `None` or not less than their number."""
    if count is None or count >= len(items):
        return tuple(items)
    return tuple(items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int))


def sha256_of(files: Iterable[Path]) -> str:
    """SHA-256 of the concatenated contents of the files, in hexadecimal."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def write_aside(path: Path, data: str | bytes, sync: bool = False) -> None:
    """
    Write a file atomically: write a temporary file next to `path`, then rename it to `path`.

    Readers of `path` find either the old or the new file, even if this process is killed. If several processes, on one or more machines,
    write the same path, a complete file of one of them remains.

    Args:
        sync: flush the temporary file to the disk before it is renamed, so that it survives a power cut.
    """
    partial = path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)  # frees space on a full disk
        raise


def sweep_aside(folder: Path) -> None:
    """Remove the temporary files of processes killed within [`write_aside`]. No other process may be writing to the folder."""
    for left in folder.glob(".*.partial"):
        if left.is_file():
            left.unlink(missing_ok=True)


@contextmanager
def folder_aside(final: Path) -> Iterator[Path]:
    """Yield a temporary path for a new folder, which replaces `final` when the block ends without an error."""
    partial, old = final.with_name(f".{final.name}.partial"), final.with_name(f".{final.name}.old")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(partial, final)
    shutil.rmtree(old, ignore_errors=True)
