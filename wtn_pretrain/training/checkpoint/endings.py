"""How saves end that ranks make together, in threads beside the training: what could not be written ends no run that goes on.

A save has failed if any rank has: the last one to finish knows, and tells all. The checkpoints before it stay, and the next save tries
again; only the last one has to succeed.
"""

import json
from collections.abc import Callable
from typing import NamedTuple

from torch.distributed import Store

from wtn_pretrain.parallel.launch import wait_for_rank


class Ending(NamedTuple):
    """How a save has ended."""

    step: int
    problem: str
    """Why it failed, in one line without its remedy; empty: it is whole."""


class Endings:
    """The endings of the saves of one stage. Every rank must make one, and begin the same saves in the same order."""

    def __init__(self, store: Store) -> None:
        """`store`: shared by all ranks."""
        self._store = store
        self.begun = 0
        self._heard = 0
        self.failed = 0
        """Saves that this rank has heard to have failed."""

    def begin(self) -> int:
        """The number of the save that begins now, from 1."""
        self.begun += 1
        return self.begun

    def tell(self, number: int, ending: Ending) -> None:
        """Says how a save has ended; for the last rank that had a part in it."""
        self._store.set(f"ended-{number}", json.dumps(ending))

    def news(self) -> list[Ending]:
        """The endings that have become known since this was last asked; waits for nobody."""
        found = []
        while self._heard < self.begun and self._store.check([f"ended-{self._heard + 1}"]):
            found.append(self._next())
        return found

    def last(self, meanwhile: Callable[[Ending], object]) -> Ending | None:
        """Waits until all saves have ended on all ranks; the last one's ending. `meanwhile` gets those before it that were not known."""
        while self._heard < self.begun - 1:
            self._await(self._heard + 1)
            meanwhile(self._next())
        if not self.begun:
            return None
        self._await(self.begun)
        self._heard = self.begun
        return self._get(self.begun)

    def lost(self, before: int) -> set[int]:
        """The steps of which all saves with numbers below `before` have failed; all of those must have ended."""
        endings = [self._get(number) for number in range(1, before)]
        return {ending.step for ending in endings if ending.problem} - {ending.step for ending in endings if not ending.problem}

    def _next(self) -> Ending:
        self._heard += 1
        ending = self._get(self._heard)
        self.failed += bool(ending.problem)
        return ending

    def _get(self, number: int) -> Ending:
        return Ending(*json.loads(self._store.get(f"ended-{number}")))

    def _await(self, number: int) -> None:
        wait_for_rank(lambda: self._store.check([f"ended-{number}"]))
