"""Batch norms of several ranks: over their whole micro-batch, on any device (torch's own needs an accelerator), or each over its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from wtn_pretrain.errors import UserError


class _NormOverRanks(torch.autograd.Function):
    """Batch norm with the statistics of the samples of all ranks. Of the activations only the input is kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[B, C, Y, X] normalised, and what it was normalised with: mean [C], biased variance [C], count [] over all ranks."""
        channels = x.shape[1]
        # torch's own batch norm in two parts; `var_mean` takes forty times as long on channels-last images
        mean, variance = torch.ops.aten.batch_norm_update_stats(x.float(), None, None, 0.0)
        own = torch.cat([mean, variance, mean.new_tensor([x.numel() // channels])])
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, own, group=group)
        parts = torch.stack(gathered)
        # statistics of the parts joined (Chan, Golub and LeVeque 1979): no difference of large sums, the same on every rank
        means, variances, counts = parts[:, :channels], parts[:, channels:-1], parts[:, -1:]
        count = counts.sum()
        mean = (means * counts).sum(0) / count
        variance = ((variances + (means - mean).square()) * counts).sum(0) / count
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(variance + eps), count)
        ctx.group = group
        ctx.mark_non_differentiable(mean, variance, count)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, scale, count = ctx.saved_tensors
        given, inputs = gradients[0].float(), x.float()
        sums = torch.ops.aten.native_batch_norm_backward(given, inputs, weight, None, None, mean, scale, True, 0.0, [False, True, True])
        _, of_weight, of_bias = sums
        # every rank's loss depends on the statistics, so their gradients are summed
        shared = torch.cat([of_bias, of_weight])
        dist.all_reduce(shared, group=ctx.group)
        to_mean, to_variance = (shared / count).view(2, -1)
        factor = weight * scale
        # factor x (given - to_mean - to_variance x normalised input), its second half as a batch norm of variance one
        rest = F.batch_norm(inputs, mean, torch.ones_like(mean), -factor * to_variance * scale, -factor * to_mean, False, 0.0, 0.0)
        return rest.addcmul_(given, factor[:, None, None]).to(x.dtype), of_weight, of_bias, None, None


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose training statistics are those of the samples of all ranks of `group`; gradients cross the ranks too.

    Ranks may hold different numbers of samples. Same parameters, buffers and state as `nn.BatchNorm2d`; statistics in fp32.
    """

    group: dist.ProcessGroup | None = None
    """The ranks that share a micro-batch; None: all."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, Y, X] to [B, C, Y, X]."""
        if not self.training or not dist.is_initialized() or dist.get_world_size(self.group) == 1:
            return super().forward(x)
        # torch types them as optional, for norms without statistics, which these networks do not use
        tracked, running_mean, running_var, momentum = self.num_batches_tracked, self.running_mean, self.running_var, self.momentum
        if tracked is None or running_mean is None or running_var is None or momentum is None:
            raise RuntimeError("batch norm without running statistics is not supported")
        result, mean, variance, count = _NormOverRanks.apply(x, self.weight, self.bias, self.eps, self.group)
        with torch.no_grad():
            tracked += 1
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(variance * (count / (count - 1)), momentum)
        return result


def synchronise_batch_norm(network: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Turns every `nn.BatchNorm2d` of `network` into a `SyncBatchNorm2d` over `group`, in place; parameters stay the same objects."""
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
            setattr(module, "group", group)  # noqa: B010  (its class has just changed)


class RunningStatistics:
    """Those of batch norms that normalise with their own rank's samples: in evaluation and in checkpoints there is one network.

    What a rank's norm has seen moves its running mean and variance linearly, so the mean over ranks is what one norm would keep that
    saw the statistics of all ranks one after the other with a share of its momentum each.
    """

    def __init__(self, network: nn.Module, group: dist.ProcessGroup | None) -> None:
        """`network`: has batch norms, and keeps their buffers, in place. `group`: the ranks that see different samples; None: all."""
        norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        self._buffers = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var) if buffer is not None]
        self._group = group

    @torch.no_grad()
    def average(self) -> None:
        """Every rank's become the mean over the ranks, the same bits everywhere; one message."""
        flat = torch.cat(self._buffers)
        dist.all_reduce(flat, group=self._group)
        flat /= dist.get_world_size(self._group)
        torch._foreach_copy_(self._buffers, list(flat.split([buffer.numel() for buffer in self._buffers])))


@contextmanager
def enough_samples(key: str, remedy: str) -> Iterator[None]:
    """Within, a batch norm that learns from one value a channel (one sample, one pixel) is a user's mistake.

    Raises:
        UserError: names `key`, and ends with the `remedy`.
    """
    try:
        yield
    except ValueError as error:
        # torch's own words, for which it has no type of its own
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(f"{key}: a rank's pass is one sample, and of its one pixel a batch norm has no variance; {remedy}") from None
