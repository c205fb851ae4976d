"""The training loop of stages 1 and 3."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from wtn_pretrain.checkpoint.keeping import keep_of, rhythm_of
from wtn_pretrain.data.prefetch import on_device
from wtn_pretrain.data.stream import Batch, batches
from wtn_pretrain.device import RunAhead, device, peak_flops, peak_memory, to_device
from wtn_pretrain.errors import Preempted, UserError
from wtn_pretrain.models.base import BlockNetwork
from wtn_pretrain.parallel.batchnorm import RunningStatistics, enough_samples
from wtn_pretrain.parallel.grid import Grid
from wtn_pretrain.parallel.launch import Place, wait_for_all
from wtn_pretrain.parallel.preemption import Departure, Notice
from wtn_pretrain.parallel.watch import STACKS, Watch
from wtn_pretrain.screen import say
from wtn_pretrain.tasks.base import Task, TaskModule
from wtn_pretrain.training.checkpoint.checkpoints import Checkpoints, Stateful
from wtn_pretrain.training.config import TrainSection
from wtn_pretrain.training.ema import Average
from wtn_pretrain.training.engine import gathered_state, start_engine
from wtn_pretrain.training.guard import Guard, weighed
from wtn_pretrain.training.monitor import ROLLBACK, Monitor, Work
from wtn_pretrain.training.schedules import scale
from wtn_pretrain.training.spikes import Jump

SILENCE = 30.0
"""Seconds after which a rank that is not heard of counts as lost; one that dies is noticed at once."""
HOST_AHEAD = 2
"""Steps by which a rank's host may be ahead of its device: on it rests that ranks agree where to leave (`preemption.AHEAD`)."""
START, SAVE, EVALUATE = 1800.0, 1800.0, 3600.0
"""Seconds that starting with the first step, a save and a validation may take before a rank counts as hung."""


NOTHING: Mapping[str, str] = MappingProxyType({})


class Trained(NamedTuple):
    """What a training stage leaves."""

    state: dict[str, Tensor] | None
    """The network's whole fp32 state on rank 0, None elsewhere."""
    score: dict[str, float]
    """Validation figures at the end: `loss` and `metric`."""
    seconds: float
    """Wall time of training alone, over all starts of the stage."""


def step_seed(seed: int, step: int, rank: int) -> int:
    """The random state of a step (dropout) as a function of where it stands, so that a resumed run repeats it."""
    return (seed * 1_000_003 + step) * 4099 + rank


def train(
    network: BlockNetwork,
    task: Task,
    section: TrainSection,
    *,
    stage: str,
    folder: Path,
    seed: int,
    place: Place,
    notice: Notice | None = None,
    identity: Mapping[str, str] = NOTHING,
) -> Trained:
    """Trains `network` on `task` through DeepSpeed, continuing from the newest checkpoint in `folder` if there is one.

    `identity`: what else a checkpoint must have in common with this run to be continued.

    Raises:
        Preempted: `notice` came; a checkpoint of the last step is kept.
    """
    departure = Departure(notice, place) if notice else None
    names = [f"rank {rank}" for rank in range(place.world_size)]
    with Watch(place, names, SILENCE, together=section.patience, stacks=folder / STACKS) as watch:
        with watch.allow(START, "start"):
            run = _Training(network, task, section, stage, folder, seed, place, watch, identity)
        return run.go(departure)


class _Training:
    """One start of a stage on this rank."""

    def __init__(
        self,
        network: BlockNetwork,
        task: Task,
        section: TrainSection,
        stage: str,
        folder: Path,
        seed: int,
        place: Place,
        watch: Watch,
        more: Mapping[str, str],
    ) -> None:
        self.network, self.task, self.section, self.stage, self.seed, self.watch = network, task, section, stage, seed, watch
        self.place = place
        self.grid = grid = Grid(place, section.tensor_parallel, f"{stage}.tensor_parallel")
        self.stream = task.stream(
            section.batch_size,
            steps=section.steps,
            seed=seed,
            micro_batch_size=section.micro_batch_size or None,
            rank=grid.data_index,
            world_size=grid.data_count,
        )
        if grid.tensor_group is not None:
            network.divide(grid.tensor_group, section.sequence_parallel)
        module = TaskModule(network, task)
        mpu = grid if section.tensor_parallel > 1 else None
        self.engine = start_engine(module, section, stage, grid.data_count, self.stream.accumulation, mpu=mpu)
        self.average = Average(network, section.ema) if section.ema else None
        own = section.batch_norms == "rank" and grid.data_count > 1
        self.statistics = RunningStatistics(network, grid.data_group) if own else None
        self.remedy = "take more samples" + (f", fewer ranks or {stage}.batch_norms all" if own else "")
        identity: dict[str, int | str] = {
            "stage": stage,
            "seed": seed,
            "samples": len(task.train),
            "batch_size": section.batch_size,
            "optimizer": section.optimizer.name,
            **task.identity,
            **more,
        }
        self.guard = Guard(self.engine, network, section, stage, folder, self.stream)
        beside: dict[str, Stateful] = {"guard": self.guard, **({"average": self.average} if self.average else {})}
        keep = keep_of(section)
        self.checkpoints = Checkpoints(folder / "checkpoints", self.engine, network, place, identity=identity, beside=beside, keep=keep)
        self.start, self.spent = self.checkpoints.resume()
        work = Work(place.world_size, peak_flops(section.products), peak_memory)
        self.monitor = Monitor(folder, stage, section.steps, start=self.start, log_every=section.log_every, rank=place.rank, work=work)

    def go(self, departure: Departure | None) -> Trained:
        """Trains what is left, evaluates, and gathers the network."""
        section, last = self.section, self.section.steps
        rhythm = rhythm_of(section, last)
        began = time.monotonic() - self.spent
        self.engine.train()
        step, settled = self.start, False
        fetched = self._fetched(step)
        pace = RunAhead(HOST_AHEAD)
        while step < last:
            done = step + 1
            # the first step meets the other ranks, and may compile
            patience = section.patience if settled else START
            self.watch.at("data", done)
            with self.watch.allow(patience, "data"):
                micro_batches = next(fetched)
                pace.step()
            leaving = departure is not None and done < last and departure.due(done)
            # after the last step too: what follows may take as long as many steps
            saving = leaving or rhythm.due(done)
            telling = done % section.log_every == 0 or done == last
            # whoever is late, the others are in a collective with it
            with self.watch.waiting() if settled else self.watch.allow(START, "step"):
                sums, told, taken = self._step(step, micro_batches, telling)
                if telling or self.guard.listens:
                    sums = _mean_over_ranks(sums)
            settled = True
            # a backward pass costs twice a forward pass
            flops = 3 * self.task.step_flops(self.network.config, self.guard.batch(step), last).total * section.batch_size
            tokens = self.task.step_length(self.guard.batch(step), last) or 0
            self.monitor.step(done, {**sums, **told}, samples=section.batch_size, flops=flops, tokens=tokens)
            if step in self.guard.in_a_row:
                self.monitor.event("skipped", step=done)
            if self.guard.listens and taken and (jump := self.guard.jumps(float(sums["loss"]))):
                start = self._spiked(step, jump)
                if start is not None:
                    step, settled = start, False
                    fetched = self._fetched(step)
                    continue
            if section.evaluate_every and done % section.evaluate_every == 0 and done < last:
                self.monitor.evaluated(done, self._evaluated())
            # while steps are left out, those before them are what is worth keeping
            if saving and (leaving or done == last or not self.guard.in_a_row):
                with self.watch.allow(SAVE, "save"):
                    saved = self.checkpoints.save(done, time.monotonic() - began)
                self.monitor.event("checkpoint", step=done, **saved._asdict())
            if leaving and departure is not None and self._left(departure, done):
                raise Preempted(f"{self.stage}: left after step {done} of {last} on {departure.why}, all saved")
            step += 1
        spent = time.monotonic() - began
        score = self._evaluated()
        with self.watch.allow(SAVE, "save"), self._averaged():
            state = gathered_state(self.engine, self.network)
            self.monitor.evaluated(last, score)
            self._close()
        return Trained(state, score, spent)

    def _fetched(self, step: int) -> Iterator[list[Batch]]:
        """The micro-batches from a step on."""
        first = self.guard.batch(step)
        return on_device(self.stream.iterate(first, first + self.section.steps - step))

    def _spiked(self, step: int, jump: Jump) -> int | None:
        """Records a spike, and goes back where that is wanted and can be done: the step to go on with."""
        path = self.guard.name_batches(step, f"a spike of the loss: {jump.deviations:.1f} deviations above its median", [step])
        told = {"at": step + 1, **jump._asdict(), "batches": path.name}
        if self.guard.may_return:
            with self.watch.allow(SAVE, "save"):
                self.checkpoints.settle()
            with self.watch.waiting():
                wait_for_all(self.place)
            with self.watch.allow(START, "go back"):
                start = self.guard.returning(step, self.checkpoints.resume)
            if start is not None:
                self.monitor.rewind(start)
                self.monitor.event(ROLLBACK, step=start, number=self.guard.returns, **told)
                say(
                    f"{self.stage}: the loss of step {step + 1} is {jump.loss:.4g} after {jump.median:.4g}; back to the checkpoint of "
                    f"step {start}, and past the {step + 1 - start} batches since"
                )
                return start
        self.monitor.event("spike", step=step + 1, **told)
        return None

    def _step(self, step: int, micro_batches: Sequence[Batch], telling: bool) -> tuple[dict[str, Tensor], dict[str, Any], bool]:
        """One optimizer step: its losses, what else a record says of it if it is `telling`, and whether it was taken."""
        section, engine = self.section, self.engine
        rate = section.optimizer.lr * scale(section.schedule, step, section.steps)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        # the ranks of a tensor group draw alike
        torch.manual_seed(step_seed(self.seed, step, self.grid.data_index))
        sums: dict[str, Tensor] = {}
        norm, terms = None, self._terms(micro_batches)
        self.guard.begin()
        for number, batch in enumerate(micro_batches, start=1):
            self.watch.at(f"micro-batch {number}", step + 1)
            with enough_samples(f"{self.stage}.micro_batch_size", self.remedy):
                losses = engine(to_device(batch), terms=terms)
            engine.backward(weighed(losses["loss"]))
            if number == self.stream.accumulation:
                norm = self.guard.look(telling)
            _step(engine, self.stage, step + 1)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() / self.stream.accumulation
        taken = not self.guard.left_out(step, sums["loss"])
        if self.statistics is not None and taken:
            self.statistics.average()
        if self.average is not None and taken:
            self.average.update()
        return sums, {"lr": rate, **(self._told(norm) if telling else {})}, taken

    def _told(self, norm: float | Tensor | None) -> dict[str, Any]:
        """What a record says of the step that was just taken, beside the loss; `norm`: of the gradients, if it is known already."""
        engine = self.engine
        norm = engine.get_global_grad_norm() if norm is None else norm
        told: dict[str, Any] = {} if norm is None else {"grad_norm": float(norm)}
        if self.guard.skipped:
            told["skipped"] = self.guard.skipped
        if engine.fp16_enabled():
            told |= {"loss_scale": engine.optimizer.loss_scale, "overflows": self.guard.overflows}
        return told

    def _terms(self, micro_batches: Sequence[Batch]) -> Tensor | None:
        """The mean number of terms that a micro-batch of this step has, over all data ranks; None where all have as many."""
        counts = [count for batch in micro_batches if (count := self.task.terms(batch)) is not None]
        if not counts:
            return None
        total = torch.stack(counts).sum().float().to(device())
        if self.grid.data_count > 1:
            dist.all_reduce(total, group=self.grid.data_group)
        return total.clamp_min(1) / (self.stream.accumulation * self.grid.data_count)

    def _averaged(self) -> AbstractContextManager[Any]:
        """Within, the network holds the average of its weights, if there is one."""
        return self.average.swap() if self.average else nullcontext()

    def _evaluated(self) -> dict[str, float]:
        with self.watch.allow(EVALUATE, "evaluate"), self._averaged():
            # what fits in training fits here
            return _evaluate(self.engine, self.task, self.grid, min(256, max(1, self.stream.micro_batch_size)))

    def _left(self, departure: Departure, step: int) -> bool:
        """Whether all ranks leave after `step` steps, all of which is then written."""
        with self.watch.waiting():
            if not departure.together(step):
                return False
        with self.watch.allow(SAVE, "save"):
            self._close()
            departure.finish()
        return True

    def _close(self) -> None:
        self.checkpoints.close()
        self.monitor.close()
        self.engine.destroy()


def _step(engine: Any, stage: str, step: int) -> None:
    try:
        engine.step()
    except Exception as error:
        # DeepSpeed's own words, for which it has no type of its own
        if "loss scale already at minimum" not in str(error):
            raise
        raise UserError(
            f"{stage}: gradients overflow in fp16 at step {step} at every loss scale; use {stage}.precision bf16 or a lower learning rate"
        ) from None


def _mean_over_ranks(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if dist.get_world_size() == 1:
        return dict(sums)
    values = torch.stack([value.float() for value in sums.values()])
    dist.all_reduce(values)
    return dict(zip(sums, values / dist.get_world_size(), strict=True))


def _evaluate(engine: Any, task: Task, grid: Grid, batch_size: int) -> dict[str, float]:
    """Validation over all ranks: each takes every n-th batch, and all take equally many (ZeRO-3 gathers together)."""
    engine.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        rounds = math.ceil(math.ceil(len(task.valid) / batch_size) / grid.data_count)
        mine = batches(task.valid, batch_size, grid.data_index, grid.data_count)
        batch: dict[str, Tensor] | None = None
        for _ in range(rounds):
            own = next(mine, None)
            # a rank that has run out repeats a batch and counts it for nothing
            batch = own or batch or next(batches(task.valid, batch_size))
            tally = engine(to_device(batch), measure=True)
            if own is not None:
                sums += torch.stack([tally[name].double().cpu() for name in ("loss", "right", "count")])
    engine.train()
    if grid.data_count > 1:
        shared = sums.to(device())
        dist.all_reduce(shared, group=grid.data_group)
        sums = shared.cpu()
    return task.score(dict(zip(("loss", "right", "count"), sums.tolist(), strict=True)))
