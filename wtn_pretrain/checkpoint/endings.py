"""How saves end that ranks make together, in threads beside the training: what could not be written ends no run that goes on.

A save has failed if any rank has: the last one to finish knows, and tells all. The checkpoints before it stay, and the next save tries
again; only the last one has to succeed.
"""

import json
from typing import NamedTuple

from torch.distributed import Store

from wtn_pretrain.parallel.launch import wait_for_rank
from wtn_pretrain.screen import say


class Ending(NamedTuple):
    """How a save has ended."""

    name: str
    """Of the checkpoint."""
    problem: str
    """Why it failed; empty: it is whole."""


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

    def hear(self) -> None:
        """Says what has failed since this was last asked; waits for nobody."""
        while self._heard < self.begun and self._store.check([f"ended-{self._heard + 1}"]):
            self._say(self._next())

    def last(self) -> Ending | None:
        """Waits until all saves have ended on all ranks; the last one's ending. Those before it that were not known are said."""
        while self._heard < self.begun - 1:
            self._await(self._heard + 1)
            self._say(self._next())
        if not self.begun:
            return None
        self._await(self.begun)
        self._heard = self.begun
        return self._get(self.begun)

    def lost(self, before: int) -> set[str]:
        """The names of which all saves with numbers below `before` have failed; all of those must have ended."""
        endings = [self._get(number) for number in range(1, before)]
        return {ending.name for ending in endings if ending.problem} - {ending.name for ending in endings if not ending.problem}

    def _say(self, ending: Ending) -> None:
        """Says that a save has failed which was not the last, if it has; rank 0 does."""
        if ending.problem:
            failed = f"{self.failed} so far" if self.failed > 1 else "the first"
            say(f"{ending.problem}, and the training goes on to the next one ({failed})")

    def _next(self) -> Ending:
        self._heard += 1
        ending = self._get(self._heard)
        self.failed += bool(ending.problem)
        return ending

    def _get(self, number: int) -> Ending:
        return Ending(*json.loads(self._store.get(f"ended-{number}")))

    def _await(self, number: int) -> None:
        wait_for_rank(lambda: self._store.check([f"ended-{number}"]))
