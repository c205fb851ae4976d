"""Warm-up with shorter rows: short ones first, the full length for the rest (Devlin et al. 2019, appendix A.2: 128, then 512)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from wtn_pretrain.data.stream import Batch, BatchStream, Dataset

Lengths = Sequence[tuple[float, int]]
"""Pairs (share of the steps, tokens), shares rising: each length is used until that share of the steps is done."""


def length_at(lengths: Lengths, final: int, step: int, steps: int) -> int:
    """The length of the rows of step number `step` (from 0) of `steps`; `final` after the last share."""
    return next((length for share, length in lengths if step < share * steps), final)


def begins(lengths: Lengths, final: int, steps: int) -> list[tuple[int, int]]:
    """The first step of each phase and its length, of the phases that have a step."""
    found: list[tuple[int, int]] = []
    for step in range(steps):
        length = length_at(lengths, final, step, steps)
        if not found or found[-1][1] != length:
            found.append((step, length))
    return found


class LengthenedStream(BatchStream):
    """Batches of rows whose length follows from the step. Each length has rows and epochs of its own, which begin with its phase."""

    def __init__(self, sets: Sequence[tuple[int, Dataset]], batch_size: int, **settings: Any) -> None:
        """`sets`: the first step of each phase, ascending from 0, and its rows. `settings` are those of `BatchStream`."""
        super().__init__(sets[-1][1], batch_size, **settings)
        self._phases = [(first, BatchStream(rows, batch_size, **settings)) for first, rows in sets]

    def sample_ids(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """See `BatchStream.sample_ids`; indices are those of the step's own set."""
        first, stream = self._phase(step)
        return stream.sample_ids(step - first)

    def micro_batch(self, step: int, k: int) -> Batch:
        """See `BatchStream.micro_batch`."""
        first, stream = self._phase(step)
        return stream.micro_batch(step - first, k)

    def _phase(self, step: int) -> tuple[int, BatchStream]:
        return next(phase for phase in reversed(self._phases) if phase[0] <= step)
