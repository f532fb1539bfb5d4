"""Performance on CPUs: number of threads, memory reuse, and the library that computes matrix products."""

import ctypes
import os
import platform

import torch
from torch import Tensor
from torch.nn import functional as F

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of glibc's malloc.h


def usable_cores() -> int:
    """Number of cores that this process may use; under a scheduler or in a container it may be less than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_cpu(num_processes: int) -> None:
    """
    Set the number of threads of this process, and make glibc keep freed memory.

    Threads: the processes of a run on this machine share its cores. A launcher's OMP_NUM_THREADS=1 is ignored. Any other value, or a 1
    without a launcher, was set by the user and is an upper bound: on cores that have other work, threads mostly wait for one another.

    Memory: each step frees and allocates the same large tensors. By default glibc returns them to the system, which hands out new pages
    filled with zeros. When the memory is kept, a step of ResNet-50 at 256x512 on 2 cores took 0.65 to 0.87 of the time and 1.03 times
    the memory; a step of the small network at 128x256 took 0.93 of the time.

    The scripts also set GOMP_SPINCOUNT=1000 before they import torch, unless the variable is set. By default, waiting threads keep their
    cores busy for milliseconds; if another program occupies a core, the whole run waits for it (docs/scaling.md, "Threads that wait").

    Args:
        num_processes: processes of the run. All are taken to be on this machine unless a launcher sets LOCAL_WORLD_SIZE.
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
            mallopt(_MMAP_THRESHOLD, 32 << 20)  # the largest value that earlier versions accept
        mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


def _on_amd() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return any(line.startswith("vendor_id") and "AuthenticAMD" in line for line in file)
    except OSError:  # not Linux
        return False


# PyTorch computes float32 matrix products with MKL, which uses at most AVX2 on AMD processors, and convolutions with oneDNN, which also
# uses AVX-512 there.
_CONVOLVES = torch.backends.mkl.is_available() and "AVX512" in torch.backends.cpu.get_cpu_capability() and _on_amd()
_FEW_ROWS = 512  # with fewer, converting the weights to oneDNN's layout costs more than it saves


def linear(points: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """
    Compute torch.nn.functional.linear of points (N, C) and weight (O, C), giving (N, O).

    In float32 on AMD processors with AVX-512, the product is computed as a convolution. On 2 cores of an EPYC, forward and backward of
    (4096, 256) by (512, 256) took 7.8 ms instead of 15.8, and of (4096, 2048) by (4096, 2048) 640 ms instead of 972. A step of ResNet-50
    took 0.77 of the time, a step of the small network 0.90.
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
    # The points become a batch of images of one row each: with one thread, PyTorch uses oneDNN only for batches of at least 16.
    count = points.shape[0]
    width = next((width for width in (64, 32, 16) if count % width == 0 and count >= 16 * width), count)
    image = points.unflatten(0, (-1, 1, width)).permute(0, 3, 1, 2)
    return F.conv2d(image, weight[:, :, None, None], bias).permute(0, 2, 3, 1).flatten(0, 2)
