"""Check the videos of a run before anything costly starts, and refuse sources that have no usable video."""

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
    Try a sample of the videos before anything costly starts.

    The sample consists of up to `limit` videos spread over the list, and one video of each folder, pattern, tar or data set that would
    otherwise have none in the sample. If all sampled videos of such a source are unusable, up to `limit` of its videos are tried until one
    is usable. A source that is a single file need not be usable: like any other file, it is skipped.

    Args:
        by_source: the videos of each item of `--videos`, as [`~training.video_sources.videos_by_source`] returns them. If more than `limit`
            sources have no video among the first `limit`, then `limit` of these sources are tried, and the number of the others is logged.

    Returns:
        "path: reason" for each tried video that is unusable and will be skipped.

    Raises:
        ValueError: no tried video is usable, or none of such a source; the text gives the reasons. Or a video crashes or blocks the process
            that reads it.
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
    """Warn if videos are smaller than a crop. Only videos whose index is cached in this process are checked."""
    # With `frame_size`, all frames are resized to it, whatever the videos' size, as in the paper's recipe on BDD100K (720x1280 videos).
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
    Check that a source has a usable video.

    Args:
        seen: the reasons why its videos tried so far are unusable.
        more: the reasons for further videos; an empty reason means that the video is usable.

    Raises:
        ValueError: no video of the source is usable.
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
    """Return whether the source names a single file. A shell's pattern or a list can give thousands of such sources."""
    return len(videos) == 1 and Path(videos[0]).name == Path(source).name
