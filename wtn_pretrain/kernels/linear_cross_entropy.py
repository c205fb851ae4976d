"""A linear map to a vocabulary and the cross-entropy of what it gives, in chunks of rows: the logits are never whole.

The gradients of a sum of losses do not wait for what comes back: each chunk's are made in the forward pass, while its logits are
there, and only scaled in the backward pass (as Liger Kernel does; Hsu et al. 2024). Nothing is computed twice.
"""
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wtn_pretrain.kernels.chunks import at_once
from wtn_pretrain.kernels.jit import jit, power_of_two, tl
from wtn_pretrain.kernels.live import live
from wtn_pretrain.kernels.precision import accumulator_dtype, as_written, product_dtype


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore: int = -100, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the logits hidden @ weight.T + bias against `targets`; gradients to `hidden`, `weight` and `bias`.

    Logits are computed in the dtype of `hidden`, or autocast's, and the softmax and the sum over rows in fp32 (fp64 for fp64). The
    gradient of the weight is summed over chunks in fp32.

    Args:
        hidden: [N, D]; N may be 0.
        weight: [V, D].
        bias: [V].
        targets: [N] int64, 0 to V - 1, or `ignore`.
        label_smoothing: the share of each target that is spread evenly over the vocabulary, as in `F.cross_entropy`.

    Returns:
        The sum over the targets that count, fp32 (fp64 for fp64), and their number, int64.
    """
    kept = targets != ignore
    implementation = live("linear_cross_entropy", hidden)
    if implementation == "liger" and len(targets):
        return by_liger(hidden, weight, bias, targets, ignore, label_smoothing), kept.sum()
    if torch.compiler.is_compiling():
        return reference(hidden, weight, bias, targets, ignore, label_smoothing)
    step = partial(_rows_by_triton if implementation == "triton" else _rows_by_torch, smoothing=label_smoothing)
    return ChunkedCrossEntropy.apply(hidden, weight, bias, targets, kept, torch.is_grad_enabled(), step), kept.sum()


def reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore: int = -100, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` in plain torch, with all logits at once."""
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(accumulator_dtype(logits.dtype))
    loss = F.cross_entropy(logits, targets, ignore_index=ignore, reduction="sum", label_smoothing=label_smoothing)
    return loss, (targets != ignore).sum()


def by_liger(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore: int, label_smoothing: float) -> Tensor:
    """The sum of losses by Liger Kernel, which goes the same way."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy  # type: ignore[import-not-found]

    if not torch.is_grad_enabled():  # it makes gradients for whatever could take them
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    return liger_fused_linear_cross_entropy(
        hidden, weight, targets, bias, ignore_index=ignore, label_smoothing=label_smoothing, reduction="sum", accum_dtype=torch.float32
    )


CHUNK = 2**23, 2**26
"""Logits of a chunk, on the CPU and elsewhere: 32 MiB in fp32, 128 MiB in bf16, where larger products are faster."""
_BLOCK = 4096


@jit
def _rows(logits, targets, kept, losses, columns, smoothing, GRADIENT: tl.constexpr, SMOOTHED: tl.constexpr, BLOCK: tl.constexpr):
    # a row a program: its loss, and its logits turned into their gradient
    row = tl.program_id(0)
    start = row.to(tl.int64) * columns
    target = tl.load(targets + row)
    counts = tl.load(kept + row) != 0
    column = tl.arange(0, BLOCK)
    # maximum and sum of powers in one pass (Milakov and Gimelshein 2018), a running pair for each lane
    top = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    powers = tl.zeros([BLOCK], dtype=tl.float32)
    chosen = tl.zeros([BLOCK], dtype=tl.float32)
    level = tl.zeros([BLOCK], dtype=tl.float32)
    for begin in range(0, columns, BLOCK):
        at = begin + column
        value = tl.load(logits + start + at, mask=at < columns, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, value)
        # a lane that has seen nothing yet, or nothing but -inf, has no powers
        still = higher == float("-inf")
        powers = tl.where(still, 0.0, powers * tl.exp(top - higher) + tl.exp(value - higher))
        top = higher
        chosen += tl.where(at == target, value, 0.0)
        if SMOOTHED:
            level += tl.where(at < columns, value, 0.0)
    highest = tl.max(top, axis=0)
    total = tl.sum(powers * tl.exp(top - highest), axis=0)
    loss = tl.log(total) + highest - (1.0 - smoothing) * tl.sum(chosen, axis=0)
    if SMOOTHED:
        loss -= smoothing / columns * tl.sum(level, axis=0)
    # an impossible target must not pass for a loss: torch would stop there, a kernel cannot
    loss = tl.where((target >= 0) & (target < columns), loss, float("nan"))
    tl.store(losses + row, tl.where(counts, loss, 0.0))
    if GRADIENT:
        for begin in range(0, columns, BLOCK):
            at = begin + column
            value = tl.load(logits + start + at, mask=at < columns, other=0.0).to(tl.float32)
            gradient = tl.exp(value - highest) / total
            if SMOOTHED:
                gradient -= smoothing / columns
            gradient -= tl.where(at == target, 1.0 - smoothing, 0.0)
            tl.store(logits + start + at, tl.where(counts, gradient, 0.0), mask=at < columns)


def _rows_by_triton(logits: Tensor, targets: Tensor, kept: Tensor, gradient: bool, smoothing: float) -> tuple[Tensor, Tensor]:
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    block = min(_BLOCK, power_of_two(logits.shape[1]))
    _rows[(len(logits),)](
        logits, targets.contiguous(), kept.to(torch.int8), losses, logits.shape[1], smoothing,
        GRADIENT=gradient, SMOOTHED=smoothing > 0, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return losses.sum(), logits


def _rows_by_torch(logits: Tensor, targets: Tensor, kept: Tensor, gradient: bool, smoothing: float) -> tuple[Tensor, Tensor]:
    dtype = logits.dtype
    # in place from here on: one buffer of the chunk, in fp32
    logits = logits.to(accumulator_dtype(dtype))
    vocabulary = logits.shape[1]
    targets = targets.where(kept, 0)[:, None]
    top = logits.amax(1, keepdim=True)
    loss = (1 - smoothing) * (top - logits.gather(1, targets))
    if smoothing:
        loss += smoothing * (top - logits.mean(1, keepdim=True))
    total = logits.sub_(top).exp_().sum(1, keepdim=True)
    loss = (loss + total.log()).masked_fill_(~kept[:, None], 0).sum()
    if gradient:
        logits.div_(total)
        if smoothing:
            logits.sub_(smoothing / vocabulary)
        logits.scatter_add_(1, targets, torch.full_like(total, smoothing - 1)).masked_fill_(~kept[:, None], 0)
    return loss, logits.to(dtype)


RowsStep = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
"""Of logits [rows, V], targets [rows], which of them count [rows] and whether a gradient is needed: the sum of the losses, and the
gradient of the logits where it is, in place or not."""


class ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of losses of hidden @ weight.T + bias, by a `RowsStep` for a chunk of rows at a time, gradients included."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        kept: Tensor,
        learns: bool,
        step: RowsStep,
    ) -> Tensor:
        dtype = product_dtype(hidden)
        to_hidden, to_weight, to_bias = (learns and needed for needed in ctx.needs_input_grad[:3])
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        vocabulary = len(weight)
        rows = max(1, at_once(hidden, *CHUNK) // vocabulary)
        accumulator = accumulator_dtype(dtype)
        with as_written(hidden):
            hidden, weight = hidden.detach(), weight.detach().to(dtype)
            shift = None if bias is None else bias.detach().to(dtype)
            of_hidden = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if to_hidden else None
            of_weight = torch.zeros(weight.shape, dtype=accumulator, device=hidden.device) if to_weight else None
            of_bias = torch.zeros(vocabulary, dtype=accumulator, device=hidden.device) if to_bias else None
            loss = torch.zeros((), dtype=accumulator, device=hidden.device)
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                own = hidden[part].to(dtype)
                own_loss, of_logits = step(F.linear(own, weight, shift), targets[part], kept[part], to_hidden or to_weight or to_bias)
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
