"""After which steps checkpoints are written, and which of them stay."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

Place = TypeVar("Place")


class Keys(Protocol):
    """The keys of a stage that say so."""

    @property
    def checkpoint_every(self) -> int: ...

    @property
    def checkpoint_keep(self) -> int: ...

    @property
    def checkpoint_keep_every(self) -> int: ...


class Keep(NamedTuple):
    """The last `last` checkpoints stay, and for good those after every `every` steps (0: none)."""

    last: int = 2
    every: int = 0

    def for_good(self, done: int) -> bool:
        """Whether a checkpoint after `done` steps is never removed."""
        return bool(self.every) and done > 0 and done % self.every == 0

    def recent(self, known: Sequence[Place]) -> set[Place]:
        """Of checkpoints in the order in which they were begun, those that stay for now."""
        return set(known[-self.last :])


LAST_TWO = Keep()


class Rhythm(NamedTuple):
    """When a stage of `total` steps saves: after every `every` steps, every `good` ones (0: none), and the last."""

    total: int
    every: int
    good: int

    def due(self, done: int) -> bool:
        return done == self.total or self.next(done - 1) == done

    def next(self, done: int) -> int:
        """The step of the first save after `done` steps."""
        following = [(done // every + 1) * every for every in (self.every, self.good) if every]
        return min(self.total, *following) if done < self.total else min(following)


def keep_of(section: Keys) -> Keep:
    return Keep(section.checkpoint_keep, section.checkpoint_keep_every)


def rhythm_of(section: Keys, total: int) -> Rhythm:
    """`total`: steps of the stage, which may be more than the section's own."""
    return Rhythm(total, section.checkpoint_every or max(1, total // 10), section.checkpoint_keep_every)
