"""
Scaling from one process to several on CPUs: pairs per second, with the same work and one thread in each process.

    python benchmarks/processes.py                          # 1 and 2 processes, the street
    python benchmarks/processes.py --processes 1 2 4

Takes the flags of training/pretrain.py (its flow: dis, RAFT or unflow). As in a run on CPUs, torchrun starts the processes and
DistributedDataParallel connects them over gloo. Every number of processes is measured --rounds times, in turns. Efficiency is the rate
divided by (number of processes times the rate of one process). It is meaningful only on a machine with a free core for each process.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.common import OurStep, benchmark_parser, print_table, step_recipe, timed_steps, write_json
from modeling_poodle.cpu import usable_cores
from training.recipe import parse_recipe

ROOT = Path(__file__).resolve().parent.parent


def work(steps: int, warmup: int, flags: list[str], path: str) -> None:
    """Run as one of the processes. The first rank writes the median seconds of a step to `path`."""
    step = OurStep(parse_recipe(flags))
    torch.set_num_threads(1)
    timed_steps(step, warmup)
    seconds = statistics.median(row["wall"] for row in timed_steps(step, steps))
    if step.accelerator.is_main_process:
        Path(path).write_text(json.dumps(seconds))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def seconds_a_step(processes: int, steps: int, warmup: int, flags: list[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "seconds.json")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += [__file__, "--worker", str(path), "--steps", str(steps), "--warmup", str(warmup), *flags]
        subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return json.loads(path.read_text())


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=20, help="steps that count, each round")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", help="used by this script itself: be one of the processes, write to this file")
    options, flags = parser.parse_known_args()
    if options.worker:
        work(options.steps, options.warmup, flags, options.worker)
        return
    recipe = step_recipe(parser, flags)
    found = {count: [] for count in sorted({1, *options.processes})}
    for _ in range(options.rounds):
        for count, seconds in found.items():
            seconds.append(seconds_a_step(count, options.steps, options.warmup, flags))
    rows = []
    for count, seconds in found.items():
        rate = count * recipe.per_device_train_batch_size / statistics.median(seconds)
        rows.append({"processes": count, "pairs_per_second": rate, "ms_a_step": 1000 * statistics.median(seconds)})
        rows[-1]["efficiency"] = rate / (count * rows[0]["pairs_per_second"])
    print(f"{recipe.per_device_train_batch_size} pairs a process, one thread each, {usable_cores()} cores may be used")
    print_table(rows, {"processes": "", "pairs_per_second": ".2f", "ms_a_step": ".0f", "efficiency": ".2f"})
    write_json(options.json, {"rows": rows})


if __name__ == "__main__":
    main()
