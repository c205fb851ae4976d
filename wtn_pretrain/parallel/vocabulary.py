"""A linear map to a vocabulary whose rows are divided over tensor ranks, and the cross-entropy of what it gives, in chunks of rows.

Each rank has the logits of its part of the vocabulary, of one chunk at a time, and they are never brought together: of every row the
ranks exchange three numbers, from which all know its loss. As in `wtn_pretrain.kernels.linear_cross_entropy` the gradients are made in
the forward pass, while the logits are there, and only scaled in the backward pass.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wtn_pretrain.kernels import linear_cross_entropy as undivided
from wtn_pretrain.kernels.chunks import at_once
from wtn_pretrain.kernels.precision import accumulator_dtype, as_written, product_dtype
from wtn_pretrain.parallel.tensor import Ranks


def vocabulary_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, ranks: Ranks, ignore: int = -100
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the logits hidden @ weight.T + bias over the vocabulary of all ranks against `targets`.

    Logits are computed in the dtype of `hidden`, or autocast's, and the softmax and the sums over rows and chunks in fp32 (fp64 for
    fp64). Every rank of the group must call it, with as many rows.

    Args:
        hidden: [N, D], alike on all ranks; N may be 0. Its gradient is the sum over the ranks.
        weight: [V / ranks, D], this rank's rows.
        bias: [V / ranks].
        targets: [N] int64, rows of the whole vocabulary, or `ignore`; alike on all ranks.

    Returns:
        The sum over the targets that count, fp32 (fp64 for fp64), and their number, int64; both the same on every rank.
    """
    kept = targets != ignore
    return _DividedCrossEntropy.apply(ranks.copy(hidden), weight, bias, targets, kept, ranks, torch.is_grad_enabled()), kept.sum()


def _rows(logits: Tensor, targets: Tensor, kept: Tensor, ranks: Ranks, gradient: bool) -> tuple[Tensor, Tensor]:
    """The sum of losses of a chunk [rows, V / ranks], and its logits turned into their gradient."""
    dtype, columns = logits.dtype, logits.shape[1]
    # in place from here on: one buffer of the chunk, in fp32
    logits = logits.to(accumulator_dtype(dtype))
    local = (targets - ranks.index * columns)[:, None]
    mine = (local >= 0) & (local < columns) & kept[:, None]
    local = local.where(mine, 0)
    picked = logits.gather(1, local).masked_fill_(~mine, 0)
    top = logits.amax(1, keepdim=True)
    powers = logits.sub_(top).exp_().sum(1, keepdim=True)
    # what all ranks have found of each row: [ranks, 3, rows, 1]
    tops, sums, chosen = _gathered(torch.stack([top, powers, picked]), ranks).unbind(1)
    highest = tops.amax(0)
    total = (sums * (tops - highest).exp()).sum(0)
    loss = (total.log() + highest - chosen.sum(0)).masked_fill(~kept[:, None], 0).sum()
    if gradient:
        logits.mul_((top - highest).exp() / total)
        logits.scatter_add_(1, local, -mine.to(logits.dtype)).masked_fill_(~kept[:, None], 0)
    return loss, logits.to(dtype)


def _gathered(values: Tensor, ranks: Ranks) -> Tensor:
    parts = [torch.empty_like(values) for _ in range(ranks.count)]
    ranks.all_gather(parts, values)
    return torch.stack(parts)


class _DividedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, kept: Tensor, ranks: Ranks, learns: bool
    ) -> Tensor:
        dtype = product_dtype(hidden)
        accumulator = accumulator_dtype(dtype)
        to_hidden, to_weight, to_bias = (learns and needed for needed in ctx.needs_input_grad[:3])
        ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype
        # as many chunks on every rank: they meet in each
        rows = max(1, at_once(hidden, *undivided.CHUNK) // len(weight))
        with as_written(hidden):
            hidden, weight, shift = hidden.detach(), weight.detach().to(dtype), bias.detach().to(dtype)
            of_hidden = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if to_hidden else None
            of_weight = torch.zeros(weight.shape, dtype=accumulator, device=hidden.device) if to_weight else None
            of_bias = torch.zeros(len(weight), dtype=accumulator, device=hidden.device) if to_bias else None
            loss = torch.zeros((), dtype=accumulator, device=hidden.device)
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                own = hidden[part].to(dtype)
                own_loss, of_logits = _rows(
                    F.linear(own, weight, shift), targets[part], kept[part], ranks, to_hidden or to_weight or to_bias
                )
                loss += own_loss
                if of_hidden is not None:
                    torch.mm(of_logits, weight, out=of_hidden[part])
                if of_weight is not None:
                    if dtype is accumulator:
                        of_weight.addmm_(of_logits.T, own)
                    else:
                        of_weight += of_logits.T @ own
                if of_bias is not None:
                    of_bias += of_logits.sum(0, dtype=accumulator)
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # not in place: a graph that is kept may be gone through again
        made = (
            (gradient * grad).to(dtype) if gradient is not None else None
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*made, None, None, None, None)
