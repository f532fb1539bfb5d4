"""
Write flow for all pairs of a recipe, to be read by `--flow precomputed --flow_dir DIR`.

    python -m training.flow [--config RECIPE] [--videos SOURCE ...] [--out DIR] [--epochs N] [--FIELD VALUE ...]
    torchrun --nproc_per_node 8 -m training.flow ...       # or accelerate launch: each process writes its share

The recipe's `flow` names the estimator. Files that exist are kept: to continue after a stop, give the same command again; a higher
`--epochs` adds epochs. Pair estimators run in `dataloader_num_workers` processes, device estimators on batches of
`per_device_train_batch_size`.
"""

import argparse
import dataclasses
import json
import logging
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from tqdm import tqdm

from modeling_poodle.folders import sha256_of, write_aside
from modeling_poodle.processes import main_first
from training.addresses import printable, video_name, without_secrets
from training.assembly import make_accelerator
from training.faults import fault_of
from training.flow import build_flow
from training.flow_files import (
    FORMAT,
    STEPS_PER_PIXEL,
    epochs_needed,
    opening_file,
    pack_opening,
    read_about,
    read_manifest,
    sampling_fields,
)
from training.pair_plans import PairSampling
from training.recipe import Recipe, flow_beside, parse_recipe
from training.video_files import UnreadableVideo
from training.video_loader import build_loader, resolve_videos
from training.video_stream import video_pairs
from training.workers import Workers, note

logger = logging.getLogger("poodle")


def main(arguments: list[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", help="folder of the flow; unset: flow/ in the one folder that --videos names")
    parser.add_argument("--epochs", type=int, help="epochs of pairs; unset: those that the recipe's steps need")
    options, flags = parser.parse_known_args(arguments)
    if options.epochs is not None and options.epochs < 1:
        raise ValueError(f"--epochs must be at least 1, got {options.epochs}")
    wrong = [flag for flag in flags if re.match("--out(put)?[-_]dir(=|$)", flag)]
    if wrong:
        raise ValueError(f"{wrong[0].split('=')[0]}: the folder of the flow is given by --out")
    recipe = parse_recipe(flags)
    out = options.out or flow_beside(recipe.videos)
    if out is None:
        raise ValueError(
            "--out must be the folder of the flow; it may be unset where --videos is one local folder alone"
        )
    # "latest": videos of the Hub keep the commit that is recorded in --out. If there is none, their current commit is recorded.
    recipe = dataclasses.replace(recipe, output_dir=out, resume_from_checkpoint="latest")
    if recipe.flow == "precomputed":
        raise ValueError("flow must name the estimator that computes what is written (--flow dis), got 'precomputed'")
    accelerator = make_accelerator(recipe)
    shown = [without_secrets(flag, flag) for flag in flags]
    folder, command = Path(out), ["python", "-m", "training.flow", *shown, "--out", out]
    estimator = build_flow(recipe.flow, recipe.flow_weights, recipe.flow_updates, model=recipe.flow_model)
    main_first(accelerator, lambda: write_manifest(folder, recipe, shlex.join(command)))
    paths = resolve_videos(accelerator, recipe)
    epochs = options.epochs or epochs_needed(recipe, build_loader(accelerator, recipe, paths, None))
    write_flow(accelerator, recipe, folder, paths, epochs, estimator)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# --- what a folder holds ---


def write_manifest(folder: Path, recipe: Recipe, command: str) -> None:
    """
    Write `flow.json`: what the flow depends on, and the command that writes more of it. An existing file is compared instead.

    Raises:
        ValueError: the folder holds flow of other pairs or of another estimator, or cannot be written.
    """
    manifest = {
        "format": FORMAT,
        "steps_per_pixel": STEPS_PER_PIXEL,
        "sampling": sampling_fields(PairSampling.of(recipe)),
    }
    manifest["estimator"] = estimator_fields(recipe)
    known = read_manifest(folder)
    if known is None:
        write_file(folder / "flow.json", json.dumps({**manifest, "command": command}, indent=1).encode())
        return
    changed = [
        f"{name} {known[part].get(name)} there, {value} now"
        for part in ("sampling", "estimator")
        for name, value in manifest[part].items()
        if known[part].get(name) != value
    ]
    if changed:
        raise ValueError(f"--out {folder} holds another recipe's flow: {'; '.join(changed)}. Give another --out")


# For estimators with weights, the recipe fields on which the flow depends.
_OF_RAFT = ("flow_weights", "flow_updates", "bf16")
_FIELDS = {"raft_large": _OF_RAFT, "raft_small": _OF_RAFT, "unflow": ("flow_model", "bf16")}


def estimator_fields(recipe: Recipe) -> dict:
    """Return the recipe's fields on which an estimate depends. Files and folders of weights become a digest of their contents."""
    fields = {name: getattr(recipe, name) for name in ("flow", *_FIELDS.get(recipe.flow, ()))}
    return fields | {
        name: fields[name] and _contents(fields[name]) for name in ("flow_weights", "flow_model") if name in fields
    }


def _contents(value: str) -> str:
    path = Path(value, "model") if Path(value, "model").is_dir() else Path(value)  # a run of train_flow.py
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    return f"sha256:{sha256_of(files)}" if files else value


def write_file(file: Path, data: bytes) -> None:
    """
    Write a file under a temporary name, then rename it. If several processes write the same file, each leaves a whole one.

    Raises:
        ValueError: the disk is full, or the folder cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_aside(file, data)
    except OSError as error:
        raise ValueError(
            f"{file} cannot be written ({error.strerror}). What is there is whole: make room and give the same command again, or another --out"
        ) from error


def is_written(file: Path) -> bool:
    """Return whether an opening's file is whole. Files that a crash of the machine cut off, and skipped openings, are written anew."""
    try:
        return file.exists() and bool(read_about(file))
    except (SafetensorError, OSError, KeyError, ValueError):  # damaged, or not a file of an opening
        return False


# --- openings ---


class Openings(torch.utils.data.Dataset):
    """
    Openings of videos, each as (epoch, path, result).

    The result is the bytes of the opening's file, or its samples if the device computes their flow, or the reason why there is none.
    """

    def __init__(self, shards: list[tuple[int, str]], sampling: PairSampling, pair_flow):
        self.shards, self.sampling, self.pair_flow = shards, sampling, pair_flow

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, number: int) -> tuple[int, str, bytes | list[dict] | str]:
        epoch, path = self.shards[number]
        note(path)
        try:
            samples = list(video_pairs(path, self.sampling, epoch))
            if self.pair_flow is None:
                return epoch, path, samples
            for sample in samples:
                self.pair_flow(sample)
            return epoch, path, pack_opening(samples)
        except UnreadableVideo as error:
            return epoch, path, str(error)


@torch.no_grad()
def device_flow(accelerator, module: torch.nn.Module, samples: list[dict], batch_size: int) -> None:
    """Add `flow` to the samples, batch by batch."""
    for start in range(0, len(samples), batch_size):
        part = samples[start : start + batch_size]
        frames = torch.from_numpy(np.stack([sample["frames"] for sample in part])).to(accelerator.device)
        with accelerator.autocast():
            flow = module(frames).float().cpu().numpy()
        for sample, its_flow in zip(part, flow, strict=True):
            sample["flow"] = its_flow


def write_flow(accelerator, recipe: Recipe, folder: Path, paths: list[str], epochs: int, estimator: tuple) -> None:
    """
    Write this process's share of the openings of `epochs` epochs that are missing.

    Args:
        estimator: as [`build_flow`] returns it.
    """
    rank, ranks = accelerator.process_index, accelerator.num_processes
    mine = [(epoch, path) for epoch in range(epochs) for path in paths][rank::ranks]
    shards = [(epoch, path) for epoch, path in mine if not is_written(opening_file(folder, epoch, path))]
    pair_flow, module = estimator
    if module is not None:
        module.to(accelerator.device)
    batch_size = recipe.per_device_train_batch_size
    workers = Workers(recipe.dataloader_num_workers)
    openings = torch.utils.data.DataLoader(
        Openings(shards, PairSampling.of(recipe), pair_flow),
        batch_size=max(1, batch_size // recipe.pairs_per_video),
        num_workers=recipe.dataloader_num_workers,
        collate_fn=list,
        multiprocessing_context=workers.start_method,
        worker_init_fn=workers.start,
    )
    logger.info("%d of %d openings are there; writing %d", len(mine) - len(shards), len(mine), len(shards))
    progress = tqdm(
        total=len(shards), disable=not (accelerator.is_main_process and sys.stderr.isatty()), unit="opening"
    )
    done, written, told = 0, 0, 0
    with in_words(openings, workers, recipe) as groups:
        for group in groups:
            if module is not None:
                samples = [sample for _, _, found in group if not isinstance(found, str) for sample in found]
                device_flow(accelerator, module, samples, batch_size)
            for epoch, path, found in group:
                written += write_opening(opening_file(folder, epoch, path), path, found)
            done += len(group)
            progress.update(len(group))
            if progress.disable and 10 * done // len(shards) > told:
                told, whole = 10 * done // len(shards), written / done * len(shards) * ranks / 2**30
                free = shutil.disk_usage(folder).free / 2**30
                logger.info(
                    "%d of %d openings; about %.2f GiB in all, %.2f GiB are free", done, len(shards), whole, free
                )
    progress.close()
    # No barrier: a process with shorter videos could wait for the others longer than the process group's timeout allows.
    per_pair = written / max(len(shards) * recipe.pairs_per_video, 1) / 1024
    logger.info(
        "%s: flow of %d epoch(s); this process wrote %d openings, %.1f KiB a pair", folder, epochs, done, per_pair
    )


@contextmanager
def in_words(openings: torch.utils.data.DataLoader, workers: Workers, recipe: Recipe) -> Iterator[Iterator[list]]:
    """
    Yield the iterator of the loader, and end its workers in any case. If a worker dies, raise an error that names what it was reading.

    The block must contain all work on the batches, because torch's SIGCHLD handler raises wherever the process is when a worker dies.
    """
    batches = iter(openings)
    try:
        try:
            yield batches
        finally:
            workers.end(batches)
    except BrokenPipeError:  # the program that read this output has ended
        raise
    except (EOFError, ConnectionError, RuntimeError) as error:
        fault = fault_of(error, workers.died_at, recipe.ddp_timeout, "then give the same command again")
        if fault is None:
            raise
        raise fault from error


def write_opening(file: Path, path: str, found: bytes | list[dict] | str) -> int:
    """Write an opening's file, or the reason why there is none. Returns the bytes of flow written."""
    if isinstance(found, list):
        try:
            found = pack_opening(found)
        except UnreadableVideo as error:
            found = str(error)
    skipped = file.with_suffix(".skipped")
    if isinstance(found, str):
        logger.warning("skipped %s: %s", printable(video_name(path)), printable(found))
        write_file(skipped, found.encode())
        file.unlink(missing_ok=True)  # if damaged, a run would refuse it and ask for this command again
        return 0
    write_file(file, found)
    skipped.unlink(missing_ok=True)
    return len(found)
