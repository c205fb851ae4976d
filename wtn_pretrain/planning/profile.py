"""What a unit costs on the device at hand, measured: one unit is built at a time, and units of one shape are measured once."""

import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from wtn_pretrain.device import device
from wtn_pretrain.imitation.config import ImitateSection
from wtn_pretrain.imitation.learner import Learner
from wtn_pretrain.imitation.pairing import Pairing
from wtn_pretrain.imitation.units import Unit
from wtn_pretrain.models.base import BlockConfig, Flops
from wtn_pretrain.parallel.replicas import Replicas, forget_replicas
from wtn_pretrain.planning.costs import Curve, UnitCost, describe, working_sets
from wtn_pretrain.planning.footprint import train
from wtn_pretrain.planning.pieces import Piece, autocast, batch, cut, fewest_rows, materialise
from wtn_pretrain.training.optimizers import decay_groups, make_optimizer

RUNTIME = 55_000_000
"""Bytes that a process takes once it works: threads, kernels made at run time, libraries that are loaded when first used."""


class Profile(NamedTuple):
    """What was measured."""

    costs: list[UnitCost]
    base: int
    """Bytes that this process held before any network was built; 0 on an accelerator, whose memory is counted from nothing."""


def profile(
    thin: BlockConfig,
    wide: BlockConfig,
    pairing: Pairing,
    counts: tuple[Flops, Flops],
    section: ImitateSection,
    rows: int,
    *,
    fed: str = "student",
    length: int | None = None,
    repeats: int = 5,
) -> Profile:
    """Measures every unit of a pair on micro-batches of `rows` and on shares of them; see `costs.declared` for the rest.

    Each figure is the median of `repeats` after a warm-up. In a process group of one (`parallel.launch.start_ranks`) steps are
    DeepSpeed's, as in a run; else plain torch's.
    """
    base = resident() + RUNTIME if device().type == "cpu" else 0
    found: dict[str, UnitCost] = {}
    costs = []
    # the engine's own learners, DeepSpeed included, where this process is in a group (of one)
    alone = Replicas.alone(0) if dist.is_initialized() and dist.get_world_size() == 1 else None
    for piece in cut(thin, wide, pairing, counts, section, length):
        if piece.key not in found:
            found[piece.key] = _measured(piece, section, rows, fed, repeats, alone)
        costs.append(found[piece.key])
    if alone is not None:
        forget_replicas()
    return Profile(costs, base)


def resident() -> int:
    """Bytes of this process's resident set."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


class _Plain:
    """Backward and optimizer step without DeepSpeed, for a process that is in no group."""

    def __init__(self, unit: Unit, section: ImitateSection) -> None:
        self._own, self._clip = unit.own_parameters(), section.clip
        self._optimizer = make_optimizer(section.optimizer, decay_groups(self._own, section.optimizer.weight_decay))

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, rate: float, number: int) -> None:
        if self._clip:
            torch.nn.utils.clip_grad_norm_(self._own, self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def close(self) -> None:
        pass


def _measured(piece: Piece, section: ImitateSection, rows: int, fed: str, repeats: int, alone: Replicas | None) -> UnitCost:
    counts = sorted({max(math.ceil(rows / parts), fewest_rows(piece, rows)) for parts in (1, 2, 4, 16)})
    unit = materialise(piece.unit, device())
    unit.learn(piece.learns)
    learner = _learner(unit, section, alone) if piece.learns else None
    points = [(some, *_seconds(unit, learner, piece, section, some, fed, repeats)) for some in counts]
    if learner is not None:
        learner.close()
    return describe(
        piece,
        section,
        Curve.through((some, teacher) for some, teacher, _, _ in points),
        Curve.through((some, student) for some, _, student, _ in points),
        median(step for *_, step in points),
        working_sets(piece, section, counts, fed),
    )


def _learner(unit: Unit, section: ImitateSection, alone: Replicas | None) -> "Learner | _Plain":
    if alone is None:
        return _Plain(unit, section)
    # what is measured are numbers drawn at random: whether they overflow is nobody's mistake
    return Learner([unit], section.model_copy(update={"micro_batch_size": 0, "max_skipped": sys.maxsize}), alone)


def _seconds(
    unit: Unit, learner: "Learner | _Plain | None", piece: Piece, section: ImitateSection, rows: int, fed: str, repeats: int
) -> tuple[float, float, float]:
    """Seconds of the teacher's forward, of the student's forward and backward, and of the optimizer's step."""
    cast = autocast(section, device().type)
    teacher, student = batch(piece.teacher_in, rows, device()), batch(piece.student_in, rows, device())
    with cast():
        target, taps = unit.teach(teacher)

    def teach() -> None:
        with cast():
            unit.teach(teacher)

    if learner is None:

        @torch.no_grad()
        def follow() -> None:
            with cast():
                unit.answer(unit.enter(teacher, student, "student", local=True))

        forward, following = timed([teach, follow], repeats)
        return forward, following, 0.0

    def learn() -> None:
        train(unit, teacher, student, fed, target, taps, cast, learner.backward)

    forward, learning, step = timed([teach, learn, partial(learner.step, 1e-6, 0)], repeats)
    return forward, learning, step


def timed(work: Sequence[Callable[[], object]], repeats: int) -> tuple[float, ...]:
    """Seconds of each piece of work, one after the other in every round: medians of `repeats` rounds after one that does not count."""
    rounds = []
    for _ in range(repeats + 1):
        marks = [time.perf_counter()]
        for piece in work:
            piece()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            marks.append(time.perf_counter())
        rounds.append([after - before for before, after in pairwise(marks)])
    return tuple(median(column) for column in zip(*rounds[1:], strict=True))
