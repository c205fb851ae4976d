"""What one rank does with one micro-batch: its teachers forward, its students forward and backward, a unit at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wtn_pretrain.device import device
from wtn_pretrain.imitation.config import ImitateSection
from wtn_pretrain.imitation.learner import Learner, Look, looks
from wtn_pretrain.imitation.losses import Ratio
from wtn_pretrain.imitation.observer import Observer
from wtn_pretrain.imitation.pairing import Pairing
from wtn_pretrain.imitation.residence import Residence
from wtn_pretrain.imitation.schedules import Phase
from wtn_pretrain.imitation.units import Unit
from wtn_pretrain.models.base import Carry, Flow, Taps
from wtn_pretrain.parallel.replicas import Replicas
from wtn_pretrain.training.guard import weighed
from wtn_pretrain.training.schedules import scale


@dataclass
class Work:
    """What imitation has cost on this rank so far."""

    seconds: float = 0.0
    teacher_flops: int = 0
    student_flops: int = 0
    skipped: int = 0
    """Steps that units have left out, as their gradients were not finite; each counts by itself."""


class Entry(NamedTuple):
    """What enters a span: the inputs of the network at the first one, else what the span below sent."""

    teacher: Flow | None
    student: Flow | None
    expand: Tensor | None = None
    """E of the bridge below the span."""


EVALUATE = 600.0
"""Seconds that one unit's errors may take before a rank counts as lost."""
Send = Callable[[Carry | None, Carry | None, Tensor | None], None]
"""Takes what leaves a span: the teacher's activation, the student's, and E of the bridge at its upper end."""


class Imitator:
    """Trains the students of a span, phase after phase."""

    def __init__(
        self,
        units: list[Unit],
        section: ImitateSection,
        replicas: Replicas,
        observer: Observer | None = None,
        residence: Residence | None = None,
    ) -> None:
        """`units`: those of this rank's span, from the bottom; `residence`: where they are, None: all on the device."""
        self.units, self.section, self.replicas = units, section, replicas
        self.work = Work()
        self.observer = observer or Observer()
        self.residence = residence or Residence(units, Path(), Pairing((0,), (0,)), "none")
        self._others = [rank for rank in replicas.ranks if rank != replicas.ranks[replicas.index]]
        self._learners: dict[tuple[int, ...], Learner] = {}
        self._learning: list[Learner] = []
        self._left_out: dict[int, list[list[int]]] = {}
        """Step of the phase (from 0) -> the units of every learner that has left it out; kept on the first replica."""

    def begin(self, phase: Phase) -> None:
        """Sets which units learn, and starts their optimizers afresh."""
        for unit in self.units:
            unit.learn(unit.index in phase.rates)
        mine = tuple(unit.index for unit in self.units)
        wanted = [(index,) for index in mine if index in phase.rates] if phase.local else [mine]
        for key in wanted:
            if key not in self._learners:
                units = [unit for unit in self.units if unit.index in key]
                for unit in units:
                    if self.residence.students_move:
                        self.residence.home(unit)
                    unit.learn(True)
                self._learners[key] = Learner(units, self.section, self.replicas)
                for unit in units:
                    self.residence.knows(unit.index, self._learners[key])
                    unit.learn(unit.index in phase.rates)
        self._learning = [self._learners[key] for key in wanted]
        for learner in self._learning:
            learner.weights_changed()
            learner.start_afresh()

    def step(self, phase: Phase, entry: Entry, send: Send | None = None, taught: Mapping[int, Carry] | None = None) -> list[Tensor]:
        """Forward and backward of one micro-batch through the span; gradients are left in place.

        With local gradients a unit's graph lives only from its forward to its backward, so that the memory of activations is
        that of one unit whatever the depth.

        Args:
            send: takes what the span above waits for as soon as it is there; None at the top.
            taught: the teacher's outputs by unit where they are known, else they are computed.

        Returns:
            This replica's share of the loss of each unit of the span in `phase.losses`, in order.
        """
        student, expand = entry.student, entry.expand
        losses: list[Tensor] = []
        taught_units: Any = self._taught(phase, entry.teacher, taught)
        last = self.units[-1]
        if send is not None and phase.fed == "teacher":
            # the span above must not wait for the students of this one
            taught_units = list(taught_units)
            send(taught_units[-1][2] if taught is None else None, None, last.leaving(phase.fed))
        for unit, teacher, target, target_taps in taught_units:
            counts = unit.index in phase.losses
            if counts or phase.fed == "student":
                with self.observer.work("student", unit=unit.index):
                    with self._autocast(), torch.set_grad_enabled(counts or not phase.local):
                        entered = unit.enter(teacher, student, phase.fed, phase.local, expand)
                        output, taps = self._answer(unit, entered, learning=unit.index in phase.rates)
                        if counts:
                            ratio = unit.loss(output, taps, target, target_taps)
                            losses.append(self._shared(ratio))
                    if send is not None and unit is last and phase.fed == "student":
                        send(target if taught is None else None, output.detach(), last.leaving(phase.fed))
                    student = output.detach() if phase.local else output
                    if counts and phase.local:
                        self._backward(self._learners[unit.index,], losses[-1])
                        losses[-1] = losses[-1].detach()
            expand = None
        if not phase.local:
            self._backward(self._learning[0], torch.stack(losses).sum())
        return [loss.detach() for loss in losses]

    def step_one(self, unit: Unit, fed: str, teacher: Flow, student: Flow, target: Carry, target_taps: Taps) -> list[Tensor]:
        """Forward and backward of one unit on given inputs and target."""
        if self.residence.students_move:
            self.residence.home(unit)
        with self.observer.work("student", unit=unit.index):
            with self._autocast():
                output, taps = self._answer(unit, unit.enter(teacher, student, fed, local=True), learning=True)
                ratio = unit.loss(output, taps, target, target_taps)
                loss = self._shared(ratio)
            self._backward(self._learners[unit.index,], loss)
        return [loss.detach()]

    def update(self, phase: Phase, step: int) -> float:
        """Ends a micro-batch; after the last one of a step the optimizers step. Returns the rate.

        Gradients are clipped unit by unit, so that the result does not depend on which rank holds which.
        """
        rate = self.rate(phase, step)
        with self.observer.work("optimizer"):
            with self._together():
                # on an accelerator the host waits here for sums over the replicas
                found = looks(self._learning)
            for learner, look in zip(self._learning, found, strict=True):
                self._step(learner, rate * phase.rates[learner.units[0].index if phase.local else max(phase.rates)], step, look)
        return rate

    def visit(
        self,
        phase: Phase,
        step: int,
        entries: Sequence[Entry],
        accumulation: int,
        send: Send | None = None,
        taught: Sequence[Mapping[int, Carry]] | None = None,
    ) -> list[list[Tensor]]:
        """`step` and `update` of several micro-batches, one unit after the other: each comes home once for all of them.

        Units do not depend on one another's later steps, so the result is that of going step by step.

        Args:
            step: that of the first of `entries`, which make up whole steps of `accumulation` micro-batches.

        Returns:
            For each micro-batch the losses that `step` returns.
        """
        teacher = [entry.teacher for entry in entries]
        student = [entry.student for entry in entries]
        expand = [entry.expand for entry in entries]
        losses: list[list[Tensor]] = [[] for _ in entries]
        for position, unit in enumerate(self.units):
            self.residence.home(unit, then=self.units[(position + 1) % len(self.units)])
            leaving: list[Tensor | None] = []
            for micro in range(len(entries)):
                target, taps = (self.teach(unit, _known(teacher[micro]))) if taught is None else (taught[micro][unit.index], {})
                # E as it is before the step that this micro-batch ends
                leaving.append(_copy(unit.leaving(phase.fed)))
                if send is not None and phase.fed == "teacher" and unit is self.units[-1]:
                    send(target if taught is None else None, None, leaving[-1])
                counts = unit.index in phase.losses
                if counts or phase.fed == "student":
                    with self.observer.work("student", unit=unit.index):
                        with self._autocast(), torch.set_grad_enabled(counts):
                            below = taught[micro].get(unit.index - 1, teacher[micro]) if taught is not None else teacher[micro]
                            entered = unit.enter(below, student[micro], phase.fed, True, expand[micro])
                            output, found = self._answer(unit, entered, learning=unit.index in phase.rates)
                            if counts:
                                losses[micro].append(self._shared(unit.loss(output, found, target, taps)))
                        student[micro] = output.detach()
                        if counts:
                            learner = self._learners[unit.index,]
                            self._backward(learner, losses[micro][-1])
                            losses[micro][-1] = losses[micro][-1].detach()
                            number = step + micro // accumulation
                            with self.observer.work("optimizer"):
                                self._step(learner, self.rate(phase, number) * phase.rates[unit.index], number)
                teacher[micro] = target
            expand = leaving
        if send is not None and phase.fed == "student":
            for micro in range(len(entries)):
                send(_carry(teacher[micro]) if taught is None else None, _carry(student[micro]), expand[micro])
        return losses

    @torch.no_grad()
    def errors(self, entries: Iterator[Entry], send: Send | None = None) -> list[float]:
        """Energy-normalised error of every unit of the span, student-fed in eval mode: what the assembled thin network really carries."""
        for unit in self.units:
            unit.learn(False)
        means = torch.zeros(len(self.units), dtype=torch.float64)
        seen = 0
        # units that come and go do so once for several batches
        together = self.section.offload_batches if self.residence.comes_and_goes else 1
        while visitors := list(islice(entries, together)):
            seen += len(visitors)
            teacher, student, expand = (list(side) for side in zip(*visitors, strict=True))
            for position, unit in enumerate(self.units):
                with self.observer.allow(EVALUATE, "errors"):
                    self.residence.home(unit)
                    for number in range(len(visitors)):
                        target, _ = unit.teach(_known(teacher[number]))
                        output, _ = unit.answer(unit.enter(teacher[number], student[number], "student", True, expand[number]))
                        means[position] += unit.error(output, target).value().double().cpu()
                        teacher[number], student[number], expand[number] = target, output, None
            if send is not None:
                for target, output in zip(teacher, student, strict=True):
                    send(_carry(target), _carry(output), self.units[-1].leaving("student"))
        return (means / max(seen, 1)).tolist()

    def teach(self, unit: Unit, flow: Flow) -> tuple[Carry, Taps]:
        """The teacher's output of one unit, counted."""
        self.work.teacher_flops += unit.teacher_flops * samples(flow)
        self.residence.home(unit)
        with self.observer.work("teacher", unit=unit.index), self._autocast():
            return unit.teach(flow)

    @torch.no_grad()
    def answer(self, unit: Unit, flow: Carry | Mapping[str, Tensor]) -> Carry:
        """The finished student's output of one unit."""
        self.residence.home(unit)
        with self.observer.work("student", unit=unit.index), self._autocast():
            return self._answer(unit, unit.enter(flow, flow, "student", local=True), learning=False)[0]

    @property
    def learning(self) -> list[Learner]:
        """The learners of the current phase."""
        return self._learning

    def close(self) -> None:
        for learner in self._learners.values():
            learner.close()
        self._learners.clear()

    def _taught(
        self, phase: Phase, flow: Flow | None, taught: Mapping[int, Carry] | None
    ) -> Iterator[tuple[Unit, Flow | None, Carry, Taps]]:
        """Every unit of the span up to the phase's top, with its teacher's input and output."""
        for unit in self.units:
            if unit.index > max(phase.losses):
                return
            if taught is not None:
                if unit.index:
                    flow = taught[unit.index - 1]
                yield unit, flow, taught[unit.index], {}
            else:
                assert flow is not None
                target, taps = self.teach(unit, flow)
                yield unit, flow, target, taps
                flow = target

    def left_out(self, step: int) -> list[int]:
        """The units that have left out a step of the phase (from 0), as the first replica knows. To be asked when all units have passed it:
        it counts from then on, since in a visit some are ahead of others."""
        found = self._left_out.pop(step, [])
        self.work.skipped += len(found)
        return [unit for units in found for unit in units]

    def rate(self, phase: Phase, step: int) -> float:
        """The learning rate of a step, before a unit's share of it."""
        return self.section.optimizer.lr * scale(self.section.schedule_lr, step, phase.steps)

    def _shared(self, ratio: Ratio) -> Tensor:
        """This replica's part of a loss whose normaliser is that of all."""
        with self.observer.input(self._others) if self._others else nullcontext():
            bottom = self.replicas.sum(ratio.bottom.detach().clone())
        return weighed(ratio.top / bottom)

    def _backward(self, learner: Learner, loss: Tensor) -> None:
        with self._together():
            learner.backward(loss)

    def _step(self, learner: Learner, rate: float, number: int, look: Look | None = None) -> None:
        with self._together():
            left_out = learner.step(rate, number, look)
        if left_out and self.replicas.index == 0:
            self._left_out.setdefault(number, []).append([unit.index for unit in learner.units])

    def _together(self) -> AbstractContextManager[Any]:
        return self.observer.waiting(*self._others) if self._others else nullcontext()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(device().type, dtype=torch.bfloat16, enabled=self.section.precision == "bf16")

    def _answer(self, unit: Unit, flow: Flow, learning: bool) -> tuple[Carry, Taps]:
        # a backward pass costs twice a forward pass
        self.work.student_flops += unit.student_flops * samples(flow) * (3 if learning else 1)
        return unit.answer(flow)


def _known(flow: Flow | None) -> Flow:
    assert flow is not None
    return flow


def _carry(flow: Flow | None) -> Carry:
    assert isinstance(flow, Carry)
    return flow


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def samples(flow: Flow) -> int:
    return len(flow.hidden) if isinstance(flow, Carry) else len(next(iter(flow.values())))
