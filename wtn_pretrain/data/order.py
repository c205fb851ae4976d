"""In which order samples come, as a function of the seed and the sample's number in the stream alone."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from wtn_pretrain.data.hashing import hash_keys, permutation
from wtn_pretrain.errors import UserError

SORTED_UP_TO = 1 << 22
"""Sets up to this size are permuted by sorting hashes, larger ones by a cipher that needs no memory."""

_ROUNDS = 6
_CIPHER, _SLOT, _PART = 31, 32, 33
_CYCLE = 1 << 16


class Order(Protocol):
    """The order of a stream of samples."""

    def at(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and indices, int64 [B], of the samples number `numbers` int64 [B], counted from the beginning of training."""
        ...


class Epochs:
    """Every sample once an epoch, each epoch in a permutation of its own."""

    def __init__(self, seed: int, size: int, shuffle: bool = True) -> None:
        self._seed, self._size, self._shuffle = seed, size, shuffle
        self._orders: dict[int, np.ndarray] = {}

    def at(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Order.at`."""
        epochs, indices = np.divmod(numbers, self._size)
        if self._shuffle:
            for epoch in np.unique(epochs):
                within = epochs == epoch
                indices[within] = self._permuted(int(epoch), indices[within])
        return epochs, indices

    def _permuted(self, epoch: int, places: np.ndarray) -> np.ndarray:
        if self._size > SORTED_UP_TO:
            return permuted(self._seed, epoch, self._size, places)
        if epoch not in self._orders:
            while len(self._orders) > 1:  # a batch may straddle two epochs
                self._orders.pop(next(iter(self._orders)))
            self._orders[epoch] = permutation(self._seed, epoch, self._size)
        return self._orders[epoch][places]


class Blended:
    """Samples of several sets by weight, each set in epochs of its own.

    Of every 65,536 samples each set has its share, to within one, at places that a hash chooses; the n-th sample of a set is the n-th
    of its own `Epochs`. So no sample of a set comes twice before all of the set have come once, whatever the weights are.
    """

    def __init__(self, seed: int, sizes: Sequence[int], weights: Sequence[float]) -> None:
        """`weights`: one a set, at least 0, not all 0; only their proportions count."""
        if len(weights) != len(sizes) or any(weight < 0 for weight in weights) or not sum(weights):
            raise UserError(f"weights {list(weights)} do not suit {len(sizes)} sets; give one for each, none negative and not all zero")
        self._offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        exact = np.array(weights, np.float64) / sum(weights) * _CYCLE
        counts = np.floor(exact).astype(np.int64)
        # the largest remainders have what rounding down has left
        counts[np.argsort(counts - exact, kind="stable")[: _CYCLE - counts.sum()]] += 1
        self._counts = counts
        seeds = [int(hash_keys(seed, _PART, part) >> np.uint64(1)) for part in range(len(sizes))]
        self._parts = [Epochs(own, size) for own, size in zip(seeds, sizes, strict=True)]
        self._slots = np.repeat(np.arange(len(sizes)), counts)
        self._seed = int(hash_keys(seed, _SLOT) >> np.uint64(1))
        self._cycles: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def at(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Order.at`; indices count through the sets one after the other."""
        cycles, places = np.divmod(numbers, _CYCLE)
        parts, ranks = np.empty_like(numbers), np.empty_like(numbers)
        for cycle in np.unique(cycles):
            within = cycles == cycle
            parts[within], ranks[within] = (values[places[within]] for values in self._cycle(int(cycle)))
        epochs, indices = np.empty_like(numbers), np.empty_like(numbers)
        for part in np.unique(parts):
            own = parts == part
            epochs[own], indices[own] = self._parts[part].at(cycles[own] * self._counts[part] + ranks[own])
        return epochs, indices + self._offsets[parts]

    def _cycle(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """The set of each sample of a cycle, and how many of the same set stand before it in the cycle."""
        if cycle not in self._cycles:
            while len(self._cycles) > 1:  # a batch may straddle two
                self._cycles.pop(next(iter(self._cycles)))
            parts = self._slots[permutation(self._seed, cycle, _CYCLE)]
            ranks = np.empty(_CYCLE, np.int64)
            ranks[np.argsort(parts, kind="stable")] = np.arange(_CYCLE) - np.repeat(np.cumsum(self._counts) - self._counts, self._counts)
            self._cycles[cycle] = parts, ranks
        return self._cycles[cycle]


def order_of(dataset: object, size: int, seed: int, shuffle: bool) -> Order:
    """The order of a data set: blended where it has `shares` (see `Blend`), else in plain epochs."""
    shares = getattr(dataset, "shares", None)
    if shuffle and shares is not None:
        return Blended(seed, *shares)
    return Epochs(seed, size, shuffle)


def permuted(seed: int, epoch: int, size: int, places: np.ndarray) -> np.ndarray:
    """Where a permutation of range(size) sends `places`, int64 [B], without the permutation itself.

    A balanced Feistel network over the next even power of two, walked along its cycles until the value lies within the range (Black
    and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = max(1, -(-(size - 1).bit_length() // 2))
    mask = np.uint64((1 << half) - 1)
    values = places.astype(np.uint64)
    open_ = np.ones(len(values), bool)
    while open_.any():
        left, right = values[open_] >> np.uint64(half), values[open_] & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (hash_keys(seed, epoch, _CIPHER, number, right) & mask)
        values[open_] = (left << np.uint64(half)) | right
        open_ &= values >= np.uint64(size)
    return values.astype(np.int64)
