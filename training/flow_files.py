"""
Flow that was computed in advance: `--flow precomputed --flow_dir DIR` reads what `python -m training.flow --out DIR` wrote.

A folder holds `flow.json` (how pairs were drawn, what computed their flow, the command) and one safetensors file for each opening of a
video, `epoch-0003/NAME.safetensors`. The draw of pairs depends only on (seed, epoch, video's name, repeat), so the writer draws exactly the
pairs that a run draws. If a video cannot be used, there is a file `NAME.skipped` with the reason instead.

Flow is stored as int16 in steps of 1/16 px: it is at most 1/32 px off and reaches 2,047 px. The training process gets it in half precision,
which holds these values exactly up to 128 px. Differences along x and then along y turn smooth flow into small numbers, which zstd (Collet
& Kucherawy, RFC 8878) compresses well. docs/scaling.md has the measurements.
"""

import dataclasses
import hashlib
import json
import os
import re
import shlex
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from modeling_poodle.folders import spread
from training.addresses import is_remote, video_name
from training.first_look import indices_in_subprocess
from training.pair_plans import PairSampling, is_within, plan_pairs
from training.schedules import count_steps
from training.video_files import UnreadableVideo
from training.video_stream import PairLoader

FORMAT = "poodle-flow-1"
STEPS_PER_PIXEL = 16
# Openings whose files are compared with the pairs before a run begins. The others are compared when they are read.
_LOOKED_AT = 64
# With DIS flow of CamVid and the street on one core, level 9 is 6 % smaller but takes 3 to 5 times as long; zlib 4 % smaller, 8 times.
_CODEC = pyarrow.Codec("zstd", 1)


# --- one flow ---


def encode_flow(flow: np.ndarray) -> bytes:
    """
    Encode flow (2, 2, H, W) in pixels as bytes.

    Components are clipped at 2,047 px: beyond that, flow leaves any frame of up to 2,047 px anyway.

    Raises:
        UnreadableVideo: the flow is not finite.
    """
    if not np.isfinite(flow).all():
        raise UnreadableVideo("gives a flow that is not finite")
    limit = np.iinfo(np.int16).max
    steps = np.rint(flow.astype(np.float32) * STEPS_PER_PIXEL).clip(-limit, limit).astype(np.int16)
    along_x = steps.copy()
    along_x[..., 1:] -= steps[..., :-1]  # differences may wrap around, but so do the sums in `decode_flow`
    residual = along_x.copy()
    residual[..., 1:, :] -= along_x[..., :-1, :]
    # Zigzag encoding turns small numbers of either sign into small unsigned ones. Their high bytes are zeros, which compress to almost
    # nothing in a plane of their own.
    zigzag = ((residual << 1) ^ (residual >> 15)).view(np.uint16).ravel()
    return _CODEC.compress(np.stack([zigzag & 255, zigzag >> 8]).astype(np.uint8), asbytes=True)


def decode_flow(data, height: int, width: int) -> np.ndarray:
    """Bytes of [`encode_flow`] -> flow (2, 2, H, W) float16, pixels."""
    count = 4 * height * width
    low, high = np.frombuffer(_CODEC.decompress(data, decompressed_size=2 * count), np.uint8).reshape(2, count)
    zigzag = high.astype(np.uint16) << 8 | low
    residual = ((zigzag >> 1) ^ -(zigzag & 1)).view(np.int16).reshape(4, height, width)
    for y in range(1, height):  # at 512x1024 this loop takes 1.6 ms, NumPy's cumsum along this axis 11.8
        residual[:, y] += residual[:, y - 1]
    steps = torch.from_numpy(residual).cumsum(dim=-1, dtype=torch.int16)
    return steps.half().mul_(1 / STEPS_PER_PIXEL).view(2, 2, height, width).numpy()


# --- one opening of a video ---


def opening_file(folder: str | Path, epoch: int, video: str) -> Path:
    """Return the path of the file with an opening's flow. Its name begins with a readable part and ends with the video's own digest."""
    video = video_name(video)
    stem = re.sub(r"[^A-Za-z0-9]+", "-", Path(video).stem)[-40:].strip("-")
    # File names need not be UTF-8.
    digest = hashlib.blake2s(video.encode(errors="surrogateescape"), digest_size=8).hexdigest()
    return Path(folder, f"epoch-{epoch:04d}", f"{stem}-{digest}.safetensors")


def pack_opening(samples: list[dict]) -> bytes:
    """
    Return the contents of the file with the flow of an opening's pairs.

    The tensors are `flow.N` of pair N, and `valid.N` if the estimator gives a valid mask. The metadata says which video, crops and times
    they belong to; a reader compares this with the pair that it needs flow for.

    Raises:
        UnreadableVideo: a flow is not finite.
    """
    video, tensors, checksums = samples[0]["video"], {}, []
    for repeat, sample in enumerate(samples):
        data, valid = encode_flow(sample["flow"]), b""
        tensors[f"flow.{repeat}"] = np.frombuffer(data, np.uint8)
        if "valid_mask" in sample:
            valid = tensors[f"valid.{repeat}"] = np.packbits(sample["valid_mask"])
        checksums.append(zlib.crc32(valid, zlib.crc32(data)))
    about = {
        "video": video,
        "video_bytes": _video_bytes(video),
        "size": list(samples[0]["frames"].shape[-2:]),
        "crops": [sample["crop"].tolist() for sample in samples],
        "times": [sample["times"].tolist() for sample in samples],
        "crc32": checksums,
    }
    return save(tensors, metadata={"opening": json.dumps(about)})


def _video_bytes(video: str) -> int | None:
    """Return a local file's size, else `None`: the name of a tar's member contains its size, and that of a Hub video its commit."""
    return None if "::" in video or is_remote(video) else os.path.getsize(video)


def _difference(about: dict, repeat: int, video: str, size, crop, times=None) -> str | None:
    """Return why the flow in an opening's file does not belong to a pair, or `None` if it does."""
    if about.get("video_bytes") != _video_bytes(video):
        return f"is that of another file: the video had {about.get('video_bytes')} bytes, it has {_video_bytes(video)}"
    if about["size"] != list(size):
        return f"is {'x'.join(map(str, about['size']))}, the pairs are {size[0]}x{size[1]}"
    if repeat >= len(about["crops"]):
        return f"is that of {len(about['crops'])} pairs an opening"
    if not np.array_equal(about["crops"][repeat], crop):
        return f"is that of the crop {about['crops'][repeat]}, the pair's is {list(crop)}"
    if times is not None and not np.allclose(about["times"][repeat], times, rtol=0, atol=1e-3):
        return f"is from {about['times'][repeat]} s, the pair from {list(times)} s"
    return None


def read_about(file: Path) -> dict:
    """
    Read the metadata of an opening's file: what its flow belongs to (see [`pack_opening`]).

    Raises:
        SafetensorError, OSError, ValueError: the file is damaged or missing.
    """
    with safe_open(file, framework="numpy") as opened:
        return _about(opened)


def _about(opened) -> dict:
    about = json.loads((opened.metadata() or {}).get("opening", "null"))
    lists = [about.get(name) for name in ("size", "crops", "times", "crc32")] if isinstance(about, dict) else [None]
    if not all(isinstance(value, list) for value in lists) or len({len(value) for value in lists[1:]}) != 1:
        raise ValueError("it was not written by training.flow")
    return about


class FlowFiles:
    """
    The pair flow that reads precomputed flow.

    If a file is damaged, or belongs to other frames, its video is skipped, as a damaged video is. Problems of the whole folder are reported
    earlier, by [`precomputed_epochs`].
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def __call__(self, sample: dict) -> None:
        video, repeat, (height, width) = sample["video"], sample["repeat"], sample["frames"].shape[-2:]
        file = opening_file(self.folder, sample["epoch"], video)
        damaged = f"its flow in {file} is damaged: delete it, and training.flow writes it anew"
        try:
            with safe_open(file, framework="numpy") as opened:
                about = _about(opened)
                difference = _difference(about, repeat, video, (height, width), sample["crop"], sample["times"])
                if difference:
                    raise UnreadableVideo(f"its flow in {file} {difference}")
                data, valid = opened.get_tensor(f"flow.{repeat}"), b""
                if f"valid.{repeat}" in opened.keys():
                    valid = opened.get_tensor(f"valid.{repeat}")
        except UnreadableVideo:
            raise
        except (OSError, SafetensorError, ValueError) as error:
            skipped = file.with_suffix(".skipped")
            if skipped.is_file():
                raise UnreadableVideo(f"has no flow: {skipped.read_text(encoding='utf-8')}") from None
            raise UnreadableVideo(f"its flow cannot be read ({error})") from error
        if zlib.crc32(valid, zlib.crc32(data)) != about["crc32"][repeat]:
            raise UnreadableVideo(damaged)
        if len(valid):
            bits = np.unpackbits(valid, count=2 * height * width)
            sample["valid_mask"] = bits.astype(bool).reshape(2, height, width)
        try:
            sample["flow"] = decode_flow(data, height, width)
        except (OSError, ValueError) as error:  # the data has another length than it should
            raise UnreadableVideo(damaged) from error


# --- a folder ---


def sampling_fields(sampling: PairSampling) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(sampling)))  # JSON turns tuples into lists


def read_manifest(folder: str | Path) -> dict | None:
    """
    Read `flow.json`, or return `None` if there is none.

    Raises:
        ValueError: this version cannot read the file.
    """
    file = Path(folder, "flow.json")
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        known = about["format"]
    except FileNotFoundError:
        return None
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} cannot be read ({error}); write the flow anew into another folder") from error
    if known != FORMAT:
        raise ValueError(f"{file} is of format {known}, expected {FORMAT}: write the flow anew into another folder")
    return about


def epochs_needed(recipe, loader: PairLoader) -> int:
    """Return the number of epochs from which a run sees pairs."""
    steps = count_steps(recipe, loader.world_size, loader.pairs_per_epoch)
    return loader.epochs_seen(steps * recipe.gradient_accumulation_steps)


def precomputed_epochs(recipe, loader: PairLoader) -> int | None:
    """
    Return the number of epochs whose pairs a run with precomputed flow uses, or `None` with any other flow.

    The number is `flow_epochs` or, if that is unset, as many epochs as the run needs. A longer run goes through the same pairs again.
    Prefetching and skipped videos may take the run a few batches beyond the last epoch, to pairs of the first.

    Raises:
        ValueError: the folder lacks the flow of these pairs. The message says what differs, and which command writes what is missing.
    """
    if recipe.flow != "precomputed":
        return None
    needed = epochs_needed(recipe, loader)
    epochs = recipe.flow_epochs or needed
    folder, about = Path(recipe.flow_folder), read_manifest(recipe.flow_folder)
    if about is None:
        raise ValueError(
            f"flow_dir {folder} holds no flow (no flow.json). Write it by `python -m training.flow` with this run's flags, --flow dis (or "
            f"another estimator) and --out {shlex.quote(str(folder))} --epochs {epochs}"
        )
    sampling = loader.sampling
    changed = [
        f"{name} {about['sampling'].get(name)} there, {value} in this run"
        for name, value in sampling_fields(sampling).items()
        if about["sampling"].get(name) != value
    ]
    if changed:
        raise ValueError(
            f"flow_dir {folder} was written for other pairs: {'; '.join(changed)}. Run as it was written "
            f"(`{about['command']}`), or write flow for these pairs into another folder"
        )
    why = f"the run needs {needed}" if recipe.flow_epochs is None else f"flow_epochs is {recipe.flow_epochs}"
    _refuse_missing(folder, loader.paths, epochs, why, about)
    _refuse_other_videos(folder, sampling, loader.paths, epochs, about)
    return epochs


def _refuse_missing(folder: Path, paths: Sequence[str], epochs: int, why: str, about: dict) -> None:
    names = {path: opening_file(folder, 0, path).stem for path in paths}
    missing, complete = [], 0
    for epoch in range(epochs):
        part = opening_file(folder, epoch, "").parent
        there = {entry.name for entry in os.scandir(part)} if part.is_dir() else set()
        absent = [p for p, n in names.items() if f"{n}.safetensors" not in there and f"{n}.skipped" not in there]
        if epoch == 0 and len(absent) == len(paths) and there:
            raise ValueError(
                f"flow_dir {folder} has flow of other videos, none of {video_name(paths[0])}: pairs are drawn by a video's name, so give videos as they "
                f"were given to `{about['command']}`"
            )
        missing += [(epoch, path) for path in absent]
        complete += not absent and complete == epoch
    if missing:
        again = f", or go through those again and again by --flow_epochs {complete}" if complete else ""
        raise ValueError(
            f"flow_dir {folder} has {complete} complete epoch(s), {why}: {len(missing)} openings are missing, the first that of {video_name(missing[0][1])} "
            f"in epoch {missing[0][0]}. Write them by `{about['command']} --epochs {epochs}`{again}"
        )


def _refuse_other_videos(folder: Path, sampling: PairSampling, paths: Sequence[str], epochs: int, about: dict) -> None:
    numbers = spread(range(len(paths) * epochs), _LOOKED_AT)
    looked_at = indices_in_subprocess([paths[number % len(paths)] for number in numbers])
    for epoch, (path, index) in zip((number // len(paths) for number in numbers), looked_at):
        file = opening_file(folder, epoch, path)
        try:
            if isinstance(index, UnreadableVideo):
                raise index
            pairs = plan_pairs(index, sampling, epoch, path)
        except UnreadableVideo:
            continue  # the video gives no pairs; the run names it when it skips it
        if not file.exists():
            continue  # there is NAME.skipped instead
        try:
            opening = read_about(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{file} is damaged ({error}): `{about['command']}` writes it anew") from error
        if not index.exact and len(opening["crops"]) < len(pairs):
            # Some frames of this remote video were not where its header says, so its pairs are known only after decoding.
            continue
        if not index.exact and not all(is_within(times, index, sampling) for times in opening["times"]):
            raise ValueError(
                f"the flow of {video_name(path)} in {file} is of frames that are not valid pairs: an earlier version chose them. "
                f"Delete {folder} and write it anew by `{about['command']}`"
            )
        for repeat, pair in enumerate(pairs):
            times = [index.times[cut.number] for cut in pair] if index.exact else None
            difference = _difference(opening, repeat, path, sampling.crop_size, pair[0].box, times)
            if difference:
                raise ValueError(
                    f"the flow of {video_name(path)} in {file} {difference}. Delete {folder} and write it anew by `{about['command']}`"
                )
