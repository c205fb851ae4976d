"""Documents that were seen before: exactly, or nearly by MinHash (Broder 1997) and locality-sensitive hashing."""

import numpy as np
import xxhash

from wtn_pretrain.data.hashing import hash_keys, splitmix64
from wtn_pretrain.errors import UserError

_SHINGLE = 5
"""Words of a shingle."""
_PERMUTATIONS = 128
_BAND = 31


def text_hash(text: str) -> int:
    """64-bit hash of a document; white space between words does not count."""
    return xxhash.xxh3_64_intdigest(" ".join(text.split()).encode())


class MinHash:
    """Turns documents into hashes of which two share one where the documents' sets of five-word shingles are alike.

    Of Jaccard similarity s, two documents share a band with probability 1 - (1 - s^rows)^bands: a half and more from `threshold` on,
    and rising steeply there. Words are compared in lower case.
    """

    def __init__(self, threshold: float) -> None:
        if not 0 < threshold < 1:
            raise UserError(f"--near-duplicates {threshold}: a Jaccard similarity lies between 0 and 1; 0.8 is usual")
        shapes = [(_PERMUTATIONS // rows, rows) for rows in range(1, _PERMUTATIONS + 1)]
        self.bands, self.rows = min(shapes, key=lambda shape: abs((1 / shape[0]) ** (1 / shape[1]) - threshold))
        count = self.bands * self.rows
        keys = splitmix64(np.arange(2 * count, dtype=np.uint64) + np.uint64(0x5EED))
        # multiply-shift needs odd factors
        self._factors, self._terms = keys[:count, None] | np.uint64(1), keys[count:, None]

    def signature(self, text: str) -> np.ndarray:
        """The minima under each of the permutations: uint32 [bands * rows]."""
        words = np.array([xxhash.xxh3_64_intdigest(word.encode()) for word in text.lower().split()], np.uint64)
        width = min(_SHINGLE, max(1, len(words)))
        count = max(1, len(words) - width + 1)
        shingles = np.unique(hash_keys(*(words[first : first + count] for first in range(width))) if len(words) else np.zeros(1, np.uint64))
        least = np.full(len(self._factors), 0xFFFFFFFF, np.uint32)
        for first in range(0, len(shingles), 4096):  # a long document must not take memory times the permutations
            hashed = (shingles[None, first : first + 4096] * self._factors + self._terms) >> np.uint64(32)
            least = np.minimum(least, hashed.min(axis=1).astype(np.uint32))
        return least

    def band_hashes(self, text: str) -> np.ndarray:
        """uint64 [bands]."""
        signature = self.signature(text).reshape(self.bands, self.rows).astype(np.uint64)
        return hash_keys(_BAND, np.arange(self.bands, dtype=np.uint64), *signature.T)


class Seen:
    """A growing set of uint64 hashes at 8 bytes each: sorted runs, merged so that each is at least twice as long as the next."""

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def add(self, hashes: np.ndarray) -> None:
        """Joins hashes, uint64 of any shape."""
        run = np.unique(hashes)
        while self._runs and len(self._runs[-1]) < 2 * len(run):
            run = np.sort(np.concatenate([self._runs.pop(), run]), kind="stable")
        if len(run):
            self._runs.append(run)

    def holds(self, hashes: np.ndarray) -> np.ndarray:
        """Which of the hashes are in the set: bool, their shape."""
        found = np.zeros(hashes.shape, bool)
        for run in self._runs:
            found |= run[np.minimum(np.searchsorted(run, hashes), len(run) - 1)] == hashes
        return found

    def first_seen(self, hashes: np.ndarray) -> np.ndarray:
        """Which documents are new: bool [N], and joins the hashes of those. `hashes` uint64 [N, H]: documents that share one are alike."""
        new: np.ndarray = ~np.any(self.holds(hashes), axis=1)
        here: set[int] = set()
        for number in np.flatnonzero(new):
            own = hashes[number].tolist()
            if here.isdisjoint(own):
                here.update(own)
            else:
                new[number] = False
        self.add(hashes[new])
        return new
