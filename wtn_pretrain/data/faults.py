"""What was wrong with raw data: reported with file and position, and by choice counted and left out."""

import os
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

from wtn_pretrain.errors import UserError

Policy = Literal["stop", "skip"]
_EXAMPLES = 5


@dataclass
class Faults:
    """Counts what is left out, by kind, with the first few of each kind; under "stop" the first one ends the work."""

    policy: Policy = "stop"
    remedy: str = "--faults skip"
    """How the user chooses to skip."""
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def report(self, kind: str, where: str, what: str, repair: str = "repair it") -> None:
        """Notes a fault of a kind such as "invalid UTF-8", at a place such as "a.txt, byte 12".

        Args:
            repair: what the user can do about it beside leaving it out.

        Raises:
            UserError: the policy is "stop".
        """
        if self.policy == "stop":
            raise UserError(f"{where}: {what}; {repair}, or leave what cannot be read out and count it with {self.remedy}")
        self.counts[kind] = self.counts.get(kind, 0) + 1
        some = self.examples.setdefault(kind, [])
        if len(some) < _EXAMPLES:
            some.append(f"{where}: {what}")

    def state(self) -> dict[str, Any]:
        """What `restore` and a card take, as plain JSON."""
        return {"counts": dict(sorted(self.counts.items())), "examples": {kind: list(some) for kind, some in sorted(self.examples.items())}}

    def forget(self) -> None:
        """Counts anew: what is read again and again counts once."""
        self.counts, self.examples = {}, {}

    def join(self, state: dict[str, Any]) -> None:
        """Adds what another reading counted, as its `state`."""
        for kind, count in state["counts"].items():
            self.counts[kind] = self.counts.get(kind, 0) + count
            self.examples[kind] = [*self.examples.get(kind, []), *state["examples"][kind]][:_EXAMPLES]

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from the `state` of an earlier run."""
        self.counts = dict(state["counts"])
        self.examples = {kind: list(some) for kind, some in state["examples"].items()}


def tell_skipped(faults: Faults, name: str) -> None:
    """Says on standard error what was left out of the data called `name`, on the first rank alone."""
    if faults.counts and os.environ.get("RANK", "0") == "0":
        for kind, count in sorted(faults.counts.items()):
            print(f"data: {name}: skipped: {kind}, {count} times, such as {faults.examples[kind][0]}", file=sys.stderr)
