"""Batch norm over the whole micro-batch of several ranks, on any device (torch's own needs an accelerator)."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over the ranks of a group; every rank's loss depends on it, so its gradient is summed as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose training statistics are those of the samples of all ranks of `group`; gradients cross the ranks too.

    Ranks may hold different numbers of samples. Same parameters, buffers and state as `nn.BatchNorm2d`.
    """

    group: dist.ProcessGroup | None = None
    """The ranks that share a micro-batch; None: all."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, Y, X] to [B, C, Y, X]."""
        if not self.training or not dist.is_initialized() or dist.get_world_size(self.group) == 1:
            return super().forward(x)
        # statistics in single precision, as torch's own batch norm keeps them under autocast
        dtype, x = x.dtype, x.float()
        own = x.new_tensor([x.numel() // x.shape[1]])
        sums = _SumOverRanks.apply(torch.cat([x.sum(dim=(0, 2, 3)), own]), self.group)
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = x - mean[:, None, None]
        variance = _SumOverRanks.apply(centred.square().sum(dim=(0, 2, 3)), self.group) / count
        # torch types them as optional, for norms without statistics, which these networks do not use
        tracked, running_mean, running_var, momentum = self.num_batches_tracked, self.running_mean, self.running_var, self.momentum
        if tracked is None or running_mean is None or running_var is None or momentum is None:
            raise RuntimeError("batch norm without running statistics is not supported")
        with torch.no_grad():
            tracked += 1
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(variance * (count / (count - 1)), momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(dtype)


def synchronise_batch_norm(network: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Turns every `nn.BatchNorm2d` of `network` into a `SyncBatchNorm2d` over `group`, in place; parameters stay the same objects."""
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
            setattr(module, "group", group)  # noqa: B010  (its class has just changed)
