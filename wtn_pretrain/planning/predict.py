"""What a plan will do: time of a step, idle time and memory of every span, without running it."""

from collections.abc import Sequence
from typing import NamedTuple

from wtn_pretrain.errors import UserError
from wtn_pretrain.imitation.plan import Plan, Span, shares
from wtn_pretrain.planning.cluster import Cluster
from wtn_pretrain.planning.costs import UnitCost
from wtn_pretrain.planning.spans import Flow, Memory, SpanCosts


class Stage(NamedTuple):
    """One span of a plan; its replicas move together, since they meet in every unit's all-reduce. Seconds are of a micro-batch."""

    span: Span
    ranks: range
    nodes: int
    rows: int
    """Of the replica that has most."""
    teacher: float
    student: float
    """Forward, backward and optimizer."""
    reduce: float
    """Sums over the replicas."""
    copying: float
    """What the relay takes of the computation."""
    leaves: float
    """From the start until what the span above waits for is there."""
    received: float
    """Transfer from the span below; 0 at the bottom."""
    sent: float
    """Transfer to the span above; 0 at the top."""
    memory: Memory

    @property
    def busy(self) -> float:
        return self.teacher + self.student + self.reduce + self.copying


class Prediction(NamedTuple):
    """A plan in steady state and from its first micro-batch to its last."""

    stages: tuple[Stage, ...]
    flow: Flow

    @property
    def links(self) -> list[float]:
        """Seconds of the transfers between neighbours, as slow as the slower end."""
        return [max(below.sent, above.received) for below, above in zip(self.stages, self.stages[1:], strict=False)]

    @property
    def micro_batch(self) -> float:
        """Seconds between micro-batches in steady state."""
        return max([stage.busy for stage in self.stages] + self.links)

    @property
    def step(self) -> float:
        """Seconds between optimizer steps in steady state."""
        return self.micro_batch * self.flow.accumulation

    @property
    def fill(self) -> float:
        """Seconds until the top span starts on the first micro-batch."""
        return sum(stage.leaves for stage in self.stages[:-1]) + sum(self.links)

    def idle(self, stage: Stage) -> float:
        """The share of the steady state in which a span waits."""
        return 1 - stage.busy / self.micro_batch

    def seconds(self, steps: int) -> float:
        """From the start of the first micro-batch to the end of the last of `steps` optimizer steps, fill and drain included.

        The longest chain of things that wait for one another: micro-batches pile up before the slowest span or link on the way.
        """
        packets, before, slowest, latest = steps * self.flow.accumulation, 0.0, 0.0, 0.0
        for stage, link in zip(self.stages, [*self.links, 0.0], strict=True):
            slowest = max(slowest, stage.busy)
            latest = max(latest, before + (packets - 1) * slowest + stage.busy)
            before += stage.leaves + link
            slowest = max(slowest, link)
        return latest


def predict(plan: Plan, costs: Sequence[UnitCost], cluster: Cluster, flow: Flow) -> Prediction:
    """What `plan` does with micro-batches of `flow`, on machines of which it fills the first ranks.

    Raises:
        UserError: a span has more replicas than a micro-batch has rows.
    """
    for span in plan.spans:
        if span.replicas > flow.rows:
            raise UserError(
                f"narrow.plan: span {span} has {span.replicas} replicas for micro-batches of {flow.rows} rows; give each at least a row"
            )
    spans = SpanCosts(costs, cluster.sized(plan.ranks), flow)
    stages = []
    for number, span in enumerate(plan.spans):
        ranks, place = plan.ranks_of(number), span.replicas - 1
        top = number == len(plan.spans) - 1
        first, last = cluster.node(ranks[0]), cluster.node(ranks[-1])
        crosses = first != last
        received = float(spans.received(span.first, last != cluster.node(ranks[0] - 1))[place])
        sent = 0.0 if top else float(spans.sent(first != cluster.node(ranks[-1] + 1))[span.last][place])
        teacher = [float(spans.teacher(unit)[place]) for unit in span.units]
        student = [float(spans.student(unit)[place]) for unit in span.units]
        leaves = sum(teacher)
        if flow.fed == "student":
            # the span above waits for the last student's forward, a third of its work
            leaves += sum(student[:-1]) + student[-1] / (3 if costs[span.last].learns else 1)
        memory = spans.memory(span.first)
        stages.append(
            Stage(
                span=span,
                ranks=ranks,
                nodes=last - first + 1,
                rows=shares(flow.rows, span.replicas)[0],
                teacher=sum(teacher),
                student=sum(student) + sum(float(spans.step(unit)[place]) for unit in span.units),
                reduce=sum(float(spans.reduced(unit, crosses)[place]) for unit in span.units),
                copying=(1 - cluster.hidden) * (received + sent),
                leaves=leaves,
                received=received,
                sent=sent,
                memory=Memory(*(term[span.last - span.first, place] for term in memory)),
            )
        )
    return Prediction(tuple(stages), flow)
