"""Expand sources (files, folders, globs, URLs, tars, data sets on the Hub) into a sorted list of videos."""

import glob
import json
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
from huggingface_hub import HfApi, HfFileSystem

from modeling_poodle.folders import files_below, write_aside
from modeling_poodle.video_frames import EXTENSIONS
from training.addresses import is_dataset_id, is_remote, printable, public_url, video_name, without_secrets
from training.hub import FAILURES, explain
from training.video_files import RemoteFile

logger = logging.getLogger("poodle")
COMPRESSED_TARS = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


def find_videos(sources: Sequence[str], pins: Path | None = None) -> list[str]:
    """Return the videos of all sources as a sorted list without duplicates; see [`videos_by_source`]."""
    return merged(videos_by_source(sources, pins))


def merged(by_source: dict[str, list[str]]) -> list[str]:
    """Return each video once, sorted by [`video_name`], so that signatures in URLs do not change the order."""
    return sorted({video for videos in by_source.values() for video in videos}, key=video_name)


def videos_by_source(sources: Sequence[str], pins: Path | None = None) -> dict[str, list[str]]:
    """
    Return the videos of each source, at least one for each.

    Sources are files, folders (searched recursively, also through links), globs, URLs, data sets on the Hub (`org/name`,
    `hf://datasets/org/name/...`) and tars (one entry for each video inside).

    Args:
        pins: JSON file with the commit of each data set on the Hub. Commits in the file are used, so that a resumed run sees the same
            bytes. The commits of other data sets are added.

    Raises:
        ValueError: a source has no video (the text lists what was tried), or two videos have the same name ([`video_name`]).
    """
    known = json.loads(pins.read_text(encoding="utf-8")) if pins is not None and pins.exists() else {}
    commits = dict(known)
    expanded = [(source, *_expand(source, commits)) for source in sources]
    found = {video for _, videos, _ in expanded for video in videos}
    if not found or not all(videos for _, videos, _ in expanded):
        tried = [
            printable(f"{public_url(source)}: {f'{len(videos)} videos' if videos else outcome}")
            for source, videos, outcome in expanded
        ]
        some = "no videos found in some sources" if found else "no videos found"
        raise ValueError(f"{some}; tried\n  " + "\n  ".join(tried) + f"\nExtensions: {' '.join(EXTENSIONS)}")
    _refuse_one_name_for_two(found)
    if pins is not None and commits != known:
        pins.parent.mkdir(parents=True, exist_ok=True)
        write_aside(pins, json.dumps(commits, indent=1), sync=True)
    return {source: videos for source, videos, _ in expanded}


def _refuse_one_name_for_two(found: set[str]) -> None:
    paths: dict[str, str] = {}
    for path in found:
        if paths.setdefault(video_name(path), path) != path:
            raise ValueError(
                f"two URLs of videos differ by their user or query alone: {video_name(path)}. Videos are known by what stands before the "
                "query: give this one once, or two videos at paths that differ"
            )


def is_elsewhere(source: str) -> bool:
    """Return whether a source is on a server, not a local path."""
    return is_dataset_id(source) or is_remote(source)


def _is_video(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _is_tar(name: str) -> bool:
    return name.lower().endswith(".tar")


def _expand(source: str, commits: dict[str, str]) -> tuple[list[str], str]:
    """Return a source's videos, and words for the error message if there are none. New commits of the Hub are added to `commits`."""
    if is_dataset_id(source):  # or a misspelt path of two parts, so the error names both
        videos, outcome = _expand_hub(f"hf://datasets/{source}", commits)
        return videos, f"no such file or folder here, and as a data set: {outcome}"
    if source.startswith("hf://"):
        return _expand_hub(source, commits)
    if is_remote(source):
        return _expand_remote(source)
    try:
        path = Path(source).expanduser()
    except RuntimeError:  # `~` of an unknown user
        return [], "no such file or folder"
    if path.is_dir():
        refused: list[OSError] = []
        below = [p for p in files_below(path, refused.append) if not _is_hidden(p.relative_to(path))]
        inside = _there(list(map(str, below)))
        for error in refused:
            logger.warning("%s cannot be listed (%s): what lies in it is left out", error.filename, error.strerror)
        return _videos_among(inside), f"a folder without videos ({len(inside)} other files){_how_to_read(inside)}"
    if path.is_file():
        if path.name.lower().endswith(COMPRESSED_TARS):
            return [], "a compressed tar, of which no part can be read alone: decompress it, to .tar"
        if hint := _how_to_read([str(path)]):
            return [], f"no video{hint}"
        return (_tar_members(str(path)), "a tar without videos") if _is_tar(path.name) else ([str(path)], "a file")
    matches = _there(glob.glob(str(path), recursive=True))
    if glob.has_magic(source):
        hint = _how_to_read(matches)
        return _videos_among(matches), f"a pattern that matches {len(matches)} files, none of them a video{hint}"
    return [], "no such file or folder"


# What users often give in place of videos, and what to do with it.
_HINTS = {
    (".png", ".jpg", ".jpeg"): (
        "make a video of the images, for example by ffmpeg -framerate 30 -pattern_type glob -i '*.png' -crf 12 frames.mp4"
    ),
    (".txt", ".csv", ".json", ".jsonl", ".yaml", ".yml"): (
        "give the videos of a list themselves, for example by --videos $(cat list.txt), or in a recipe's `videos`"
    ),
    (".zip", ".7z", ".rar"): "unpack the archive",
    (".parquet", ".arrow"): "videos inside tables are not read: write each into a file of its own",
}


def _how_to_read(names: Sequence[str]) -> str:
    """Return the hint that fits most of these files, or else an empty text."""
    ends = (Path(name).suffix.lower() for name in names)
    fitting = Counter(hint for end in ends for kinds, hint in _HINTS.items() if end in kinds)
    return "".join(f": {hint}" for hint, _ in fitting.most_common(1))


def _is_hidden(path: Path) -> bool:
    """Return whether any part of the path is hidden, as trash folders and snapshots are."""
    return any(part.startswith(".") for part in path.parts)


def _there(names: list[str]) -> list[str]:
    """Return the paths that are files. Warn of dangling links, which are left when a disk is unmounted."""
    gone = [name for name in names if not os.path.exists(name)]
    if gone:
        logger.warning("%d links lead nowhere and are left out, the first is %s", len(gone), printable(gone[0]))
    return [name for name in names if os.path.isfile(name)]


def _videos_among(names: Sequence[str]) -> list[str]:
    """Return the videos among the files, then the videos inside the tars among them."""
    compressed = [name for name in names if name.lower().endswith(COMPRESSED_TARS)]
    if compressed:
        logger.warning(
            "%d compressed tars are left out, the first is %s: decompress them, to .tar",
            len(compressed),
            printable(public_url(compressed[0])),
        )
    # Each member of a remote tar takes a request, so up to 16 tars are read at once.
    with ThreadPoolExecutor(16) as pool:
        members = [m for found in pool.map(_tar_members, (n for n in names if _is_tar(n))) for m in found]
    return [n for n in names if _is_video(n)] + members


def _expand_hub(source: str, commits: dict[str, str]) -> tuple[list[str], str]:
    """Expand a repository, folder, file or pattern on the Hub. The paths name the commit, so later commits do not change a run."""
    repository = source
    try:
        files = HfFileSystem()
        place = files.resolve_path(source)
        repository = place.repo_id
        key = f"{place.repo_type}s/{place.repo_id}@{place.revision}"
        if key not in commits:
            commits[key] = HfApi().repo_info(place.repo_id, repo_type=place.repo_type, revision=place.revision).sha
        prefix = "" if place.repo_type == "model" else f"{place.repo_type}s/"
        root = f"{prefix}{place.repo_id}@{commits[key]}"
        path = f"{root}/{place.path_in_repo}".rstrip("/")
        # In fsspec, `**` must stand alone between slashes, but users write **.mp4.
        names = files.glob(re.sub(r"\*\*(?=[^/])", "**/*", path)) if glob.has_magic(path) else files.find(path)
    except (*FAILURES, AttributeError) as error:  # AttributeError means a bucket, which has no commits
        return [], explain(error, repository)
    return (
        _videos_among([f"hf://{name}" for name in names]),
        f"{len(names)} files on the Hub, none a video{_how_to_read(names)}",
    )


def _expand_remote(source: str) -> tuple[list[str], str]:
    protocol = source.partition("://")[0].rpartition("::")[2]
    if protocol not in fsspec.available_protocols():
        return [], f"cannot be listed: {protocol}:// is no protocol of files (of a stream, record some first)"
    # In http(s) URLs, "?" begins a query and is no wildcard.
    place = public_url(source) if source.startswith(("http://", "https://")) else source
    if not glob.has_magic(place):
        if _is_tar(place):
            return _tar_members(source), "a tar without videos"
        return [source], "a URL"
    try:
        filesystem, path = fsspec.core.url_to_fs(source)
        names = [filesystem.unstrip_protocol(name) for name in filesystem.glob(path)]
    except Exception as error:  # each fsspec backend has its own errors; all mean that the source cannot be listed
        return [], f"cannot be listed ({type(error).__name__}: {without_secrets(str(error), source)})"
    return _videos_among(names), f"a pattern that matches {len(names)} remote files, none of them a video"


def _tar_members(tar: str) -> list[str]:
    """
    Return the videos in an uncompressed tar, as `TAR::OFFSET:SIZE:NAME`. Members of the same name are all kept.

    Nothing is extracted, so names with `..` and links do no harm. Only plain files count.
    """
    members = []
    try:
        # 64 KiB blocks, because only the header of each member is read.
        opened = RemoteFile(tar, block=1 << 16) if is_remote(tar) else open(tar, "rb")
        with opened as file, tarfile.open(fileobj=file, mode="r:") as archive:
            end = file.size if is_remote(tar) else os.stat(tar).st_size
            for m in archive:
                # tarfile trusts the header. With a negative size it would loop for ever.
                if m.size < 0 or m.offset_data + m.size > end:
                    raise tarfile.ReadError(f"a member of {m.size} bytes by its header ends outside of the file")
                if m.isreg() and not m.issparse() and _is_video(m.name):
                    members.append(f"{tar}::{m.offset_data}:{m.size}:{m.name}")
    except OSError as error:
        logger.warning("skipped %s: not a readable tar (%s)", printable(public_url(tar)), printable(str(error)))
        return []  # none at all: part of them would differ from what the next run sees
    except (tarfile.TarError, ValueError, OverflowError) as error:
        shown, reason = printable(public_url(tar)), printable(str(error))
        logger.warning(
            "%s: not a whole tar (%s); the %d videos before that place are used", shown, reason, len(members)
        )
    return members
