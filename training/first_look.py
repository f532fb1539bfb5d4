"""The first look at videos: read their indices and one frame in a separate process, which a decoder may crash or hang."""

import functools
import multiprocessing
import signal
from collections.abc import Iterator, Sequence

from training import workers
from training.addresses import printable, video_name
from training.stopping import SIGNALS
from training.video_decoding import Cut, decode_cuts
from training.video_files import OpenVideo, UnreadableVideo, time_limit
from training.video_index import VideoIndex, by_index, index_video


def indices_in_subprocess(paths: Sequence[str]) -> Iterator[tuple[str, VideoIndex | UnreadableVideo]]:
    """
    Yield each path with the index by which it can be read, or with the reason why there is none.

    The videos are read in a separate process, as in a loader's worker: a decoder that crashes or hangs there does not affect this process.
    The indices are cached in this process, so that workers forked later have them.

    Raises:
        ValueError: a video crashed its reader or kept it beyond the time limit; names the video.
    """
    context = multiprocessing.get_context(workers.START_METHOD)
    receiver, sender = context.Pipe(duplex=False)
    reader = context.Process(target=_send_indices, args=(paths, receiver, sender), daemon=True)
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
    # Otherwise sending would block for ever after the run has died, because this process would hold the receiver open itself.
    receiver.close()
    for number in (*SIGNALS, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    for path in paths:
        # When the time is up, the system ends this process, which a decoder cannot prevent.
        signal.setitimer(signal.ITIMER_REAL, patience(path))
        index_video.drop(path)  # the file may have changed since
        try:
            found = by_index(path, functools.partial(_decoded, path))
        except UnreadableVideo as error:
            found = error
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            sender.send((found, found is index_video.kept.get(path)))
        except BrokenPipeError:  # the run has ended, and has said why
            return


def _decoded(path: str, index: VideoIndex, video: OpenVideo | None) -> VideoIndex:
    """Return `index` if its first frame, or else its middle one, can be decoded; raise UnreadableVideo otherwise."""
    corner = (0, 0, 2, 2)
    try:
        decode_cuts(path, index, [Cut(0, corner, (2, 2))], video)
    except UnreadableVideo:
        # Restart the timer: `patience` is meant for a worker, which opens a file fewer times.
        signal.setitimer(signal.ITIMER_REAL, patience(path))
        decode_cuts(path, index, [Cut(len(index.pts) // 2, corner, (2, 2))])
    return index


def _end_of_reader(path: str, code: int) -> str:
    if code == -signal.SIGALRM:
        return f"reading it did not end within {patience(path):g} s"
    return f"it crashed its reader ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"


def patience(path: str) -> float:
    # One limit each for the index and the frames, the same again if the whole file must be read, and one in reserve.
    return 5 * time_limit(path)
