"""
Videos -> batches of frame pairs, streamed, sharded over ranks and workers, and resumable to the bit.

An opening is one video in one epoch; it gives `pairs_per_video` pairs. A shard is a group of openings whose pairs take turns, so
that the pairs of a batch come from different videos: BatchNorm and the pooled objective would see one scene otherwise. Several
epochs' shuffled openings lie one behind the other in a span (so that workers are rarely restarted, and so that more ranks or workers
than videos all have work); each shard belongs to one worker of one rank, so no two processes ever see the same (video, epoch, repeat).
"""

from collections.abc import Iterator, Sequence
from itertools import zip_longest

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torchdata.stateful_dataloader import StatefulDataLoader

from training.addresses import printable, video_name
from training.first_look import indices_in_subprocess, patience
from training.pair_plans import PairSampling, checksum, is_within, plan_pairs
from training.video_decoding import decode_cuts
from training.video_files import OpenVideo, UnreadableVideo, ended_if_stuck
from training.video_index import VideoIndex, by_index
from training.workers import Workers, note

# Least openings of a span in all, and for each worker of all ranks: at its end workers are forked anew, and each decodes a group before its
# first batch.
OPENINGS_PER_SPAN, OPENINGS_PER_LANE = 2048, 512
PAIRS_HELD = 64  # by a worker, decoded: 200 MB at 512x1024; recipes bound the pairs of an opening by half of it


# --- pairs of one video ---


def reasons_to_skip(paths: Sequence[str], sampling: PairSampling) -> Iterator[tuple[str, str]]:
    """Each path with "path: reason" where it cannot be used, and with "" where it can."""
    for path, found in indices_in_subprocess(paths):
        try:
            if isinstance(found, UnreadableVideo):
                raise found
            plan_pairs(found, sampling, 0, path)
            yield path, ""
        except UnreadableVideo as error:
            yield path, printable(f"{video_name(path)}: {error}")


def video_pairs(path: str, sampling: PairSampling, epoch: int) -> Iterator[dict]:
    """The pairs of one opening of a video, as sample dicts (see [`PairLoader`])."""

    def read(index: VideoIndex, video: OpenVideo | None):
        pairs = plan_pairs(index, sampling, epoch, path)
        return index, pairs, decode_cuts(path, index, [cut for pair in pairs for cut in pair], video)

    with ended_if_stuck(video_name(path), patience(path)):
        index, pairs, (pictures, times) = by_index(path, read)
    kept = 0
    for number, (earlier, _) in enumerate(pairs):
        both, when = pictures[2 * number : 2 * number + 2], times[2 * number : 2 * number + 2]
        # Where times are estimated from a header, other frames may come than were planned: in videos with holes, and at their ends.
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
    """The generator behind the stream. `paths` are the shards, groups of (epoch, path); the pairs of a group's videos take turns."""
    for group in paths:
        for samples in zip_longest(*(readable_pairs(path, sampling, epoch, pair_flow) for epoch, path in group)):
            for sample in samples:
                if sample is None:  # of a video that was skipped, or broke off
                    continue
                # `datasets` calls this anew for every shard: what was skipped waits in the process for the next sample.
                sample["skipped"] = _PENDING[:]
                _PENDING.clear()
                yield sample


def readable_pairs(path: str, sampling: PairSampling, epoch: int, pair_flow=None) -> Iterator[dict]:
    """The pairs of one opening with their flow; a bad file, of the video or of its flow, ends it, and is handed on with the next sample."""
    note(path)
    try:
        for sample in video_pairs(path, sampling, epoch):
            if pair_flow is not None:
                note(path)  # others have had their turn
                pair_flow(sample)
            yield sample
    except UnreadableVideo as error:
        # Not logged: workers are many, and begin anew at each span. The run names what it has not named yet.
        _PENDING.append((printable(video_name(path)), printable(str(error))))


_PENDING: list[tuple[str, str]] = []


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
        # Here, where a lack of shared memory is an error that arrives; in the queue's own thread it would be dropped, and the
        # training process wait for ever.
        for value in batch.values():
            if isinstance(value, torch.Tensor):
                value.share_memory_()
    return batch


class PairLoader:
    """
    Batches of pairs, forever.

    A batch: `frames` (B, 2, 3, H, W) uint8, earlier then later; `times` (B, 2) seconds; `crop` (B, 4) xyxy in the video's own
    pixels; `epoch`, `repeat` (B,); `video` list of names; `skipped` list of (path, reason); and what `pair_flow` adds: `flow`
    (B, 2, 2, H, W) float16 and, where it is known, `valid_mask` (B, 2, H, W) bool.

    `state_dict()` after any batch, JSON-able, and `load_state_dict()` before iterating go on bit for bit.

    Args:
        paths: the videos, as [`~training.video_sources.find_videos`] gives them. batch_size: pairs. num_workers: decoding processes of this rank.
        pair_flow: callable that adds the flow to a sample, in the worker.

    Its `epochs`, where it is set before iterating, is the number of epochs whose pairs are drawn: later ones draw those of `epoch % epochs`
    again, in an order of their own. `estimator`: what computed the flow that is read from files, by which a resumed stream knows it again.
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
        # As many videos take turns as a batch has pairs, so that no two are of one opening; fewer where memory does not allow it.
        self._group = max(1, min(batch_size, PAIRS_HELD // pairs))
        # A multiple of the lanes, or `datasets` would let every rank read everything; enough pairs for a batch in each lane.
        wanted = max(
            OPENINGS_PER_SPAN, OPENINGS_PER_LANE * lanes, lanes * -(-2 * batch_size // pairs), len(self.paths)
        )
        self._openings_per_span = -(-wanted // (lanes * self._group)) * lanes * self._group

    @property
    def pairs_per_epoch(self) -> int:
        return len(self.paths) * self.sampling.pairs_per_video

    def epochs_seen(self, batches: int) -> int:
        """Epochs of which `batches` batches of each rank have pairs; more than their number says, since whole groups take turns."""
        lane_pairs = -(-batches // max(self.num_workers, 1)) * self.batch_size
        groups = -(-lane_pairs // (self._group * self.sampling.pairs_per_video))
        openings = groups * self._group * self.world_size * max(self.num_workers, 1)
        return -(-openings // len(self.paths))

    def openings(self, span: int) -> list[tuple[int, str]]:
        """(epoch, path) of a span, all ranks. Epoch after epoch, each shuffled by its own seed."""
        begin, end, n = span * self._openings_per_span, (span + 1) * self._openings_per_span, len(self.paths)
        openings = []
        for epoch in range(begin // n, -(-end // n)):
            order = np.random.default_rng([self.sampling.seed, epoch]).permutation(n)
            drawn = epoch if self.epochs is None else epoch % self.epochs
            openings += [(drawn, self.paths[i]) for i in order]
        offset = begin - begin // n * n
        return openings[offset : offset + self._openings_per_span]

    def shards(self, span: int) -> list[tuple[tuple[int, str], ...]]:
        """The openings of a span in groups whose pairs take turns."""
        openings = self.openings(span)
        return [tuple(openings[i : i + self._group]) for i in range(0, len(openings), self._group)]

    def _make_loader(self) -> StatefulDataLoader:
        stream = datasets.IterableDataset.from_generator(
            generate_pairs,
            gen_kwargs={"paths": self.shards(self.span), "sampling": self.sampling, "pair_flow": self.pair_flow},
        )
        return StatefulDataLoader(
            split_dataset_by_node(stream, rank=self.rank, world_size=self.world_size),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=collate,
            drop_last=True,
            pin_memory=torch.cuda.is_available(),
            # Its own, or each start of the workers would move the global generator, which dropout draws from, and a resumed run's differ.
            generator=torch.Generator(),
            # fork (spawn costs each worker the import of torch): PyAV and OpenCV are opened in the workers alone.
            multiprocessing_context="fork" if self.num_workers else None,
            worker_init_fn=self.workers.start,
            prefetch_factor=4 if self.num_workers else None,
        )

    def __iter__(self) -> Iterator[dict]:
        _PENDING.clear()  # of another stream in this process
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
                    f"cannot resume the stream: the checkpoint's loader.loader is no state of one ({error!r})"
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
            "openings": (self.span + 1) * self._openings_per_span,  # an inexact resumption reads none of these again
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
        Args:
            inexact: with other workers, ranks or batches, or where another rank is in a later span, begin with openings that no rank has seen.

        Raises:
            ValueError: other workers, ranks, batches, videos or flow than the run's: the stream would not be the same.
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
            if inexact:  # also of a rank whose span is before another's, with the same workers (see `read_rank_state`)
                self.span = behind
                return
            raise ValueError(
                "cannot resume the stream exactly: the run is one of an earlier version, whose workers were given other shares; go on with "
                "--resume_inexact true"
            )
        self.span, self._restored = state["span"], state["loader"]

    def close(self) -> None:
        """Stop the workers (see [`~training.workers.Workers`])."""
        self.workers.end(self._iterator)
        self._iterator = self._loader = None
