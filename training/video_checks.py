"""A look at the videos of a run before anything costly: which can be used, and sources that have none."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from modeling_poodle.folders import spread
from training.addresses import printable, public_url, video_name
from training.pair_plans import PairSampling
from training.video_index import index_video
from training.video_stream import reasons_to_skip

logger = logging.getLogger("poodle")


def check_videos(
    paths: Sequence[str],
    sampling: PairSampling,
    by_source: Mapping[str, Sequence[str]] | None = None,
    limit: int = 64,
) -> list[str]:
    """
    Look at videos before anything costly: at up to `limit`, spread over the list, and at one of each folder, pattern, tar or data set that
    has none of these. Such a source is looked at further only where what was seen of it cannot be used: at `limit` of its videos, until one
    can. A source that is one file is a file as any other: skipped where it cannot be used.

    Args:
        by_source: the videos of each item of `--videos`, as [`~training.video_sources.videos_by_source`] gives them. Of more than `limit` sources
            without a video among the first, `limit` are looked at; how many are not is logged.

    Returns:
        "path: reason" of those that will be skipped.

    Raises:
        ValueError: none of them, or none of such a source's, can be used; named with the reasons. Or one of them ends or stops whoever reads it.
    """
    looked_at = list(spread(paths, limit))
    by_source = {source: videos for source, videos in (by_source or {}).items() if not _is_one_file(source, videos)}
    among = set(looked_at)
    unseen = [source for source, videos in by_source.items() if among.isdisjoint(videos)]
    if len(unseen) > limit:
        logger.info(
            "%d of the %d folders, patterns, tars and data sets are not looked at before the run; what of them cannot be used is skipped",
            len(unseen) - limit,
            len(by_source),
        )
    looked_at = list(dict.fromkeys(looked_at + [by_source[source][0] for source in spread(unseen, limit)]))
    reasons = dict(reasons_to_skip(looked_at, sampling))
    if all(reasons.values()):
        of = "" if len(looked_at) == len(paths) else f" of {len(looked_at)} looked at, among {len(paths)},"
        raise ValueError(f"no usable video{of}:\n  " + "\n  ".join(reasons.values()))
    for source, videos in by_source.items():
        seen = [reasons[video] for video in videos if video in reasons]
        if seen and all(seen):
            more = [video for video in spread(videos, limit) if video not in reasons]
            _need_usable(source, videos, seen, (reason for _, reason in reasons_to_skip(more, sampling)))
    _tell_of_small([path for path, reason in reasons.items() if not reason], sampling)
    return [reason for reason in reasons.values() if reason]


def _tell_of_small(paths: Sequence[str], sampling: PairSampling) -> None:
    """A warning of videos in which no crop fits. Of servers' files, whose index is not kept, nothing is known here."""
    # `frame_size` is the size that frames are to have, whatever the videos': so with the paper's recipe on BDD100K, whose videos are 720x1280.
    if sampling.frame_size is not None:
        return
    crop_h, crop_w = sampling.crop_size
    known = {path: index for path in paths if (index := index_video.kept.get(path)) is not None}
    small = [path for path, index in known.items() if index.height < crop_h or index.width < crop_w]
    if small:
        logger.warning(
            "%d of the %d videos looked at first are smaller than crop_size %dx%d (%s is %dx%d): every crop of them is enlarged, which takes "
            "time and shows no more. Lower crop_size, unless this is meant",
            *(len(small), len(known), crop_h, crop_w, printable(video_name(small[0]))),
            *(known[small[0]].height, known[small[0]].width),
        )


def _need_usable(source: str, videos: Sequence[str], seen: list[str], more: Iterator[str]) -> None:
    """Raises ValueError unless one of `more`, reasons of further videos of a source, is empty; `seen` are those that are known."""
    for reason in more:
        if not reason:
            return
        seen.append(reason)
    looked_at = "" if len(seen) == len(videos) else f" of {len(seen)} looked at, among {len(videos)}"
    raise ValueError(
        f"videos: {printable(public_url(source))} has no usable video{looked_at}, for example {seen[0]}. Correct it, or leave it out"
    )


def _is_one_file(source: str, videos: Sequence[str]) -> bool:
    """The source is a file's own name or URL, of which there may be thousands: that of a shell's pattern, or of a list."""
    return len(videos) == 1 and Path(videos[0]).name == Path(source).name
