"""Losses that jump: how far a step's loss lies above those before it."""

import statistics
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

WINDOW = 64
"""Losses that a step's is held against, at most."""
ENOUGH = 16
"""Losses without which nothing is said of the next one."""
NORMAL = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation (Rousseeuw and Croux 1993, section 1)."""
FLOOR = 0.005
"""The least that counts as a deviation, as a share of the median: losses that hardly differ are no reason to call a small rise a spike."""


class Jump(NamedTuple):
    """A loss that lies far above those before it."""

    loss: float
    median: float
    """Of the losses before it."""
    deviations: float
    """By how many robust standard deviations it lies above that."""


class Spikes:
    """The losses of the last steps, and which of them jump above the others.

    The median and the median absolute deviation stay what they are though some of the losses are spikes themselves, and a loss that
    falls moves neither towards an alarm.
    """

    def __init__(self, threshold: float) -> None:
        """`threshold`: in robust standard deviations; 0: nothing is a spike."""
        self.threshold = threshold
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.within = False
        """Whether the last loss lay above the threshold."""

    def take(self, loss: float) -> Jump | None:
        """Takes in the loss of a step; a `Jump` at the first step of a spike, None elsewhere."""
        jump = self._jump(loss)
        first = jump is not None and not self.within
        self.within = jump is not None
        self.losses.append(loss)
        return jump if first else None

    def restore(self, losses: Iterable[float], within: bool) -> None:
        """Goes on from what `losses` and `within` have been."""
        self.losses = deque(losses, WINDOW)
        self.within = within

    def _jump(self, loss: float) -> Jump | None:
        if not self.threshold or len(self.losses) < ENOUGH:
            return None
        median = statistics.median(self.losses)
        spread = NORMAL * statistics.median(abs(other - median) for other in self.losses)
        deviations = (loss - median) / max(spread, FLOOR * abs(median), 1e-12)
        return Jump(loss, median, deviations) if deviations > self.threshold else None
