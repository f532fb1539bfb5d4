"""Runs that compute on the CPU."""

import multiprocessing
import os
import platform
import re
import resource
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY
from torch.nn import functional as F

from modeling_poodle import cpu
from modeling_poodle.cpu import share_cpu, usable_cores


def count_page_faults(connection, keep: bool) -> None:
    if keep:
        share_cpu(2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child lacks its parent's threads and would wait for them
    for number in range(20):
        if number == 16:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(8 << 20).fill_(1)  # 32 MiB, freed at once
    connection.send((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, threads))


@pytest.fixture
def threads(monkeypatch):
    """Return a function that gives the threads of one of `processes` on so many cores. Afterwards the old number is restored."""
    before = torch.get_num_threads()

    def shared(cores: int, processes: int, **environment: str) -> int:
        monkeypatch.setattr(cpu, "usable_cores", lambda: cores)
        for name in ("ACCELERATE_MIXED_PRECISION", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        share_cpu(processes)
        return torch.get_num_threads()

    yield shared
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("launched", "expected"), [({}, 2), ({"LOCAL_WORLD_SIZE": "4"}, 1), ({"LOCAL_WORLD_SIZE": "1"}, 4)]
)
def test_threads_are_shared_among_the_processes_of_this_machine(threads, launched, expected):
    assert threads(4, 2, **launched) == expected


@pytest.mark.parametrize(
    ("launcher", "asked", "expected"),
    [
        ({}, "1", 1),
        ({}, "3", 3),
        ({}, "64", 8),
        ({}, "0", 1),
        ({}, "four", 8),
        # Under a launcher, a 1 is the launcher's. On CPUs only torchrun starts several processes; each gets at most its share.
        ({"ACCELERATE_MIXED_PRECISION": "2"}, "1", 8),
        ({"ACCELERATE_MIXED_PRECISION": "2"}, "3", 3),
        ({"LOCAL_WORLD_SIZE": "2"}, "1", 4),
        ({"LOCAL_WORLD_SIZE": "2"}, "3", 3),
    ],
)
def test_who_asks_for_fewer_threads_gets_fewer(threads, launcher, asked, expected):
    assert threads(8, 1, **launcher, OMP_NUM_THREADS=asked) == expected


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc is what is told")
def test_memory_that_a_step_frees_is_kept_for_the_next(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    faults = {}
    for keep in (False, True):
        receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=count_page_faults, args=(sender, keep))
        process.start()
        assert receiver.poll(60)
        faults[keep], threads = receiver.recv()
        process.join()
    pages = 4 * (32 << 20) // resource.getpagesize()
    if faults[False] < pages / 2:
        pytest.skip("memory comes in large pages here, or by another allocator")
    assert faults[True] < pages / 100
    assert threads == max(1, usable_cores() // 2)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("count", [24, 512, 640, 4096, 4099])
def test_products_as_convolutions_are_the_same_products(monkeypatch, count, threads):
    """
    Results and gradients are compared, for points in rows and in columns as they lie in a map.

    PyTorch's own product is used for few rows, for other types and under autocast.
    """
    convolved, convolution = [], F.conv2d
    monkeypatch.setattr(cpu, "_CONVOLVES", True)
    monkeypatch.setattr(F, "conv2d", lambda *inputs: convolved.append(len(inputs[0])) or convolution(*inputs))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator().manual_seed(0)
        points, weight, bias, gradient = (
            torch.randn(*shape, generator=generator, dtype=torch.float64)
            for shape in ((count, 24), (40, 24), (40,), (count, 40))
        )
        for turned in (False, True):
            own = [value.float().requires_grad_() for value in (points.t() if turned else points, weight, bias)]
            found = cpu.linear(own[0].t() if turned else own[0], *own[1:])
            found.backward(gradient.float())
            exact = [value.clone().requires_grad_() for value in (points, weight, bias)]
            expected = F.linear(*exact)
            expected.backward(gradient)
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
            for value, twin in zip(own, exact):
                shown = value.grad.t() if turned and value is own[0] else value.grad
                torch.testing.assert_close(shown.double(), twin.grad, rtol=1e-4, atol=1e-3)
        assert len(convolved) == (0 if count == 24 else 2)
        assert all(images >= 16 for images in convolved) or count % 16
        convolved.clear()
        assert torch.equal(cpu.linear(points, weight), F.linear(points, weight))
        with torch.autocast("cpu", torch.bfloat16):
            assert cpu.linear(points.float(), weight.float()).dtype == torch.bfloat16
        assert not convolved
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("convolves", [False, True])
def test_products_compile_to_one_graph(monkeypatch, convolves):
    monkeypatch.setattr(cpu, "_CONVOLVES", convolves)
    points, weight = torch.randn(512, 8), torch.randn(16, 8)
    found = torch.compile(cpu.linear, fullgraph=True, backend="eager")(points, weight)
    torch.testing.assert_close(found, F.linear(points, weight), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="torch comes with libgomp on Linux")
@pytest.mark.parametrize(("given", "count"), [({}, "1000"), ({"GOMP_SPINCOUNT": "70"}, "70")])
def test_threads_of_the_scripts_wait_awake_for_a_moment_only(given, count):
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    done = subprocess.run(
        [sys.executable, "training/pretrain.py", "--batch_size", "4"], cwd=REPOSITORY, capture_output=True, text=True, timeout=200,
        env={**environment, "OMP_DISPLAY_ENV": "VERBOSE", **given},
    )  # fmt: skip
    assert re.search(rf"GOMP_SPINCOUNT = '{count}'", done.stderr) and "error: " in done.stderr


@pytest.mark.parametrize("script", ["training/pretrain.py", "training/train_flow.py", "evaluation/segment.py", "evaluation/detect.py"])  # fmt: skip
def test_it_is_said_before_torch_reads_it(script):
    text = (REPOSITORY / script).read_text()
    assert (
        0
        < text.index("GOMP_SPINCOUNT")
        < min(text.index(name) for name in ("import torch", "import Accelerator") if name in text)
    )
