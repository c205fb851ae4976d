"""Bias and exact GELU in one pass over memory, forward and backward."""
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wtn_pretrain.kernels.jit import blocks, jit, tl
from wtn_pretrain.kernels.linear import linear
from wtn_pretrain.kernels.live import live


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias), z Phi(z) with the normal distribution's Phi (Hendrycks and Gimpel 2016), not its tanh approximation.

    Args:
        x: [..., F], any float dtype, which is the result's.
        bias: [F], any float dtype.
    """
    if live("bias_gelu", x) == "triton":
        return _BiasGelu.apply(x, bias)
    return reference(x, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x weight' + bias): [..., D], [F, D] and [F] to [..., F]."""
    if live("bias_gelu", x) == "triton":
        return bias_gelu(linear(x, weight), bias)
    return F.gelu(linear(x, weight, bias))


def reference(x: Tensor, bias: Tensor) -> Tensor:
    """`bias_gelu` in plain torch."""
    return F.gelu(x + bias.to(x.dtype))


_ROWS, _COLUMNS = 16, 128
_GROUP = 256
"""Rows whose share of the bias's gradient is summed by one program; a multiple of `_ROWS`."""


@jit
def _forward(x, bias, y, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    at = row[:, None].to(tl.int64) * columns + column[None, :]
    shift = tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
    z = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + shift[None, :]
    tl.store(y + at, 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476)), mask=inside)


@jit
def _backward(grad, x, bias, of_x, sums, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    group = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    shift = tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for step in range(0, GROUP, ROWS):
        row = group * GROUP + step + tl.arange(0, ROWS)
        inside = (row[:, None] < rows) & (column[None, :] < columns)
        at = row[:, None].to(tl.int64) * columns + column[None, :]
        z = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + shift[None, :]
        # d/dz of z Phi(z): Phi(z) + z phi(z)
        slope = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
        of_z = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * slope
        tl.store(of_x + at, of_z, mask=inside)
        total += tl.sum(of_z, axis=0)
    tl.store(sums + group * columns + column, total, mask=column < columns)


class _BiasGelu(torch.autograd.Function):
    """The Triton form; keeps its input alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        x, bias = x.contiguous(), bias.contiguous()
        ctx.save_for_backward(x, bias)
        y = torch.empty_like(x)
        columns = bias.numel()
        rows = x.numel() // columns
        if rows:
            grid = (blocks(rows, _ROWS), blocks(columns, _COLUMNS))
            _forward[grid](x, bias, y, rows, columns, ROWS=_ROWS, COLUMNS=_COLUMNS)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, bias = ctx.saved_tensors
        grad = grad.contiguous()
        of_x = torch.empty_like(x)
        columns = bias.numel()
        rows = x.numel() // columns
        groups = blocks(rows, _GROUP)
        sums = torch.empty(groups, columns, device=x.device, dtype=torch.float32)
        if rows:
            grid = (groups, blocks(columns, _COLUMNS))
            _backward[grid](grad, x, bias, of_x, sums, rows, columns, ROWS=_ROWS, COLUMNS=_COLUMNS, GROUP=_GROUP)
        return of_x, sums.sum(0).to(bias.dtype)
