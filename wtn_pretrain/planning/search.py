"""The fastest plan: spans and replicas whose slowest stage is fastest, of all that fill the ranks and fit their memory.

A time T is reachable if the units can be cut into spans none of which takes longer. Which numbers of ranks the first i units can
fill in T is a set of whole numbers, kept as the bits of one; a span adds its replicas to each, so it shifts the set. Spans that lie
on one node and spans that cross nodes have different costs, and both depend only on where the span starts within its node. The
least T is found by halving; what is found is optimal to the last bit, since at the end no plan is faster than the one returned.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from wtn_pretrain.device import total_memory
from wtn_pretrain.errors import UserError
from wtn_pretrain.imitation.config import ImitateSection
from wtn_pretrain.imitation.learner import zero_stage
from wtn_pretrain.imitation.pairing import Pairing
from wtn_pretrain.imitation.plan import Plan, Span, single
from wtn_pretrain.models.base import BlockConfig, Flops
from wtn_pretrain.planning.cluster import Cluster, usual
from wtn_pretrain.planning.costs import Device, UnitCost, declared, here
from wtn_pretrain.planning.spans import Flow, SpanCosts, flow


def search(costs: Sequence[UnitCost], cluster: Cluster, flow: Flow, slack: float = 0.0) -> Plan:
    """The plan with the fastest slowest stage on exactly the cluster's ranks: every rank of a run must have a place.

    Where more replicas would only cost (an all-reduce slower than what it saves), that plan may be slower than one of fewer ranks.
    Among equals the one with the longest spans from the top down is taken, so that every rank finds the same.

    Args:
        slack: take the leanest, by the memory of its fullest rank, of all plans that are slower by at most this share.

    Raises:
        UserError: more ranks than rows for them, or a rank that cannot hold its span under any plan.
    """
    units, ranks = len(costs), cluster.ranks
    if ranks > units * flow.rows:
        raise UserError(
            f"{ranks} ranks: {units} units and micro-batches of {flow.rows} rows have work for {units * flow.rows}, a row each; "
            "use fewer ranks or a larger narrow.micro_batch_size"
        )
    return _Search(SpanCosts(costs, cluster, flow)).best(slack)


def automatic(
    thin: BlockConfig,
    wide: BlockConfig,
    pairing: Pairing,
    counts: tuple[Flops, Flops],
    section: ImitateSection,
    ranks: int,
    length: int | None = None,
    target: Device | None = None,
    cluster: Cluster | None = None,
) -> Plan:
    """The plan of `narrow.plan: auto`: from declared costs of this kind of device alone, so the same on every rank.

    Declared costs are rough: of the plans within a tenth of the fastest it is the leanest. Schedules that do not stream (bottom_up,
    joint) split every batch over all ranks.

    Args:
        length: of sequences; None: the longest.
        target, cluster: where the ranks will run, if not on devices of this kind.
    """
    if ranks == 1 or section.schedule in ("bottom_up", "joint"):
        return single(pairing.units + 1, ranks)
    moving = flow(section, fed_by(section), zero_stage(section))
    costs = declared(thin, wide, pairing, counts, section, moving.rows, target=target or here(), fed=moving.fed, length=length, quick=True)
    return search(costs, cluster or usual(ranks)._replace(memory=total_memory()), moving, slack=0.1)


def fewest(costs: Sequence[UnitCost], cluster: Cluster, flow: Flow, seconds: float) -> int:
    """The fewest ranks, at most the cluster's, on which some plan has no stage slower than `seconds`; 0 if there is none."""
    enough = _Search(SpanCosts(costs, cluster, flow)).reach(seconds)[-1]
    return (enough & -enough).bit_length() - 1 if enough else 0


def fed_by(section: ImitateSection) -> str:
    """Which pass a plan is made for: the student-fed one where there is one, since it sends more."""
    teacher_only = section.schedule == "parallel" and section.feed != "student"
    return "teacher" if teacher_only or (section.schedule == "hybrid" and section.teacher_fed_share == 1) else "student"


class _Edges(NamedTuple):
    """Replica counts, as bits, with which one span is allowed, by where it stands."""

    near: int
    """On one node, neighbours too."""
    from_far: int
    """First on its node, so that its input comes from another."""
    to_far: int
    """Last on its node."""
    alone: int
    """A whole node."""
    crossing: int
    """On several nodes."""


class _Search:
    def __init__(self, spans: SpanCosts) -> None:
        self.spans, self.cluster = spans, spans.cluster
        self.units, self.ranks = spans.units, spans.cluster.ranks
        self.most = len(spans.replicas)
        self.full = (1 << (self.ranks + 1)) - 1
        # on one node nothing crosses, and where on it a span stands does not matter
        self.node = self.cluster.per_node if self.cluster.per_node < self.ranks else 0
        self._costs = [self._of(first) for first in range(self.units)]
        self._totals = [spans.memory(first).total for first in range(self.units)]
        node = self.node or 1
        self._starts = [sum(1 << place for place in range(at, self.ranks + 1, node)) for at in range(node)]
        self._up_to = [0]
        for bits in self._starts:
            self._up_to.append(self._up_to[-1] | bits)

    def best(self, slack: float) -> Plan:
        self._require_memory()
        low, high = self._bounds()
        while high - low > 1e-9 * high:
            middle = (low + high) / 2
            if self._fills(middle):
                high = middle
            else:
                low = middle
        while True:
            plan = self._plan(high, self.cluster.memory)
            high = float(np.nextafter(self.time(plan), 0))
            if not self._fills(high):
                break
        if not slack:
            return plan
        high *= 1 + slack
        return self._plan(high, self._leanest(high))

    def time(self, plan: Plan) -> float:
        """The slowest stage of a plan."""
        start, worst = 0, 0.0
        for span in plan.spans:
            worst = max(worst, float(self._at(span.first, span.last, start, np.array([span.replicas]))[0]))
            start += span.replicas
        return worst

    def _of(self, first: int) -> list[np.ndarray]:
        """Costs of spans from `first` [lasts, r] in the places of `_Edges`."""
        if not self.node:
            return [self.spans.cost(first, False, False, False)]
        near = [
            self.spans.cost(first, False, below, above)[:, : self.node]
            for below, above in ((False, False), (True, False), (False, True), (True, True))
        ]
        return [*near, self.spans.cost(first, True, True, True)]

    def _at(self, first: int, last: int, starts: np.ndarray | int, replicas: np.ndarray) -> np.ndarray:
        """Costs of one span with several numbers of replicas, each from a rank of its own."""
        costs = [cost[last - first] for cost in self._costs[first]]
        if not self.node:
            return costs[0][replicas - 1]
        place = np.asarray(starts) % self.node
        crossing = place + replicas > self.node
        which = np.where(crossing, 4, (place == 0) + 2 * (place + replicas == self.node))
        inside = np.minimum(replicas, self.node) - 1
        return np.choose(which, [*(cost[inside] for cost in costs[:4]), costs[4][replicas - 1]])

    def _bounds(self) -> tuple[float, float]:
        """A time that no plan beats, and one that some plan keeps."""
        # the slowest unit is somewhere, on some number of replicas
        low = max(min(float(cost[0].min()) for cost in self._costs[unit]) for unit in range(self.units)) / 2
        high = 2 * low
        while not self._fills(high):
            low, high = high, 2 * high
        return low, high

    def reach(self, time: float, memory: float | None = None) -> list[int]:
        """For each number of units from the bottom, the numbers of ranks, as bits, that they can fill in `time`."""
        limit = self.cluster.memory if memory is None else memory
        reached = [1] + [0] * self.units
        for first in range(self.units):
            if reached[first]:
                for last, edges in enumerate(self._edges(first, time, limit), start=first):
                    reached[last + 1] |= self._add(reached[first], edges)
        return reached

    def _fills(self, time: float, memory: float | None = None) -> bool:
        return bool(self.reach(time, memory)[-1] >> self.ranks & 1)

    def _edges(self, first: int, time: float, memory: float) -> list[_Edges]:
        fits = self._totals[first] <= memory
        masks = [_bits((cost <= time) & fits[:, : cost.shape[1]]) for cost in self._costs[first]]
        return [_Edges(*row) for row in zip(*masks, strict=True)] if self.node else [_Edges(near, 0, 0, 0, 0) for near in masks[0]]

    def _add(self, starts: int, edges: _Edges) -> int:
        """Where spans with these replicas end, from each of `starts`."""
        if not self.node:
            return _shifted(starts, edges.near) & self.full
        ends = 0
        inside = edges.near | edges.from_far | edges.to_far | edges.alone | edges.crossing
        for replicas in range(1, min(self.node, self.most) + 1):
            if not inside >> replicas & 1:
                continue
            first, between, last = self._places(replicas)
            allowed = 0
            if edges.near >> replicas & 1:
                allowed |= between
            if (edges.alone if replicas == self.node else edges.from_far) >> replicas & 1:
                allowed |= first
            if edges.to_far >> replicas & 1:
                allowed |= last
            if edges.crossing >> replicas & 1:
                allowed |= ~(first | between | last)
            ends |= (starts & allowed) << replicas
        ends |= _shifted(starts, edges.crossing >> (self.node + 1) << (self.node + 1))
        return ends & self.full

    def _places(self, replicas: int) -> tuple[int, int, int]:
        """Starting ranks, as bits, from which a span of `replicas` is first on its node, in between, and last."""
        room = self.node - replicas
        between = self._up_to[max(room, 1)] & ~self._starts[0]
        return self._starts[0], between, self._starts[room] if room else 0

    def _plan(self, time: float, memory: float) -> Plan:
        """A plan within a `time` that can be reached, from the top down, each span as long as it can be and on as few ranks."""
        reached = self.reach(time, memory)
        spans: list[Span] = []
        end, rank = self.units, self.ranks
        while end:
            for first in range(end):
                replicas = np.array([r for r in range(1, min(self.most, rank) + 1) if reached[first] >> (rank - r) & 1], dtype=int)
                if not len(replicas):
                    continue
                fits = self._totals[first][end - 1 - first, replicas - 1] <= memory
                allowed = replicas[fits & (self._at(first, end - 1, rank - replicas, replicas) <= time)]
                if len(allowed):
                    spans.append(Span(first, end - 1, int(allowed[0])))
                    end, rank = first, rank - int(allowed[0])
                    break
            else:
                raise AssertionError("a reachable plan has spans")
        return Plan(tuple(reversed(spans)))

    def _leanest(self, time: float) -> float:
        """The least memory of a rank with which some plan keeps `time`, which one does without a limit."""
        sizes = np.unique(np.concatenate([total.ravel() for total in self._totals]))
        low, high = 0, len(sizes) - 1
        while low < high:
            middle = (low + high) // 2
            if self._fills(time, sizes[middle]):
                high = middle
            else:
                low = middle + 1
        return float(sizes[low])

    def _require_memory(self) -> None:
        if self._fills(math.inf):
            return
        needed, given = self._leanest(math.inf) / 1e9, self.cluster.memory / 1e9
        raise UserError(
            f"memory: {self.ranks} ranks of {given:.3g} GB lack {needed - given:.3g} GB each, the leanest plan needs {needed:.3g} GB; "
            "use more ranks, ds_configs/zero1.json or zero2.json, a smaller narrow.micro_batch_size, or teacher streaming"
        )


def _bits(allowed: np.ndarray) -> list[int]:
    """Each row of bools as a whole number whose bit r stands for r replicas."""
    packed = np.packbits(allowed, axis=1, bitorder="little")
    return [int.from_bytes(row.tobytes(), "little") << 1 for row in packed]


def _shifted(starts: int, by: int) -> int:
    """The bits of `starts` moved up by every number whose bit is set in `by`: for each run of neighbours at once, by doubling."""
    ends, offset = 0, 0
    while by:
        zeros = (by & -by).bit_length() - 1
        by >>= zeros
        offset += zeros
        length = (~by & (by + 1)).bit_length() - 1
        block, have = starts, 1
        while have < length:
            step = min(have, length - have)
            block |= block << step
            have += step
        ends |= block << offset
        by >>= length
        offset += length
    return ends
