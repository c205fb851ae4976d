"""Attention by torch's fused operator, and attention within the documents of packed rows.

A masked softmax of our own is seldom worth its while: `F.scaled_dot_product_attention` never stores the scores, on the CPU (mask and all)
as on accelerators, where unmasked attention runs in flash or cuDNN kernels and masked attention in the memory-efficient one. What it
lacks is packed rows: a block-diagonal mask makes it compute, and mask away, every pair of documents. There the variable-length kernels
of `torch.nn.attention.varlen` or of flash-attn take over, for which a batch is one long row of documents and their offsets. And dropout
on the CPU: there it goes through torch's single operations, and `_Dropped` does the same in fewer passes, with the fast dropout.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wtn_pretrain.kernels.dropout import by_words, draw_seed, gain, kept
from wtn_pretrain.kernels.live import live


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """softmax(query key' / sqrt(K)) value, without storing the scores.

    Args:
        query, key, value: [B, H, S, K].
        mask: what each position sees: None, everything; bool, broadcastable to [B, H, S, S]; or int [B, S], `segments`: each
            position sees those of its row that have its number, as the documents of a packed row do (and padding sees padding).
        dropout: the probability with which a weight is dropped.

    Returns:
        [B, H, S, K].
    """
    if dropout and query.dtype is torch.float32 and by_words(query, dropout):
        return _Dropped.apply(query, key, value, None if mask is None else _added(mask), dropout)
    if mask is None or mask.dtype is torch.bool:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    implementation = live("documents", query)
    # the variable-length kernels are for half precision, and torch's has no dropout
    half = query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    if half and (implementation == "flash_attn" or (implementation == "varlen" and not dropout)):
        return _attend_in_one_row(query, key, value, documents(mask), implementation, dropout)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=same_document(mask), dropout_p=dropout)


def reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """`attend` without dropout, with all scores at once."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~(mask if mask.dtype is torch.bool else same_document(mask)), float("-inf"))
    return scores.softmax(-1) @ value


def same_document(segments: Tensor) -> Tensor:
    """Bool [B, 1, S, S], which positions of a row see each other, from their documents' numbers [B, S]."""
    return segments[:, None, :, None] == segments[:, None, None, :]


class Documents(NamedTuple):
    """A batch as one row of documents, one after the other, padding included."""

    offsets: Tensor
    """Where each begins, and where the last one ends: int32 [documents + 1]."""
    longest: int


def documents(segments: Tensor) -> Documents:
    """The runs of equal numbers in the rows of `segments` [B, S]. Waits for the device once a batch, as it remembers its answer."""
    known = getattr(segments, "_documents", None)
    version = 0 if segments.is_inference() else segments._version
    if known is not None and known[0] == version:
        return known[1]
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = begins.flatten().nonzero().flatten()
    offsets = torch.cat([starts, starts.new_tensor([segments.numel()])]).int()
    found = Documents(offsets, int(offsets.diff().max()) if len(starts) else 0)
    segments._documents = (version, found)  # type: ignore[attr-defined]
    return found


def _added(mask: Tensor) -> Tensor | None:
    """What a mask, bool or int as of `attend`, adds to scores, fp32 [B, 1, 1 or S, S]; None: nothing. It remembers its answer."""
    known = getattr(mask, "_added", None)
    version = 0 if mask.is_inference() else mask._version
    if known is not None and known[0] == version:
        return known[1]
    seen = mask if mask.dtype is torch.bool else same_document(mask)
    # finite, so that a position that sees none has no softmax of nothing; exp() of it is 0 beside any other score
    found = None if seen.all() else torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)
    mask._added = (version, found)  # type: ignore[attr-defined]
    return found


class _Dropped(torch.autograd.Function):
    """softmax(query key' / sqrt(K) + added), some of its weights dropped, times value. Stores the weights, and of the dropout a seed."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, added: Tensor | None, p: float) -> Tensor:
        batch, heads, length, size = query.shape
        ctx.seed, ctx.p, ctx.scale = draw_seed(), p, size**-0.5
        q, k, v = (x.reshape(batch * heads, -1, size) for x in (query, key, value))
        scores = _product(q, k.mT, ctx.scale)
        if added is not None:
            scores.view(batch, heads, length, -1).add_(added)
        weights = torch.softmax(scores, -1)
        ctx.save_for_backward(q, k, v, weights)
        mixed = _product(kept(ctx.seed, weights, p).mul_(weights), v, gain(p))
        return mixed.view(query.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_mixed: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        shape, of_mixed = of_mixed.shape, of_mixed.reshape(q.shape)
        keeps = kept(ctx.seed, weights, ctx.p)
        of_weights = _product(of_mixed, v.mT, gain(ctx.p)).mul_(keeps)
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        found = (
            _product(of_scores, k, ctx.scale),
            _product(of_scores.mT, q, ctx.scale),
            _product(keeps.mul_(weights).mT, of_mixed, gain(ctx.p)),
        )
        return *(x.view(shape) for x in found), None, None


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * a @ b for [N, R, C] and [N, C, D], in one pass."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def why_no_varlen(device: torch.device) -> str | None:
    """None where `torch.nn.attention.varlen` runs on `device`, tried out, else what stands against it."""
    if find_spec("torch.nn.attention.varlen") is None:
        return "this torch has no torch.nn.attention.varlen"
    return _tried("varlen", device)


def why_no_flash_attn(device: torch.device) -> str | None:
    """None where flash-attn is installed and runs on `device`, tried out, else what stands against it."""
    if find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    return _tried("flash_attn", device)


def _tried(implementation: str, device: torch.device) -> str | None:
    if device.type == "cpu":
        return "it has no CPU kernel"
    segments = torch.tensor([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 2]], device=device)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, 2, 2, 6, 16, generator=generator).to(device, torch.bfloat16)
    query, key, value = given = tuple(x.clone().requires_grad_() for x in drawn)
    try:
        with torch.enable_grad():
            mine = _attend_in_one_row(query, key, value, documents(segments), implementation, 0.0)
            plain = reference(query.float(), key.float(), value.float(), segments)
            of_mine, of_plain = (torch.autograd.grad(answer.float().square().sum(), given) for answer in (mine, plain))
    except Exception as error:  # an old device, a build without it: each has errors of its own
        return f"it does not run here ({' '.join(str(error).split())[:160]})"
    # bf16 has 8 bits; gradients of a sum of squares are a few times 1
    far = [bool((a.float() - b.float()).abs().max() > 0.1) for a, b in zip((mine, *of_mine), (plain, *of_plain), strict=True)]
    return "it computes wrongly here" if any(far) else None


def _attend_in_one_row(query: Tensor, key: Tensor, value: Tensor, packed: Documents, implementation: str, dropout: float) -> Tensor:
    batch, heads, length, size = query.shape
    rows = [x.transpose(1, 2).reshape(batch * length, heads, size) for x in (query, key, value)]
    function: Callable[..., Any]
    more: dict[str, Any] = {}
    if implementation == "varlen":
        from torch.nn.attention.varlen import varlen_attn as function
    else:
        from flash_attn import flash_attn_varlen_func as function  # type: ignore[import-not-found,no-redef]

        more = {"dropout_p": dropout}
    mixed = function(*rows, packed.offsets, packed.offsets, packed.longest, packed.longest, **more)
    return mixed.view(batch, length, heads, size).transpose(1, 2)
