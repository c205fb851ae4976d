"""The imitation engine on one process: runs the phases of a schedule over units, a block's backward right after its forward."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wtn_pretrain.data.stream import BatchStream
from wtn_pretrain.device import device, to_device
from wtn_pretrain.errors import UserError
from wtn_pretrain.imitation.config import ImitateSection
from wtn_pretrain.imitation.schedules import Phase
from wtn_pretrain.imitation.store import ActivationStore
from wtn_pretrain.imitation.units import Flow, Unit
from wtn_pretrain.models.base import Carry, Taps
from wtn_pretrain.training.monitor import Monitor
from wtn_pretrain.training.optimizers import decay_groups, make_optimizer
from wtn_pretrain.training.schedules import scale


@dataclass
class Work:
    """What imitation has cost so far."""

    seconds: float = 0.0
    teacher_flops: int = 0
    student_flops: int = 0


class Imitator:
    """Trains the students of `units`, phase after phase."""

    def __init__(self, units: list[Unit], section: ImitateSection) -> None:
        self.units, self.section = units, section
        self.work = Work()
        self._dtype = torch.bfloat16 if section.precision == "bf16" else torch.float32

    def optimizer(self, phase: Phase) -> torch.optim.Optimizer:
        """A fresh optimizer over the units that learn in `phase`; each group knows its unit's share of the rate."""
        groups: list[dict[str, Any]] = []
        for unit in self.units:
            if unit.index in phase.rates:
                own = decay_groups(unit.own_parameters(), self.section.optimizer.weight_decay)
                groups += [{**group, "share": phase.rates[unit.index]} for group in own]
        return make_optimizer(self.section.optimizer, groups)

    def begin(self, phase: Phase) -> None:
        """Sets which units learn."""
        for unit in self.units:
            unit.learn(unit.index in phase.rates)

    def step(self, phase: Phase, inputs: Flow) -> list[Tensor]:
        """Forward and backward of one batch from the bottom; gradients are left in place. Returns the loss of each unit in `losses`.

        With local gradients a unit's graph lives only from its forward to its backward, so that the memory of activations is
        that of one unit whatever the depth.
        """
        teacher: Flow = inputs
        student: Flow = inputs
        losses: list[Tensor] = []
        top = max(phase.losses)
        for unit in self.units[: top + 1]:
            with self._autocast():
                target, target_taps = self._teach(unit, teacher)
                counts = unit.index in phase.losses
                if counts or phase.fed == "student":
                    with torch.set_grad_enabled(counts or not phase.local):
                        entered = unit.enter(teacher, student, phase.fed, phase.local)
                        output, taps = self._answer(unit, entered, learning=unit.index in phase.rates)
                        if counts:
                            losses.append(unit.loss(output, taps, target, target_taps))
                    student = output.detach() if phase.local else output
                teacher = target
            if counts and phase.local:
                losses[-1].backward()
                losses[-1] = losses[-1].detach()
        if not phase.local:
            torch.stack(losses).sum().backward()
        return [loss.detach() for loss in losses]

    def step_one(self, unit: Unit, fed: str, teacher: Flow, student: Flow, target: Carry, target_taps: Taps) -> list[Tensor]:
        """Forward and backward of one unit on given inputs and target."""
        with self._autocast():
            output, taps = self._answer(unit, unit.enter(teacher, student, fed, local=True), learning=True)
            loss = unit.loss(output, taps, target, target_taps)
        loss.backward()
        return [loss.detach()]

    def update(self, phase: Phase, optimizer: torch.optim.Optimizer, step: int) -> float:
        """One optimizer step. Gradients are clipped unit by unit, so that the result does not depend on which rank holds which."""
        rate = self.section.optimizer.lr * scale(self.section.schedule_lr, step, phase.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        if self.section.clip:
            for unit in self.units:
                if unit.index in phase.rates:
                    torch.nn.utils.clip_grad_norm_(unit.own_parameters(), self.section.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return rate

    @torch.no_grad()
    def errors(self, batches: Iterator[dict[str, Tensor]], limit: int) -> list[float]:
        """Energy-normalised error of every unit, student-fed in eval mode: what the assembled thin network really carries."""
        for unit in self.units:
            unit.learn(False)
        sums = torch.zeros(len(self.units), dtype=torch.float64)
        seen = 0
        for batch, _ in zip(batches, range(limit), strict=False):
            seen += 1
            teacher: Flow = to_device(batch)
            student: Flow = teacher
            for unit in self.units:
                target, _ = unit.teach(teacher)
                output, _ = unit.answer(unit.enter(teacher, student, "student", local=True))
                sums[unit.index] += unit.error(output, target).double().cpu()
                teacher, student = target, output
        return (sums / max(seen, 1)).tolist()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(device().type, dtype=torch.bfloat16, enabled=self._dtype is torch.bfloat16)

    def _teach(self, unit: Unit, flow: Flow) -> tuple[Carry, Taps]:
        self.work.teacher_flops += unit.teacher_flops * _samples(flow)
        return unit.teach(flow)

    def _answer(self, unit: Unit, flow: Flow, learning: bool) -> tuple[Carry, Taps]:
        # a backward pass costs twice a forward pass
        self.work.student_flops += unit.student_flops * _samples(flow) * (3 if learning else 1)
        return unit.answer(flow)


class Run:
    """A schedule from start to end: data, phases, checkpoints, what a person sees. The trained students are left in the units."""

    def __init__(self, imitator: Imitator, phases: list[Phase], stream: BatchStream, folder: Path, stage: str = "narrow") -> None:
        self.imitator, self.phases, self.stream, self.folder, self.stage = imitator, phases, stream, folder, stage
        self.total = sum(phase.steps for phase in phases)
        section = imitator.section
        self.every = section.checkpoint_every or max(1, self.total // 10)
        state = _load(folder / "checkpoint.pt")
        self.first_phase, self.first_step, self.optimizer_state = 0, 0, None
        if state:
            self._restore(state)
        start = sum(phase.steps for phase in phases[: self.first_phase]) + self.first_step
        self.monitor = Monitor(folder, stage, self.total, start=start, log_every=section.log_every)

    def go(self) -> None:
        """Runs what is left of the schedule."""
        for number in range(self.first_phase, len(self.phases)):
            phase = self.phases[number]
            before = sum(earlier.steps for earlier in self.phases[:number])
            start = self.first_step if number == self.first_phase else 0
            self.imitator.begin(phase)
            optimizer = self.imitator.optimizer(phase)
            if start and self.optimizer_state is not None:
                optimizer.load_state_dict(self.optimizer_state)
            if phase.cached and number and not start:
                # this unit gives up the activations that the one below started from: no start may go back there
                self._save(number, 0, optimizer)
            run = self._cached(phase, number, start) if phase.cached else self._from_the_bottom(phase, before, start)
            began = time.monotonic()
            for step, losses in enumerate(run, start=start):
                rate = self.imitator.update(phase, optimizer, step)
                self.imitator.work.seconds += time.monotonic() - began
                self._report(phase, before + step + 1, losses, rate)
                done = step + 1
                saving = (before + done) % self.every == 0 and before + done < self.total
                if saving or done == phase.steps:
                    self._require_finite(phase, before + done, losses)
                if saving:
                    self._save(number, done, optimizer)
                began = time.monotonic()
            self.imitator.work.seconds += time.monotonic() - began
        self.monitor.close()
        shutil.rmtree(self.folder / "activations", ignore_errors=True)

    def _from_the_bottom(self, phase: Phase, before: int, start: int) -> Iterator[list[Tensor]]:
        for micro_batches in self.stream.iterate(before + start, before + phase.steps):
            (batch,) = micro_batches
            yield self.imitator.step(phase, to_device(batch))

    def _cached(self, phase: Phase, number: int, start: int) -> Iterator[list[Tensor]]:
        """Steps of one unit on stored activations. Each teacher unit sees each batch once; the units below are not run again."""
        (index,) = phase.losses
        unit = self.imitator.units[index]
        batches = self.imitator.section.cache_batches or phase.steps
        batches = min(batches, phase.steps)
        teacher_in, student_in = self._inputs(index, batches, phase.fed)
        fed_by_one = teacher_in is None or student_in is None or teacher_in.folder == student_in.folder
        target_store = ActivationStore(self._place("teacher", index), batches)
        kept = index < len(self.imitator.units) - 1 or batches < phase.steps
        for step in range(start, phase.steps):
            position = step % batches
            teacher = self._flow(teacher_in, position)
            student = teacher if fed_by_one else self._flow(student_in, position)
            if step < batches or unit._taps:
                with self.imitator._autocast():
                    target, taps = self.imitator._teach(unit, teacher)
                if step < batches and kept:
                    target_store.write(position, target)
            else:
                target, taps = self._to(target_store.read(position)), {}
            yield self.imitator.step_one(unit, phase.fed, teacher, student, target, taps)
        if kept:
            target_store.finish()

    def _inputs(self, index: int, batches: int, fed: str) -> tuple[ActivationStore | None, ActivationStore | None]:
        """Stores of what enters unit `index` on both sides, each made by one pass over the unit below; None at the stem: the data."""
        if index == 0:
            return None, None
        below = self.imitator.units[index - 1]
        teacher = self._store("teacher", index - 1, batches)
        if not teacher.complete:
            # only the stem can be missing here: every other unit stored its teacher's outputs while it learned
            source = None if index == 1 else self._store("teacher", index - 2, batches)
            self._fill(teacher, batches, lambda position: self.imitator._teach(below, self._flow(source, position))[0])
        student = teacher if fed == "teacher" else self._store("student", index - 1, batches)
        if not student.complete:
            below.learn(False)
            source = None if index == 1 else self._store("student", index - 2, batches)

            def answer(position: int) -> Carry:
                flow = self._flow(source, position)
                return self.imitator._answer(below, below.enter(flow, flow, "student", local=True), learning=False)[0]

            self._fill(student, batches, answer)
        for kind in ("teacher", "student"):
            ActivationStore(self._place(kind, index - 2), batches).remove()
        return teacher, student

    def _place(self, kind: str, unit: int) -> Path:
        # a stem that was copied has one output, not two
        kind = "teacher" if unit == 0 and self.imitator.units[0].exit is None else kind
        return self.folder / "activations" / f"{kind}-{unit}"

    def _store(self, kind: str, unit: int, batches: int) -> ActivationStore:
        return ActivationStore(self._place(kind, unit), batches)

    def _fill(self, store: ActivationStore, batches: int, make: Callable[[int], Carry]) -> None:
        with torch.no_grad(), self.imitator._autocast():
            for position in range(batches):
                store.write(position, make(position))
        store.finish()

    def _flow(self, store: ActivationStore | None, position: int) -> Flow:
        return to_device(self.stream.micro_batch(position, 0)) if store is None else self._to(store.read(position))

    @staticmethod
    def _to(carry: Carry) -> Carry:
        here = device()
        return Carry(carry.hidden.to(here), tuple(tensor.to(here) for tensor in carry.context))

    def _report(self, phase: Phase, step: int, losses: list[Tensor], rate: float) -> None:
        if step % self.imitator.section.log_every == 0 or step == self.total:
            values = self._require_finite(phase, step, losses)
            units: list[float | None] = [None] * len(self.imitator.units)
            for unit, value in zip(phase.losses, values.tolist(), strict=True):
                units[unit] = value
            self.monitor.step(
                step, {"loss": float(values.mean()), "units": units, "phase": phase.name, "lr": rate}, samples=self.stream.batch_size
            )
        else:
            self.monitor.step(step, {"phase": phase.name}, samples=self.stream.batch_size)

    def _require_finite(self, phase: Phase, step: int, losses: list[Tensor]) -> Tensor:
        """The losses on the CPU, or a refusal that names the unit."""
        values = torch.stack(losses).float().cpu()
        if not bool(torch.isfinite(values).all()):
            unit = phase.losses[int((~torch.isfinite(values)).nonzero()[0])]
            name = "the stem" if unit == 0 else f"unit {unit}"
            raise UserError(
                f"{self.stage}: the imitation loss of {name} is not finite at step {step}; "
                "lower narrow.optimizer.lr or narrow.clip under another --run.name"
            )
        return values

    def _save(self, phase: int, step: int, optimizer: torch.optim.Optimizer) -> None:
        path = self.folder / "checkpoint.pt"
        state = {
            "phase": phase,
            "step": step,
            "units": [unit.state_dict() for unit in self.imitator.units],
            "optimizer": optimizer.state_dict(),
            "work": vars(self.imitator.work),
        }
        try:
            with path.with_suffix(".tmp").open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(path.with_suffix(".tmp"), path)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{path}: cannot be written ({error}); the checkpoint before it is kept, free the disk and start again"
            ) from None

    def _restore(self, state: dict[str, Any]) -> None:
        self.first_phase, self.first_step, self.optimizer_state = state["phase"], state["step"], state["optimizer"]
        for unit, saved in zip(self.imitator.units, state["units"], strict=True):
            unit.load_state_dict(saved)
        self.imitator.work = Work(**state["work"])


def _load(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location=device(), weights_only=True)
    except Exception as error:  # torch raises several kinds for a damaged file
        raise UserError(f"{path}: cannot be read ({type(error).__name__}); remove it to start the stage again") from None


def _samples(flow: Flow) -> int:
    return len(flow.hidden) if isinstance(flow, Carry) else len(next(iter(flow.values())))
