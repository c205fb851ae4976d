"""The layouts there are, and the best of those that fit."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from wtn_pretrain.planning.cluster import Cluster
from wtn_pretrain.planning.training.layout import Layout
from wtn_pretrain.planning.training.memory import Memory, memory
from wtn_pretrain.planning.training.pace import Pace, Passes, pace
from wtn_pretrain.planning.training.work import Work

TENSORS = (1, 2, 4, 8)
MICRO = 1024
"""The largest micro-batch that is looked at."""
NEAR = 0.05
"""Differences that no layout is chosen for: those between a plan and a run are larger."""


class Answer(NamedTuple):
    """What a layout does."""

    layout: Layout
    pace: Pace
    memory: Memory

    def seconds(self, steps: int) -> float:
        """Of a stage."""
        return steps * self.pace.step


Timed = Callable[[Work, Layout], Passes]


def answer(work: Work, layout: Layout, timed: Timed, machines: Cluster, on: str, exact: bool = True) -> Answer:
    """Time and memory of one layout; `exact`: see `counted.count`."""
    held = memory(work, layout, on, machines.base, machines.slack, exact)
    return Answer(layout, pace(work, layout, timed(work, layout), machines, on, exact=exact), held)


def fits(found: Answer, machines: Cluster) -> bool:
    return found.memory.total <= machines.memory


def choices(work: Work, ranks: int, per_node: int, offload: bool = False, tensors: Sequence[int] = TENSORS) -> Iterator[Layout]:
    """Every layout of a stage's batch on so many ranks, without its micro-batch: one sample, and as many passes as that takes."""
    for tensor in tensors:
        if tensor > min(ranks, per_node) or ranks % tensor:
            continue
        if tensor > 1 and work.config.why_not_divisible(tensor, work.length or None):
            continue
        data = ranks // tensor
        if work.section.batch_size % data:
            continue
        share = work.section.batch_size // data
        for zero in (0, 1, 2, 3):
            if (zero == 3 and tensor > 1) or (zero and data == 1):
                continue
            for checkpoint in (0, 1):
                made = Layout(ranks, zero, tensor, False, 1, share, checkpoint, buffers=2 if zero >= 2 else 1)
                yield made
                if offload and zero in (1, 2, 3):
                    yield made._replace(offload="both" if zero == 3 else "optimizer")


def best(work: Work, ranks: int, timed: Timed, machines: Cluster, on: str, offload: bool = False) -> list[Answer]:
    """The fastest micro-batch of every layout that fits, the fastest layout first; those within `NEAR` of it by simplicity."""
    found: list[Answer] = []
    # dividing layers sends far more than dividing samples: only where that cannot be done, or does not fit
    for tensors in (TENSORS[:1], TENSORS[1:]):
        for layout in choices(work, ranks, machines.per_node, offload, tensors):
            tried = [_with(work, layout, micro, timed, machines, on) for micro in _divisors(layout.accumulation)]
            held = [one for one in tried if fits(one, machines)]
            if held:
                found.append(min(held, key=lambda one: (round(one.pace.step, 9), one.layout.accumulation)))
        if found:
            break
    if not found:
        return []
    fastest = min(one.pace.step for one in found)
    return sorted(found, key=lambda one: (0 if one.pace.step <= (1 + NEAR) * fastest else one.pace.step, _simplicity(one.layout)))


def smallest(
    work: Work, seconds: float, counts: Sequence[int], timed: Timed, machines: Cluster, on: str, offload: bool = False
) -> list[tuple[int, Answer | None]]:
    """For rising numbers of ranks the best layout (None: none fits), up to the first that is done in `seconds` and one beyond."""
    found: list[tuple[int, Answer | None]] = []
    enough = False
    for ranks in counts:
        if work.section.batch_size % ranks and ranks > work.section.batch_size:
            break
        first = next(iter(best(work, ranks, timed, machines.sized(ranks), on, offload)), None)
        found.append((ranks, first))
        if enough:
            break
        enough = first is not None and first.seconds(work.section.steps) <= seconds
    return found


def counts(per_node: int, most: int, batch: int) -> list[int]:
    """Numbers of ranks that are looked at: powers of two within a node, then whole nodes that the batch can be divided over."""
    within = [ranks for ranks in (1, 2, 4, 8, 16) if ranks <= min(per_node, most)]
    nodes = [ranks for ranks in range(2 * per_node, most + 1, per_node) if batch % ranks == 0]
    return sorted({*within, *nodes})


def _with(work: Work, layout: Layout, micro: int, timed: Timed, machines: Cluster, on: str) -> Answer:
    return answer(work, layout._replace(micro=micro, accumulation=layout.accumulation // micro), timed, machines, on, exact=False)


def _divisors(number: int) -> list[int]:
    """Micro-batches that a rank's share of the batch divides into."""
    return [value for value in range(1, min(number, MICRO) + 1) if number % value == 0]


def _simplicity(layout: Layout) -> tuple[int, int, int, int, int]:
    return layout.tensor, layout.offload != "none", layout.checkpoint, layout.zero, layout.accumulation
