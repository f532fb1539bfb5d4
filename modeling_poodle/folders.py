"""What lies below a folder, some of it, and files and folders that appear whole or not at all."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np


def files_below(folder: Path, onerror: Callable[[OSError], None] | None = None) -> list[Path]:
    """
    All files below a folder, also those in folders that are linked there, and links that lead nowhere; sorted. Each folder counts once, by its
    own path rather than a link's, and a link to a folder around this one leads nowhere: a walk ends, in a circle too.

    Args:
        onerror: is given the error of each folder that cannot be listed; without it they are passed over.
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
    """`count` of the items, spread evenly from the first to the last; all where there are no more, or with `None`."""
    if count is None or count >= len(items):
        return tuple(items)
    return tuple(items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int))


def sha256_of(files: Iterable[Path]) -> str:
    """SHA-256 of the files' contents, one behind the other."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def write_aside(path: Path, data: str | bytes, sync: bool = False) -> None:
    """
    Write a file aside, then rename it over an older one: whoever reads `path` finds the old one or the new, whenever this process is
    killed. Of several processes that write the same file, on whichever machines, each leaves a whole one.

    Args:
        sync: ask the system to put it on the disk before it is renamed, so that it outlives a power cut.
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
        partial.unlink(missing_ok=True)  # makes room on a full disk
        raise


def sweep_aside(folder: Path) -> None:
    """Remove what processes that were killed in [`write_aside`] have left in a folder that nobody else writes to now."""
    for left in folder.glob(".*.partial"):
        if left.is_file():
            left.unlink(missing_ok=True)


@contextmanager
def folder_aside(final: Path) -> Iterator[Path]:
    """A name to fill a folder under, which takes the name `final`, over an older one, once the block has ended without an error."""
    partial, old = final.with_name(f".{final.name}.partial"), final.with_name(f".{final.name}.old")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(partial, final)
    shutil.rmtree(old, ignore_errors=True)
