"""The training loop of stages 1 and 3."""

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from wtn_pretrain.data.prefetch import on_device
from wtn_pretrain.data.stream import batches
from wtn_pretrain.device import device, peak_flops, peak_memory, to_device
from wtn_pretrain.errors import UserError
from wtn_pretrain.models.base import BlockNetwork
from wtn_pretrain.parallel.grid import Grid
from wtn_pretrain.parallel.launch import Place
from wtn_pretrain.tasks.base import Task, TaskModule
from wtn_pretrain.training.checkpoint.checkpoints import Checkpoints
from wtn_pretrain.training.config import TrainSection
from wtn_pretrain.training.ema import Average
from wtn_pretrain.training.engine import gathered_state, gradient_norm, start_engine
from wtn_pretrain.training.monitor import Monitor, Work
from wtn_pretrain.training.schedules import scale


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
    grid = Grid(place, section.tensor_parallel, f"{stage}.tensor_parallel")
    stream = task.stream(
        section.batch_size,
        steps=section.steps,
        seed=seed,
        micro_batch_size=section.micro_batch_size or None,
        rank=grid.data_index,
        world_size=grid.data_count,
    )
    if grid.tensor_group is not None:
        network.divide(grid.tensor_group, section.sequence_parallel)
    module = TaskModule(network, task).to(device())
    engine = start_engine(module, section, stage, grid.data_count, stream.accumulation, mpu=grid if section.tensor_parallel > 1 else None)
    average = Average(network, section.ema) if section.ema else None
    identity: dict[str, int | str] = {
        "stage": stage,
        "seed": seed,
        "samples": len(task.train),
        "batch_size": section.batch_size,
        "optimizer": section.optimizer.name,
    }
    beside = {"average": average} if average else {}
    checkpoints = Checkpoints(folder / "checkpoints", engine, network, place, identity=identity, beside=beside)
    start, spent = checkpoints.resume()
    every = section.checkpoint_every or max(1, section.steps // 10)
    work = Work(place.world_size, task.length or 0, peak_flops(section.products), peak_memory)
    monitor = Monitor(folder, stage, section.steps, start=start, log_every=section.log_every, rank=place.rank, work=work)
    began = time.monotonic()
    engine.train()
    for step, micro_batches in enumerate(on_device(stream.iterate(start, section.steps)), start=start):
        rate = section.optimizer.lr * scale(section.schedule, step, section.steps)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        # the ranks of a tensor group draw alike
        torch.manual_seed(step_seed(seed, step, grid.data_index))
        done = step + 1
        saving = done % every == 0 and done < section.steps
        telling = done % section.log_every == 0 or done == section.steps
        sums: dict[str, Tensor] = {}
        norm = None
        for number, batch in enumerate(micro_batches, start=1):
            losses = engine(to_device(batch))
            engine.backward(losses["loss"])
            if telling and number == stream.accumulation:
                norm = gradient_norm(engine)
            _step(engine, stage, done)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() / stream.accumulation
        if average is not None and engine.was_step_applied():
            average.update()
        if saving or telling:
            sums = _mean_over_ranks(sums)
            _require_finite(sums["loss"], stage, done, checkpoints.folder)
        told = _told(engine, norm) if telling else {}
        # a backward pass costs twice a forward pass
        flops = 3 * task.step_flops(network.config, step, section.steps).total * section.batch_size
        monitor.step(done, {**sums, "lr": rate, **told}, samples=section.batch_size, flops=flops)
        if section.evaluate_every and done % section.evaluate_every == 0 and done < section.steps:
            with average.swap() if average else nullcontext():
                monitor.evaluated(done, _evaluate(engine, task, grid))
        if saving:
            saved = checkpoints.save(done, spent + time.monotonic() - began)
            monitor.event("checkpoint", step=done, **saved._asdict())
    spent += time.monotonic() - began
    with average.swap() if average else nullcontext():
        score = _evaluate(engine, task, grid)
        state = gathered_state(engine, network)
    monitor.evaluated(section.steps, score)
    checkpoints.close()
    monitor.close()
    engine.destroy()
    return Trained(state, score, spent)


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


def _told(engine: Any, norm: float | Tensor | None) -> dict[str, Any]:
    """What a record says of the step that `engine` has just taken, beside the loss; `norm`: of the gradients, if it is known already."""
    norm = engine.get_global_grad_norm() if norm is None else norm
    told: dict[str, Any] = {} if norm is None else {"grad_norm": float(norm)}
    if engine.fp16_enabled():
        told["loss_scale"] = engine.optimizer.loss_scale
    if engine.fp16_enabled() or engine.skipped_steps:
        told["skipped"] = engine.skipped_steps
    return told


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


def _evaluate(engine: Any, task: Task, grid: Grid, batch_size: int = 256) -> dict[str, float]:
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
