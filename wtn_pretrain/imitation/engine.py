"""The imitation engine: runs the phases of a schedule on this rank's span, fed by the data or by the span below.

One process is a plan of one span. There is no barrier between spans: each receives, trains, steps and saves at its own pace.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, islice, repeat
from pathlib import Path

import torch
from torch import Tensor

from wtn_pretrain.checkpoint.keeping import keep_of, rhythm_of
from wtn_pretrain.data.stream import BatchStream, Dataset
from wtn_pretrain.device import device, to_device
from wtn_pretrain.errors import Preempted, UserError
from wtn_pretrain.imitation.checkpoint.checkpoints import Checkpoints
from wtn_pretrain.imitation.checkpoint.manifest import Position
from wtn_pretrain.imitation.config import ImitateSection
from wtn_pretrain.imitation.imitator import Entry, Imitator
from wtn_pretrain.imitation.learner import DivergedError, zero_stage
from wtn_pretrain.imitation.passage import arriving, sender
from wtn_pretrain.imitation.plan import single
from wtn_pretrain.imitation.progress import Progress, Told
from wtn_pretrain.imitation.schedules import Phase
from wtn_pretrain.imitation.store import ActivationStore
from wtn_pretrain.imitation.taught import Taught, TaughtUnit
from wtn_pretrain.imitation.wiring import Wiring
from wtn_pretrain.models.base import Carry, Flow, Taps
from wtn_pretrain.parallel.launch import Place, shared_store, wait_for_rank
from wtn_pretrain.parallel.preemption import Departure, Notice
from wtn_pretrain.parallel.relay import Outbox
from wtn_pretrain.training.monitor import Monitor
from wtn_pretrain.training.offending import name_samples

START, SAVE, FILL = 300.0, 600.0, 600.0
"""Seconds without a mark that the start of a phase (optimizers are made, moments loaded), a checkpoint and the storing of a unit's
outputs may take before a rank counts as lost."""


def open_stream(
    dataset: Dataset, section: ImitateSection, seed: int, *, part: tuple[int, int] | None = None, workers: int = 0
) -> BatchStream:
    """The batches of imitation, cut into micro-batches; of each, rows `part[0]` to `part[0] + part[1]` are fetched."""
    rows = section.micro_batch_size or section.batch_size
    return BatchStream(dataset, section.batch_size, seed=seed, micro_batch_size=rows, part=part, workers=workers)


Stored = ActivationStore | TaughtUnit
"""One unit's outputs for a sequence of micro-batches."""


class Run:
    """A schedule from start to end on one rank: data or relay, phases, checkpoints, what a person sees.

    The trained students are left in the units, and in the last checkpoint.
    """

    def __init__(
        self,
        imitator: Imitator,
        phases: list[Phase],
        stream: BatchStream,
        folder: Path,
        wiring: Wiring | None = None,
        taught: Taught | None = None,
        stage: str = "narrow",
        notice: Notice | None = None,
        identity: Mapping[str, int | str] | None = None,
    ) -> None:
        """`stream` gives this rank's rows of the micro-batches; only the ranks of the first span read it. `taught`: the teacher's
        answers where they are known. `notice`: on which the run is left early. `identity`: what else a checkpoint must have in common
        with this run to be continued."""
        self.imitator, self.phases, self.stream, self.folder, self.stage = imitator, phases, stream, folder, stage
        self.wiring = wiring or Wiring(single(len(imitator.units)), Place(0, 1), stream.micro_batch_size)
        self.taught, self._observer = taught, imitator.observer
        self.total = sum(phase.steps for phase in phases)
        section = imitator.section
        self.rhythm = rhythm_of(section, self.total)
        store = shared_store(self.wiring.place)
        self.checkpoints = Checkpoints(
            folder / "checkpoints",
            imitator,
            self.wiring,
            store,
            identity={
                "stage": stage,
                "data_seed": stream.seed,
                "samples": len(stream.dataset),
                "batch_size": stream.batch_size,
                "micro_batch_size": stream.micro_batch_size,
                "schedule": section.schedule,
                "phases": len(phases),
                "steps": self.total,
                "optimizer": section.optimizer.name,
                **(identity or {}),
            },
            starts=list(accumulate((phase.steps for phase in phases[:-1]), initial=0)),
            keep=keep_of(section),
        )
        self._whole = 0
        """The step after which all units stand at one step again."""
        self._departure = Departure(notice, self.wiring.place) if notice else None
        self.first_phase, self.first_step = 0, 0
        position = self.checkpoints.newest()
        if position:
            self._continue_from(position)
        self.checkpoints.begin(position)
        start = sum(phase.steps for phase in phases[: self.first_phase]) + self.first_step
        self._begun = start
        self.monitor = Monitor(folder, stage, self.total, start=start, log_every=section.log_every, rank=self.wiring.place.rank)
        self.progress = Progress(self.monitor, self.wiring, store, start, self.total, stream.batch_size, section.log_every)

    def go(self) -> Position:
        """Runs what is left of the schedule; where its last checkpoint stands.

        Raises:
            Preempted: the notice came; all ranks have saved the same step.
        """
        outbox = Outbox(self.wiring.above, self.imitator.section.in_flight, self._observer.lane) if self.wiring.above else None
        for number in range(self.first_phase, len(self.phases)):
            phase = self.phases[number]
            before = sum(earlier.steps for earlier in self.phases[:number])
            start = self.first_step if number == self.first_phase else 0
            if start == phase.steps:
                # killed after its last checkpoint: nothing is left to do, and its stores may be gone
                continue
            with self._observer.allow(START, "start"):
                self.imitator.begin(phase)
                if start:
                    self.checkpoints.restore_optimizers()
            if phase.cached and number and not start and number != self.first_phase:
                # this unit gives up the activations that the one below started from: a start that goes back there makes them anew
                self._save(number, 0)
                with self._observer.allow(SAVE, "save"):
                    self.checkpoints.wait()
            if phase.cached and before + start == self._begun:
                self._drop_stores(phase)
            run = self._cached(phase, before, start) if phase.cached else self._streamed(phase, before, start, outbox)
            began = time.monotonic()
            sums: list[Tensor] = []
            for micro, (losses, rate) in enumerate(self._while_finite(run, phase, before)):
                step, k = start + micro // self.stream.accumulation, micro % self.stream.accumulation
                sums = losses if k == 0 else [total + loss for total, loss in zip(sums, losses, strict=True)]
                if k < self.stream.accumulation - 1:
                    continue
                self.imitator.work.seconds += time.monotonic() - began
                done = step + 1
                leaving = before + done == self._whole < self.total and self._departure is not None and self._departure.due(self._whole)
                saving = self.rhythm.due(before + done)
                reported = self.progress.logs(before + done)
                left_out = self.imitator.left_out(step)
                told = Told(self._losses(phase, sums), self.imitator.work.skipped) if reported else None
                self.progress.done(before + done, {"phase": phase.name, "lr": rate}, told, left_out, now=leaving)
                self._say_saved()
                # all ranks save the same steps: one that others have passed already is none of them
                leaving = leaving and self._together(before + done)
                if saving or leaving:
                    self._save(number, done)
                if leaving:
                    self._leave(before + done)
                began = time.monotonic()
            self.imitator.work.seconds += time.monotonic() - began
        if outbox is not None:
            assert self.wiring.above is not None
            with self._observer.output(self.wiring.above.ranks):
                outbox.close()
        self._all_reported(self.total)
        self._close()
        shutil.rmtree(self.folder / "activations", ignore_errors=True)
        last = Position(len(self.phases) - 1, self.phases[-1].steps, str(self.wiring.plan), zero_stage(self.imitator.section))
        with self._observer.waiting():
            # replicas may be late with their part of it
            wait_for_rank(lambda: self.checkpoints.whole(last))
        return last

    def _together(self, step: int) -> bool:
        """Whether all ranks leave after this step; if not, one has gone on."""
        assert self._departure is not None
        with self._observer.waiting():
            return self._departure.together(step)

    def _leave(self, step: int) -> None:
        """Ends the run here."""
        assert self._departure is not None
        self._all_reported(step)
        self._close()
        with self._observer.waiting():
            self._departure.finish()
        raise Preempted(f"{self.stage}: left after step {step} of {self.total} on {self._departure.why}, all saved")

    def _all_reported(self, step: int) -> None:
        """Waits, on the first rank, until all spans have reported `step`, and lets checkpoints count."""
        with self._observer.waiting():
            while not self.progress.finish(step):
                self._say_saved()
                time.sleep(0.02)
            self._say_saved()

    def _save(self, phase: int, step: int) -> None:
        with self._observer.allow(SAVE, "save"):
            self._require_finite(sum(earlier.steps for earlier in self.phases[:phase]) + step)
            self.checkpoints.save(phase, step)
        self._say_saved()

    def _say_saved(self) -> None:
        """Lets checkpoints count whose steps have been written down: a start from one never misses a record before it."""
        self.checkpoints.settle(self.progress.reported)

    def _close(self) -> None:
        with self._observer.allow(SAVE, "save"):
            self.checkpoints.close()
        self.monitor.close()

    def _streamed(self, phase: Phase, before: int, start: int, outbox: Outbox | None) -> Iterator[tuple[list[Tensor], float]]:
        """The micro-batches of a phase, as they come from the data or from the span below: losses and rate of each, when it is done."""
        steps: Sequence[int] = range(before + start, before + phase.steps)
        accumulation, in_flight = self.stream.accumulation, self.imitator.section.in_flight
        if self.taught is not None:
            steps = [step % (self.taught.batches // accumulation) for step in steps]
        send = None
        if outbox and self.wiring.above and self._relays(phase, upwards=True):
            send = sender(outbox, self.wiring.above, self._observer)
        entries: Iterator[Entry] = repeat(Entry(None, None), len(steps) * accumulation)
        if self._relays(phase, upwards=False):
            entries = arriving(self.wiring.below, self.stream, steps, in_flight, self._observer)
        known: Iterator[Mapping[int, Carry]] = iter(())
        if self.taught is not None:
            known = self.taught.stream([step * accumulation + k for step in steps for k in range(accumulation)])

        def answers() -> Mapping[int, Carry] | None:
            if self.taught is None:
                return None
            with self._observer.work("read"):
                return next(known)

        step = start
        while step < phase.steps:
            self._observer.step = before + step + 1
            if not self.imitator.residence.students_move:
                self._whole = before + step + 1
                for _ in range(accumulation):
                    losses = self.imitator.step(phase, next(entries), send, answers())
                    yield losses, self.imitator.update(phase, step)
                step += 1
                continue
            # a visit may not go past a checkpoint, where all units stand at one step
            until = min(step + self.imitator.section.offload_batches, phase.steps, self.rhythm.next(before + step) - before)
            self._whole = before + until
            count = (until - step) * accumulation
            visitors = list(islice(entries, count))
            taught = [found for _ in range(count) if (found := answers()) is not None]
            visited = self.imitator.visit(phase, step, visitors, accumulation, send, taught or None)
            for micro, losses in enumerate(visited):
                yield losses, self.imitator.rate(phase, step + micro // accumulation)
            step = until

    def _relays(self, phase: Phase, upwards: bool) -> bool:
        """Whether something has to come to this span from the data or the one below, or (`upwards`) go to the one above.

        Where the teacher's answers are known, teacher-fed students need no more than their bridge's E.
        """
        units = self.imitator.units
        if self.taught is None or phase.fed == "student":
            return True
        if upwards:
            return units[-1].leaving(phase.fed) is not None
        return units[0].arriving(phase.fed) if units[0].index else 0 in phase.losses

    def _cached(self, phase: Phase, before: int, start: int) -> Iterator[tuple[list[Tensor], float]]:
        """Steps of one unit on stored activations. Each teacher unit sees each batch once; the units below are not run again."""
        (index,) = phase.losses
        unit = self.imitator.units[index]
        accumulation = self.stream.accumulation
        batches = accumulation * min(self.imitator.section.cache_batches or phase.steps, phase.steps)
        teacher_in, student_in = self._inputs(index, batches, phase.fed)
        fed_by_one = teacher_in is None or student_in is None or teacher_in.folder == student_in.folder
        target_store = ActivationStore(self._place("teacher", index), batches)
        kept = self.taught is None and (index < len(self.imitator.units) - 1 or batches < phase.steps * accumulation)
        if kept and start and not target_store.begun:
            # they were given up when a later unit began, and all checkpoints of that one are damaged
            with self._observer.allow(FILL, "store"):
                target_store.refill(
                    min(start * accumulation, batches), lambda position: self.imitator.teach(unit, self._flow(teacher_in, position))[0]
                )
        for micro in range(start * accumulation, phase.steps * accumulation):
            self._whole = self._observer.step = before + micro // accumulation + 1
            position = micro % batches
            teacher = self._flow(teacher_in, position)
            student = teacher if fed_by_one else self._flow(student_in, position)
            taps: Taps = {}
            if self.taught is not None:
                target = self.taught.read(index, position)
            elif micro < batches or unit.needs_taps:
                target, taps = self.imitator.teach(unit, teacher)
                if micro < batches and kept:
                    target_store.write(position, target)
            else:
                target = self._to(target_store.read(position))
            losses = self.imitator.step_one(unit, phase.fed, teacher, student, target, taps)
            yield losses, self.imitator.update(phase, micro // accumulation)
        if kept:
            target_store.finish()

    def _inputs(self, index: int, batches: int, fed: str) -> tuple[Stored | None, Stored | None]:
        """Stores of what enters unit `index` on both sides, each made by one pass over the unit below; None at the stem: the data."""
        if index == 0:
            return None, None
        teacher = self._filled("teacher", index - 1, batches)
        student = teacher if fed == "teacher" else self._filled("student", index - 1, batches)
        for kind in ("teacher", "student"):
            ActivationStore(self._place(kind, index - 2), batches).remove()
        return teacher, student

    def _filled(self, kind: str, index: int, batches: int) -> Stored | None:
        """The outputs of unit `index` on one side, made from those of the unit below where they are missing; None below the stem: the data.

        Only the stem's and the last finished student's are missing, but after a start that went back to a checkpoint whose stores are gone.
        """
        if index < 0:
            return None
        store = self._store(kind, index, batches)
        if isinstance(store, ActivationStore) and not store.complete:
            source = self._filled(kind, index - 1, batches)
            unit = self.imitator.units[index]
            if kind == "student":
                unit.learn(False)

            def make(position: int) -> Carry:
                flow = self._flow(source, position)
                return self.imitator.teach(unit, flow)[0] if kind == "teacher" else self.imitator.answer(unit, flow)

            with self._observer.allow(FILL, "store"):
                self._fill(store, batches, make)
            if index > 1:
                # the stem's may be those of both sides
                ActivationStore(self._place(kind, index - 1), batches).remove()
        return store

    def _drop_stores(self, phase: Phase) -> None:
        """Removes the outputs of units that the phase from which this start goes on has still to train, or to ask."""
        (index,) = phase.losses
        for unit in range(index, len(self.imitator.units)):
            ActivationStore(self._place("student", unit), 0).remove()
            if unit > index:
                ActivationStore(self._place("teacher", unit), 0).remove()

    def _place(self, kind: str, unit: int) -> Path:
        # a stem that was copied has one output, not two
        kind = "teacher" if unit == 0 and self.imitator.units[0].exit is None else kind
        rows = f"rows-{self.wiring.part[0]}-{sum(self.wiring.part)}"
        return self.folder / "activations" / rows / f"{kind}-{unit}"

    def _store(self, kind: str, unit: int, batches: int) -> Stored:
        if self.taught is not None and self._place(kind, unit).name.startswith("teacher"):
            return self.taught.at(unit)
        return ActivationStore(self._place(kind, unit), batches)

    @staticmethod
    def _fill(store: ActivationStore, batches: int, make: Callable[[int], Carry]) -> None:
        for position in range(batches):
            store.write(position, make(position))
        store.finish()

    def _flow(self, store: Stored | None, position: int) -> Flow:
        if store is None:
            return to_device(self.stream.micro_batch(*divmod(position, self.stream.accumulation)))
        return self._to(store.read(position))

    @staticmethod
    def _to(carry: Carry) -> Carry:
        here = device()
        return Carry(carry.hidden.to(here), tuple(tensor.to(here) for tensor in carry.context))

    def _losses(self, phase: Phase, sums: list[Tensor]) -> dict[int, float]:
        """The loss of every unit of this span over all replicas."""
        mine = [unit.index for unit in self.imitator.units if unit.index in phase.losses]
        if not mine:
            return {}
        values = self.imitator.replicas.sum(torch.stack(sums).float() / self.stream.accumulation)
        return dict(zip(mine, values.tolist(), strict=True))

    def _require_finite(self, step: int) -> None:
        """Refuses to save what an update has left after `step` steps over all phases that was too large for a number, however finite its
        gradient was: the checkpoint would be the newest, and whole."""
        for unit in self.imitator.units:
            found = [value.isfinite().all() for value in unit.own_state().values() if value.is_floating_point()]
            if found and not bool(torch.stack(found).all()):
                raise UserError(
                    f"{self.stage}: weights of {_called(unit.index)} are not finite after step {step}, though its gradients were; the "
                    f"checkpoint before it is kept in {self.checkpoints.folder}; lower narrow.optimizer.lr or narrow.clip under "
                    "another --run.name"
                )

    def _while_finite(self, run: Iterator[tuple[list[Tensor], float]], phase: Phase, before: int) -> Iterator[tuple[list[Tensor], float]]:
        """`run`; of units that leave out too many steps in a row the samples are named."""
        try:
            yield from run
        except DivergedError as error:
            raise self._diverged(error, phase, before) from None

    def _diverged(self, error: DivergedError, phase: Phase, before: int) -> UserError:
        """What is said of steps that a unit was to leave out one time too often."""
        steps = [before + step + 1 for step in error.steps]
        batches = [step - 1 for step in steps]
        if phase.cached:
            batches = [step % min(self.imitator.section.cache_batches or phase.steps, phase.steps) for step in error.steps]
        elif self.taught is not None:
            batches = [batch % (self.taught.batches // self.stream.accumulation) for batch in batches]
        name = "all units" if len(error.units) > 1 else _called(error.units[0])
        what = f"the loss or the gradient of {name} is not finite"
        taken = list(zip(steps, batches, strict=True))
        path = name_samples(self.folder, self.stage, steps[-1], what, taken, self.stream, write=self.wiring.leads)
        row = f", after {len(steps) - 1} steps in a row that were left out for that" if len(steps) > 1 else ""
        return UserError(
            f"{self.stage}: {what} at step {steps[-1]}{row}; the samples are named in {path}; look at them, or lower "
            "narrow.optimizer.lr or narrow.clip under another --run.name"
        )

    def _continue_from(self, position: Position) -> None:
        plan, zero = str(self.wiring.plan), zero_stage(self.imitator.section)
        cached = position.phase < len(self.phases) and self.phases[position.phase].cached
        if plan != position.plan and (cached or position.zero or zero):
            why = "its stored activations are those of the old ranks" if cached else "ZeRO has divided its optimizer among the old ranks"
            raise UserError(
                f"{self.checkpoints.folder}: written under plan {position.plan}, and this run has {plan}; {why}: start it as before, "
                f"or remove the folder to start {self.stage} again"
            )
        if zero != position.zero:
            raise UserError(
                f"{self.checkpoints.folder}: written under ZeRO {position.zero}, and this run has ZeRO {zero}; start it as before, "
                f"or remove the folder to start {self.stage} again"
            )
        with self._observer.allow(START, "restore"):
            self.checkpoints.restore()
        self.first_phase, self.first_step = position.phase, position.step


def _called(unit: int) -> str:
    """What people call a unit."""
    return "the stem" if unit == 0 else f"unit {unit}"
