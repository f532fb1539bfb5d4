"""Shared by the benchmarks: our step split into parts, time and memory measurement, tables and JSON."""

import argparse
import json
import math
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from modeling_poodle.cpu import usable_cores
from training.assembly import build_model, build_optimizer, compile_modules, make_accelerator, prepared
from training.flow import build_flow
from training.health import Health
from training.recipe import Recipe, parse_recipe
from training.views import model_inputs, to_device


class Clock:
    """
    Adds up the seconds of named parts. It waits for a GPU at each boundary of a part only if `exact` is set.

    On a CPU these are seconds of processor time, summed over all threads, which other processes on the machine hardly affect.
    """

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.exact = device, {}, False
        self.now = time.process_time if device.type == "cpu" else time.perf_counter

    def wait(self) -> None:
        if self.device.type == "cuda" and self.exact:
            torch.cuda.synchronize()

    @contextmanager
    def part(self, name: str):
        self.wait()
        began = self.now()
        yield
        self.wait()
        self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - began

    def around(self, name: str, function):
        def timed(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)

        return timed


def moving_frames(b: int, height: int, width: int, device: torch.device) -> torch.Tensor:
    """Make frames (B, 2, 3, H, W) uint8 of a smooth picture that moves by (5, -3) pixels, x then y, from the earlier to the later."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(b, 3, height // 8, width // 8, generator=generator)
    later = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    earlier = later.roll((3, -5), dims=(2, 3))
    return (torch.stack([earlier, later], dim=1) * 255).byte().to(device)


class OurStep:
    """The step of training/pretrain.py, split into parts. It includes the flow; DIS runs in this process rather than in a worker."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.accelerator = recipe, make_accelerator(recipe)
        self.device = self.accelerator.device
        self.pair_flow, self.flow_module = build_flow(
            recipe.flow, recipe.flow_weights, recipe.flow_updates, folder=recipe.flow_folder, model=recipe.flow_model
        )
        if self.flow_module is not None:
            self.flow_module.to(self.device)
        self.model = build_model(self.accelerator, recipe)
        self.optimizer = build_optimizer(recipe, self.model)
        self.health = Health(self.accelerator)
        compile_modules(recipe, self.model, self.flow_module)
        self.wrapped = prepared(self.accelerator, self.model)
        self.model.train()
        self.frames = moving_frames(recipe.per_device_train_batch_size, *recipe.crop_size, self.device)
        self.generator = torch.Generator(device=self.device).manual_seed(0)
        self.clock = Clock(self.device)

    def time_the_teacher(self) -> None:
        """From now on, time the teacher's forward separately from the student's. Does not work with torch_compile."""
        teacher = self.model.teacher
        for name in ("encode", "decode"):
            setattr(teacher, name, self.clock.around("teacher", getattr(type(teacher), name).__get__(teacher)))

    def estimate_flow(self) -> torch.Tensor:
        if self.flow_module is None:
            return self.pair_flow.batch(self.frames)
        with self.accelerator.autocast():
            return self.flow_module(self.frames)

    def __call__(self, batch: dict | None = None) -> None:
        """Run a step on `batch` from the loader, or by default on frames that are already on the device."""
        clock = self.clock
        if batch is None or "flow" not in batch:
            self.frames = self.frames if batch is None else to_device(batch["frames"], self.device)
            with clock.part("flow"):
                batch = {"frames": self.frames, "flow": self.estimate_flow()}
        with clock.part("augmentation"):
            inputs = model_inputs(batch, self.recipe, self.generator)
            inputs.pop("matched")
        before = clock.seconds.get("teacher", 0.0)
        with clock.part("forward"), self.accelerator.autocast():
            output = self.wrapped(**inputs, subcrop_size=self.recipe.subcrop_size)
        if "teacher" in clock.seconds:
            clock.seconds["forward"] -= clock.seconds["teacher"] - before
        with clock.part("backward"):
            output.loss.backward()
        with clock.part("optimizer"):
            self.health.guard(self.model, self.optimizer)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        with clock.part("ema"):
            self.model.update_teacher(0.996)


# --- time, memory, arithmetic ---


def timed_steps(step, steps: int, *batch: dict) -> list[dict[str, float]]:
    """
    Time each of `steps` steps.

    Args:
        batch: passed to each step.

    Returns:
        For each step its seconds: `wall`, and by the step's clock `step` (the whole step) and its parts.
    """
    rows = []
    for _ in range(steps):
        step.clock.seconds = {}
        wall, began = time.perf_counter(), step.clock.now()
        step(*batch)
        if step.device.type == "cuda":
            torch.cuda.synchronize()
        step_seconds, wall = step.clock.now() - began, time.perf_counter() - wall
        rows.append({"wall": wall, "step": step_seconds, **step.clock.seconds})
    return rows


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def step_flops(step) -> dict[str, int]:
    """
    Count the FLOPs of a step with torch.utils.flop_counter; a multiplication and an addition count as two.

    The step runs uncompiled: under the counter torch.compile finds nothing to compile. torch 2.14 then raises an error if a whole graph
    was requested, and torch 2.11 compiles nothing from then on.

    Returns:
        `flow`, and `model`: all the rest except the products (bmm) that cut subcrops. These are image processing, not part of the
        network, and 0.6 % of a pair at 512x1024.
    """
    total, products = {}, {}
    for name, function in (("flow", step.estimate_flow), ("all", step)):
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            function()
        total[name] = counter.get_total_flops()
        products[name] = counter.get_flop_counts()["Global"].get(
            torch.ops.aten.bmm, 0
        )  # RAFT's correlations are some too
    return {"flow": total["flow"], "model": total["all"] - total["flow"] - (products["all"] - products["flow"])}


def memory_bytes(device: torch.device, peak: bool = False) -> int:
    """Bytes that this process holds, or held at most since `reset_peak`: tensors on a GPU, resident memory on a CPU (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    # Not getrusage, whose peak is inherited from the parent process.
    name = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def ceiling(device: torch.device, bf16: bool) -> float:
    """
    Measure the highest FLOP/s that this device reaches now, in the step's precision.

    On a GPU it is the rate of a product of 8192 x 8192 matrices. On a CPU it is that of the fastest of a few ResNet convolutions, for one
    core: FLOPs over processor time.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    if device.type == "cuda":
        a = torch.randn(8192, 8192, device=device, dtype=dtype)
        return _rate(lambda: a @ a, 2 * 8192**3, 10)
    best = 0.0
    for channels, size, kernel in ((64, 56, 3), (256, 28, 3), (256, 56, 1), (1024, 28, 1)):
        images = torch.randn(8, channels, size, size, dtype=dtype).to(memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, kernel, kernel, dtype=dtype).to(memory_format=torch.channels_last)
        flops = 2 * images.numel() * channels * kernel**2

        def convolve(images=images, weight=weight, padding=kernel // 2):
            with torch.no_grad():
                return F.conv2d(images, weight, padding=padding)

        best = max(best, _rate(convolve, flops, 5))
    return best


def _rate(function: Callable[[], torch.Tensor], flops: int, windows: int) -> float:
    """
    FLOP/s in the best of `windows` windows of a fifth of a second each.

    Single calls are too short: the system accounts for the time of a running second thread at its ticks, some milliseconds late. One call
    of 4 ms in ten would therefore seem to take half its time.
    """

    def run(calls: int) -> float:
        began = now()
        for _ in range(calls):
            result = function()
        if result.is_cuda:
            torch.cuda.synchronize()
        return now() - began

    now = Clock(function().device).now
    run(2)
    calls = max(1, math.ceil(0.2 / max(run(3) / 3, 1e-6)))
    return flops * calls / min(run(calls) for _ in range(windows))


# --- what is written ---


def benchmark_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", help="also write the figures to this file")
    return parser


def step_recipe(parser: argparse.ArgumentParser, flags: list[str], reference: bool = False) -> Recipe:
    """Parse pretrain.py's flags into a recipe for a step on synthetic frames. Ends with an error if the recipe's flow needs real videos."""
    recipe = parse_recipe(flags)
    if recipe.flow in ("exact", "precomputed"):
        parser.error(
            f"--flow {recipe.flow} is of a loader's videos, here are frames alone: take dis, raft_large, raft_small or unflow"
        )
    if reference and recipe.flow == "unflow":
        parser.error("--flow unflow: the reference estimates flow by RAFT, or is given that of dis")
    return recipe


def machine() -> dict[str, str | int]:
    """The context of a measured figure: machine, versions, date and command."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        cpu = names[0] if names else cpu
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "cpu": cpu,
        "cores": usable_cores(),
        **gpu,
        "torch": torch.__version__,
    }


def print_table(rows: list[dict], columns: dict[str, str]) -> None:
    """Print rows under headings. `columns` maps each key of a row to its format (`""` for text)."""
    cells = [list(columns)] + [
        ["-" if row.get(key) is None else format(row[key], form) for key, form in columns.items()] for row in rows
    ]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    for row in cells:
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))))


def write_json(path: str | None, figures: dict) -> None:
    if path:
        Path(path).write_text(json.dumps({**machine(), **figures}, indent=1) + "\n")
