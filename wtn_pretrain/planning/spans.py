"""What a span of units costs on a number of replicas: the formulas that search and prediction share."""

from collections.abc import Sequence
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from wtn_pretrain.imitation.config import ImitateSection
from wtn_pretrain.planning.cluster import Cluster, Link
from wtn_pretrain.planning.costs import UnitCost


class Flow(NamedTuple):
    """How micro-batches flow."""

    rows: int
    """Of a micro-batch, over all replicas of a span."""
    fed: str = "student"
    """Who feeds the students: in student-fed passes their activations travel as well, and what leaves a span waits for its students."""
    zero: int = 0
    """ZeRO stage within the replicas of a span."""
    in_flight: int = 2
    """Micro-batches that wait before a span, and behind it."""
    accumulation: int = 1
    """Micro-batches that an optimizer step takes."""
    wire: float = 1.0
    """Bytes sent for each byte held: 0.5 where fp32 travels as bf16."""
    graphs: Literal["unit", "all", "below"] = "unit"
    """What is held of the students until a backward pass: a unit's graph for its own, the graphs of all units for one pass through them,
    or these where only the topmost unit has a loss."""


def flow(section: ImitateSection, fed: str = "student", zero: int = 0) -> Flow:
    """The flow that a section asks for."""
    rows = section.micro_batch_size or section.batch_size
    graphs: Literal["unit", "all", "below"] = "unit"
    if section.schedule == "joint":
        graphs = "all"
    elif section.schedule == "bottom_up" and section.below == "joint":
        graphs = "below"
    return Flow(rows, fed, zero, section.in_flight, section.batch_size // rows, 0.5 if section.wire == "bf16" else 1.0, graphs)


class Memory(NamedTuple):
    """Bytes on one rank of a span, by what they are for; arrays where the costs of many spans are asked at once."""

    base: np.ndarray
    """The process before any network is built."""
    teacher: np.ndarray
    """The teacher's weights."""
    student: np.ndarray
    """The student's weights and bridges."""
    optimizer: np.ndarray
    """Optimizer states and, under ZeRO, the copy of the weights that it steps."""
    gradients: np.ndarray
    packets: np.ndarray
    """Activations that came in and wait or are worked on, and those that wait to leave."""
    targets: np.ndarray
    """The teacher's outputs: of all units at once where the span above waits for the last, else of the one that learns. Where graphs of
    all units are held, they are part of `work`."""
    work: np.ndarray
    """What the unit at work makes, gradients of its own left out."""

    @property
    def total(self) -> np.ndarray:
        return sum(self, start=np.zeros(()))


class SpanCosts:
    """Costs of all spans; axis r of every array is `replicas` = 1, 2, ... up to the ranks, or the rows if these are fewer."""

    def __init__(self, costs: Sequence[UnitCost], cluster: Cluster, flow: Flow) -> None:
        self.costs, self.cluster, self.flow = costs, cluster, flow
        self.units = len(costs)
        self.replicas = np.arange(1, min(cluster.ranks, flow.rows) + 1)
        self.share = -(-flow.rows // self.replicas)
        """Rows of the replica that has most, [r]."""

    def busy(self, first: int, crosses: bool) -> np.ndarray:
        """Seconds of a micro-batch for spans from `first` to each last unit [lasts, r], without the relay."""
        return self._from(self._work, first) + self._from(self._reduce[crosses], first)

    def received(self, first: int, far: bool) -> np.ndarray:
        """Seconds in which a rank of a span from `first` receives its rows [r]; nothing at the bottom."""
        return self.sent(far)[first - 1] if first else np.zeros(len(self.replicas))

    def sent(self, far: bool) -> np.ndarray:
        """Seconds in which a rank of a span up to each last unit sends its rows [units, r]; nothing at the top."""
        return self._sent[far]

    def cost(self, first: int, crosses: bool, far_below: bool, far_above: bool) -> np.ndarray:
        """Seconds between micro-batches that spans from `first` to each last unit allow [lasts, r].

        A span is as slow as its computation with the all-reduce, which waits for the backward pass, or as one of its links, which
        carry beside it.
        """
        incoming, outgoing = self.received(first, far_below), self.sent(far_above)[first:]
        seen = (1 - self.cluster.hidden) * (incoming + outgoing)
        return np.maximum(np.maximum(self.busy(first, crosses) + seen, incoming), outgoing)

    def memory(self, first: int) -> Memory:
        """Bytes of a rank for spans from `first` to each last unit [lasts, r]."""
        flow, costs, share, replicas = self.flow, self.costs[first:], self.share, self.replicas
        lasts = len(costs)

        def summed(values: list[int]) -> np.ndarray:
            return np.broadcast_to(np.cumsum(values)[:, None], (lasts, len(replicas)))

        trained = summed([cost.trained for cost in costs])
        parts = replicas if flow.zero else np.ones_like(replicas)
        masters = 1 if flow.zero else 0
        gradients = trained / (replicas if flow.zero == 2 else 1)
        targets: np.ndarray = summed([cost.hidden for cost in costs]) * share
        both = [cost.hidden + (self.costs[first + place - 1].hidden if place else 0) for place, cost in enumerate(costs)]
        single = np.maximum.accumulate(both)[:, None] * share
        if flow.fed == "teacher":
            targets = np.concatenate([targets[:-1], single[-1:]])
        elif flow.graphs != "unit":
            targets = np.zeros_like(targets)
        else:
            targets = single + np.maximum.accumulate([cost.student_hidden for cost in costs])[:, None] * share
        incoming = self._leaving[first - 1] if first else np.multiply(self.costs[0].inputs, share)
        outgoing = self._leaving[first:].copy()
        outgoing[-1] = 0
        # gradients of the units above the one at work are not there yet, unless earlier micro-batches left theirs
        work = self._peak(first) + (0 if flow.accumulation == 1 else gradients)
        # replicas average gradients in buckets, a unit's after the other's; what was freed of them stays in a heap of the CPU
        bucket = (trained if self.cluster.slack else np.maximum.accumulate([cost.trained for cost in costs])[:, None]) * (replicas > 1)
        if flow.graphs != "unit" and flow.zero:
            # one engine has all units, and fills a bucket while another is sent
            bucket = 2 * trained * (replicas > 1)
        return Memory(
            base=np.full((lasts, len(replicas)), self.cluster.base),
            teacher=summed([cost.teacher_weights for cost in costs]),
            student=summed([cost.student_weights for cost in costs]),
            optimizer=(summed([cost.states for cost in costs]) + masters * trained) / parts,
            gradients=gradients,
            packets=(flow.in_flight + 1) * np.broadcast_to(incoming, outgoing.shape) + flow.in_flight * outgoing,
            targets=targets,
            work=np.maximum(work - gradients, 0) * (1 + self.cluster.slack) + bucket,
        )

    def _peak(self, first: int) -> np.ndarray:
        """Most bytes that the units from `first` make at work, with the gradients of the units before them [lasts, r]."""
        if self.flow.graphs != "unit":
            return self._peak_of_all(first)
        flow, costs = self.flow, self.costs[first:]
        trained = np.array([cost.trained for cost in costs])
        before = (np.cumsum(trained) - trained) if flow.accumulation == 1 else np.zeros(len(costs))
        student = self._student_work[first:] * np.array([cost.learns or flow.fed == "student" for cost in costs])[:, None]
        step = (np.cumsum(trained) if flow.accumulation == 1 else np.zeros(len(costs))) + [cost.step_work for cost in costs]
        parts = self.replicas if flow.zero == 2 else np.ones_like(self.replicas)
        peak = np.maximum(np.maximum(student, self._teacher_work[first:]) + before[:, None] / parts, step[:, None] / parts)
        return np.maximum.accumulate(peak)

    def _peak_of_all(self, first: int) -> np.ndarray:
        """`_peak` where one backward pass goes down through all units, which have held their graphs until then; with the teacher's
        outputs, which losses do not hold."""
        costs = self.costs[first:]
        parts = self.replicas if self.flow.zero == 2 else np.ones_like(self.replicas)
        trained = np.cumsum([cost.trained for cost in costs])[:, None] * (self.flow.accumulation == 1) / parts
        held = np.array([cost.student_held.at(self.share) for cost in costs])
        work = self._student_work[first:]
        if self.flow.graphs == "below":
            # the units below have no loss
            graph = np.array([cost.student_graph.at(self.share) for cost in costs])
            work, held = work - (held - graph), graph
        below = np.cumsum(held, axis=0) - held
        # forward: the teacher beside the graphs of the students below it; backward: those, and the gradients of the units above
        forward = np.maximum.accumulate(below + self._teacher_work[first:])
        backward = np.maximum.accumulate(below + work + np.array([[cost.hidden] for cost in costs]) * self.share - trained) + trained
        step = trained + np.maximum.accumulate([cost.step_work for cost in costs])[:, None] / parts
        return np.maximum(np.maximum(forward, backward), step)

    @cached_property
    def _work(self) -> np.ndarray:
        """Seconds of computation of a micro-batch, summed up to each unit [units + 1, r]."""
        return self._summed([self.teacher(unit) + self.student(unit) + self.step(unit) for unit in range(self.units)])

    def teacher(self, unit: int) -> np.ndarray:
        """Seconds of a unit's teacher [r]."""
        return self.costs[unit].teacher.at(self.share)

    def student(self, unit: int) -> np.ndarray:
        """Seconds of a unit's student [r]; one that does not learn runs only if it feeds others."""
        cost = self.costs[unit]
        runs = cost.learns or self.flow.fed == "student"
        return cost.student.at(self.share) if runs else np.zeros(len(self.share))

    def step(self, unit: int) -> np.ndarray:
        """Seconds of a unit's optimizer for each micro-batch [r]; ZeRO divides the work."""
        return self.costs[unit].step / (self.replicas if self.flow.zero else np.ones(len(self.replicas))) / self.flow.accumulation

    def reduced(self, unit: int, crosses: bool) -> np.ndarray:
        """Seconds of a unit's sums over the replicas for each micro-batch [r]; ZeRO's scatter and gather move as much."""
        cost = self.costs[unit]
        gradients = self.cluster.all_reduce(cost.trained, self.replicas, crosses) / self.flow.accumulation
        small = cost.syncs * (self.cluster.all_reduce(0, self.replicas, crosses) + self.cluster.meeting * (self.replicas > 1))
        return gradients + small if cost.learns else np.zeros(len(self.replicas))

    @cached_property
    def _reduce(self) -> tuple[np.ndarray, np.ndarray]:
        near, far = (self._summed([self.reduced(unit, crosses) for unit in range(self.units)]) for crosses in (False, True))
        return near, far

    @cached_property
    def _leaving(self) -> np.ndarray:
        """Bytes of a rank's rows of what leaves each unit [units, r]."""
        student = self.flow.fed == "student"
        return np.array([(c.hidden + c.context + student * c.student_hidden) * self.share + c.bridge for c in self.costs], dtype=float)

    @cached_property
    def _sent(self) -> tuple[np.ndarray, np.ndarray]:
        def over(link: Link) -> np.ndarray:
            seconds = np.asarray(link.seconds(self._leaving * self.flow.wire))
            seconds[-1] = 0
            return seconds

        return over(self.cluster.inside), over(self.cluster.between)

    @cached_property
    def _teacher_work(self) -> np.ndarray:
        return np.array([cost.teacher_work.at(self.share) for cost in self.costs])

    @cached_property
    def _student_work(self) -> np.ndarray:
        return np.array([cost.student_work.at(self.share) for cost in self.costs])

    def _summed(self, rows: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.zeros((1, len(self.replicas))), np.cumsum(rows, axis=0)])

    @staticmethod
    def _from(sums: np.ndarray, first: int) -> np.ndarray:
        return sums[first + 1 :] - sums[first]
