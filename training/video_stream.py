"""
Stream batches of frame pairs from videos, sharded over ranks and workers, resumable bit for bit.

- An *opening* is one video in one epoch. It gives `pairs_per_video` pairs.
- A *shard* is a group of openings whose pairs are interleaved, so that the pairs of a batch come from different videos. Otherwise BatchNorm
  and the pooled objective would see a single scene. Each shard belongs to one worker of one rank, so no two processes ever see the same
  (video, epoch, repeat).
- A *span* is a long sequence of shuffled openings, of several epochs if there are few videos. It is long so that workers are rarely
  restarted, and so that each worker of each rank has work even then.
"""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from tempfile import TemporaryDirectory

import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from datasets.io.generator import GeneratorDatasetInputStream
from torchdata.stateful_dataloader import StatefulDataLoader

from training.addresses import printable, video_name
from training.first_look import indices_in_subprocess, patience
from training.pair_plans import PairSampling, checksum, is_within, plan_pairs
from training.video_decoding import decode_cuts
from training.video_files import OpenVideo, UnreadableVideo, ended_if_stuck
from training.video_index import VideoIndex, by_index
from training.workers import Workers, note

# Least number of openings in a span: in total, and for each worker of each rank. After each span the workers are started again, and each
# must decode a whole group before its first batch.
OPENINGS_PER_SPAN, OPENINGS_PER_LANE = 2048, 512
# Most decoded pairs that a worker holds: 200 MB at 512x1024. Recipes limit the pairs of an opening to half of this.
PAIRS_HELD = 64


# --- pairs of one video ---


def reasons_to_skip(paths: Sequence[str], sampling: PairSampling) -> Iterator[tuple[str, str]]:
    """Yield (path, "path: reason") for each video that cannot be used, and (path, "") for the others."""
    for path, found in indices_in_subprocess(paths):
        try:
            if isinstance(found, UnreadableVideo):
                raise found
            plan_pairs(found, sampling, 0, path)
            yield path, ""
        except UnreadableVideo as error:
            yield path, printable(f"{video_name(path)}: {error}")


def video_pairs(path: str, sampling: PairSampling, epoch: int) -> Iterator[dict]:
    """
    Yield the pairs of one opening of a video, as sample dicts (see [`PairLoader`]).

    Raises:
        UnreadableVideo: the video cannot be read, or has no pair.
    """

    def read(index: VideoIndex, video: OpenVideo | None):
        pairs = plan_pairs(index, sampling, epoch, path)
        return index, pairs, decode_cuts(path, index, [cut for pair in pairs for cut in pair], video)

    with ended_if_stuck(video_name(path), patience(path)):
        index, pairs, (pictures, times) = by_index(path, read)
    kept = 0
    for number, (earlier, _) in enumerate(pairs):
        both, when = pictures[2 * number : 2 * number + 2], times[2 * number : 2 * number + 2]
        # If times were estimated from a header, the decoded frames may not be the planned ones, around holes and at the end of a video.
        if not index.exact and (both[0] is None or both[1] is None or not is_within(when, index, sampling)):
            continue
        yield {
            "frames": np.stack(both),
            "video": video_name(path),
            "times": np.array(when),
            "epoch": epoch,
            "repeat": kept,
            "crop": np.array(earlier.box, dtype=np.float64),
        }
        kept += 1
    if not kept:
        raise UnreadableVideo(
            "has no frames where its header tells of them, so that none are as far apart as frame_gap_seconds asks for"
        )


def generate_pairs(paths: list[tuple[tuple[int, str], ...]], sampling: PairSampling, pair_flow=None) -> Iterator[dict]:
    """
    Yield the samples of the stream.

    Args:
        paths: the shards, each a group of (epoch, path) whose pairs are interleaved.
        pair_flow: see [`PairLoader`].
    """
    for group in paths:
        for samples in zip_longest(*(readable_pairs(path, sampling, epoch, pair_flow) for epoch, path in group)):
            for sample in samples:
                if sample is None:  # the video was skipped, or ended early
                    continue
                # `datasets` calls this function once for each shard, so skipped files wait for the next sample in a global variable.
                sample["skipped"] = _PENDING[:]
                _PENDING.clear()
                yield sample


def readable_pairs(path: str, sampling: PairSampling, epoch: int, pair_flow=None) -> Iterator[dict]:
    """Yield the pairs of one opening with their flow. An unusable video or flow file ends it, and is reported with the next sample."""
    note(path)
    try:
        for sample in video_pairs(path, sampling, epoch):
            if pair_flow is not None:
                note(path)  # again: other videos were decoded meanwhile
                pair_flow(sample)
            yield sample
    except UnreadableVideo as error:
        # Not logged here: there are many workers, restarted for each span, and each would log the file. The run logs each file once.
        _PENDING.append((printable(video_name(path)), printable(str(error))))


_PENDING: list[tuple[str, str]] = []  # (path, reason) of skipped files that no sample has reported yet


def collate(samples: list[dict]) -> dict:
    batch = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        if name == "skipped":
            batch[name] = [entry for value in values for entry in value]
        elif isinstance(values[0], np.ndarray):
            batch[name] = torch.from_numpy(np.stack(values))
        else:
            batch[name] = torch.tensor(values) if isinstance(values[0], int) else values
    if torch.utils.data.get_worker_info() is not None:
        # Move the tensors to shared memory here. If there is too little of it, this raises an error that reaches the training process. The
        # queue's own thread would drop the error, and the training process would wait for ever.
        for value in batch.values():
            if isinstance(value, torch.Tensor):
                value.share_memory_()
    return batch


class PairLoader:
    """
    Iterates over batches of pairs without end.

    A batch holds:

    - `frames` (B, 2, 3, H, W) uint8, the earlier frame first;
    - `times` (B, 2) in seconds;
    - `crop` (B, 4) xyxy in the video's own pixels;
    - `epoch` and `repeat` (B,);
    - `video`, a list of names;
    - `skipped`, a list of (path, reason);
    - what `pair_flow` adds: `flow` (B, 2, 2, H, W) float16 and, if it is known, `valid_mask` (B, 2, H, W) bool.

    `state_dict()` can be called after any batch and is JSON-serialisable. After `load_state_dict()`, iterating continues bit for bit.

    Args:
        paths: the videos, as [`~training.video_sources.find_videos`] returns them.
        batch_size: number of pairs in a batch.
        num_workers: decoding processes of this rank; 0 decodes in the calling process.
        rank, world_size: this process's rank, and the number of ranks.
        pair_flow: callable that adds the flow to a sample, in the worker.

    Attributes, to be set before iterating:
        epochs: number of epochs with different pairs. Later epochs repeat the pairs of `epoch % epochs`, in a new order. `None`: no limit.
        estimator: description of the flow if it is read from files. A stream is resumed only with the same flow.
    """

    def __init__(self, paths, sampling: PairSampling, batch_size, num_workers=0, rank=0, world_size=1, pair_flow=None):
        if not paths:
            raise ValueError("PairLoader needs at least one video, got none")
        self.paths, self.sampling, self.pair_flow, self.epochs = list(paths), sampling, pair_flow, None
        self.estimator: dict | None = None
        self.batch_size, self.num_workers, self.rank, self.world_size = batch_size, num_workers, rank, world_size
        self.span, self._loader, self._restored, self._iterator = 0, None, None, None
        self.workers = Workers(num_workers)
        lanes, pairs = world_size * max(num_workers, 1), sampling.pairs_per_video
        # As many openings as pairs in a batch, so that no two pairs come from the same opening. Fewer if PAIRS_HELD requires it.
        self._group = max(1, min(batch_size, PAIRS_HELD // pairs))
        # A lane is one worker of one rank. The number of shards is a multiple of the number of lanes, because otherwise `datasets` lets
        # every rank read all shards. Each lane has enough pairs for a batch.
        wanted = max(
            OPENINGS_PER_SPAN, OPENINGS_PER_LANE * lanes, lanes * -(-2 * batch_size // pairs), len(self.paths)
        )
        self._openings_per_span = -(-wanted // (lanes * self._group)) * lanes * self._group

    @property
    def pairs_per_epoch(self) -> int:
        return len(self.paths) * self.sampling.pairs_per_video

    def epochs_seen(self, batches: int) -> int:
        """
        Return the number of epochs that `batches` batches of each rank reach into, counting an epoch that is only begun.

        Groups are interleaved, so the result may exceed pairs / pairs_per_epoch.
        """
        lane_pairs = -(-batches // max(self.num_workers, 1)) * self.batch_size
        groups = -(-lane_pairs // (self._group * self.sampling.pairs_per_video))
        openings = groups * self._group * self.world_size * max(self.num_workers, 1)
        return -(-openings // len(self.paths))

    def openings(self, span: int) -> list[tuple[int, str]]:
        """Return the (epoch, path) pairs of a span for all ranks, epoch by epoch. Each epoch is shuffled with its own seed."""
        begin, end, n = span * self._openings_per_span, (span + 1) * self._openings_per_span, len(self.paths)
        openings = []
        for epoch in range(begin // n, -(-end // n)):
            order = np.random.default_rng([self.sampling.seed, epoch]).permutation(n)
            drawn = epoch if self.epochs is None else epoch % self.epochs
            openings += [(drawn, self.paths[i]) for i in order]
        offset = begin - begin // n * n
        return openings[offset : offset + self._openings_per_span]

    def shards(self, span: int) -> list[tuple[tuple[int, str], ...]]:
        """Return the shards of a span: its openings in groups whose pairs are interleaved."""
        openings = self.openings(span)
        return [tuple(openings[i : i + self._group]) for i in range(0, len(openings), self._group)]

    def _make_loader(self) -> StatefulDataLoader:
        gen_kwargs = {"paths": self.shards(self.span), "sampling": self.sampling, "pair_flow": self.pair_flow}
        # This is IterableDataset.from_generator, which takes no `cache_dir`: datasets makes a lock file in the cache although a stream keeps
        # nothing there. In the user's home folder one would remain of each span, and the run would end if the folder cannot be written.
        with TemporaryDirectory() as cache:
            stream = GeneratorDatasetInputStream(
                generate_pairs, cache_dir=cache, streaming=True, gen_kwargs=gen_kwargs
            ).read()
        return StatefulDataLoader(
            split_dataset_by_node(stream, rank=self.rank, world_size=self.world_size),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=collate,
            drop_last=True,
            pin_memory=torch.cuda.is_available(),
            # A generator of its own. Otherwise each start of workers would advance the global generator, which dropout draws from, and a
            # resumed run would differ.
            generator=torch.Generator(),
            # A fork is safe because PyAV and OpenCV are used in the workers only.
            multiprocessing_context=self.workers.start_method,
            worker_init_fn=self.workers.start,
            prefetch_factor=4 if self.num_workers else None,
        )

    def __iter__(self) -> Iterator[dict]:
        _PENDING.clear()  # may hold entries of another stream in this process
        while True:
            self._loader = self._make_loader()
            if self._restored is not None:
                self._loader.load_state_dict(self._restored)
            resumed, self._restored, count = self._restored is not None, None, 0
            try:
                self._iterator = iter(self._loader)
            except (AssertionError, AttributeError, IndexError, KeyError, TypeError) as error:
                if not resumed:
                    raise
                raise ValueError(
                    f"cannot resume the stream: the checkpoint's loader.loader is not a loader state ({error!r})"
                ) from error
            for batch in self._iterator:
                count += 1
                yield batch
            if count == 0 and not resumed:
                reasons = (reason for _, reason in reasons_to_skip(self.paths, self.sampling) if reason)
                reason = next(reasons, "frames that could not be decoded")
                raise ValueError(f"none of the {len(self.paths)} videos gave a full batch, for example {reason}")
            self.span += 1

    def state_dict(self) -> dict:
        return {
            "span": self.span,
            "openings": (self.span + 1) * self._openings_per_span,  # an inexact resumption begins after these
            "num_workers": self.num_workers,
            "world_size": self.world_size,
            "batch_size": self.batch_size,
            "paths": checksum("\n".join(map(video_name, self.paths))),
            "first_path": video_name(self.paths[0]),
            "estimator": self.estimator,
            "loader": None if self._loader is None else self._loader.state_dict(),
        }

    def load_state_dict(self, state: dict, inexact: bool = False) -> None:
        """
        Continue the stream at a saved state.

        Args:
            inexact: if the number of workers or ranks or the batch size has changed, or another rank is in a later span, begin at openings
                that no rank has seen.

        Raises:
            ValueError: the stream would differ, because workers, ranks, batch size, videos or flow have changed.
        """
        own, behind = self.state_dict(), -(-state["openings"] // self._openings_per_span)
        if own["estimator"] != state["estimator"]:
            raise ValueError(
                f"flow_dir now holds the flow of {own['estimator']}, the run began with that of {state['estimator']}: write that again into it, "
                "or start a new run in another --output_dir"
            )
        if own["paths"] != state["paths"]:
            was, now = printable(state["first_path"]), printable(own["first_path"])
            raise ValueError(
                f"cannot resume the stream exactly: videos was a list that begins with {was}, now another, of {len(self.paths)}, that begins with "
                f"{now}; give the run's own videos again, or start a new run in another --output_dir"
            )
        for name, what in (
            ("num_workers", "dataloader_num_workers"),
            ("world_size", "num_processes"),
            ("batch_size", "per_device_train_batch_size"),
        ):
            if own[name] == state[name]:
                continue
            if inexact:
                self.span = behind
                return
            raise ValueError(
                f"cannot resume the stream exactly: {what} was {state[name]}, now {own[name]}; go on with --resume_inexact true"
            )
        if state["openings"] != (state["span"] + 1) * self._openings_per_span:
            if inexact:  # also taken if this rank's span is before another rank's (see `read_rank_state`)
                self.span = behind
                return
            raise ValueError(
                "cannot resume the stream exactly: the run is of an earlier version, which divided the videos differently among workers; go on with "
                "--resume_inexact true"
            )
        self.span, self._restored = state["span"], state["loader"]

    def close(self) -> None:
        """Stop the workers (see [`~training.workers.Workers`])."""
        self.workers.end(self._iterator)
        self._iterator = self._loader = None
