"""Locks output folders, so that only one run writes to each."""

import json
import logging
import os
import socket
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError as error:
    raise ImportError("training and evaluation run on Linux and macOS; on Windows, use them in WSL") from error

logger = logging.getLogger("poodle")
# Lock files by path. They stay open until the process ends; then the system releases the locks, even after a crash.
_HELD: dict[str, object] = {}


def lock_output_dir(output_dir: Path) -> None:
    """
    Create `output_dir` and lock it for this process. If the file system does not support locks (some NFS), only log a warning.

    Raises:
        ValueError: another process holds the lock (named by pid and host), or the folder cannot be written.
    """
    path = output_dir / ".lock"
    try:
        if output_dir.exists() and not output_dir.is_dir():
            raise ValueError(f"output_dir {output_dir} is a file; it must be a folder")
        output_dir.mkdir(parents=True, exist_ok=True)
        if str(path) in _HELD:  # an earlier run of this process
            _HELD.pop(str(path)).close()
        file = open(path, "a+", encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"output_dir {output_dir} cannot be written ({error}); choose another --output_dir"
        ) from error
    try:
        # lockf, not flock: with flock, the loader's forked workers would keep the lock after this process is killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(
            f"output_dir {output_dir} is in use by {_holder(file)}: wait for its end, stop it, or choose another --output_dir"
        ) from None
    except OSError as error:
        logger.warning("%s cannot be locked (%s): see to it that no other run writes there", output_dir, error)
    try:
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        file.flush()
    except OSError as error:
        raise ValueError(
            f"output_dir {output_dir} cannot be written ({error}); choose another --output_dir"
        ) from error
    _HELD[str(path)] = file


def still_held(output_dir: Path) -> None:
    """
    Check that `output_dir` is still the folder that this process has locked. If it was removed, create and lock it again.

    Raises:
        ValueError: the folder was removed and another run has begun in its place, even if that run has ended since.
    """
    path = output_dir / ".lock"
    if (held := _HELD.get(str(path))) is None:
        return
    try:
        there, own = path.stat(), os.fstat(held.fileno())
    except FileNotFoundError:
        logger.warning("output_dir %s was removed while this run wrote to it", output_dir)
        lock_output_dir(output_dir)
        return
    if (there.st_ino, there.st_dev) != (own.st_ino, own.st_dev):
        with open(path, encoding="utf-8") as file:
            other = _holder(file)
        raise ValueError(
            f"output_dir {output_dir} was removed, and another run has begun in its place ({other}): this one ends"
        )


def _holder(file) -> str:
    file.seek(0)
    try:
        holder = json.loads(file.read())
        return f"the run of process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return "another run"
