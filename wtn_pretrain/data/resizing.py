"""Progressive resizing: small images first, larger ones as training goes on (Howard 2018; Tan and Le 2021)."""

from collections.abc import Sequence
from typing import Any

from wtn_pretrain.data.images import ImageSet
from wtn_pretrain.data.stream import Batch, BatchStream

Sizes = Sequence[tuple[float, int]]
"""Pairs (share of the steps, side in pixels), shares rising: each side is used until that share of the steps is done."""


def side_at(sizes: Sizes, final: int, step: int, steps: int) -> int:
    """The side of the images of step number `step` (from 0) of `steps`; `final` after the last share."""
    return next((side for share, side in sizes if step < share * steps), final)


def steps_at(sizes: Sizes, final: int, steps: int) -> dict[int, int]:
    """How many of `steps` steps take images of each side."""
    counts: dict[int, int] = {}
    for step in range(steps):
        side = side_at(sizes, final, step, steps)
        counts[side] = counts.get(side, 0) + 1
    return counts


class ResizedStream(BatchStream):
    """Batches whose side follows from the step; samples, their order and their seeds are those of a `BatchStream`."""

    def __init__(self, images: ImageSet, batch_size: int, *, sizes: Sizes, steps: int, **settings: Any) -> None:
        """`steps`: of the whole stage. `settings` are those of `BatchStream`."""
        super().__init__(images, batch_size, **settings)
        self._images, self._sizes, self._steps = images, sizes, steps

    def side(self, step: int) -> int:
        """Side in pixels of the images of `step`."""
        return side_at(self._sizes, self._images.pixels.size, step, self._steps)

    def micro_batch(self, step: int, k: int) -> Batch:
        """See `BatchStream.micro_batch`."""
        self.dataset = self._images.resized(self.side(step))
        return super().micro_batch(step, k)
