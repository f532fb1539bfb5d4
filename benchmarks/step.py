"""
One training step: pairs a second, peak memory, and where the time goes.

    python benchmarks/step.py --config street
    python benchmarks/step.py --config bdd100k_r50 --flow dis --per_device_train_batch_size 1 --steps 1 --warmup 0   # memory at 512x1024
    python benchmarks/step.py --config bdd100k_r50 --flow_weights random --bf16 --per_device_train_batch_size 32     # on a GPU

Takes any flag of training/pretrain.py. Frames are synthetic and lie on the device, so that neither the disk nor the decoder is
measured (benchmarks/loader.py does that); flow that a loader's worker would make is given, RAFT is run and counted as "flow".
"""

import argparse
import resource
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from training.assembly import build_model, build_optimizer, make_accelerator
from training.flow import build_flow
from training.recipe import Recipe, parse_recipe
from training.views import model_inputs

PARTS = ("flow", "augmentation", "forward", "teacher", "backward", "optimizer", "ema")


class Clock:
    """Adds up the seconds of named parts; waits for the device at each boundary only where `exact` is set."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, dict.fromkeys(PARTS, 0.0)
        self.exact = True

    def wait(self) -> None:
        if self.device.type == "cuda" and self.exact:
            torch.cuda.synchronize()

    @contextmanager
    def part(self, name: str):
        self.wait()
        began = time.perf_counter()
        yield
        self.wait()
        self.seconds[name] += time.perf_counter() - began

    def around(self, name: str, function):
        def timed(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)

        return timed


def synthetic_batch(recipe: Recipe, device: torch.device, with_flow: bool) -> dict:
    """Frames that move by a constant shift, and that shift as flow."""
    b, (height, width) = recipe.per_device_train_batch_size, recipe.crop_size
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(b, 3, height // 8, width // 8, generator=generator)
    later = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    earlier = later.roll((3, -5), dims=(2, 3))
    batch = {"frames": (torch.stack([earlier, later], dim=1) * 255).byte().to(device)}
    if with_flow:
        shift = torch.tensor([5.0, -3.0])
        flow = torch.stack([shift, -shift]).view(1, 2, 2, 1, 1).expand(b, 2, 2, height, width)
        batch["flow"] = flow.half().to(device)
    return batch


def peak_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux; the whole process


class OurStep:
    """The step of training/pretrain.py on one process, in parts."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.accelerator = recipe, make_accelerator(recipe)
        self.device = self.accelerator.device
        pair_flow, self.flow_module = build_flow(
            recipe.flow, weights=recipe.flow_weights, num_updates=recipe.flow_updates
        )
        if self.flow_module is not None:
            self.flow_module.to(self.device)
        self.model = build_model(self.accelerator, recipe)
        self.optimizer = build_optimizer(self.accelerator, recipe, self.model)
        if recipe.torch_compile:
            self.model.compile()
        self.model.train()
        self.batch = synthetic_batch(recipe, self.device, with_flow=pair_flow is not None)
        self.generator = torch.Generator(device=self.device).manual_seed(0)
        self.clock = Clock(self.device)

    def time_the_teacher(self) -> None:
        """Also take the teacher's forward apart from the student's. Not together with torch_compile."""
        teacher = self.model.teacher
        for name in ("encode", "decode"):
            setattr(teacher, name, self.clock.around("teacher", getattr(teacher, name)))

    def __call__(self) -> None:
        clock, batch = self.clock, self.batch
        if self.flow_module is not None:
            with clock.part("flow"), self.accelerator.autocast():
                batch = {**batch, "flow": self.flow_module(batch["frames"])}
        with clock.part("augmentation"):
            inputs = model_inputs(batch, self.recipe, self.generator)
            inputs.pop("matched")
        before = clock.seconds["teacher"]
        with clock.part("forward"), self.accelerator.autocast():
            output = self.model(**inputs, subcrop_size=self.recipe.subcrop_size)
        clock.seconds["forward"] -= clock.seconds["teacher"] - before
        with clock.part("backward"):
            output.loss.backward()
        with clock.part("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        with clock.part("ema"):
            self.model.update_teacher(0.996)


def measure(step, device: torch.device, steps: int, warmup: int) -> list[float]:
    """Seconds of each of `steps` steps after `warmup`."""
    seconds = []
    for number in range(warmup + steps):
        if number == warmup and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= warmup:
            seconds.append(time.perf_counter() - began)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="steps that count")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    options, flags = parser.parse_known_args()
    recipe = parse_recipe(flags)
    step = OurStep(recipe)
    pairs, device = recipe.per_device_train_batch_size, step.device
    step.clock.exact = False
    median = statistics.median(measure(step, device, options.steps, options.warmup))
    memory = peak_gib(device)
    step.clock.exact, step.clock.seconds = True, dict.fromkeys(PARTS, 0.0)
    if not recipe.torch_compile:
        step.time_the_teacher()
    parts_steps = max(1, min(options.steps, 5))
    measure(step, device, parts_steps, 0)
    height, width = recipe.crop_size
    print(
        f"{pairs} pairs of {height}x{width}, {recipe.num_subcrops} subcrops of {recipe.subcrop_size} a frame, "
        f"{'bf16' if recipe.bf16 else 'fp32'}, {device} ({torch.get_num_threads()} threads)"
    )
    print(f"{pairs / median:.2f} pairs/s   {1000 * median:.0f} ms a step   peak {memory:.2f} GiB")
    total = sum(step.clock.seconds.values())
    for name, seconds in step.clock.seconds.items():
        if seconds:
            print(f"  {name:14}{1000 * seconds / parts_steps:9.1f} ms{100 * seconds / total:7.1f} %")


if __name__ == "__main__":
    main()
