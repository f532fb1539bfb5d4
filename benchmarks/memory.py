"""
Memory over time, of the loader's batches and of training steps. It should stay flat.

    python benchmarks/memory.py                              # 2,000 batches, 500 steps, the street
    python benchmarks/memory.py --batches 200 --steps 50
    python benchmarks/memory.py --batches 0                  # the steps alone, on a GPU, without PyAV and datasets

Takes the flags of training/pretrain.py (its flow: dis, RAFT or unflow). The batches and the steps each run in their own process; the loader
runs there without workers, which would do the same. Growth compares the resident memory at the end with that after the first tenth; on a
GPU also the memory of its tensors.
"""

import dataclasses
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.common import OurStep, benchmark_parser, memory_bytes, print_table, step_recipe, write_json
from training.flow import build_flow
from training.recipe import Recipe

MARKS = 10


def watch(act, count: int, device: torch.device) -> dict[str, list[float]]:
    """Call `act` `count` times. Returns the MiB held after each tenth of the calls, by this process and on the GPU if `device` is one."""
    held = {name: [] for name in dict.fromkeys(("cpu", device.type))}
    for number in range(1, count + 1):
        act()
        if number * MARKS // count > (number - 1) * MARKS // count:
            for name, marks in held.items():
                marks.append(memory_bytes(torch.device(name)) / 2**20)
    return held


def watch_loader(recipe: Recipe, count: int) -> dict[str, list[float]]:
    # Imported here, so that a machine without PyAV and datasets can still watch the steps.
    from benchmarks.loader import videos_of
    from training.pair_plans import PairSampling
    from training.video_stream import PairLoader

    paths = videos_of(recipe)
    pair_flow, _ = build_flow(recipe.flow, recipe.flow_weights, recipe.flow_updates, model=recipe.flow_model)
    torch.set_num_threads(1)
    loader = PairLoader(
        paths, PairSampling.of(recipe), recipe.per_device_train_batch_size, num_workers=0, pair_flow=pair_flow
    )
    batches = iter(loader)
    return watch(lambda: next(batches), count, torch.device("cpu"))


def watch_steps(recipe: Recipe, count: int) -> dict[str, list[float]]:
    step = OurStep(recipe)
    return watch(step, count, step.device)


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--batches", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=500)
    options, flags = parser.parse_known_args()
    parts = (("batches", watch_loader, options.batches), ("steps", watch_steps, options.steps))
    asked = [part for part in parts if part[2]]
    if not asked or any(count < MARKS for *_, count in asked):
        parser.error(
            f"--batches and --steps must be at least {MARKS}, or one 0, got {options.batches} and {options.steps}"
        )
    recipe = step_recipe(parser, flags)
    rows = []
    for name, function, count in asked:
        # Not multiprocessing.Pool: its daemonic workers may not start processes, which the rendering of the street needs.
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
            watched = pool.submit(function, recipe, count).result()
        for place, held in watched.items():
            row = {"what": f"{count} {name}", "memory": place, "first_mib": held[0], "last_mib": held[-1]}
            rows.append({**row, "growth_percent": 100 * (held[-1] / held[0] - 1), "held_mib": held})
    columns = {"what": "", "memory": "", "first_mib": ".1f", "last_mib": ".1f", "growth_percent": "+.2f"}
    print_table(rows, columns)
    write_json(options.json, {"rows": rows, "recipe": dataclasses.asdict(recipe)})


if __name__ == "__main__":
    main()
