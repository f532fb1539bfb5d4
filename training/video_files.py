"""Open untrusted videos (local files, members of tars, remote files) within limits of time and size."""

import contextlib
import io
import logging
import math
import os
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import av
import av.container
import av.error
import fsspec
import torch

from modeling_poodle.video_frames import ANY_TAGS, CONTAINERS, MAX_PIXELS, moving
from training.addresses import MEMBER, is_remote, printable, without_secrets
from training.mov_tables import Tables, read_tables

logger = logging.getLogger("poodle")
av.logging.set_level(av.logging.PANIC)  # silences FFmpeg: damaged files are reported once, by this project

# Most entries that the tracks of a MOV or MP4 may have in all. FFmpeg allocates up to 70 bytes for each when it opens the file. A day of
# video at 60 frames a second with AAC sound has 9 million.
MAX_ENTRIES = 10_000_000
# Time limit for opening a video once, to read its index, its pairs or both. Local files get more time in proportion to their size, because
# they may be read from end to end for their index.
SECONDS = 60.0
BYTES_PER_SECOND = 10e6
REMOTE_SECONDS = 120.0
# Bytes of one request to a server. A pair lies in a few blocks. Each block is fetched once an opening, and a seek wastes at most one block.
REMOTE_BLOCK = 1 << 20
REQUEST_SECONDS = 20.0  # for http(s); other backends have their own limits (the Hub's client: 10 s without a byte)
ATTEMPTS = 5
NO_RANGES = "its server gives no byte ranges, which videos are read by: download it, or use a server that does"
BACK_OFF = 0.5  # seconds before the second attempt, doubled before each further one


class UnreadableVideo(ValueError):
    """A video that cannot be used. The message gives the reason in plain words, without the path."""


class Deadline:
    """
    The time by which an opening of a video must be finished.

    Args:
        seconds: time from now.
    """

    def __init__(self, seconds: float = math.inf):
        self.seconds, self.end = seconds, time.monotonic() + seconds

    def check(self) -> None:
        """Raise UnreadableVideo if the time is over."""
        if time.monotonic() > self.end:
            raise UnreadableVideo(f"takes longer than {self.seconds:.0f} s")


def time_limit(source: str) -> float:
    """Return how many seconds one opening of a video may take."""
    if is_remote(source):
        return REMOTE_SECONDS
    member = MEMBER.match(source)
    size = int(member[3]) if member else 0
    if not member:
        with contextlib.suppress(OSError):  # a missing file is reported when it is opened
            size = os.path.getsize(source)
    return SECONDS + size / BYTES_PER_SECOND


class _Seekable(io.RawIOBase):
    """Base class of seekable files of `size` bytes that PyAV can read."""

    size, position = 0, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position


class RemoteFile(_Seekable):
    """
    A remote file for PyAV, read by byte ranges.

    A read that fails or stalls is tried again on a new connection, up to `ATTEMPTS` times in all, with growing pauses. It fails at once if
    the file does not exist, access is refused, the server gives no byte ranges, or the file has changed since the first connection.

    Args:
        block: bytes of one request.
        deadline: after this time, nothing is tried again.
    """

    def __init__(self, source: str, block: int = REMOTE_BLOCK, deadline: Deadline | None = None):
        self.source, self.block, self.deadline = source, block, deadline or Deadline()
        self.file = self.version = None
        self.size = self._attempt(lambda file: file.size)
        if self.size is None:
            raise OSError("its server tells no size, so that it cannot be read by ranges")

    def _open(self):
        if not self.source.startswith(("http://", "https://")):
            files, path = fsspec.core.url_to_fs(self.source)
            file = files.open(path, "rb", block_size=self.block, cache_type="blockcache")
            return file, getattr(file, "details", {})
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
        files, path = fsspec.core.url_to_fs(self.source, client_kwargs={"timeout": timeout})
        details = files.info(path)  # asked for here, because the opened file keeps only the size
        if not details.get("partial", True):
            raise _NoRanges(NO_RANGES)
        whole = details.get("size")
        return files.open(path, "rb", block_size=self.block, cache_type="blockcache", size=whole), details

    def _attempt(self, act):
        for attempt in range(ATTEMPTS):
            try:
                if self.file is None:
                    self.file, details = self._open()
                    version = _version(details)
                    if self.version not in (None, version):
                        raise _Changed("has changed on its server while it was read")
                    self.version = version
                return act(self.file)
            except Exception as error:  # each fsspec backend has its own errors, and few of them are OSErrors
                self.file, root = None, error
                # fsspec raises FileNotFoundError whatever failed, with the real error as its cause. A timeout's own cause adds nothing.
                while root.__cause__ is not None and not isinstance(root, TimeoutError):
                    root = root.__cause__
                # The text of fsspec's ValueError is advice for programmers.
                if "support range requests" in str(root):
                    root = _NoRanges(NO_RANGES)
                status = getattr(getattr(root, "response", None), "status_code", getattr(root, "status", None))
                refused = status is not None and 400 <= status < 500 and status not in (408, 429)
                pause = BACK_OFF * 2**attempt
                late = attempt + 1 == ATTEMPTS or time.monotonic() + pause > self.deadline.end
                if late or refused or isinstance(root, (FileNotFoundError, _Changed, _NoRanges)):
                    reason = (
                        "no answer in time" if isinstance(root, TimeoutError) else str(root) or type(root).__name__
                    )
                    tried = f", tried {attempt + 1} times" if attempt else ""
                    raise OSError(" ".join(without_secrets(reason, self.source).split()) + tried) from error
            time.sleep(pause)

    def read(self, size: int = -1) -> bytes:
        def from_here(file) -> bytes:
            file.seek(self.position)
            return file.read(size)

        data = self._attempt(from_here)
        self.position += len(data)
        return data


class _Changed(OSError):
    pass


class _NoRanges(OSError):
    pass


def _version(details: dict) -> tuple:
    return tuple(details.get(name) for name in ("size", "ETag", "Last-Modified", "LastModified", "mtime"))


class _Part(_Seekable):
    """A file that consists of `size` bytes of another open file, from `offset` on."""

    def __init__(self, file, offset: int, size: int):
        self.file, self.offset, self.size = file, offset, size

    def read(self, size: int = -1) -> bytes:
        left = max(self.size - self.position, 0)
        self.file.seek(self.offset + self.position)
        data = self.file.read(left if size < 0 else min(size, left))
        self.position += len(data)
        return data


class OpenVideo(NamedTuple):
    """
    An opened video.

    Args:
        deadline: of this opening.
        version: identifies this state of the file, as in `VideoIndex.version`.
        size: size of the file in bytes.
        movie: the tables of a MOV or MP4, for [`~training.mov_tables.track`]; `None` for other formats, or if the tables lack some frames.
    """

    container: av.container.InputContainer
    deadline: Deadline
    version: tuple
    size: int
    movie: bytes | None


@contextlib.contextmanager
def open_video(source: str) -> Iterator[OpenVideo]:
    """
    Open a video for the `with` block. It is closed at the end, because PyAV would otherwise leak memory.

    Args:
        source: a local path, a URL that fsspec opens (range requests), or a member of a tar, `TAR::OFFSET:SIZE:NAME`.

    Raises:
        UnreadableVideo: the video cannot be opened; the text gives the reason.
    """
    with contextlib.ExitStack() as stack:
        try:
            member = MEMBER.match(source)
            path = member[1] if member else source
            deadline = Deadline(time_limit(source))
            if is_remote(path):
                file = RemoteFile(path, deadline=deadline)
                version = file.version
            else:
                facts = os.stat(path)
                version = (facts.st_size, facts.st_mtime_ns)
                file = stack.enter_context(open(path, "rb"))
            if member:
                file = _Part(file, int(member[2]), int(member[3]))
            size = file.size if member or is_remote(path) else facts.st_size
            tables = _tables(file, size, is_remote(path), deadline)
            # With "file:", because FFmpeg would take the part of a path before a colon as a protocol.
            container = _open(file if member or is_remote(path) else f"file:{path}", tables.entries > 0, deadline)
        except UnreadableVideo:
            raise
        except (av.error.FFmpegError, OSError, ValueError, MemoryError) as error:
            raise UnreadableVideo(f"cannot be opened as a video ({words(error)})") from error
        yield OpenVideo(stack.enter_context(container), deadline, version, size, tables.movie)


def _open(file, described: bool, deadline: Deadline):
    """
    Open the container of `file`.

    Args:
        described: the file is a MOV or MP4, whose header holds what FFmpeg would otherwise decode frames to find out. So the file is opened
            without decoders, which takes 0.4 instead of 8 ms at 1280x720.
    """
    options = {"format_whitelist": CONTAINERS, "max_pixels": str(MAX_PIXELS)}
    if described:
        options["codec_whitelist"] = "none"  # applies to FFmpeg's first look at the streams, not to later decoding
    container = av.open(file, options=options, timeout=deadline.seconds, **ANY_TAGS)
    # For MPEG-4 Part 2, FFmpeg does not take the size from the header, so the file is opened again, with decoders.
    if described and any(not stream.codec_context.width for stream in moving(container) if stream.codec_context):
        container.close()
        if not isinstance(file, str):
            file.seek(0)
        return _open(file, False, deadline)
    return container


def _tables(file, size: int, remote: bool, deadline: Deadline) -> Tables:
    tables = read_tables(file, size, remote, deadline.check)
    if tables.entries > MAX_ENTRIES:
        raise UnreadableVideo(
            f"declares {tables.entries} frames and samples of all its tracks, the most is {MAX_ENTRIES}"
        )
    file.seek(0)
    return tables


def words(error: Exception) -> str:
    if isinstance(error, av.error.ExitError):  # raised after the container's `timeout`
        return "takes too long"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


@contextlib.contextmanager
def ended_if_stuck(path: str, seconds: float):
    """
    In a loader's worker, end the process if the `with` block takes longer than `seconds`. In other processes, do nothing.

    Deadlines are checked only between packets. If a decoder never returns from a packet, only the end of the process can stop it.
    """

    def end():
        logger.error(
            "%s: no end after %g s; its loader worker ends. Remove this file, and resume", printable(path), seconds
        )
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    if torch.utils.data.get_worker_info() is not None:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
