"""Memory and work of a step, counted from its tensors and operations."""

import json

import pytest
import torch
from test_benchmarks import SMALL, TINY, run
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.counting import BANDWIDTH, HALF_PEAK, TF32_PEAK, CountedWork, LiveBytes
from modeling_poodle import PoodleConfig, PoodleForPreTraining


def test_live_bytes_of_a_known_sequence():
    with LiveBytes() as counted:
        a = torch.zeros(1000)  # 4,000 bytes
        b = a.view(10, 100).t()  # a view: no bytes
        c = a + 1  # 4,000 more
        del c
        a.add_(1)
        d = b.double()  # 8,000 more
    assert counted.peak == counted.now == 12_000
    del d
    assert counted.now == 4_000


def test_attention_on_a_cpu_is_counted():
    """Two products forward. Backward computes the scores again, and the gradients of values, weights, queries and keys."""
    query, key, value = (torch.randn(1, 4, length, 3, requires_grad=True) for length in (5, 7, 7))
    product = 2 * 4 * 5 * 7 * 3
    with FlopCounterMode(display=False) as counter:
        F.scaled_dot_product_attention(query, key, value).sum().backward()
    assert counter.get_total_flops() == (2 + 5) * product


def test_counted_memory_of_a_step(tmp_path):
    text = run("step.py", "--count_memory", "--reference", "--flow", "dis", "--json", str(tmp_path / "f.json"), *SMALL)
    figures = json.loads((tmp_path / "f.json").read_text())
    model = PoodleForPreTraining(PoodleConfig(**TINY))
    bytes_of = {"all": 0, "trained": 0}
    for parameter in model.parameters():
        bytes_of["all"] += parameter.nbytes
        bytes_of["trained"] += parameter.nbytes * parameter.requires_grad
    for name in ("ours", "reference"):
        found = figures[name]
        # Weights and two moments. Gradients count too if memory peaks in the optimizer's update.
        assert found["fixed"] > (bytes_of["all"] + 2 * bytes_of["trained"]) / 2**30
        assert found["pair"] > 0
        assert found["H100"] == int((79 - found["fixed"]) / found["pair"])
    assert figures["ours"]["pair"] < figures["reference"]["pair"]
    assert "the most pairs" in text


def test_counted_work_of_a_known_sequence():
    a, weight = torch.zeros(1, 64, 32, 32), torch.zeros(64, 64, 1, 1)
    rows, index = torch.zeros(100, 1000), torch.arange(100)[:, None]
    with CountedWork() as counted:
        a.view(64, -1).t()  # no kernel
        torch.nn.functional.conv2d(a, weight)
        a.bfloat16().view(64, -1).t() @ weight.bfloat16().view(64, 64)
        a.relu_()
        rows.gather(1, index)  # moves 100 numbers, however long the rows are
    pixels, weights = a.nbytes, weight.nbytes
    flops = 2 * 64 * 64 * 32 * 32
    products, copies = counted.kinds["products"], counted.kinds["other"]
    assert (products["operations"], products["flops"]) == (2, 2 * flops)
    assert products["bytes"] == 1.5 * (2 * pixels + weights)
    assert counted.kinds["ReLU and pooling"]["bytes"] == pixels  # a tensor changed in place counts once
    assert copies["operations"] == 3 and copies["bytes"] == 1.5 * (pixels + weights) + 100 * (4 + 8 + 4)
    for gpu, bandwidth in BANDWIDTH.items():
        first = max(flops / TF32_PEAK, (2 * pixels + weights) / bandwidth)
        second = max(flops / HALF_PEAK, (2 * pixels + weights) / 2 / bandwidth)
        assert products[f"seconds_{gpu}"] == pytest.approx(first + second)


def test_counted_work_of_a_step(tmp_path):
    flags = [
        "--flow",
        "raft_small",
        "--flow_weights",
        "random",
        "--flow_updates",
        "2",
        "--json",
        str(tmp_path / "f.json"),
    ]
    text = run("step.py", "--count_work", "--reference", *flags, *SMALL, "--crop_size", "128", "128", "--bf16")
    figures = json.loads((tmp_path / "f.json").read_text())
    sums = {}
    for name in ("ours", "reference"):
        for part in ("flow", "model"):
            rows = [row for row in figures[name]["kinds"] if row["part"] == part]
            flops = {row["kind"]: row["pair"]["flops"] for row in rows}
            assert flops.pop("products") > 0 and not any(flops.values())
            sums[name, part] = sum(row["pair"]["bytes"] for row in rows)
        bounds = figures[name]["bounds"]
        assert bounds["H100"]["ms_a_pair"] > bounds["H200"]["ms_a_pair"] > bounds["H200"]["model_ms_a_pair"] > 0
        assert bounds["H200"]["ms_a_pair"] > bounds["H200"]["products_ms_a_pair"] > 0
        assert 0 < bounds["H100"]["share_of_bf16_peak"] < 1
    assert sums["ours", "flow"] < sums["reference", "flow"] and sums["ours", "model"] < sums["reference", "model"]
    assert "at least" in text
