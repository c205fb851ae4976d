"""Bias, dropout, residual and LayerNorm in one pass over memory, forward and backward.

The Triton form stores no dropout mask: element (row, column) is kept if a counter-based generator, Philox 4x32-10 (Salmon et al. 2011),
gives it a number of at least p, and the backward pass draws the same numbers from the same seed. The seed comes from torch's generator
of the CPU, so that a recomputed forward pass, whose random state torch restores, repeats it, and no device is waited for.
"""
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wtn_pretrain.kernels.dropout import draw_seed, dropout
from wtn_pretrain.kernels.jit import blocks, jit, power_of_two, tl
from wtn_pretrain.kernels.live import live
from wtn_pretrain.kernels.precision import as_written

WIDEST = 16384
"""Columns up to which a row is held by one program; wider ones take the plain form."""
PROGRAMS = 512
"""Programs of the backward pass, each of which sums the gradients of weights over its share of the rows."""


def dropout_add_norm(
    x: Tensor, bias: Tensor | None, residual: Tensor, weight: Tensor, norm_bias: Tensor, eps: float, p: float, training: bool
) -> tuple[Tensor, Tensor]:
    """What stands between two sublayers of an encoder: sum = residual + dropout(x + bias), normed = LayerNorm(sum).

    A post-LN layer goes on with `normed` alone; a pre-LN one feeds `normed` to the next sublayer and `sum` to the next residual.

    Args:
        x, residual: [..., D].
        bias, weight, norm_bias: [D].
        eps: what LayerNorm adds to the variance.
        p: the probability with which an element of x + bias is dropped when `training`; the others are scaled by 1 / (1 - p).

    Returns:
        normed and sum, [..., D] in the wider dtype of `x` and `residual`; sums and statistics are computed in fp32 at least.
    """
    p = p if training else 0.0
    implementation = live("dropout_add_norm", x)
    if implementation == "triton" and x.shape[-1] <= WIDEST and p < 1:
        return _DropoutAddNorm.apply(x, bias, residual, weight, norm_bias, eps, p)
    total = _added(x, bias, residual, p)
    if implementation == "apex":
        return apex_norm(total, weight, norm_bias, eps), total
    return _norm(total, weight, norm_bias, eps), total


def reference(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    p: float,
    training: bool,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`dropout_add_norm` in plain torch, whose dropout draws from torch's generator.

    Args:
        kept: bool [..., D], what the dropout keeps, instead of drawing it.
    """
    total = _added(x, bias, residual, p if training else 0.0, kept)
    return _norm(total, weight, norm_bias, eps), total


def kept_by(seed: int, rows: int, columns: int, p: float) -> Tensor:
    """What the Triton form's dropout keeps, bool [rows, columns] on the CPU, computed here by torch from the generator's definition.

    Element (r, c) gets the word c mod 4 of Philox 4x32-10 at the counter (c // 4, r, 0, 0) under the key `seed`; its upper 24 bits
    are a number from 0 to 1, and it is kept if that is at least p.
    """
    quarter, row = torch.meshgrid(torch.arange(blocks(columns, 4)), torch.arange(rows), indexing="xy")
    words = [quarter, row, torch.zeros_like(row), torch.zeros_like(row)]
    low, high = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        (first, zeroth), (third, second) = _product(words[0], 0xD2511F53), _product(words[2], 0xCD9E8D57)
        words = [third ^ words[1] ^ low, second, first ^ words[3] ^ high, zeroth]
        low, high = (low + 0x9E3779B9) & _WORD, (high + 0xBB67AE85) & _WORD
    drawn = (torch.stack(words, -1).flatten(1)[:, :columns] >> 8).float() * 2.0**-24
    return drawn >= p


_WORD = 2**32 - 1


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of a product of 32-bit words, in int64 that must not overflow."""
    lower = (word & 0xFFFF) * factor
    upper = (word >> 16) * factor + (lower >> 16)
    return upper >> 16, (upper & 0xFFFF) << 16 | lower & 0xFFFF


def _added(x: Tensor, bias: Tensor | None, residual: Tensor, p: float, kept: Tensor | None = None) -> Tensor:
    if bias is not None:
        x = x + bias.to(x.dtype)
    if kept is not None:
        x = x.masked_fill(~kept, 0) / (1 - p)
    elif p:
        x = dropout(x, p)
    return residual + x


def _norm(total: Tensor, weight: Tensor, norm_bias: Tensor, eps: float) -> Tensor:
    with as_written(total):
        return F.layer_norm(total, total.shape[-1:], weight.to(total.dtype), norm_bias.to(total.dtype), eps)


def apex_norm(total: Tensor, weight: Tensor, norm_bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last axis by NVIDIA's apex."""
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine  # type: ignore[import-not-found]

    with as_written(total):
        return fused_layer_norm_affine(total, weight.to(total.dtype), norm_bias.to(total.dtype), tuple(total.shape[-1:]), eps)


@jit
def _kept(seed, row, p, BLOCK: tl.constexpr):
    # four columns share a counter: the generator's four words are all used
    quarter = tl.arange(0, BLOCK // 4)
    a, b, c, d = tl.philox(seed, quarter, quarter * 0 + row, quarter * 0, quarter * 0)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK])
    # through int32: 24 bits fit, and every device converts those
    return (words >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08 >= p


@jit
def _forward(
    x, bias, residual, weight, norm_bias, total, normed, means, scales, columns, eps, seed, p,
    HAS_BIAS: tl.constexpr, DROPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    at = row.to(tl.int64) * columns + column
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if DROPS:
        value = tl.where(_kept(seed, row, p, BLOCK), value / (1.0 - p), 0.0)
    value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    # what is normalised is the sum as it is stored, from which the backward pass starts
    value = value.to(total.dtype.element_ty).to(tl.float32)
    tl.store(total + at, value, mask=inside)
    mean = tl.sum(value, axis=0) / columns
    centred = tl.where(inside, value - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / columns + eps)
    tl.store(means + row, mean)
    tl.store(scales + row, scale)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(norm_bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at, centred * scale * gain + shift, mask=inside)


@jit
def _backward(
    of_normed, of_total, total, weight, means, scales, of_residual, of_x, weight_sums, shift_sums, bias_sums,
    rows, share, columns, seed, p,
    HAS_TOTAL: tl.constexpr, HAS_BIAS: tl.constexpr, DROPS: tl.constexpr, TWO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    of_weight = tl.zeros([BLOCK], dtype=tl.float32)
    of_shift = tl.zeros([BLOCK], dtype=tl.float32)
    of_bias = tl.zeros([BLOCK], dtype=tl.float32)
    for step in range(share):
        row = program * share + step
        here = inside & (row < rows)
        at = row.to(tl.int64) * columns + column
        scale = tl.load(scales + row, mask=row < rows, other=0.0)
        mean = tl.load(means + row, mask=row < rows, other=0.0)
        normal = tl.where(here, (tl.load(total + at, mask=here, other=0.0).to(tl.float32) - mean) * scale, 0.0)
        given = tl.load(of_normed + at, mask=here, other=0.0).to(tl.float32)
        of_normal = given * gain
        along = tl.sum(of_normal * normal, axis=0) / columns
        level = tl.sum(of_normal, axis=0) / columns
        of_sum = (of_normal - along * normal - level) * scale
        if HAS_TOTAL:
            of_sum += tl.load(of_total + at, mask=here, other=0.0).to(tl.float32)
        tl.store(of_residual + at, of_sum, mask=here)
        of_weight += given * normal
        of_shift += given
        if DROPS:
            of_sum = tl.where(_kept(seed, row, p, BLOCK), of_sum / (1.0 - p), 0.0)
        if TWO:
            tl.store(of_x + at, of_sum, mask=here)
        if HAS_BIAS:
            of_bias += tl.where(here, of_sum, 0.0)
    part = program.to(tl.int64) * columns + column
    tl.store(weight_sums + part, of_weight, mask=inside)
    tl.store(shift_sums + part, of_shift, mask=inside)
    if HAS_BIAS:
        tl.store(bias_sums + part, of_bias, mask=inside)


def _warps(block: int) -> int:
    return 4 if block <= 2048 else 8 if block <= 8192 else 16


class _DropoutAddNorm(torch.autograd.Function):
    """The Triton form; keeps the sum, and a mean and a scale a row, for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, residual: Tensor, weight: Tensor, norm_bias: Tensor, eps: float, p: float
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        shape, columns = residual.shape, residual.shape[-1]
        ctx.p, ctx.dtypes = p, (x.dtype, residual.dtype)
        ctx.bias_dtype, ctx.shift_dtype = None if bias is None else bias.dtype, norm_bias.dtype
        ctx.seed = draw_seed() if p else 2**32 + 1
        x, residual, weight, norm_bias = x.contiguous(), residual.contiguous(), weight.contiguous(), norm_bias.contiguous()
        dtype = torch.promote_types(x.dtype, residual.dtype)
        total, normed = (torch.empty(shape, dtype=dtype, device=x.device) for _ in range(2))
        rows, block = total.numel() // columns, max(4, power_of_two(columns))
        means, scales = torch.empty(2, rows, dtype=torch.float32, device=x.device)
        if rows:
            _forward[(rows,)](
                x, weight if bias is None else bias.contiguous(), residual, weight, norm_bias, total, normed, means, scales,
                columns, eps, ctx.seed, p, HAS_BIAS=bias is not None, DROPS=p > 0, BLOCK=block, num_warps=_warps(block),
            )  # fmt: skip
        ctx.save_for_backward(total, weight, means, scales)
        return normed, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_normed: Tensor | None, of_total: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, means, scales = ctx.saved_tensors
        columns = total.shape[-1]
        rows, block = total.numel() // columns, max(4, power_of_two(columns))
        of_normed = torch.zeros_like(total) if of_normed is None else of_normed.contiguous()
        share = max(1, blocks(rows, PROGRAMS))
        programs = blocks(rows, share)
        sums = torch.empty(3, programs, columns, dtype=torch.float32, device=total.device)
        dtype, residual_dtype = ctx.dtypes
        of_residual = torch.empty_like(total, dtype=residual_dtype)
        # without dropout x and the residual have one gradient, unless their dtypes differ
        two = ctx.p > 0 or dtype is not residual_dtype
        of_x = torch.empty_like(total, dtype=dtype) if two else of_residual
        has_bias = ctx.bias_dtype is not None
        if rows:
            _backward[(programs,)](
                of_normed, of_normed if of_total is None else of_total.contiguous(), total, weight, means, scales, of_residual, of_x,
                *sums, rows, share, columns, ctx.seed, ctx.p,
                HAS_TOTAL=of_total is not None, HAS_BIAS=has_bias, DROPS=ctx.p > 0, TWO=two, BLOCK=block, num_warps=_warps(block),
            )  # fmt: skip
        of_weight, of_shift = sums[0].sum(0).to(weight.dtype), sums[1].sum(0).to(ctx.shift_dtype)
        of_bias = sums[2].sum(0).to(ctx.bias_dtype) if has_bias else None
        return of_x, of_bias, of_residual, of_weight, of_shift, None, None
