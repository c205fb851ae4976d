"""A linear map to a vocabulary whose rows are divided over tensor ranks, and the cross-entropy of what it gives, in chunks of rows.

Each rank has the logits of its part of the vocabulary, of one chunk at a time, and they are never brought together: of every row the
ranks exchange three numbers, from which all know its loss. As in `wtn_pretrain.kernels.linear_cross_entropy` the gradients are made in
the forward pass, while the logits are there, and only scaled in the backward pass.
"""

from functools import partial

import torch
from torch import Tensor

from wtn_pretrain.kernels.linear_cross_entropy import ChunkedCrossEntropy
from wtn_pretrain.kernels.precision import accumulator_dtype
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
    # ranks have as many rows of the vocabulary, and so as many chunks: they meet in each
    step = partial(_rows, ranks=ranks)
    return ChunkedCrossEntropy.apply(ranks.copy(hidden), weight, bias, targets, kept, torch.is_grad_enabled(), step), kept.sum()


def _rows(logits: Tensor, targets: Tensor, kept: Tensor, gradient: bool, ranks: Ranks) -> tuple[Tensor, Tensor]:
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
