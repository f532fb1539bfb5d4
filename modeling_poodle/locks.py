"""One run in one output folder."""

import fcntl
import json
import logging
import os
import socket
from pathlib import Path

logger = logging.getLogger("poodle")
_HELD: dict[str, object] = {}  # open until the process ends, however it ends: then the system gives the lock back


def lock_output_dir(output_dir: Path) -> None:
    """
    Make `output_dir` and hold it for this process. Where the file system knows no locks (some NFS), a warning.

    Raises:
        ValueError: another process holds it (named by pid and host), or the folder cannot be written.
    """
    path = output_dir / ".lock"
    try:
        if output_dir.exists() and not output_dir.is_dir():
            raise ValueError(f"output_dir {output_dir} is a file; it must be a folder")
        output_dir.mkdir(parents=True, exist_ok=True)
        if str(path) in _HELD:  # an earlier run of this process
            _HELD.pop(str(path)).close()
        file = open(path, "a+")
    except OSError as error:
        raise ValueError(
            f"output_dir {output_dir} cannot be written ({error}); choose another --output_dir"
        ) from error
    try:
        # lockf, not flock: the loader's workers, which are forks, must not hold it on when this process is killed.
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
    See to it that `output_dir` is the folder that this process has locked. One that was removed is made and locked again.

    Raises:
        ValueError: it was removed, and another run has begun in its place, also if that has ended.
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
        with open(path) as file:
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
