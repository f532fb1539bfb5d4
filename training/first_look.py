"""The first look at videos: their indices and a frame, read in a process that a decoder may end or keep."""

import functools
import multiprocessing
import signal
from collections.abc import Iterator, Sequence

from training.addresses import printable, video_name
from training.video_decoding import Cut, decode_cuts
from training.video_files import OpenVideo, UnreadableVideo, time_limit
from training.video_index import VideoIndex, by_index, index_video


def indices_in_subprocess(paths: Sequence[str]) -> Iterator[tuple[str, VideoIndex | UnreadableVideo]]:
    """
    Each path with the index by which it can be read, or the reason why there is none, found in a process of its own, as in a loader's
    worker: what a decoder does to it, it does not do to this one. The indices are kept, for the workers to be forked with.

    Raises:
        ValueError: a video ended its reader, or did not let it come back; named.
    """
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    reader = fork.Process(target=_send_indices, args=(paths, receiver, sender), daemon=True)
    reader.start()
    sender.close()
    try:
        for path in paths:
            try:
                found, kept = receiver.recv()
            except EOFError:
                reader.join()
                raise ValueError(
                    f"{printable(video_name(path))}: {_end_of_reader(path, reader.exitcode)}, and would stop the run in the "
                    "same way. Remove it, or put an empty file in its place, which is skipped"
                ) from None
            if isinstance(found, VideoIndex) and kept:
                index_video.keep(path, found)
            yield path, found
    finally:
        reader.kill()
        reader.join()
        receiver.close()


def _send_indices(paths: Sequence[str], receiver, sender) -> None:
    receiver.close()  # or it would wait for ever for itself, should the run be gone
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    for path in paths:
        signal.setitimer(signal.ITIMER_REAL, patience(path))  # by the system, which a decoder cannot keep from it
        index_video.drop(path)  # of a file that may have changed since
        try:
            found = by_index(path, functools.partial(_decoded, path))
        except UnreadableVideo as error:
            found = error
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            sender.send((found, found is index_video.kept.get(path)))
        except BrokenPipeError:  # the run is gone, and has said why
            return


def _decoded(path: str, index: VideoIndex, video: OpenVideo | None) -> VideoIndex:
    """An index whose first frame, or the one in the middle, can be decoded."""
    corner = (0, 0, 2, 2)
    try:
        decode_cuts(path, index, [Cut(0, corner, (2, 2))], video)
    except UnreadableVideo:
        signal.setitimer(signal.ITIMER_REAL, patience(path))  # which is that of a worker, who opens a file less often
        decode_cuts(path, index, [Cut(len(index.pts) // 2, corner, (2, 2))])
    return index


def _end_of_reader(path: str, code: int) -> str:
    if code == -signal.SIGALRM:
        return f"reading it did not end within {patience(path):g} s"
    return f"it crashed its reader ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"


def patience(path: str) -> float:
    return 5 * time_limit(path)  # index and frames, both again by the whole file, and as much as one of these
