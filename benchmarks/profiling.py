"""Where a step's time goes, kernel by kernel: what its convolutions reach, and what all the rest costs."""

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# The first group of which a kernel's name holds a part has it; the last takes what is left.
GROUPS = {
    "compiled": ("triton_", "Compiled"),  # their names list all operations that were fused
    "sampling and cutting": ("grid_sampler", "upsample", "bmm"),
    "normalisation": ("batch_norm", "layer_norm"),
    "convolutions": ("conv", "addmm", "::mm", "linear"),
    "ReLU and pooling": ("threshold", "clamp_min", "relu", "max_pool", "gelu"),
    "copies": ("copy_", "fill_", "zero_", "aten::cat", "clone"),
    "optimizer and EMA": ("adamw", "lerp_"),
    "other": ("",),
}


def group(kernel: str) -> str:
    return next(name for name, parts in GROUPS.items() if any(part in kernel for part in parts))


def kernel_seconds(step, steps: int) -> dict[str, float]:
    """
    Seconds of one step in each of GROUPS, mean of `steps` (one before them is not counted), flow left out: of the device's kernels on a
    GPU, of all threads on a CPU.
    """
    batch = {"frames": step.frames, "flow": step.estimate_flow()}
    step(batch)
    gpu = step.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as run:
        for _ in range(steps):
            step(batch)
        if gpu:
            torch.cuda.synchronize()
    seconds = dict.fromkeys(GROUPS, 0.0)
    for event in run.key_averages():
        # A GPU's kernels come twice: with the operation that started them, which counts, and by themselves. A CPU's run in all threads;
        # the time is that of the one that waits for the others.
        if event.device_type == DeviceType.CPU:
            took = event.self_device_time_total if gpu else event.self_cpu_time_total * torch.get_num_threads()
            seconds[group(event.key)] += took / steps / 1e6
    return seconds
