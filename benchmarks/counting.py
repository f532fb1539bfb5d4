"""
Count the memory and the work of a step from its tensors and operations. The counts hardly depend on the device, so they also serve for GPUs
that are not available.
"""

import weakref
from collections import Counter, defaultdict

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.profiling import group

GPUS = {"H100": 79, "H200": 139}  # GiB of memory, rounded down
# From NVIDIA's data sheets: memory bandwidth in bytes per second; and dense FLOP/s, the same for both, in 16 bits, in TF32 (PyTorch's
# default for float32 convolutions) and in float32 (its default for matrix products).
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}
HALF_PEAK, TF32_PEAK, FLOAT_PEAK = 989e12, 494e12, 67e12
# Operations that read only a part of their first input, as a multiple of the bytes that they write.
_PARTS_READ = {"gather": 1, "index": 1, "index_select": 1, "embedding": 1, "grid_sampler_2d": 4}
_NO_KERNEL = (
    "empty",
    "detach",
    "alias",
    "is_",
    "_local_scalar_dense",
    "set_",
    "resize_",
    "lift_fresh",
    "_unsafe_view",
    "_reshape_alias",
)


# A ViT's attention has a name of its own on CPUs, which PyTorch's counter knows only from 2.15 on.
_aten = torch.ops.aten
flop_registry.setdefault(
    _aten._scaled_dot_product_flash_attention_for_cpu, flop_registry[_aten._scaled_dot_product_flash_attention]
)
flop_registry.setdefault(
    _aten._scaled_dot_product_flash_attention_for_cpu_backward,
    flop_registry[_aten._scaled_dot_product_flash_attention_backward],
)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors created while the mode is on, `now` and at the `peak`, without the libraries' scratch memory."""

    def __init__(self):
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        before = {
            value.untyped_storage()._cdata for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)
        }
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in before and storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def _gone(self, key: int) -> None:
        self.now -= self.live.pop(key)


def counted_step(step) -> dict[str, int]:
    """
    Count the bytes of a step that has run before.

    Returns:
        `resident`, the bytes of the model and the optimizer, and `peak`, the most that the step's own tensors took.
    """
    kept = [*step.model.parameters(), *step.model.buffers()]
    kept += [value for state in step.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    with LiveBytes() as counted:
        step()
    return {"resident": sum(value.nbytes for value in kept), "peak": counted.peak}


class CountedWork(TorchDispatchMode):
    """
    Counts the work of the operations that run while the mode is on, by kind.

    The kinds are "products", which are all operations with FLOPs, and the groups of [`~benchmarks.profiling.GROUPS`]. Each has
    `operations`, `bytes` read and written, `flops`, and for each GPU `seconds_{gpu}`, a lower bound of the time. The bound treats each
    operation as a kernel that reads its inputs and writes its outputs once, without waiting.
    """

    def __init__(self):
        super().__init__()
        self.kinds: defaultdict[str, Counter] = defaultdict(Counter)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function._schema.name.removeprefix("aten::")
        if function.is_view or name.startswith(_NO_KERNEL):
            return result
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        outputs = [value for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
        moved, parts = {}, _PARTS_READ.get(name)
        # A tensor that is written in place is in both lists and counts once: it need not be read.
        for value in inputs + outputs:
            most = value.untyped_storage().nbytes()
            if parts and value is inputs[0]:
                most = min(most, parts * outputs[0].nbytes)
            moved[value.untyped_storage()._cdata, value.storage_offset()] = min(value.nbytes, most)
        moved = sum(moved.values())
        count = flop_registry.get(function.overloadpacket)
        flops = count(*args, **kwargs, out_val=result) if count else 0
        peak = HALF_PEAK
        if flops and inputs[0].dtype == torch.float32:
            peak = TF32_PEAK if "conv" in name else FLOAT_PEAK
        self.kinds["products" if flops else group(f"aten::{name}")].update(
            {"operations": 1, "bytes": moved, "flops": flops}
            | {f"seconds_{gpu}": max(flops / peak, moved / bandwidth) for gpu, bandwidth in BANDWIDTH.items()}
        )
        return result


def counted_work(step) -> dict[str, dict[str, Counter]]:
    """Count the work of a step that has run before: `flow`, and `model`, the rest without the reference's augmentation in a loader."""
    if hasattr(step, "augment"):
        augmented = step.augment()
        step.augment = lambda: augmented
    with CountedWork() as flow:
        estimated = step.estimate_flow()
    step.estimate_flow = lambda: estimated
    with CountedWork() as model:
        step()
    return {"flow": dict(flow.kinds), "model": dict(model.kinds)}
