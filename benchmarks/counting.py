"""The memory of a step, counted from its tensors: the same on every device, for GPUs that are not at hand."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPUS = {"H100": 79, "H200": 139}  # GiB of memory, whole ones


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that are made while it is on and still there: now, and the most there were. No library's scratch memory."""

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
    """Bytes of a step that has run before: `resident`, of the model and the optimizer, and `peak`, of what the step made at its most."""
    kept = [*step.model.parameters(), *step.model.buffers()]
    kept += [value for state in step.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    with LiveBytes() as counted:
        step()
    return {"resident": sum(value.nbytes for value in kept), "peak": counted.peak}
