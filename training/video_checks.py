"""Look at the videos of a run before anything costly, and refuse sources without a usable one."""

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
    Look at videos before anything costly.

    Up to `limit` videos are tried, spread over the list, and one of each folder, pattern, tar or data set that has none among these. If all
    those tried of such a source cannot be used, up to `limit` of its videos are tried until one can. A source that is a single file is
    treated like any other file: it is skipped if it cannot be used.

    Args:
        by_source: the videos of each item of `--videos`, as [`~training.video_sources.videos_by_source`] returns them. If more than `limit`
            sources have no video among the first, `limit` of these sources are tried, and the number of the others is logged.

    Returns:
        "path: reason" for each video that will be skipped.

    Raises:
        ValueError: no video can be used, or none of such a source; the text gives the reasons. Or reading a video ends or blocks the process.
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
    """Warn of videos that are smaller than a crop. Remote files are left out, because their index is not kept."""
    # With `frame_size`, frames get this size whatever the videos have, as in the paper's recipe on BDD100K, whose videos are 720x1280.
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
    """
    Raise ValueError unless a video of a source can be used.

    Args:
        seen: reasons of its videos that were tried already.
        more: reasons of further videos; an empty one means that the video can be used.
    """
    for reason in more:
        if not reason:
            return
        seen.append(reason)
    looked_at = "" if len(seen) == len(videos) else f" of {len(seen)} looked at, among {len(videos)}"
    raise ValueError(
        f"videos: {printable(public_url(source))} has no usable video{looked_at}, for example {seen[0]}. Correct it, or leave it out"
    )


def _is_one_file(source: str, videos: Sequence[str]) -> bool:
    """Return whether the source is the name or URL of one file. There may be thousands, from a shell's pattern or a list."""
    return len(videos) == 1 and Path(videos[0]).name == Path(source).name
