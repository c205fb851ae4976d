"""Stage 2 from start to end: plan, teacher and student of this rank's span, bridges, the engine, and the merge."""

import copy
import json
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed import Store

from wtn_pretrain.checkpoint.files import DamagedError
from wtn_pretrain.compress.merge import Bridged, merge_and_check
from wtn_pretrain.config import Section
from wtn_pretrain.data.stream import BatchStream, batches
from wtn_pretrain.device import device, to_device
from wtn_pretrain.errors import UserError
from wtn_pretrain.files import write_beside, write_text
from wtn_pretrain.imitation.bridges import Bridge, bridge_kinds, enough, place_bridges, sample_teacher, start_maps, teacher_modules
from wtn_pretrain.imitation.cache import ActivationCache
from wtn_pretrain.imitation.cache_key import Key, data_identity, network_identity
from wtn_pretrain.imitation.cache_layout import CacheLayout, lay_out
from wtn_pretrain.imitation.checkpoint.manifest import Position, Stored
from wtn_pretrain.imitation.config import ImitateSection
from wtn_pretrain.imitation.engine import Run, open_stream
from wtn_pretrain.imitation.imitator import Imitator, Send, Work
from wtn_pretrain.imitation.learner import learner_config
from wtn_pretrain.imitation.observer import Observer
from wtn_pretrain.imitation.pairing import Pairing
from wtn_pretrain.imitation.passage import arriving, imitation_errors, sender, through_leaders
from wtn_pretrain.imitation.plan import Plan
from wtn_pretrain.imitation.residence import Residence
from wtn_pretrain.imitation.schedules import phases
from wtn_pretrain.imitation.taught import Taught, as_text, fill, from_text
from wtn_pretrain.imitation.units import make_units, start_from_teacher
from wtn_pretrain.imitation.wiring import Wiring
from wtn_pretrain.models.base import BlockConfig, BlockNetwork
from wtn_pretrain.models.store import load_part, save_network
from wtn_pretrain.parallel.launch import Place, shared_store, wait_for_rank
from wtn_pretrain.parallel.preemption import Notice
from wtn_pretrain.parallel.relay import Outbox
from wtn_pretrain.parallel.replicas import forget_replicas
from wtn_pretrain.parallel.watch import Watch
from wtn_pretrain.planning.choose import choose_plan
from wtn_pretrain.screen import say
from wtn_pretrain.tasks.base import Task, evaluate
from wtn_pretrain.training.trace import Trace, merge
from wtn_pretrain.training.utilisation import bubble, utilisation, write_utilisation

SAMPLE_BATCHES = 64
"""Batches from which bridges start, at most."""
LOAD, MERGE = 1800.0, 3600.0
"""Seconds that loading networks and merging and evaluating them may take before a rank counts as lost."""
SETTLE = 3
"""Steps at either end that the utilisation leaves out."""
ERROR_BATCHES = 8
"""Validation batches over which the error of each unit is measured at the end."""


class Answers(NamedTuple):
    """A cache of the teacher's answers, and how many of its first micro-batches it holds."""

    cache: ActivationCache
    layout: CacheLayout
    kept: int

    @property
    def full(self) -> bool:
        return self.kept == self.layout.batches


class Narrow:
    """Stage 2 of one seed on this rank."""

    def __init__(
        self,
        section: ImitateSection,
        task: Task,
        thin: BlockConfig,
        wide: BlockConfig,
        pairing: Pairing,
        teacher: Path,
        folder: Path,
        place: Place,
        settings: dict[str, Section],
        notice: Notice,
    ) -> None:
        """`teacher` holds the wide network, `folder` receives the thin one; both are seen by all ranks. `settings` made the data.
        `notice`: on which the stage is left early."""
        self.notice = notice
        self.section, self.task, self.thin, self.wide, self.pairing = section, task, thin, wide, pairing
        self.teacher, self.folder, self.place, self.settings = teacher, folder, place, settings
        self.counts = task.forward_flops(thin), task.forward_flops(wide)
        self.plan = choose_plan(section, thin, wide, pairing, self.counts, place.world_size, task.length)
        # a file that does not fit is refused before anything is loaded
        learner_config(section, 1)
        with torch.device("meta"):
            self.kinds = bridge_kinds(thin.build(), wide.build(), pairing, section.bridge)

    def go(self, seed: int, data_seed: int, finish: Callable[[dict[str, Any]], object]) -> None:
        """Imitates on all ranks, the student of `seed` on the batches of `data_seed`.

        The first rank merges and gives what the stage reports to `finish`, for which the others wait.
        """
        names = [_name(self.plan, rank) for rank in range(self.place.world_size)]
        trace = Trace(self.place.rank, names[self.place.rank], enabled=self.section.trace)
        with Watch(self.place, names, self.section.patience) as watch:
            if self.place.world_size > 1:
                say(f"narrow: plan {self.plan}")
            observer = Observer(watch, trace)
            store = shared_store(self.place)
            self._imitate(seed, data_seed, observer, store)
            self._merge_traces(trace, observer, store)
            if self.place.rank == 0:
                with observer.allow(MERGE, "merge"):
                    finish(self._assemble(observer, store))
                store.set("finished", "yes")
            self._meet(0, "finished", observer, store)

    def _imitate(self, seed: int, data_seed: int, observer: Observer, store: Store) -> None:
        section = self.section
        rows, wire = section.micro_batch_size or section.batch_size, torch.bfloat16 if section.wire == "bf16" else None
        with observer.waiting():
            wiring = Wiring(self.plan, self.place, rows, wire)
        with observer.allow(LOAD, "load"):
            stream = open_stream(self.task.train, section, data_seed, part=wiring.part, workers=self.task.workers)
            thin = self._student(seed, wiring)
        store_of_answers = self._open_cache(stream, observer, store) if section.cache else None
        # a teacher whose answers are known is needed for a moment only, a unit at a time
        known = store_of_answers is not None and store_of_answers.full
        where = "disk" if known and section.offload == "none" else section.offload
        with observer.allow(LOAD, "load"):
            wide = self._wide(wiring, whole=where == "none")
        bridges = self._bridges(data_seed, wiring, wide, where == "none", observer, store)
        if wiring.span.first == 0:
            entry = bridges.get(0)
            thin.start_stem_from(wide, entry.reduce().detach() if entry else None)
        units = make_units(thin, wide, self.pairing, bridges, section, self.counts, wiring.span.units)
        residence = Residence(units, self.teacher, self.pairing, where, section.offload != "none", observer.lane)
        for unit in units:
            if section.init == "matching" and unit.index:
                with observer.allow(LOAD, "start"):
                    residence.home(unit)
                    start_from_teacher(unit)
        imitator = Imitator(units, section, wiring.replicas, observer, residence)
        order = phases(section, self.pairing.units, learns_stem=self.kinds[0] is not None)
        taught = None
        if store_of_answers is not None:
            taught = self._taught(store_of_answers, imitator, wiring, stream, observer, store)
        identity = {"seed": seed, "loss": section.loss}
        position = Run(imitator, order, stream, self.folder, wiring, taught, notice=self.notice, identity=identity).go()
        errors = imitation_errors(imitator, wiring, batches(self.task.valid, rows), ERROR_BATCHES)
        imitator.close()
        residence.close()
        forget_replicas()
        if wiring.leads:
            store.set(f"errors-{wiring.seat.span}", json.dumps({"position": position, "errors": errors}))

    def _merge_traces(self, trace: Trace, observer: Observer, store: Store) -> None:
        """Joins what all ranks have recorded to one trace, and says how busy they were."""
        if not self.section.trace:
            return
        trace.write(self.folder)
        store.add("traced", 1)
        if self.place.rank:
            return
        with observer.waiting():
            wait_for_rank(lambda: store.add("traced", 0) == self.place.world_size)
        path = merge(self.folder, self.place.world_size)
        uses = utilisation(json.loads(path.read_text(encoding="utf-8"))["traceEvents"], settle=SETTLE)
        if uses:
            write_utilisation(self.folder, uses)
            say(f"narrow: idle {100 * bubble(uses):.1f}% of the steady part; {path} opens in ui.perfetto.dev")

    def _wide(self, wiring: Wiring, whole: bool) -> BlockNetwork:
        """The wide network of which this span's modules are there (not `whole`: of them, only the stem)."""
        units = [unit for unit in wiring.span.units if whole or unit == 0]
        return self._load([part for unit in units for part in self.pairing.teacher_parts(unit)])

    def _load(self, parts: list[str]) -> BlockNetwork:
        return load_part(self.teacher, parts).requires_grad_(False)._apply(_to_here)

    def _modules(self, wide: BlockNetwork, whole: bool, observer: Observer, unit: int) -> list[nn.Module]:
        """The teacher's modules of a unit, loaded for this once if the wide network is not `whole`."""
        observer.at(f"samples {unit}")
        return teacher_modules(wide if whole else self._load(self.pairing.teacher_parts(unit)), self.pairing, unit)

    def _student(self, seed: int, wiring: Wiring) -> BlockNetwork:
        """The thin network of which only this span's modules are there, the same under every plan."""
        torch.manual_seed(seed)
        thin = self.thin.build()
        mine = {block for unit in wiring.span.units if unit for block in self.pairing.blocks_of(unit)[0]}
        for number, block in enumerate(thin.blocks):
            if number not in mine:
                block.to("meta")
        if wiring.span.first:
            thin.stem.to("meta")
        thin.head.to("meta")
        return thin._apply(_to_here)

    def _bridges(self, seed: int, wiring: Wiring, wide: BlockNetwork, whole: bool, observer: Observer, store: Store) -> dict[int, Bridge]:
        """The bridges of this rank's units, made on the first rank from what the leaders of all spans have sampled."""
        if not any(self.kinds):
            return {}
        place = self.folder / "start"
        stream = open_stream(self.task.train, self.section, seed)
        if wiring.leads:
            data = enough((stream.micro_batch(step, 0) for step in range(SAMPLE_BATCHES)), wide, self.pairing)

            def sample(entries: Any, send: Send | None) -> dict[int, Tensor]:
                flows = (entry.teacher for entry in entries)
                forward = None if send is None else lambda carry: send(carry, None, None)
                return sample_teacher(partial(self._modules, wide, whole, observer), wide.channel_axis, wiring.span.units, flows, forward)

            with observer.allow(LOAD, "samples"):
                samples = through_leaders(wiring, data, SAMPLE_BATCHES, self.section.in_flight, observer, sample)
            sampled = {str(boundary): value.cpu().contiguous() for boundary, value in samples.items()}
            write_beside(place / f"samples-{wiring.seat.span}.safetensors", lambda part: save_file(sampled, part))
            store.add("sampled", 1)
        if self.place.rank == 0:
            with observer.waiting():
                wait_for_rank(lambda: store.add("sampled", 0) == len(self.plan.spans))
            with observer.allow(LOAD, "bridges"):
                samples = {}
                for span in range(len(self.plan.spans)):
                    sampled = load_file(place / f"samples-{span}.safetensors")
                    samples |= {int(boundary): value.to(device()) for boundary, value in sampled.items()}
                with torch.device("meta"):
                    thin = self.thin.build()
                maps = start_maps(thin, self.pairing, self.kinds, samples)
                starts = {str(boundary): start.cpu().clone() for boundary, start in maps.items()}
                write_beside(place / "bridges.safetensors", lambda part: save_file(starts, part))
            store.add("bridges", 1)
        with observer.waiting(0):
            wait_for_rank(lambda: store.add("bridges", 0) > 0)
        maps = {int(boundary): start.to(device()) for boundary, start in load_file(place / "bridges.safetensors").items()}
        if store.add("read", 1) == self.place.world_size:
            shutil.rmtree(place)
        mine = {self.pairing.student[unit] for unit in wiring.span.units}
        below = {self.pairing.student[wiring.span.first - 1]} if wiring.span.first else set()
        return place_bridges({boundary: start for boundary, start in maps.items() if boundary in mine | below}, self.pairing, self.kinds)

    def _open_cache(self, stream: BatchStream, observer: Observer, store: Store) -> Answers:
        """The cache of the teacher's answers, ready to be filled or read."""
        section = self.section
        if self.place.rank == 0:
            with observer.allow(LOAD, "identify"):
                data = data_identity(self.task.train, **self.settings)
                key = Key(data, stream.seed, network_identity(self.teacher), self.pairing.teacher, section.precision)
            store.set("key", as_text(key))
        self._meet(0, "key", observer, store)
        key = from_text(store.get("key").decode())
        batches = min(section.cache_batches or section.steps, section.steps) * stream.accumulation
        sample = open_stream(self.task.train, section, stream.seed).micro_batch(0, 0)
        layout = lay_out(self.wide, self.pairing.teacher, sample, batches, precision=section.precision, stored=section.cache_dtype)
        cache = ActivationCache(Path(section.cache), key, layout)
        if self.place.rank == 0:
            with observer.allow(LOAD, "prepare"):
                store.set("kept", str(cache.prepare()))
        self._meet(0, "kept", observer, store)
        return Answers(cache, layout, int(store.get("kept")))

    def _taught(
        self, answers: Answers, imitator: Imitator, wiring: Wiring, stream: BatchStream, observer: Observer, store: Store
    ) -> Taught:
        """The teacher's answers from the cache, which all ranks fill first where it is not full."""
        cache, section = answers.cache, self.section
        if not answers.full:
            began = time.monotonic()
            # a micro-batch that was cut short by a crash is made anew with its step
            first, steps = answers.kept // stream.accumulation, answers.layout.batches // stream.accumulation
            say(f"narrow: storing the teacher's outputs of {steps - first} batches in {cache.folder} ({cache.size / 2**30:.2f} GiB)")
            # what is kept for others must not be rounded on its way
            below, above = (link.exact() if link else None for link in (wiring.below, wiring.above))
            outbox = Outbox(above, section.in_flight, observer.lane) if above else None
            send = sender(outbox, above, observer) if outbox and above else None
            entries = arriving(below, stream, range(first, steps), section.in_flight, observer)
            fill(cache, imitator, wiring, first * stream.accumulation, entries, send, section.offload_batches)
            if outbox and above:
                with observer.output(above.ranks):
                    outbox.close()
            imitator.work.seconds += time.monotonic() - began
            store.add("filled", 1)
            if self.place.rank == 0:
                with observer.waiting():
                    wait_for_rank(lambda: store.add("filled", 0) == self.place.world_size)
                with observer.allow(LOAD, "finish"):
                    cache.finish()
                store.set("cached", "yes")
            self._meet(0, "cached", observer, store)
        imitator.residence.vacate()
        return Taught(cache.reader(), answers.layout, wiring, cache.folder)

    @staticmethod
    def _meet(rank: int, word: str, observer: Observer, store: Store) -> None:
        """Waits until `rank` has said `word`."""
        with observer.waiting(rank):
            wait_for_rank(lambda: store.check([word]))

    def _assemble(self, observer: Observer, store: Store) -> dict[str, Any]:
        """The whole thin network from every unit's last state; its head from the wide one's; merged, measured and written."""
        errors: dict[int, float] = {}
        with observer.waiting():
            for span in range(len(self.plan.spans)):
                wait_for_rank(partial(store.check, [f"errors-{span}"]))
                told = json.loads(store.get(f"errors-{span}"))
                errors |= {int(unit): value for unit, value in told["errors"].items()}
        position = Position(*told["position"])
        states, work = self._last(self.folder / "checkpoints" / position.name)
        wide = self._load(["head"])
        thin = self.thin.build().to(device())
        maps = {self.pairing.student[unit]: state["exit.expand"] for unit, state in enumerate(states) if "exit.expand" in state}
        bridges = place_bridges(maps, self.pairing, self.kinds)
        for unit, state in zip(make_units(thin, wide, self.pairing, bridges, self.section, self.counts), states, strict=True):
            unit.load_own_state(state)
        top = bridges.get(len(thin.blocks))
        thin.start_head_from(wide, top.expand.detach() if top else None, top.reduce().detach() if top else None)
        merged, report = self._merge(Bridged(thin, bridges))
        score = evaluate(merged, self.task)
        if bridges:
            state = {
                f"{boundary}.{name}": value.detach().cpu()
                for boundary, bridge in bridges.items()
                for name, value in bridge.state_dict().items()
            }
            write_beside(self.folder / "bridges.safetensors", lambda part: save_file(state, part))
        write_text(self.folder / "merge.json", json.dumps(report, indent=2) + "\n")
        save_network(self.folder, self.thin, merged.state_dict())
        return {
            **score,
            "steps": self.section.steps,
            "seconds": work.seconds,
            "flops": work.teacher_flops + work.student_flops,
            "teacher_flops": work.teacher_flops,
            "imitation_error": [errors[unit] for unit in sorted(errors)],
            "plan": str(self.plan),
        }

    def _last(self, folder: Path) -> tuple[list[dict[str, Tensor]], Work]:
        """The state of every unit at the end, on this rank's device, and what all of it has cost."""
        try:
            stored = Stored(folder)
            stored.check()
            units = [stored.unit(unit) for unit in range(self.pairing.units + 1)]
        except DamagedError as error:
            raise UserError(f"{error}; start narrow again, which goes on from the checkpoint before it") from None
        return [{name: value.to(device()) for name, value in unit.items()} for unit in units], stored.spent

    def _merge(self, bridged: Bridged) -> tuple[BlockNetwork, dict[str, Any]]:
        """The merged network, and how far it is from the bridged one in fp32 and fp64 on real inputs."""
        inputs = to_device(next(batches(self.task.valid, 32)))
        head = self.task.positions(inputs)
        merged = merge_and_check(bridged, inputs, **head)
        double = copy.deepcopy(bridged).double()
        wide_inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
        exact = merge_and_check(double, wide_inputs, **head)
        kinds = {
            boundary: "free" if bridge.free else "constrained" for boundary, bridge in ((int(n), b) for n, b in bridged.bridges.items())
        }
        report = {"bridges": kinds, "difference_fp32": merged.difference, "difference_fp64": exact.difference}
        return merged.network, report


def _name(plan: Plan, rank: int) -> str:
    """What a rank is called when it is to blame."""
    seat = plan.seat(rank)
    span = plan.spans[seat.span]
    units = f"units {span.first}-{span.last}" if span.last > span.first else f"unit {span.first}"
    return f"rank {rank} ({units}{f', replica {seat.replica + 1} of {span.replicas}' if span.replicas > 1 else ''})"


def _to_here(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else tensor.to(device())
