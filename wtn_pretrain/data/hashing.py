"""Random numbers as hashes: a draw depends on its key alone, never on what was drawn before, on which process or in which order."""

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(values: U64) -> U64:
    """The SplitMix64 finaliser of each uint64, elementwise."""
    with np.errstate(over="ignore"):
        values = values + _GOLDEN
        # in place from here on: this is most of what masking and augmenting cost
        mixed = np.atleast_1d(values)
        mixed ^= mixed >> np.uint64(30)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(27)
        mixed *= np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
        return mixed.reshape(np.shape(values))


def hash_keys(*keys: int | np.ndarray) -> U64:
    """uint64 hash of a tuple of integers; arrays broadcast against each other."""
    state: U64 = np.zeros((), np.uint64)
    for key in keys:
        words = np.asarray(key & 0xFFFFFFFFFFFFFFFF if isinstance(key, int) else key).astype(np.uint64)
        state = splitmix64(state ^ words)
    return state


def uniforms(seeds: U64, purpose: int, count: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1) for each of the seeds [B]: float64 [B, count]. Purposes are independent of each other."""
    return uniforms_at(seeds, purpose, np.arange(count, dtype=np.uint64)[None, :])


def uniforms_at(seeds: U64, purpose: int, places: np.ndarray) -> NDArray[np.float64]:
    """Those of the numbers of `uniforms` that stand at `places`, int [B, N]: float64 [B, N]."""
    bits = hash_keys(seeds[:, None], purpose, places)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    """A permutation of range(length), int64; the same on every platform and numpy version."""
    keys = hash_keys(seed, epoch, np.arange(length, dtype=np.uint64))
    return np.argsort(keys, kind="stable")
