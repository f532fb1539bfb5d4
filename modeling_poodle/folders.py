"""What lies below a folder."""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path


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


def sha256_of(files: Iterable[Path]) -> str:
    """SHA-256 of the files' contents, one behind the other."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()
