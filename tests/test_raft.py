"""RAFT's inner loop against torchvision's modules, and in reduced precision."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import optical_flow

from training.flow import RaftFlow
from training.raft import GatedUnit, correlation_pyramid, look_up


@pytest.mark.parametrize(("levels", "radius", "size"), [(4, 4, (16, 24)), (4, 3, (17, 29)), (2, 1, (16, 16))])
def test_pyramid_and_lookups_equal_torchvision(levels, radius, size):
    torch.manual_seed(0)
    first, second = torch.randn(2, 2, 32, *size)
    theirs = optical_flow.raft.CorrBlock(num_levels=levels, radius=radius)
    if levels == 4:
        theirs.build_pyramid(first, second)
    else:
        volume = theirs._compute_corr_volume(first, second).reshape(-1, 1, *size)
        theirs.corr_pyramid = [volume, F.avg_pool2d(volume, 2, 2)]
    ours = correlation_pyramid(first, second, levels)
    for a, b in zip(ours, theirs.corr_pyramid, strict=True):
        torch.testing.assert_close(a[:, None, 1:-1, 1:-1], b, rtol=1e-4, atol=1e-5)
        assert torch.equal(a, F.pad(a[:, 1:-1, 1:-1], (1, 1, 1, 1)))  # a border of zeros
    # The points lie everywhere: half of them outside the map, some far away.
    points = torch.rand(2, 2, *size) * 60 - 15
    points[:, :, 0] *= 100
    expected = theirs.index_pyramid(points)
    torch.testing.assert_close(look_up(ours, points, radius), expected, rtol=1e-3, atol=2e-4)
    whole = points.round()
    torch.testing.assert_close(look_up(ours, whole, radius), theirs.index_pyramid(whole), rtol=1e-3, atol=2e-4)


def test_lookups_find_cells_by_one_index():
    """With several indices, a GPU first writes each one out for every cell: three of 8 bytes to read one value of 2 bytes."""
    counts = []

    class Indices(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.index.Tensor:
                counts.append(sum(index is not None for index in args[1]))
            return function(*args, **(kwargs or {}))

    pyramid = correlation_pyramid(torch.randn(1, 8, 16, 24), torch.randn(1, 8, 16, 24), 4)
    with Indices():
        pyramid[0][torch.arange(3)]
        look_up(pyramid, torch.rand(1, 2, 16, 24) * 16, 4)
    assert set(counts) == {1}


@pytest.mark.parametrize(("kernel", "padding"), [((1, 5), (0, 2)), (3, 1)])
def test_gated_unit_equals_torchvision(kernel, padding):
    torch.manual_seed(0)
    theirs = optical_flow.raft.ConvGRU(input_size=12, hidden_size=8, kernel_size=kernel, padding=padding)
    hidden, context, motion = torch.randn(2, 8, 9, 11), torch.randn(2, 5, 9, 11), torch.randn(2, 7, 9, 11)
    ours = GatedUnit(theirs, context)
    for _ in range(3):
        expected = theirs(hidden, torch.cat([context, motion], dim=1))
        torch.testing.assert_close(ours(hidden, motion), expected, rtol=1e-5, atol=1e-6)
        hidden = expected


def test_reduced_precision_stays_near(monkeypatch):
    torch.manual_seed(0)
    raft = RaftFlow("raft_small", "random", num_updates=4)
    coarse = torch.rand(1, 2, 3, 16, 16)
    frames = (F.interpolate(coarse.flatten(0, 1), (128, 128), mode="bicubic").clamp(0, 1) * 255).byte()[None]
    full = raft(frames)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(raft(frames), full)  # on CPUs autocast is ignored: float16 is slower there
        monkeypatch.setattr("training.flow.in_float16", torch.is_autocast_enabled)
        reduced = raft(frames)
    assert full.dtype == reduced.dtype == torch.float32
    assert 0 < (full - reduced).norm(dim=2).mean() < 0.05 < full.norm(dim=2).mean()
    # The float32 path still works as before, and the float16 copies are not part of the checkpoint.
    assert torch.equal(raft(frames), full)
    assert all(value.dtype != torch.float16 for value in raft.state_dict().values())


@pytest.mark.parametrize("variant", ["raft_large", "raft_small"])
def test_compiled_updates_are_one_graph_that_is_kept(variant):
    torch.manual_seed(0)
    raft, graphs = RaftFlow(variant, "random", num_updates=3), []
    frames, others = (torch.randint(0, 256, (1, 2, 3, 128, 136), dtype=torch.uint8) for _ in range(2))
    expected = raft(frames), raft(others)
    torch._dynamo.reset()
    raft.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    found = raft(frames), raft(others)
    torch._dynamo.reset()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1
