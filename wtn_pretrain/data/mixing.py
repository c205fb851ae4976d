"""Images mixed with others: mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019), and the targets that go with them.

Neighbours of a batch are partners: samples 2 i and 2 i + 1 of the global batch, which the stream's permutation has put together at
random and anew in each epoch. Partners lie in one micro-batch on one rank as long as micro-batches hold even numbers of samples,
so nothing is decoded twice, and how a pair is mixed follows from its first sample's seed alone.
"""

import numpy as np

from wtn_pretrain.data.hashing import uniforms
from wtn_pretrain.errors import UserError

_MIX = 6


def mix(pixels: np.ndarray, seeds: np.ndarray, mixup: float, cutmix: float) -> np.ndarray:
    """Mixes the partners in place, each with the other; where both ways are on, each pair draws one with equal probability.

    mixup: lambda x + (1 - lambda) x' with lambda from Beta(alpha, alpha). CutMix: a box of 1 - lambda of the area, uniformly placed
    and cut at the edges, is exchanged.

    Args:
        pixels: float32 [B, H, W, C].
        seeds: uint64 [B].
        mixup: alpha of mixup; 0: off.
        cutmix: alpha of CutMix; 0: off.

    Returns:
        float32 [B]: the share of each sample's own label in its target; its partner's label has the rest.

    Raises:
        UserError: B is odd.
    """
    from scipy.special import betaincinv  # takes a while to import

    count, height, width, _ = pixels.shape
    if count % 2:
        raise UserError(
            f"data.mixup, data.cutmix: mix pairs of neighbours, and a rank takes {count} samples at once; "
            "choose batch_size and micro_batch_size so that it takes an even number"
        )
    way, level, down, across = uniforms(seeds[::2], _MIX, 4).T
    boxed = way < 0.5 if mixup and cutmix else np.full(len(way), bool(cutmix))
    own = np.where(boxed, betaincinv(cutmix or 1.0, cutmix or 1.0, level), betaincinv(mixup or 1.0, mixup or 1.0, level))
    one, other = pixels[::2], pixels[1::2]
    for pair in np.flatnonzero(~boxed):
        passed = (one[pair] - other[pair]) * np.float32(1 - own[pair])
        one[pair] -= passed
        other[pair] += passed
    tall, wide = height * np.sqrt(1 - own), width * np.sqrt(1 - own)
    top, bottom = _edges(down, tall, height)
    left, right = _edges(across, wide, width)
    for pair in np.flatnonzero(boxed):
        box = pair, slice(top[pair], bottom[pair]), slice(left[pair], right[pair])
        one[box], other[box] = other[box].copy(), one[box].copy()
    own = np.where(boxed, 1 - (bottom - top) * (right - left) / (height * width), own)
    return np.repeat(own, 2).astype(np.float32)


def partners(labels: np.ndarray) -> np.ndarray:
    """The labels [B] of each sample's partner [B]."""
    return labels.reshape(-1, 2)[:, ::-1].flatten()


def _edges(centre: np.ndarray, extent: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """First and one past the last pixel of an extent about a centre in [0, 1) of a side, cut at the edges of the image."""
    middle = np.floor(centre * side)
    first = np.clip(np.rint(middle - extent / 2), 0, side).astype(np.int64)
    return first, np.clip(np.rint(middle + extent / 2), 0, side).astype(np.int64)
