"""The processor as the device that computes."""

import multiprocessing
import platform
import resource

import pytest
import torch

from modeling_poodle.cpu import share_cpu
from modeling_poodle.recipe_files import usable_cores


def count_page_faults(connection, keep: bool) -> None:
    if keep:
        share_cpu(2)
    for number in range(20):
        if number == 16:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(8 << 20).fill_(1)  # 32 MiB, freed at once
    connection.send((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, torch.get_num_threads()))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc is what is told")
def test_memory_that_a_step_frees_is_kept_for_the_next():
    faults = {}
    for keep in (False, True):
        receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=count_page_faults, args=(sender, keep))
        process.start()
        faults[keep], threads = receiver.recv()
        process.join()
    pages = 4 * (32 << 20) // resource.getpagesize()
    if faults[False] < pages / 2:
        pytest.skip("memory comes in large pages here, or by another allocator")
    assert faults[True] < pages / 100
    assert threads == max(1, usable_cores() // 2)
