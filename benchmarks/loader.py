"""
The loader alone: pairs a second, and the CPU time of a pair by part.

    python benchmarks/loader.py                                   # the street's own videos
    python benchmarks/loader.py --videos path/to/videos --config own_videos --dataloader_num_workers 2

Takes any flag of training/pretrain.py. The parts are timed in this process, one opening of a video at a time; the rate is that of the
real loader with its workers, nothing else running.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from training.flow import build_flow
from training.recipe import parse_recipe
from training.street import street_videos
from training.video_decoding import decode_cuts, index_video
from training.video_sources import find_videos
from training.video_stream import PairLoader, PairSampling, plan_pairs


def time_parts(paths: list[str], sampling: PairSampling, pair_flow, openings: int) -> dict[str, float]:
    """CPU milliseconds a pair (median over openings) of indexing, decoding with cropping and resizing, and flow."""
    rows = []
    for number in range(openings):
        path = paths[number % len(paths)]
        marks = [time.process_time()]
        index = index_video(path)
        pairs = plan_pairs(index, sampling, number, path)
        marks.append(time.process_time())
        pictures, times = decode_cuts(path, index, [cut for pair in pairs for cut in pair])
        marks.append(time.process_time())
        for repeat, (cut, _) in enumerate(pairs):
            sample = {
                "frames": np.stack(pictures[2 * repeat : 2 * repeat + 2]),
                "video": path,
                "times": times[2 * repeat : 2 * repeat + 2],
                "crop": cut.box,
            }
            if pair_flow is not None:
                pair_flow(sample)
        marks.append(time.process_time())
        rows.append([1000 * (after - before) / len(pairs) for before, after in zip(marks, marks[1:])])
    return dict(zip(("index", "decode", "flow"), (statistics.median(column) for column in zip(*rows))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=40, help="batches that count")
    options, flags = parser.parse_known_args()
    recipe = parse_recipe(flags)
    paths = street_videos() if recipe.videos == ["street"] else find_videos(recipe.videos)
    sampling = PairSampling.of(recipe)
    pair_flow, _ = build_flow(recipe.flow, weights=recipe.flow_weights, num_updates=recipe.flow_updates)
    parts = time_parts(paths, sampling, pair_flow, openings=2 * min(len(paths), 16))
    loader = PairLoader(
        paths, sampling, recipe.per_device_train_batch_size, recipe.dataloader_num_workers, pair_flow=pair_flow
    )
    batches = iter(loader)
    for _ in range(4 * max(1, recipe.dataloader_num_workers) + 1):  # what the workers hold ready when the clock starts
        next(batches)
    began = time.perf_counter()
    for _ in range(options.batches):
        next(batches)
    elapsed = time.perf_counter() - began
    loader.close()
    height, width = recipe.crop_size
    print(
        f"{len(paths)} videos, pairs of {height}x{width}, R = {recipe.pairs_per_video}, flow {recipe.flow}, "
        f"{recipe.dataloader_num_workers} worker(s)"
    )
    print(f"{options.batches * recipe.per_device_train_batch_size / elapsed:.1f} pairs/s")
    for name, milliseconds in parts.items():
        print(f"  {name:8}{milliseconds:8.1f} ms of one core a pair")


if __name__ == "__main__":
    main()
