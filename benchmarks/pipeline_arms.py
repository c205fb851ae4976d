"""The arms of `pipeline.py`, as a rank runs them."""

import contextlib
import ctypes
import gc
import io
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pairs import Pair, Shape, Widening
from products import Products, rate
from torch import Tensor

from wtn_pretrain.device import to_device
from wtn_pretrain.imitation.config import ImitateSection
from wtn_pretrain.imitation.engine import Run
from wtn_pretrain.imitation.imitator import Entry, Imitator
from wtn_pretrain.imitation.observer import Observer
from wtn_pretrain.imitation.plan import parse, single
from wtn_pretrain.imitation.schedules import Phase, phases
from wtn_pretrain.imitation.wiring import Wiring
from wtn_pretrain.models.base import Flow
from wtn_pretrain.parallel.launch import Place
from wtn_pretrain.parallel.replicas import Replicas, forget_replicas
from wtn_pretrain.planning.cluster import Cluster, Connection, cores, measure_link
from wtn_pretrain.planning.costs import UnitCost
from wtn_pretrain.planning.predict import predict
from wtn_pretrain.planning.profile import profile
from wtn_pretrain.planning.search import search
from wtn_pretrain.planning.spans import Flow as PlannedFlow
from wtn_pretrain.planning.spans import flow
from wtn_pretrain.training.trace import Trace

NEVER = 10**9
"""Steps between checkpoints and between log records."""


class Case(NamedTuple):
    """A pair of networks that is measured."""

    model: str
    blocks: int
    shape: Shape
    widening: Widening

    def __str__(self) -> str:
        inner, outer = self.widening
        return f"{self.model} {self.blocks} blocks, {f'inner {inner:g}x' if outer == 1 else f'outer {outer:g}x'}"


class Taken(NamedTuple):
    """Seconds of one block's step, the mean over its timed steps."""

    prefix: float
    """The teacher from the stem to this block."""
    student: float
    """Forward, backward, sums over ranks and optimizer of the student."""


_pairs: dict[Case, Pair] = {}


def _pair(case: Case) -> Pair:
    if case not in _pairs:
        _pairs.clear()
        _pairs[case] = Pair(*case)
    return _pairs[case]


def _section(pair: Pair, steps: int, **more: Any) -> ImitateSection:
    section = {"steps": steps, "batch_size": pair.batch_size, "checkpoint_every": NEVER, "log_every": NEVER, **more}
    return ImitateSection.model_validate(section)


def stream(place: Place, case: Case, plan: str, steps: int, folder: Path, keep: bool = False, lean: bool = False) -> dict[str, Any]:
    """Arm (c): the engine under `plan`, teacher-fed. When each step was done and the trace.

    Args:
        keep: leave the students in `folder`.
        lean: keep only the units of this rank, and say how many bytes were resident at most.
    """
    pair = _pair(case)
    section = _section(pair, steps, schedule="parallel")
    wiring = Wiring(parse(plan), place, pair.batch_size)
    trace = Trace(place.rank, f"rank {place.rank}")
    imitator = pair.imitator(section, wiring.replicas, wiring.span.units, Observer(trace=trace))
    order = phases(section, case.blocks, pair.learns_stem)
    if keep and wiring.leads:
        _write(folder, "start", imitator)
    if lean:
        # what a run has loaded: no unit of another span
        del pair.teacher
        _start_resident()
    done: list[float] = []
    resident = [0]
    update = imitator.update

    def updated(phase: Phase, step: int) -> float:
        rate = update(phase, step)
        done.append(time.perf_counter())
        if lean and step == steps - 1:
            resident.append(_most_resident())
        return rate

    imitator.update = updated  # type: ignore[method-assign]
    with contextlib.redirect_stderr(io.StringIO()):
        Run(imitator, order, pair.stream(wiring.part), folder / "run", wiring).go()
    if keep and wiring.leads:
        _write(folder, "c", imitator)
    imitator.close()
    forget_replicas()
    return {"done": done, "events": trace.events(), "teacher_flops": imitator.work.teacher_flops, "resident": resident[-1]}


def by_itself(place: Place, case: Case, steps: int) -> float:
    """Seconds of a step of all units on this rank, which exchanges nothing with another; the first is not timed."""
    pair = _pair(case)
    section = _section(pair, steps, schedule="parallel")
    imitator, batches = pair.imitator(section, Replicas.alone(place.rank)), pair.stream()
    (phase,) = phases(section, case.blocks, pair.learns_stem)
    imitator.begin(phase)
    for step in range(steps):
        if step == 1:
            began = time.perf_counter()
        batch = to_device(batches.micro_batch(step, 0))
        imitator.step(phase, Entry(batch, batch))
        imitator.update(phase, step)
    seconds = (time.perf_counter() - began) / (steps - 1)
    imitator.close()
    forget_replicas()
    return seconds


def by_block(place: Place, case: Case, blocks: list[list[int]], together: bool, steps: int, folder: Path) -> dict[int, Taken]:
    """Arms (a) and (b): block after block, each on teacher activations made anew from the stem for every batch.

    `blocks`: those of each rank. `together`: all ranks share every batch and average gradients (a), else each takes whole batches of
    its own blocks (b). The first step of a block, in which memory is allocated, is not timed. Leaves the students in `folder`.
    """
    pair = _pair(case)
    section = _section(pair, steps, schedule="bottom_up", feed="teacher")
    mine = blocks[place.rank]
    if together:
        wiring = Wiring(single(case.blocks + 1, place.world_size), place, pair.batch_size)
        replicas, part = wiring.replicas, wiring.part
    else:
        replicas, part = Replicas.alone(place.rank), (0, pair.batch_size)
    imitator, batches = pair.imitator(section, replicas), pair.stream(part)
    taken = {}
    for phase in phases(section, case.blocks, pair.learns_stem):
        (index,) = phase.losses
        if index not in mine:
            continue
        imitator.begin(phase)
        marks = []
        for step in range(steps):
            marks.append(time.perf_counter())
            flow: Flow = to_device(batches.micro_batch(step, 0))
            for unit in imitator.units[: index + 1]:
                target, taps = imitator.teach(unit, flow)
                entered, flow = flow, target
            marks.append(time.perf_counter())
            imitator.step_one(imitator.units[index], "teacher", entered, entered, target, taps)
            imitator.update(phase, step)
        marks.append(time.perf_counter())
        teaching = [end - begin for begin, end in zip(marks[2::2], marks[3::2], strict=False)]
        learning = [end - begin for begin, end in zip(marks[3::2], marks[4::2], strict=True)]
        taken[index] = Taken(sum(teaching) / len(teaching), sum(learning) / len(learning))
    _write(folder, "a" if together else "b", imitator, mine if not together or place.rank == 0 else [])
    imitator.close()
    forget_replicas()
    return taken


def plan_of(place: Place, case: Case, ranks: int, connection: Connection, repeats: int) -> dict[str, Any]:
    """The planner's plan for `ranks` ranks, from costs measured here, and what it predicts of it."""
    costs, cluster, moving = _costs(case, ranks, connection, repeats)
    plan = search(costs, cluster, moving)
    return {"plan": str(plan), "predicted_seconds": predict(plan, costs, cluster, moving).micro_batch}


def predictions(place: Place, case: Case, plans: list[str], connection: Connection, repeats: int) -> list[dict[str, Any]]:
    """Seconds of a step of each plan, and bytes of each of its ranks, from costs measured here in a process that holds no network."""
    plan = parse(plans[0])
    costs, cluster, moving = _costs(case, plan.ranks, connection, repeats)
    found = []
    for text in plans:
        stages = predict(parse(text), costs, cluster, moving)
        ranks = [stage.memory for stage in stages.stages for _ in stage.ranks]
        memory = [{name: float(value) for name, value in zip(one._fields, one, strict=True)} for one in ranks]
        found.append({"plan": text, "seconds": stages.step, "memory": [float(one.total) for one in ranks], "terms": memory})
    return found


def _costs(case: Case, ranks: int, connection: Connection, repeats: int) -> tuple[list[UnitCost], Cluster, PlannedFlow]:
    pair = _pair(case)
    section = _section(pair, 2, schedule="parallel")
    moving = flow(section, "teacher")
    measured = profile(pair.thin, pair.wide, pair.pairing, pair.counts, section, moving.rows, fed="teacher", repeats=repeats)
    cluster = connection.of(cores(ranks))._replace(base=measured.base)
    return measured.costs, cluster, moving


def link_of(place: Place) -> Connection:
    """What connects the ranks."""
    return measure_link(1 << 22)


def products(place: Place, case: Case, known: float | None) -> dict[str, float]:
    """Model FLOPs of a batch through all units, teacher and student, and the rate of its products one by one (unless `known`)."""
    pair = _pair(case)
    section = _section(pair, 2, schedule="parallel")
    imitator = pair.imitator(section, Replicas.alone(place.rank))
    (phase,) = phases(section, case.blocks, pair.learns_stem)
    imitator.begin(phase)
    batch = to_device(pair.stream().micro_batch(0, 0))
    with Products() as made:
        imitator.step(phase, Entry(batch, batch))
    imitator.close()
    forget_replicas()
    return {"flops": float(made.flops), "rate": known or rate(made.calls)}


def _start_resident() -> None:
    """From here on the peak of the resident set counts, without what freed memory the allocator still holds."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _most_resident() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def _write(folder: Path, arm: str, imitator: Imitator, only: list[int] | None = None) -> None:
    """Leaves what units have learned, a file each; of those alone whose input does not depend on what another unit learns when."""
    for unit in imitator.units:
        if (only is None or unit.index in only) and not unit.arriving("teacher"):
            state: dict[str, Tensor] = {name: value.clone() for name, value in unit.own_state().items() if value.is_floating_point()}
            torch.save(state, folder / f"{arm}-{unit.index}.pt")
