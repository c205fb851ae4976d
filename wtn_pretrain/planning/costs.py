"""What a unit costs in time, memory and bytes on the wire, from its shape alone."""

import copy
import math
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple, Self

import numpy as np
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from wtn_pretrain.device import device
from wtn_pretrain.imitation.config import ImitateSection
from wtn_pretrain.imitation.pairing import Pairing
from wtn_pretrain.models.base import BlockConfig, Flops
from wtn_pretrain.planning.footprint import FusedAttention, Training, teaching_peak, training_peak
from wtn_pretrain.planning.pieces import Piece, allocate, autocast, batch, cut, fewest_rows, row_bytes

STATES = {"adamw": 2, "lamb": 2, "sgd": 1, "lars": 1}
"""Optimizer -> numbers of state a parameter."""


class Curve(NamedTuple):
    """A cost as a function of rows: straight lines between points that rise with the rows, and on beyond them."""

    points: tuple[tuple[float, float], ...]

    @classmethod
    def through(cls, points: Iterable[tuple[float, float]]) -> Self:
        """The curve through measured points; more rows never cost less, whatever the noise."""
        rows, values = zip(*sorted(points), strict=True)
        return cls(tuple(zip(rows, accumulate(values, max), strict=True)))

    def at(self, rows: np.ndarray) -> np.ndarray:
        """The cost of `rows` rows (at least one)."""
        x, y = (np.array(axis, dtype=float) for axis in zip(*self.points, strict=True))
        if len(x) == 1:
            return rows * (y[0] / x[0])
        first, last = ((y[1] - y[0]) / (x[1] - x[0]), (y[-1] - y[-2]) / (x[-1] - x[-2]))
        # fewer rows are never more efficient than the fewest that were measured
        below = np.maximum(y[0] - first * (x[0] - rows), y[0] / x[0] * rows)
        return np.where(rows < x[0], below, np.where(rows > x[-1], y[-1] + last * (rows - x[-1]), np.interp(rows, x, y)))


class UnitCost(NamedTuple):
    """One unit (0 is the stem) on one rank. Seconds and bytes; curves are functions of the rows that the rank works on."""

    teacher: Curve
    """Seconds of the teacher's forward."""
    student: Curve
    """Seconds of the student's forward, loss and backward; of its forward where it does not learn."""
    step: float
    """Seconds of clipping and the optimizer over all trained parameters."""
    learns: bool
    teacher_weights: int
    student_weights: int
    """Student and bridges."""
    trained: int
    """Bytes of what learns: of its gradients too."""
    states: int
    """Bytes of the optimizer's state, ZeRO 0."""
    step_work: int
    """Bytes that the optimizer's step makes beside the gradients."""
    teacher_work: Curve
    """Bytes that the teacher's forward makes at once."""
    student_work: Curve
    """Bytes that the student's forward and backward make at once, its gradients included."""
    student_held: Curve
    """Bytes that are held from its loss until its backward: its graph, the loss's with it."""
    student_graph: Curve
    """Of these, bytes that are there without a loss."""
    hidden: int
    """Bytes a row of the teacher's output."""
    context: int
    """Bytes a row of what goes beside it."""
    student_hidden: int
    """Bytes a row of the student's output."""
    bridge: int = 0
    """Bytes of E at the unit's upper end, which travels whole."""
    inputs: int = 0
    """Bytes a row of the data, for the stem."""
    syncs: int = 1
    """Small sums over the replicas in each micro-batch: the loss's normaliser, and the statistics of batch norms both ways."""


class Device(NamedTuple):
    """What declared costs assume of a rank."""

    flops: float
    """FLOP a second that matrix products and convolutions reach in practice."""
    bandwidth: float
    """Bytes a second to and from its memory, for everything else."""
    overhead: float
    """Seconds to start a unit's forward, however few the rows; backward and optimizer cost as much again each."""


DATA_CENTRE = Device(3e14, 1.5e12, 1e-4)
"""A data-centre GPU in bf16, at about a third of its peak."""
CORE = Device(8e10, 1e10, 1e-4)
"""One core of a CPU."""


def here() -> Device:
    """What is assumed of this kind of device."""
    return CORE if device().type == "cpu" else DATA_CENTRE


def declared(
    thin: BlockConfig,
    wide: BlockConfig,
    pairing: Pairing,
    counts: tuple[Flops, Flops],
    section: ImitateSection,
    rows: int,
    *,
    target: Device,
    fed: str = "student",
    length: int | None = None,
    quick: bool = False,
) -> list[UnitCost]:
    """Costs of every unit from FLOPs, the bytes that its operators make, and declared rates: nothing is computed.

    Args:
        counts: FLOPs of a forward pass of one sample through the thin and the wide network.
        rows: of a micro-batch, over all replicas.
        length: of sequences; None: the longest.
        quick: memory at work is taken as proportional to the rows, which is half the counting.
    """
    found: dict[str, UnitCost] = {}
    costs = []
    for piece in cut(thin, wide, pairing, counts, section, length):
        if piece.key not in found:
            found[piece.key] = _declared(piece, section, rows, target, fed, quick)
        costs.append(found[piece.key])
    return costs


def _declared(piece: Piece, section: ImitateSection, rows: int, target: Device, fed: str, quick: bool) -> UnitCost:
    unit = piece.unit
    # times are linear in the rows here, so two points tell all
    made = working_sets(piece, section, {rows} if quick else {max(math.ceil(rows / 4), fewest_rows(piece, rows)), rows}, fed)
    if quick and rows > 1:
        made += [WorkingSet(1, *(size // rows for size in found[1:])) for found in made]
    # a backward pass costs twice a forward pass; what an operator makes is written once and read about once
    passes = 3 if piece.learns else 1
    student_flops = passes * unit.student_flops + _bridge_flops(piece, fed)
    teacher = Curve.through(
        (work.rows, target.overhead + work.rows * unit.teacher_flops / target.flops + 2 * work.teacher / target.bandwidth) for work in made
    )
    student = Curve.through(
        (work.rows, (passes - 1 or 1) * target.overhead + work.rows * student_flops / target.flops + 2 * work.student / target.bandwidth)
        for work in made
    )
    cost = describe(piece, section, teacher, student, 0.0, made)
    # the step reads weights, gradients and states and writes all but the gradients, clipping reads the gradients once more
    moved = 4 * cost.trained + 2 * cost.states
    return cost._replace(step=target.overhead + moved / target.bandwidth if piece.learns else 0.0)


class WorkingSet(NamedTuple):
    """Bytes of a unit at work on a number of rows."""

    rows: int
    teacher: int
    """The most that its forward makes at once."""
    student: int
    """The most that forward, loss and backward make at once."""
    held: int
    """Of the student's, from its loss until its backward."""
    graph: int
    """Of these, what is there without a loss."""


def working_sets(piece: Piece, section: ImitateSection, counts: Iterable[int], fed: str) -> list[WorkingSet]:
    """The memory at work for each number of rows: from shapes alone, equal to what a run makes."""
    unit, cast = copy.deepcopy(piece.unit), autocast(section, "cpu")
    found = []
    with FakeTensorMode(), FusedAttention():
        allocate(unit, "cpu")
        for rows in counts:
            entered, student = batch(piece.teacher_in, rows, "cpu"), batch(piece.student_in, rows, "cpu")
            teaching, target, taps = teaching_peak(unit, entered, cast)
            training = Training(*[rows * row_bytes(piece.student_out.hidden)] * 3)
            if piece.learns:
                training = training_peak(unit, entered, student, fed, target, taps, cast)
            found.append(WorkingSet(rows, teaching, *training))
    return found


def describe(piece: Piece, section: ImitateSection, teacher: Curve, student: Curve, step: float, work: Sequence[WorkingSet]) -> UnitCost:
    """A unit's costs from what was counted or measured and what its shape says."""
    unit = piece.unit
    own = unit.own_parameters() if piece.learns else []
    trained = _size(own)
    largest = max(map(_one, own), default=0)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in unit.student.modules())
    return UnitCost(
        teacher=teacher,
        student=student,
        step=step,
        learns=piece.learns,
        teacher_weights=sum(_size([*module.parameters(), *module.buffers()]) for module in unit.teacher),
        student_weights=_size([*unit.parameters(), *unit.buffers()]),
        trained=trained,
        states=trained * STATES[section.optimizer.name],
        step_work=2 * largest,
        teacher_work=Curve.through((one.rows, one.teacher) for one in work),
        student_work=Curve.through((one.rows, one.student) for one in work),
        student_held=Curve.through((one.rows, one.held) for one in work),
        student_graph=Curve.through((one.rows, one.graph) for one in work),
        hidden=row_bytes(piece.teacher_out.hidden),
        context=sum(map(row_bytes, piece.teacher_out.context)),
        student_hidden=row_bytes(piece.student_out.hidden),
        bridge=0 if unit.exit is None else _one(unit.exit.expand),
        inputs=0 if unit.index else row_bytes(piece.teacher_in),
        syncs=1 + 2 * norms,
    )


def _bridge_flops(piece: Piece, fed: str) -> int:
    """FLOPs of one row through the maps at both ends, backward included."""
    unit, total = piece.unit, 0
    if unit.exit is not None:
        total += 3 * 2 * unit.exit.expand.numel() * _positions(piece.student_out.hidden.shape, unit.exit.expand.shape[1])
    if unit.entry is not None and (fed == "teacher" or unit.entry.free):
        wide, narrow = unit.entry.expand.shape
        maps = (2 if unit.entry.free else 1) + (1 if fed == "student" else 0)
        total += maps * 2 * wide * narrow * _positions(piece.student_in.hidden.shape, narrow)  # type: ignore[union-attr]
    return total


def _positions(shape: tuple[int, ...], width: int) -> int:
    return math.prod(shape) // width


def _size(tensors: Iterable[object]) -> int:
    return sum(map(_one, tensors))


def _one(tensor: object) -> int:
    return tensor.numel() * tensor.element_size()  # type: ignore[attr-defined]
