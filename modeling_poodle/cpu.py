"""The processor as the device that computes: its threads, memory that is kept, and who computes products."""

import ctypes
import os
import platform

import torch
from torch import Tensor
from torch.nn import functional as F

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of glibc's malloc.h


def usable_cores() -> int:
    """Cores that this process may use: fewer than the machine's under a scheduler or a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_cpu(num_processes: int) -> None:
    """
    Threads and memory for one of a run's `num_processes`, all of this machine unless a launcher says how many are (LOCAL_WORLD_SIZE).

    Launchers set OMP_NUM_THREADS=1; the cores are there to be shared. Any other value, or a 1 without a launcher, is a person's and bounds
    the threads: on cores that have other work, they wait for one another most of the time. And a step frees and takes the same large tensors
    again and again: glibc gives each back to the system, which hands out pages anew and fills them with zeros. Kept, a step of ResNet-50 at
    256x512 took 0.65 to 0.87 of the time on 2 cores and 1.03 times the memory, one of the small network at 128x256 0.93 of the time.

    (The scripts set GOMP_SPINCOUNT=1000 before they import torch, unless it is set. By default, threads that wait for others keep their cores for
    milliseconds, and where another program has a core, the run waits for that too: docs/scaling.md, "Threads that wait".)
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or num_processes)
    threads, asked = usable_cores() // max(here, 1), os.environ.get("OMP_NUM_THREADS", "")
    launched = {"ACCELERATE_MIXED_PRECISION", "LOCAL_WORLD_SIZE"} & os.environ.keys()
    if asked.isdecimal() and not (asked == "1" and launched):
        threads = min(threads, int(asked))
    torch.set_num_threads(max(1, threads))
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        if not mallopt(_MMAP_THRESHOLD, 1 << 30):
            mallopt(_MMAP_THRESHOLD, 32 << 20)  # the most that earlier versions take
        mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


def _on_amd() -> bool:
    try:
        with open("/proc/cpuinfo") as file:
            return any(line.startswith("vendor_id") and "AuthenticAMD" in line for line in file)
    except OSError:  # another system
        return False


# PyTorch's float32 products are MKL's, which on AMD's processors goes no further than AVX2; its convolutions are oneDNN's, which takes what is there.
_CONVOLVES = torch.backends.mkl.is_available() and "AVX512" in torch.backends.cpu.get_cpu_capability() and _on_amd()
_FEW_ROWS = 512  # with fewer, converting the weights to oneDNN's layout costs more than it saves


def linear(points: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """
    As torch.nn.functional.linear, points (N, C), weight (O, C): (N, O).

    In float32 on AMD's processors with AVX-512 it is computed as a convolution: on 2 cores of an EPYC forward and backward of (4096, 256) by
    (512, 256) took 7.8 ms instead of 15.8, of (4096, 2048) by (4096, 2048) 640 instead of 972; a step of ResNet-50 took 0.77 of the time, of the small network 0.90.
    """
    few = points.shape[0] < _FEW_ROWS
    if (
        not _CONVOLVES
        or few
        or points.device.type != "cpu"
        or points.dtype != torch.float32
        or torch.is_autocast_enabled("cpu")
    ):
        return F.linear(points, weight, bias)
    # As a batch of images of one row: with one thread, PyTorch uses oneDNN only for batches of at least 16.
    count = points.shape[0]
    width = next((width for width in (64, 32, 16) if count % width == 0 and count >= 16 * width), count)
    image = points.unflatten(0, (-1, 1, width)).permute(0, 3, 1, 2)
    return F.conv2d(image, weight[:, :, None, None], bias).permute(0, 2, 3, 1).flatten(0, 2)
