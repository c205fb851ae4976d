"""Random numbers as hashes: a draw depends on its key alone, never on what was drawn before, on which process or in which order."""

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(values: U64) -> U64:
    """The SplitMix64 finaliser of each uint64, elementwise."""
    with np.errstate(over="ignore"):
        values = values + _GOLDEN
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def hash_keys(*keys: int | np.ndarray) -> U64:
    """uint64 hash of a tuple of integers; arrays broadcast against each other."""
    state: U64 = np.zeros((), np.uint64)
    for key in keys:
        words = np.asarray(key & 0xFFFFFFFFFFFFFFFF if isinstance(key, int) else key).astype(np.uint64)
        state = splitmix64(state ^ words)
    return state


def uniforms(seeds: U64, purpose: int, count: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1) for each of the seeds [B]: float64 [B, count]. Purposes are independent of each other."""
    bits = hash_keys(seeds[:, None], purpose, np.arange(count, dtype=np.uint64)[None, :])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    """A permutation of range(length), int64; the same on every platform and numpy version."""
    keys = hash_keys(seed, epoch, np.arange(length, dtype=np.uint64))
    return np.argsort(keys, kind="stable")
