"""The training loop of stages 1 and 3."""

import json
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from wtn_pretrain.data.stream import BatchStream, batches
from wtn_pretrain.device import device, to_device
from wtn_pretrain.errors import UserError
from wtn_pretrain.files import write_text
from wtn_pretrain.models.base import BlockNetwork
from wtn_pretrain.parallel.launch import Place
from wtn_pretrain.tasks.base import Task, TaskModule
from wtn_pretrain.training.config import TrainSection
from wtn_pretrain.training.engine import gathered_state, start_engine
from wtn_pretrain.training.monitor import Monitor
from wtn_pretrain.training.schedules import scale

WRITTEN_BY = "layout.json"
"""Beside the checkpoints: by how many ranks and under which ZeRO stage they were written, since DeepSpeed resumes under the same only."""


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


def train(network: BlockNetwork, task: Task, section: TrainSection, *, stage: str, folder: Path, seed: int, place: Place) -> Trained:
    """Trains `network` on `task` through DeepSpeed, continuing from the newest checkpoint in `folder` if there is one."""
    stream = BatchStream(
        task.train,
        section.batch_size,
        seed=seed,
        micro_batch_size=section.micro_batch_size or None,
        rank=place.rank,
        world_size=place.world_size,
        workers=task.workers,
    )
    module = TaskModule(network, task).to(device())
    engine = start_engine(module, section, stage, place.world_size, stream.accumulation)
    checkpoints = folder / "checkpoints"
    start, spent = _resume(engine, checkpoints, stage, place)
    every = section.checkpoint_every or max(1, section.steps // 10)
    monitor = Monitor(folder, stage, section.steps, start=start, log_every=section.log_every, rank=place.rank)
    began = time.monotonic()
    engine.train()
    for step, micro_batches in enumerate(stream.iterate(start, section.steps), start=start):
        rate = section.optimizer.lr * scale(section.schedule, step, section.steps)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(step_seed(seed, step, place.rank))
        sums: dict[str, Tensor] = {}
        for batch in micro_batches:
            losses = engine(to_device(batch))
            engine.backward(losses["loss"])
            engine.step()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() / stream.accumulation
        done = step + 1
        saving = done % every == 0 and done < section.steps
        if saving or done % section.log_every == 0 or done == section.steps:
            sums = _mean_over_ranks(sums)
            _require_finite(sums["loss"], stage, done, checkpoints)
        monitor.step(done, {**sums, "lr": rate}, samples=section.batch_size)
        if section.evaluate_every and done % section.evaluate_every == 0 and done < section.steps:
            monitor.evaluated(done, _evaluate(engine, task, place))
        if saving:
            _save(engine, checkpoints, done, spent + time.monotonic() - began, place)
    spent += time.monotonic() - began
    score = _evaluate(engine, task, place)
    monitor.evaluated(section.steps, score)
    monitor.close()
    state = gathered_state(engine, network)
    engine.destroy()
    return Trained(state, score, spent)


def _mean_over_ranks(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if dist.get_world_size() == 1:
        return dict(sums)
    values = torch.stack([value.float() for value in sums.values()])
    dist.all_reduce(values)
    return dict(zip(sums, values / dist.get_world_size(), strict=True))


def _require_finite(loss: Tensor, stage: str, step: int, checkpoints: Path) -> None:
    if not math.isfinite(float(loss)):
        kept = (
            f"the checkpoint before it is kept in {checkpoints}" if (checkpoints / "latest").exists() else "no checkpoint was written yet"
        )
        raise UserError(
            f"{stage}: the loss is {float(loss)} at step {step}; "
            f"lower {stage}.optimizer.lr or {stage}.clip under another --run.name ({kept})"
        )


def _evaluate(engine: Any, task: Task, place: Place, batch_size: int = 256) -> dict[str, float]:
    """Validation over all ranks: each takes every n-th batch, and all take equally many (ZeRO-3 gathers together)."""
    engine.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        rounds = math.ceil(math.ceil(len(task.valid) / batch_size) / place.world_size)
        mine = batches(task.valid, batch_size, place.rank, place.world_size)
        batch: dict[str, Tensor] | None = None
        for _ in range(rounds):
            own = next(mine, None)
            # a rank that has run out repeats a batch and counts it for nothing
            batch = own or batch or next(batches(task.valid, batch_size))
            tally = engine(to_device(batch), measure=True)
            if own is not None:
                sums += torch.stack([tally[name].double().cpu() for name in ("loss", "right", "count")])
    engine.train()
    if place.world_size > 1:
        shared = sums.to(device())
        dist.all_reduce(shared)
        sums = shared.cpu()
    return task.score(dict(zip(("loss", "right", "count"), sums.tolist(), strict=True)))


def _save(engine: Any, checkpoints: Path, step: int, seconds: float, place: Place) -> None:
    if place.rank == 0:
        write_text(checkpoints / WRITTEN_BY, json.dumps({"ranks": place.world_size, "zero": engine.zero_optimization_stage()}))
    try:
        engine.save_checkpoint(str(checkpoints), tag=f"step{step}", client_state={"step": step, "seconds": seconds})
    except OSError as error:
        raise UserError(
            f"{checkpoints}: checkpoint of step {step} cannot be written ({error.strerror}); free the disk and start again"
        ) from None
    if place.rank == 0:
        old = sorted(checkpoints.glob("step*"), key=lambda path: int(path.name.removeprefix("step")))[:-2]
        for path in old:
            shutil.rmtree(path)


def _resume(engine: Any, checkpoints: Path, stage: str, place: Place) -> tuple[int, float]:
    if not (checkpoints / "latest").exists():
        return 0, 0.0
    now = {"ranks": place.world_size, "zero": engine.zero_optimization_stage()}
    try:
        then = json.loads((checkpoints / WRITTEN_BY).read_text(encoding="utf-8"))
        if then == now:
            _, client = engine.load_checkpoint(str(checkpoints))
            return int(client["step"]), float(client["seconds"])
    except Exception as error:  # DeepSpeed and torch raise many kinds for a damaged file
        raise UserError(
            f"{checkpoints}: the newest checkpoint cannot be read ({type(error).__name__}); remove the folder to start {stage} again"
        ) from None
    raise UserError(
        f"{checkpoints}: written by {then['ranks']} ranks under ZeRO {then['zero']}, and this run has {now['ranks']} under "
        f"ZeRO {now['zero']}; start it as before, or remove the folder to start {stage} again"
    )
