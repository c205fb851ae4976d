"""Several sets of text as one, mixed by weight."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from wtn_pretrain.data.sentence_pairs import SentencePairs
from wtn_pretrain.data.text_set import TextSet


@dataclass(frozen=True)
class Blend:
    """A Dataset of the samples of several sets, one after the other; all must give tensors of the same names and shapes.

    In which proportions training takes them is said by `shares`, which `wtn_pretrain.data.order.order_of` heeds.
    """

    parts: tuple[Any, ...]  # Datasets
    weights: tuple[float, ...]

    @property
    def shares(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Sizes and weights of the sets."""
        return tuple(len(part) for part in self.parts), self.weights

    @cached_property
    def _bounds(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum([len(part) for part in self.parts])])

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def with_pairs(self, pair: Any) -> "Blend":
        """The same texts in rows of sentence pairs."""
        parts = [part.with_pairs(pair) for part in self.parts]
        if any(isinstance(part, SentencePairs) for part in parts):
            # full rows then say that they are
            parts = [replace(part, with_mask=True) if isinstance(part, TextSet) else part for part in parts]
        return Blend(tuple(parts), self.weights)

    def fetch(self, indices: np.ndarray, seeds: np.ndarray | None) -> dict[str, torch.Tensor]:
        """See `wtn_pretrain.data.stream.Dataset`."""
        owners = np.searchsorted(self._bounds, indices, side="right") - 1
        batch: dict[str, torch.Tensor] = {}
        for owner in np.unique(owners):
            own = np.flatnonzero(owners == owner)
            rows = self.parts[owner].fetch(indices[own] - self._bounds[owner], None if seeds is None else seeds[own])
            for name, values in rows.items():
                if name not in batch:
                    batch[name] = values.new_empty((len(indices), *values.shape[1:]))
                batch[name][torch.from_numpy(own)] = values
        return batch


def blended(parts: Sequence[Any], weights: Sequence[float]) -> Any:
    """The one set itself, or all of them as a `Blend`; without weights each as often as its size says."""
    if len(parts) == 1:
        return parts[0]
    return Blend(tuple(parts), tuple(weights) if weights else tuple(float(len(part)) for part in parts))
