"""Dropout whose random numbers cost little on the CPU, and which stores none of them.

There, torch's takes longer to draw its numbers than a layer takes for its norms. Here one word of SFC64 (numpy's port of Doty-Humphrey's
generator) decides on four elements, each by 16 bits, and the backward pass draws the same words from the same seed. The seed comes from
torch's generator of the CPU, so that a recomputed forward pass, whose random state torch restores, repeats it.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wtn_pretrain.kernels.live import live

_LEVELS = 2**16


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` by whatever is live."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training and self.p else x


def dropout(x: Tensor, p: float) -> Tensor:
    """`x` with each element zero with probability `p`, and divided by 1 - p otherwise.

    What SFC64 draws for has the multiple of 2 ** -16 nearest to `p` for a probability, and is divided by 1 minus that.
    """
    return _Dropout.apply(x, p) if by_words(x, p) else F.dropout(x, p)


def by_words(x: Tensor, p: float) -> bool:
    """Whether dropout of `x` is drawn by SFC64."""
    return live("dropout", x) == "sfc64" and 0 < _level(p) < _LEVELS


def draw_seed() -> int:
    """A seed for a dropout, from torch's generator of the CPU."""
    # odd and beyond 32 bits: for numbers that are even or small Triton would compile anew
    return int(torch.randint(2**32, 2**62, ())) | 1


def kept(seed: int, like: Tensor, p: float) -> Tensor:
    """What a dropout of `like` keeps: 1, else 0, in its shape and dtype, on the CPU."""
    words = np.random.SFC64(seed).random_raw(-(-like.numel() // 4))
    drawn = torch.from_numpy(words.view(np.int16))[: like.numel()].view(like.shape)
    # as numbers at once: torch is slow to multiply by bool
    return torch.ge(drawn, _level(p) - _LEVELS // 2, out=torch.empty(like.shape, dtype=like.dtype))


def gain(p: float) -> float:
    """By what is multiplied what `kept` keeps."""
    return _LEVELS / (_LEVELS - _level(p))


def _level(p: float) -> int:
    return round(p * _LEVELS)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        ctx.seed, ctx.p = draw_seed(), p
        return kept(ctx.seed, x, p).mul_(x).mul_(gain(p))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_dropped: Tensor) -> tuple[Tensor, None]:
        return kept(ctx.seed, of_dropped, ctx.p).mul_(of_dropped).mul_(gain(ctx.p)), None
