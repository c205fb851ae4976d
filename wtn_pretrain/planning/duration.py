"""How long stage 2 takes under a plan, phase by phase of its schedule."""

from collections.abc import Sequence
from typing import NamedTuple

from wtn_pretrain.imitation.config import ImitateSection
from wtn_pretrain.imitation.plan import Plan
from wtn_pretrain.imitation.schedules import Phase, phases
from wtn_pretrain.planning.cluster import Cluster
from wtn_pretrain.planning.costs import UnitCost
from wtn_pretrain.planning.predict import Prediction, predict
from wtn_pretrain.planning.spans import Flow, SpanCosts


class Lasting(NamedTuple):
    """A phase and its time."""

    phase: Phase
    step: float
    """Seconds of one, in steady state."""
    seconds: float
    """Of all its steps; data, validation and the storing of activations not among them."""
    prediction: Prediction | None
    """Of its own flow, where micro-batches stream through spans."""


def streams(section: ImitateSection) -> bool:
    """Whether micro-batches stream through spans; the other schedules split every batch over all ranks."""
    return section.schedule in ("hybrid", "parallel")


def lasting(plan: Plan, costs: Sequence[UnitCost], cluster: Cluster, flow: Flow, section: ImitateSection) -> list[Lasting]:
    """Every phase of the section's schedule."""
    found = []
    for phase in phases(section, len(costs) - 1, learns_stem=costs[0].learns):
        if streams(section):
            prediction = predict(plan, costs, cluster, flow._replace(fed=phase.fed))
            found.append(Lasting(phase, prediction.step, prediction.seconds(phase.steps), prediction))
        else:
            step = _split_step(phase, costs, cluster.sized(plan.ranks), flow)
            found.append(Lasting(phase, step, step * phase.steps, None))
    return found


def _split_step(phase: Phase, costs: Sequence[UnitCost], cluster: Cluster, flow: Flow) -> float:
    """Seconds of a step whose batch is split over all ranks: of the unit that learns, or of all up to the highest one."""
    spans = SpanCosts(costs, cluster, flow._replace(fed="student"))
    crosses = cluster.ranks > cluster.per_node
    units = phase.losses if phase.cached else range(max(phase.losses) + 1)
    each = [spans.teacher(u) + spans.student(u) + spans.step(u) + spans.reduced(u, crosses) for u in units]
    return float(sum(each)[cluster.ranks - 1]) * flow.accumulation  # type: ignore[index]
