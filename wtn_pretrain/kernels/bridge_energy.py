"""The squared distance of a bridged student from its teacher, in chunks of rows: what the bridge gives is never stored whole.

The teacher is D wide and the student d < D. Plain autograd keeps several tensors of the teacher's size; this keeps the gradients
alone, which are of the student's: each chunk's are made in the forward pass and only scaled in the backward pass. The distance is
taken as it is written, |E h - t|^2. Its expansion h'E'Eh - 2 h'E't + |t|^2 would never be D wide at all, but it is a small
difference of large numbers once the student has learned: in bf16 nothing of it would be left.
"""
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

from wtn_pretrain.kernels.chunks import at_once
from wtn_pretrain.kernels.jit import jit, power_of_two, tl
from wtn_pretrain.kernels.live import live
from wtn_pretrain.kernels.precision import accumulator_dtype, as_written, product_dtype


def bridge_energy(
    hidden: Tensor, expand: Tensor | None, target: Tensor, mask: Tensor | None = None, channel_axis: int = -1
) -> tuple[Tensor, Tensor]:
    """The energy of what separates a student from its teacher, and the teacher's own: sum |E h - t|^2 and sum |t|^2.

    The product E h is computed in the dtype of `hidden`, or autocast's; differences and sums in fp32 (fp64 for fp64).

    Args:
        hidden: the student's, [..., d], or with d at `channel_axis`.
        expand: E [D, d]; None where d = D and the student answers directly.
        target: the teacher's, [..., D]; no gradient goes to it.
        mask: bool, broadcastable to the positions [...] of a `hidden` whose width is last: those that count; None: all.

    Returns:
        Two scalars, fp32 (fp64 for fp64). Gradients of the first go to `hidden` and `expand`.
    """
    implementation = live("bridge_energy", hidden)
    if torch.compiler.is_compiling():
        return reference(hidden, expand, target, mask, channel_axis)
    return _BridgeEnergy.apply(hidden, expand, target, mask, channel_axis, torch.is_grad_enabled(), implementation == "triton")


def reference(
    hidden: Tensor, expand: Tensor | None, target: Tensor, mask: Tensor | None = None, channel_axis: int = -1
) -> tuple[Tensor, Tensor]:
    """`bridge_energy` in plain torch, with all of E h at once."""
    hidden, target = hidden.movedim(channel_axis, -1), target.detach().movedim(channel_axis, -1)
    if expand is not None:
        hidden = hidden @ expand.T
    dtype = accumulator_dtype(hidden.dtype)
    target = target.to(dtype)
    error, energy = (hidden.to(dtype) - target).square(), target.square()
    if mask is not None:
        error, energy = error * mask[..., None], energy * mask[..., None]
    return error.sum(), energy.sum()


CHUNK = 2**21, 2**25
"""Elements of a chunk of E h, on the CPU, whose caches hold about as many, and elsewhere."""
_BLOCK = 2048


@jit
def _rows(answer, target, mask, of_answer, tops, bottoms, columns, MASKED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    # a row a program: its two energies, and half the gradient of the first
    row = tl.program_id(0)
    start = row.to(tl.int64) * columns
    column = tl.arange(0, BLOCK)
    counts = row >= 0
    if MASKED:
        counts = tl.load(mask + row) != 0
    top = tl.zeros([BLOCK], dtype=tl.float32)
    bottom = tl.zeros([BLOCK], dtype=tl.float32)
    for begin in range(0, columns, BLOCK):
        at = begin + column
        here = (at < columns) & counts
        taught = tl.load(target + start + at, mask=here, other=0.0).to(tl.float32)
        error = tl.load(answer + start + at, mask=here, other=0.0).to(tl.float32) - taught
        top += error * error
        bottom += taught * taught
        if GRADIENT:
            tl.store(of_answer + start + at, error, mask=at < columns)
    tl.store(tops + row, tl.sum(top, axis=0))
    tl.store(bottoms + row, tl.sum(bottom, axis=0))


def _rows_by_triton(answer: Tensor, target: Tensor, mask: Tensor | None, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    answer, target = answer.contiguous(), target.contiguous()
    error = torch.empty_like(answer) if gradient else answer
    tops, bottoms = torch.empty(2, len(answer), dtype=torch.float32, device=answer.device)
    marks = tops if mask is None else mask.to(torch.int8)
    block = min(_BLOCK, power_of_two(answer.shape[1]))
    _rows[(len(answer),)](
        answer, target, marks, error, tops, bottoms, answer.shape[1], MASKED=mask is not None, GRADIENT=gradient, BLOCK=block
    )
    return tops.sum(), bottoms.sum(), error


def _rows_by_torch(answer: Tensor, target: Tensor, mask: Tensor | None, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulator_dtype(answer.dtype)
    target = target.to(dtype)
    error = answer.to(dtype) - target
    # the norm of a row reads it once and makes nothing of its size
    tops, bottoms = (torch.linalg.vector_norm(rows, dim=1).square() for rows in (error, target))
    if mask is not None:
        tops, bottoms = tops.masked_fill(~mask, 0), bottoms.masked_fill(~mask, 0)
        if gradient:
            error.masked_fill_(~mask[:, None], 0)
    return tops.sum(), bottoms.sum(), error.to(answer.dtype)


class _BridgeEnergy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        expand: Tensor | None,
        target: Tensor,
        mask: Tensor | None,
        axis: int,
        learns: bool,
        triton: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        dtype = hidden.dtype if expand is None else product_dtype(hidden)
        accumulator = accumulator_dtype(dtype)
        to_hidden, to_expand = (learns and needed for needed in ctx.needs_input_grad[:2])
        ctx.dtypes = hidden.dtype, None if expand is None else expand.dtype
        step = _rows_by_triton if triton else _rows_by_torch
        with as_written(hidden):
            of_hidden = torch.empty_like(hidden, dtype=dtype) if to_hidden else None
            matrix = None if expand is None else expand.detach().to(dtype)
            of_expand = torch.zeros(matrix.shape, dtype=accumulator, device=hidden.device) if matrix is not None and to_expand else None
            top, bottom = (torch.zeros((), dtype=accumulator, device=hidden.device) for _ in range(2))
            for own, taught, counts, place in _chunks(hidden.detach(), target.detach(), mask, of_hidden, axis):
                own = own.to(dtype)
                own_top, own_bottom, error = step(own if matrix is None else own @ matrix.T, taught, counts, to_hidden or to_expand)
                top, bottom = top + own_top, bottom + own_bottom
                if place is not None:
                    place.copy_((error if matrix is None else error @ matrix).reshape(place.shape))
                if of_expand is not None:
                    if dtype is accumulator:
                        of_expand.addmm_(error.T, own)
                    else:
                        of_expand += error.T @ own
        ctx.save_for_backward(of_hidden, of_expand)
        ctx.mark_non_differentiable(bottom)
        return top, bottom

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        # not in place: a graph that is kept may be gone through again
        made = (
            (gradient * (2 * grad)).to(dtype) if gradient is not None else None
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*made, None, None, None, None, None)


def _chunks(
    hidden: Tensor, target: Tensor, mask: Tensor | None, gradient: Tensor | None, axis: int
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
    """Chunks of rows: [n, d] of `hidden`, [n, D] of `target`, [n] of `mask`, and where in `gradient` they belong, of some shape."""
    own, taught, place = (_width_last(side, axis) for side in (hidden, target, hidden if gradient is None else gradient))
    counts = None if mask is None else mask.expand(own.shape[:-1])
    if own.is_contiguous() and taught.is_contiguous() and place.is_contiguous():
        own, taught, place = (side.flatten(0, -2) for side in (own, taught, place))
        counts = None if counts is None else counts.reshape(-1)
    # of what does not lie in rows, as images with their channels first, whole samples are brought into them, a few at a time
    step = max(1, at_once(hidden, *CHUNK) // max(1, taught.shape[-1] * prod(own.shape[1:-1])))
    for start in range(0, len(own), step):
        part = slice(start, start + step)
        yield (
            own[part].flatten(0, -2),
            taught[part].flatten(0, -2),
            None if counts is None else counts[part].flatten(),
            None if gradient is None else place[part],
        )


def _width_last(side: Tensor, axis: int) -> Tensor:
    """With at least one axis of positions before it."""
    moved = side.movedim(axis, -1)
    return moved[None] if moved.dim() == 1 else moved
