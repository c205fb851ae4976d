"""A plan of imitation: which consecutive units each rank holds, and how many ranks share them."""

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

from wtn_pretrain.errors import UserError
from wtn_pretrain.files import write_text
from wtn_pretrain.imitation.pairing import Pairing
from wtn_pretrain.models.base import BlockConfig


class Span(NamedTuple):
    """Consecutive units (0 is the stem) on the same ranks."""

    first: int
    last: int
    """The last unit, included."""
    replicas: int = 1

    @property
    def units(self) -> range:
        return range(self.first, self.last + 1)

    def __str__(self) -> str:
        return f"{self.first}-{self.last}x{self.replicas}"


class Seat(NamedTuple):
    """Where a rank stands in a plan."""

    span: int
    replica: int


class Plan(NamedTuple):
    """Spans from bottom to top; ranks are counted off span by span, replica by replica."""

    spans: tuple[Span, ...]

    @property
    def ranks(self) -> int:
        return sum(span.replicas for span in self.spans)

    @property
    def units(self) -> int:
        """Units of the plan, the stem counted."""
        return self.spans[-1].last + 1

    def seat(self, rank: int) -> Seat:
        ends = list(accumulate(span.replicas for span in self.spans))
        index = bisect_right(ends, rank)
        return Seat(index, rank - (ends[index - 1] if index else 0))

    def ranks_of(self, span: int) -> range:
        """The ranks that share a span."""
        first = sum(below.replicas for below in self.spans[:span])
        return range(first, first + self.spans[span].replicas)

    def __str__(self) -> str:
        return ",".join(map(str, self.spans))


def single(units: int, replicas: int = 1) -> Plan:
    """All `units` (the stem counted) in one span."""
    return Plan((Span(0, units - 1, replicas),))


def parse(text: str) -> Plan:
    """A plan as text: `0-3,4-6x3` holds units 0 to 3 on one rank and 4 to 6 on three."""
    spans = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?(?:x(\d+))?\s*", part)
        if not match:
            raise UserError(f"narrow.plan: {part.strip()!r} is no span; write FIRST-LASTxREPLICAS, such as 0-3,4-6x2")
        first, last, replicas = match.groups()
        spans.append(Span(int(first), int(last or first), int(replicas or 1)))
    return Plan(tuple(spans))


def check(plan: Plan, units: int, ranks: int | None = None) -> Plan:
    """`plan`, if it covers `units` units (the stem counted) without gap and fills `ranks` ranks.

    Raises:
        UserError: one line that names the span or the count that does not fit.
    """
    spans = plan.spans
    for span in spans:
        if span.last < span.first or span.replicas < 1:
            raise UserError(f"narrow.plan: span {span} is empty; a span ends at or after its first unit and has at least one replica")
    for below, above in pairwise(spans):
        if above.first != below.last + 1:
            raise UserError(f"narrow.plan: span {above} does not follow {below}; every unit belongs to one span")
    if spans[0].first != 0 or plan.units != units:
        raise UserError(f"narrow.plan: {plan} covers units {spans[0].first} to {spans[-1].last}; the model has 0 (the stem) to {units - 1}")
    if ranks is not None and plan.ranks != ranks:
        raise UserError(
            f"narrow.plan: {plan} is for {plan.ranks} ranks and this run has {ranks}; make one with tools/plan.py --ranks {ranks}"
        )
    return plan


def fingerprint(thin: BlockConfig, wide: BlockConfig, pairing: Pairing) -> str:
    """What a plan file was made for: the shapes of both networks and their pairing."""
    text = json.dumps([thin.model_dump(mode="json"), wide.model_dump(mode="json"), pairing.student, pairing.teacher], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write(path: Path, plan: Plan, model: str) -> None:
    """Writes a plan for the networks whose `fingerprint` is `model`."""
    write_text(path, json.dumps({"model": model, "spans": [list(span) for span in plan.spans]}, indent=2) + "\n")


def read(path: Path, model: str) -> Plan:
    """The plan in a file.

    Raises:
        UserError: no such file, no plan, or a plan for other networks.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        made_for, plan = tree["model"], Plan(tuple(Span(*map(int, span)) for span in tree["spans"]))
        if not plan.spans:
            raise ValueError
    except OSError as error:
        raise UserError(f"narrow.plan: {path} cannot be read ({error.strerror}); make one with tools/plan.py --out {path}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"narrow.plan: {path} holds no plan; make one with tools/plan.py --out {path}") from None
    if made_for != model:
        raise UserError(f"narrow.plan: {path} was made for other networks than this run's; make one with tools/plan.py --out {path}")
    return plan


def shares(rows: int, parts: int) -> list[int]:
    """`rows` split as evenly as whole numbers allow, the larger parts first."""
    return [rows // parts + (part < rows % parts) for part in range(parts)]


def starts(parts: Sequence[int]) -> list[int]:
    """The first row of each part."""
    return [0, *accumulate(parts)][:-1]
