"""BatchNorm over all processes that torch.compile can capture in a single graph."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives


class _OfAllRanks(torch.autograd.Function):
    """Mean and variance (C,) of each rank -> those over all ranks. Every rank must have the same number of values."""

    @staticmethod
    def forward(ctx, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        own = torch.stack([mean, var])[None]
        gathered = collectives.wait_tensor(collectives.all_gather_tensor(own, 0, dist.group.WORLD))
        means, variances = gathered.unbind(1)  # (ranks, C)
        whole = means.mean(dim=0)
        # Computed around the common mean: mean of squares minus squared mean would lose digits if the mean is large.
        spread = (variances + (means - whole).square()).mean(dim=0)
        # Read from `gathered`: with Inductor (torch 2.14), the collective changed `mean` itself, and gradients were 2 % off.
        ctx.save_for_backward(means[dist.get_rank()] - whole)
        return whole, spread

    @staticmethod
    def backward(ctx, of_mean: Tensor, of_var: Tensor) -> tuple[Tensor, Tensor]:
        (offset,) = ctx.saved_tensors
        of_mean, of_var = collectives.wait_tensor(
            collectives.all_reduce(torch.stack([of_mean, of_var]), "avg", dist.group.WORLD)
        ).unbind()
        return of_mean + 2 * offset * of_var, of_var


class EqualSyncBatchNorm2d(nn.BatchNorm2d):
    """
    [`torch.nn.SyncBatchNorm`] for processes with equal batch sizes, as in a run, built from operations that torch.compile can fuse.

    PyTorch's own layer asks which processes had an empty batch. It does so with a mask whose size the host waits for, which breaks the
    compiled graph at each of a ResNet-50's 230 normalisations a step. This was counted for a small ResNet with 42 normalisations, without a
    GPU and with other operations in place of the layer's kernels: 83 graphs instead of one, and functions that torch.compile no longer
    compiled because they had too many versions. Which layer is faster was not measured.

    The layer needs one collective forward and one backward, of 2 C numbers from each process. With a single process, and in evaluation, it
    is a plain BatchNorm.
    """

    def forward(self, hidden_state: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(hidden_state)
        values = hidden_state.to(torch.promote_types(hidden_state.dtype, torch.float32))
        var, mean = torch.var_mean(values, dim=(0, 2, 3), correction=0)
        mean, var = _OfAllRanks.apply(mean, var)
        if self.track_running_stats:
            self._move_statistics(
                mean.detach(), var.detach(), dist.get_world_size() * values.numel() / values.shape[1]
            )
        scale = self.weight * torch.rsqrt(var + self.eps)
        normed = (values - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]
        return normed.to(hidden_state.dtype)

    @torch.no_grad()
    def _move_statistics(self, mean: Tensor, var: Tensor, count: float) -> None:
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        momentum = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(var * (count / (count - 1)), momentum)


def for_compilation(model: nn.Module) -> nn.Module:
    """Turn each plain BatchNorm2d of `model` into an [`EqualSyncBatchNorm2d`], in place, and return `model`."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d and module.affine and module.track_running_stats:
            module.__class__ = EqualSyncBatchNorm2d  # the same parameters, buffers and hooks
    return model
