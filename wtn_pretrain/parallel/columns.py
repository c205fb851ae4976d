"""Column-parallel linear layers that read one hidden state, with their communication beside their products (Korthikanti et al. 2022).

Where positions are divided, the whole hidden state is there while it is multiplied and not kept: the backward pass gathers it again, while
it multiplies what does not need it. The gradient of the hidden state is summed over the ranks while those of the weights are computed.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from wtn_pretrain.kernels.linear import linear
from wtn_pretrain.kernels.precision import as_written, product_dtype
from wtn_pretrain.parallel.tensor import SEQUENCE, Ranks


def columns(x: Tensor, layers: Sequence[tuple[Tensor, Tensor | None]], ranks: Ranks) -> tuple[Tensor, ...]:
    """What each of `layers` gives of the whole hidden state. Every rank of the group must call it.

    Products, and what passes between the ranks, are in autocast's dtype, or that of `x`.

    Args:
        x: [B, S, D], or with divided positions [B, S / ranks, D], this rank's.
        layers: this rank's weight [F / ranks, D] and bias [F / ranks], or None, of each.

    Returns:
        [B, S, F / ranks] of each.
    """
    if torch.compiler.is_compiling():
        # the compiler sees into plain operations alone
        whole = ranks.enter(x)
        return tuple(linear(whole, weight, bias) for weight, bias in layers)
    return _Columns.apply(x, ranks, *(tensor for layer in layers for tensor in layer))


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, *layers: Tensor | None) -> tuple[Tensor, ...]:
        dtype = product_dtype(x)
        ctx.ranks, ctx.dtypes = ranks, (x.dtype, [None if tensor is None else tensor.dtype for tensor in layers])
        with as_written(x):
            x = x.to(dtype)
            weights, biases = ([None if tensor is None else tensor.to(dtype) for tensor in layers[start::2]] for start in (0, 1))
            whole = _Gathering(x, ranks).wait()
            made = tuple(linear(whole, weight, bias) for weight, bias in zip(weights, biases, strict=True) if weight is not None)
        ctx.save_for_backward(x, *weights)
        return made

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        ranks, (x_dtype, dtypes) = ctx.ranks, ctx.dtypes
        with as_written(x):
            gathering = _Gathering(x, ranks)
            rows = [gradient.flatten(0, -2) for gradient in gradients]
            of_whole = rows[0] @ weights[0]
            for row, weight in zip(rows[1:], weights[1:], strict=True):
                of_whole.addmm_(row, weight)
            whole = gathering.wait().flatten(0, -2)
            summing = _Summing(of_whole.view(*gradients[0].shape[:-1], -1), ranks)
            found: list[Tensor | None] = []
            for row, of_weight, of_bias in zip(rows, dtypes[::2], dtypes[1::2], strict=True):
                found += [(row.t() @ whole).to(of_weight), None if of_bias is None else row.sum(0).to(of_bias)]
            return summing.wait().to(x_dtype), None, *found


class _Gathering:
    """All positions from the parts, on their way."""

    def __init__(self, x: Tensor, ranks: Ranks) -> None:
        self._parts: list[Tensor] = [x]
        self._work: dist.Work | None = None
        if ranks.sequence:
            x = x.contiguous()
            self._parts = [torch.empty_like(x) for _ in range(ranks.count)]
            self._work = ranks.all_gather(self._parts, x, later=True)

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
        return self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts, SEQUENCE)


class _Summing:
    """The sum over the ranks, of divided positions this rank's part, on its way. `x` is given away."""

    def __init__(self, x: Tensor, ranks: Ranks) -> None:
        self._work: dist.Work | None
        if ranks.sequence:
            # kept until it has been sent
            self._given = [part.contiguous() for part in x.chunk(ranks.count, SEQUENCE)]
            self._sum = torch.empty_like(self._given[ranks.index])
            self._work = ranks.reduce_scatter(self._sum, self._given, later=True)
        else:
            self._sum = x
            self._work = ranks.all_reduce(x, later=True)

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
        return self._sum
