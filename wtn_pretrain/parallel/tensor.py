"""Tensor parallelism, as Megatron-LM divides layers (Shoeybi et al. 2019), with sequence-parallel regions (Korthikanti et al. 2022).

Between two divided layers a hidden state [B, S, D] is whole on every rank of a tensor group, or, in sequence-parallel regions, each
rank has its part of the positions [B, S / ranks, D]. `Ranks.enter` makes it whole for a column-parallel layer, `Ranks.leave` sums what a
row-parallel layer's parts give. Both are autograd functions: the backward pass of one is the other.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from wtn_pretrain.device import device
from wtn_pretrain.kernels.dropout import Dropout
from wtn_pretrain.kernels.linear import linear

SEQUENCE = 1
"""The axis of positions."""


class Ranks:
    """The ranks of a tensor group, and how hidden states pass between them."""

    def __init__(self, group: dist.ProcessGroup, sequence: bool = False) -> None:
        """`sequence`: norms and dropout work on a part of the positions each."""
        self.group, self.sequence = group, sequence
        self.count, self.index = dist.get_world_size(group), dist.get_rank(group)

    def all_reduce(self, x: Tensor, later: bool = False) -> dist.Work | None:
        """Sums `x` over the ranks, in place. `later`: what is returned has to be waited for."""
        return dist.all_reduce(x, group=self.group, async_op=later)

    def all_gather(self, parts: list[Tensor], x: Tensor, later: bool = False) -> dist.Work | None:
        """Fills `parts` with every rank's `x`."""
        return dist.all_gather(parts, x, group=self.group, async_op=later)

    def reduce_scatter(self, mine: Tensor, parts: list[Tensor], later: bool = False) -> dist.Work | None:
        """Fills `mine` with the sum of what every rank has for this one."""
        return dist.reduce_scatter(mine, parts, group=self.group, async_op=later)

    def enter(self, hidden: Tensor) -> Tensor:
        """The whole hidden state, on the way into a column-parallel layer."""
        return _Gather.apply(hidden, self) if self.sequence else _Copy.apply(hidden, self)

    def leave(self, partial: Tensor) -> Tensor:
        """The sum of all ranks' `partial` [B, S, D], on the way out of a row-parallel layer."""
        return _Scatter.apply(partial, self) if self.sequence else _Reduce.apply(partial, self)

    def divide(self, hidden: Tensor) -> Tensor:
        """This rank's part of the positions of a hidden state that all have; as it is without sequence parallelism."""
        return _Divide.apply(hidden, self) if self.sequence else hidden

    def collect(self, hidden: Tensor) -> Tensor:
        """The whole hidden state for work that all ranks then do alike; as it is without sequence parallelism."""
        return _Collect.apply(hidden, self) if self.sequence else hidden

    def copy(self, hidden: Tensor) -> Tensor:
        """What all ranks have alike, on the way into a divided layer: its gradient is the sum over the ranks."""
        return _Copy.apply(hidden, self)

    def shared(self, parameter: Tensor) -> Tensor:
        """A parameter that all ranks have, for use on a part of the positions: its gradient is the sum over the parts."""
        return _Copy.apply(parameter, self) if self.sequence else parameter

    def part(self, whole: Tensor, dim: int) -> Tensor:
        """This rank's part of a whole tensor."""
        return whole.chunk(self.count, dim)[self.index]

    @contextmanager
    def own_randomness(self) -> Iterator[None]:
        """Within, random numbers differ from rank to rank, for dropout of what each rank has alone.

        The seed comes from the common generator, so that all is a function of its state: a recomputed forward pass repeats it.
        """
        seed = int(torch.randint(2**62, ()))
        with torch.random.fork_rng([] if device().type == "cpu" else [device().index or 0]):
            torch.manual_seed(seed + self.index)
            yield


def mark(parameter: Tensor, dim: int, ranks: Ranks) -> None:
    """Says that `parameter` is this rank's part, along `dim`, of a larger one."""
    # DeepSpeed adds up the norms of gradients over the ranks for those that carry this flag
    parameter.model_parallel = True  # type: ignore[attr-defined]
    parameter.tensor_parallel_dim = dim  # type: ignore[attr-defined]
    parameter.tensor_parallel_group = ranks.group  # type: ignore[attr-defined]


def whole(parameter: Tensor, value: Tensor | None = None) -> Tensor:
    """The whole of a marked parameter, or of a `value` shaped like it; one that is not marked is whole. All of its group must call it."""
    mine = (parameter if value is None else value).detach()
    dim = getattr(parameter, "tensor_parallel_dim", None)
    if dim is None:
        return mine
    group = parameter.tensor_parallel_group  # type: ignore[attr-defined]
    parts = [torch.empty_like(mine, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine.contiguous(), group=group)
    return torch.cat(parts, dim)


class ColumnLinear(nn.Module):
    """This rank's part of a linear layer whose outputs are divided; `wtn_pretrain.parallel.columns` multiplies by it."""

    def __init__(self, linear: nn.Linear, ranks: Ranks) -> None:
        super().__init__()
        self.weight = _shard(linear.weight, 0, ranks)
        self.bias = _shard(linear.bias, 0, ranks)


class RowLinear(nn.Module):
    """A linear layer whose inputs are divided: this rank's x [..., F / ranks] -> [..., D], summed over the ranks."""

    def __init__(self, linear: nn.Linear, ranks: Ranks) -> None:
        super().__init__()
        self._ranks = ranks
        self.weight = _shard(linear.weight, 1, ranks)
        self.bias = nn.Parameter(linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        # the bias once, not once a rank
        return self._ranks.leave(linear(x, self.weight)) + self._ranks.shared(self.bias)


class SharedNorm(nn.LayerNorm):
    """A LayerNorm that may see a part of the positions."""

    def __init__(self, norm: nn.LayerNorm, ranks: Ranks) -> None:
        super().__init__(norm.normalized_shape, norm.eps)
        self.load_state_dict(norm.state_dict())
        self._ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self._ranks.shared(self.weight), self._ranks.shared(self.bias), self.eps)


class PartDropout(Dropout):
    """Dropout of a hidden state of which each rank may have a part."""

    def __init__(self, dropout: nn.Dropout, ranks: Ranks) -> None:
        super().__init__(dropout.p)
        self._ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        with self._ranks.own_randomness() if self._ranks.sequence else nullcontext():
            return super().forward(x)


class VocabularyEmbedding(nn.Module):
    """An embedding whose rows are divided: ids [B, S] -> [B, S, D], summed over the ranks."""

    def __init__(self, embedding: nn.Embedding, ranks: Ranks) -> None:
        super().__init__()
        self._ranks = ranks
        self.weight = _shard(embedding.weight, 0, ranks)

    def forward(self, ids: Tensor) -> Tensor:
        local = ids - self._ranks.index * len(self.weight)
        mine = (local >= 0) & (local < len(self.weight))
        found = F.embedding(local.where(mine, 0), self.weight)
        return _Reduce.apply(found.masked_fill(~mine[..., None], 0), self._ranks)


def _shard(parameter: Tensor, dim: int, ranks: Ranks) -> nn.Parameter:
    shard = nn.Parameter(ranks.part(parameter.detach(), dim).clone(memory_format=torch.contiguous_format))
    mark(shard, dim, ranks)
    return shard


def _gathered(x: Tensor, ranks: Ranks) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ranks.count)]
    ranks.all_gather(parts, x.contiguous())
    return torch.cat(parts, SEQUENCE)


def _summed(x: Tensor, ranks: Ranks) -> Tensor:
    # not in place: autograd may still need what it was made from
    total = x.clone(memory_format=torch.contiguous_format)
    ranks.all_reduce(total)
    return total


def _summed_part(x: Tensor, ranks: Ranks) -> Tensor:
    parts = [part.contiguous() for part in x.chunk(ranks.count, SEQUENCE)]
    mine = torch.empty_like(parts[ranks.index])
    ranks.reduce_scatter(mine, parts)
    return mine


class _Copy(torch.autograd.Function):
    """Forward: nothing; backward: the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.ranks), None


class _Reduce(torch.autograd.Function):
    """Forward: the sum over the ranks; backward: nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        return _summed(x, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    """Forward: all positions from the parts; backward: this rank's part of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return _gathered(x, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed_part(grad, ctx.ranks), None


class _Scatter(torch.autograd.Function):
    """Forward: this rank's part of the sum; backward: all positions from the parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return _summed_part(x, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gathered(grad, ctx.ranks), None


class _Divide(torch.autograd.Function):
    """Forward: this rank's part of what all have; backward: all positions from the parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.part(x, SEQUENCE).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gathered(grad, ctx.ranks), None


class _Collect(torch.autograd.Function):
    """Forward: all positions from the parts; backward: this rank's part of what all have alike."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return _gathered(x, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.part(grad, SEQUENCE).contiguous(), None
