"""What one rank does with one micro-batch: its teachers forward, its students forward and backward, a unit at a time."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wtn_pretrain.device import device
from wtn_pretrain.imitation.config import ImitateSection
from wtn_pretrain.imitation.learner import Learner
from wtn_pretrain.imitation.losses import Ratio
from wtn_pretrain.imitation.observer import Observer
from wtn_pretrain.imitation.schedules import Phase
from wtn_pretrain.imitation.units import Unit
from wtn_pretrain.models.base import Carry, Flow, Taps
from wtn_pretrain.parallel.replicas import Replicas
from wtn_pretrain.training.schedules import scale


@dataclass
class Work:
    """What imitation has cost on this rank so far."""

    seconds: float = 0.0
    teacher_flops: int = 0
    student_flops: int = 0


class Entry(NamedTuple):
    """What enters a span: the inputs of the network at the first one, else what the span below sent."""

    teacher: Flow | None
    student: Flow | None
    expand: Tensor | None = None
    """E of the bridge below the span."""


Send = Callable[[Carry | None, Carry | None, Tensor | None], None]
"""Takes what leaves a span: the teacher's activation, the student's, and E of the bridge at its upper end."""


class Imitator:
    """Trains the students of a span, phase after phase."""

    def __init__(self, units: list[Unit], section: ImitateSection, replicas: Replicas, observer: Observer | None = None) -> None:
        """`units`: those of this rank's span, from the bottom."""
        self.units, self.section, self.replicas = units, section, replicas
        self.work = Work()
        self.observer = observer or Observer()
        self._others = [rank for rank in replicas.ranks if rank != replicas.ranks[replicas.index]]
        self._learners: dict[tuple[int, ...], Learner] = {}
        self._learning: list[Learner] = []

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
                    unit.learn(True)
                self._learners[key] = Learner(units, self.section, self.replicas)
                for unit in units:
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
        if entry.expand is not None:
            bridge = self.units[0].entry
            assert bridge is not None
            bridge.expand.data.copy_(entry.expand)
        student = entry.student
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
                        entered = unit.enter(teacher, student, phase.fed, phase.local)
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
        if not phase.local:
            self._backward(self._learning[0], torch.stack(losses).sum())
        return [loss.detach() for loss in losses]

    def step_one(self, unit: Unit, fed: str, teacher: Flow, student: Flow, target: Carry, target_taps: Taps) -> list[Tensor]:
        """Forward and backward of one unit on given inputs and target."""
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
        rate = self.section.optimizer.lr * scale(self.section.schedule_lr, step, phase.steps)
        with self.observer.work("optimizer"):
            for learner in self._learning:
                with self._together():
                    learner.step(rate * phase.rates[learner.units[0].index if phase.local else max(phase.rates)])
        return rate

    @torch.no_grad()
    def errors(self, entries: Iterator[Entry], send: Send | None = None) -> list[float]:
        """Energy-normalised error of every unit of the span, student-fed in eval mode: what the assembled thin network really carries."""
        for unit in self.units:
            unit.learn(False)
        sums = torch.zeros(len(self.units), dtype=torch.float64)
        seen = 0
        for entry in entries:
            seen += 1
            self.observer.at("errors")
            if entry.expand is not None and self.units[0].entry is not None:
                self.units[0].entry.expand.data.copy_(entry.expand)
            teacher, student = entry.teacher, entry.student
            assert teacher is not None
            assert student is not None
            for position, unit in enumerate(self.units):
                target, _ = unit.teach(teacher)
                output, _ = unit.answer(unit.enter(teacher, student, "student", local=True))
                sums[position] += unit.error(output, target).value().double().cpu()
                teacher, student = target, output
            if send is not None:
                assert isinstance(teacher, Carry)
                assert isinstance(student, Carry)
                send(teacher, student, self.units[-1].leaving("student"))
        return (sums / max(seen, 1)).tolist()

    def teach(self, unit: Unit, flow: Flow) -> tuple[Carry, Taps]:
        """The teacher's output of one unit, counted."""
        self.work.teacher_flops += unit.teacher_flops * samples(flow)
        with self.observer.work("teacher", unit=unit.index), self._autocast():
            return unit.teach(flow)

    @torch.no_grad()
    def answer(self, unit: Unit, flow: Carry | Mapping[str, Tensor]) -> Carry:
        """The finished student's output of one unit."""
        with self.observer.work("student", unit=unit.index), self._autocast():
            return self._answer(unit, unit.enter(flow, flow, "student", local=True), learning=False)[0]

    def learner(self, unit: int) -> Learner | None:
        """The learner of a unit in the current phase, if it learns on its own."""
        return self._learners.get((unit,))

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

    def _shared(self, ratio: Ratio) -> Tensor:
        """This replica's part of a loss whose normaliser is that of all."""
        with self._together():
            return ratio.top / self.replicas.sum(ratio.bottom.detach().clone())

    def _backward(self, learner: Learner, loss: Tensor) -> None:
        with self._together():
            learner.backward(loss)

    def _together(self) -> AbstractContextManager[Any]:
        return self.observer.waiting(*self._others) if self._others else nullcontext()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(device().type, dtype=torch.bfloat16, enabled=self.section.precision == "bf16")

    def _answer(self, unit: Unit, flow: Flow, learning: bool) -> tuple[Carry, Taps]:
        # a backward pass costs twice a forward pass
        self.work.student_flops += unit.student_flops * samples(flow) * (3 if learning else 1)
        return unit.answer(flow)


def samples(flow: Flow) -> int:
    return len(flow.hidden) if isinstance(flow, Carry) else len(next(iter(flow.values())))
