"""Measures the time of a step by groups of kernels, to tell the convolutions from all the rest."""

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# A kernel belongs to the first group that has a part of the kernel's name; the last group takes the rest.
GROUPS = {
    "compiled": ("triton_", "Compiled"),  # first, because these names list all fused operations
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
    Seconds of one step in each of GROUPS, without the flow: the mean of `steps` steps after a warm-up step.

    On a GPU it is the time of the device's kernels, on a CPU that of all threads.
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
        # A GPU's kernels are listed twice, with the operation that started them and on their own; only the former counts. A CPU's kernels
        # run in all threads, but the profiler reports only the thread that waits for the others.
        if event.device_type == DeviceType.CPU:
            took = event.self_device_time_total if gpu else event.self_cpu_time_total * torch.get_num_threads()
            seconds[group(event.key)] += took / steps / 1e6
    return seconds
