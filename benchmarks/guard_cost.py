"""What it costs to look at every step before it is taken: steps of stage 1 that are guarded against steps that are not, of the same run.

    python benchmarks/guard_cost.py [--model bert|resnet ...] [--steps N] [--pairs N] [--clip X] [--threads N]
                                    [--preset ci|full] [--json FILE]

Guarded (`wtn_pretrain.training.guard`), buffers are copied before a step, the loss is weighed so that a bad one spoils the gradient, and at
ZeRO 0 the norm of the gradient is read by the host before the optimizer steps. Unguarded, none of that is done. Both kinds alternate, a few
steps each, in one run through `wtn_pretrain.training.loop.train`, where nothing else differs. With `--clip 0` the norm is there for the
guard alone; otherwise clipping needs it anyway.

JSON keys: `guard_cost` {model: median over pairs of the share by which guarded steps take longer}, `pairs` {model: every pair's},
`step_seconds` {model: median without the guard}.
"""

import argparse
import contextlib
import io
import sys
import time
from collections.abc import Mapping
from itertools import pairwise
from statistics import median
from typing import Any, cast

import torch
from common import parser, positive, run, table
from peaks import synchronize
from ranks import Crew, folder_of_all
from stage_one import OPTIMIZERS, RandomImages, RandomWords
from torch import Tensor

from wtn_pretrain.models import BertConfig, ResNetConfig
from wtn_pretrain.parallel.launch import Place
from wtn_pretrain.tasks.base import Task
from wtn_pretrain.training import loop
from wtn_pretrain.training.config import TrainSection
from wtn_pretrain.training.guard import Guard

SHAPES: dict[str, dict[str, tuple[BertConfig | ResNetConfig, int]]] = {
    "ci": {
        "bert": (BertConfig(layers=2, hidden_size=32, heads=2, vocab_size=512, max_positions=32), 8),
        "resnet": (
            ResNetConfig(block="basic", depths=(1, 1), channels=(8, 16), stem_channels=8, image_channels=3, image_size=16, classes=10),
            8,
        ),
    },
    "full": {
        "bert": (BertConfig(layers=4, hidden_size=256, heads=4, vocab_size=8192, max_positions=128), 8),
        "resnet": (
            ResNetConfig(
                block="basic", depths=(3, 3, 3), channels=(16, 32, 64), stem_channels=16, image_channels=3, image_size=32, classes=10
            ),
            64,
        ),
    },
}
"""Network and samples a step."""
WARM = 1
"""Pairs that are not counted."""


class Switch:
    """Turns the guard of a training off and on."""

    def __init__(self, guard: Guard) -> None:
        self._guard, self._weighed = guard, loop.weighed
        self._plain: dict[str, Any] = {}

    def set(self, on: bool) -> None:
        """Whether the steps that follow are guarded."""
        guard, wary = cast(Any, self._guard), self._guard._wary
        assert wary is not None
        engine = guard._engine
        if on:
            for name in ("begin", "look"):
                guard.__dict__.pop(name, None)
            loop.weighed = self._weighed
            engine.optimizer.step = wary._step
            if wary.clips:
                engine.clip_fp32_gradients = wary._clip
            return
        guard.begin, guard.look = lambda: None, lambda wanted: None
        loop.weighed = _as_it_is
        engine.optimizer.step = wary._plain
        # DeepSpeed's own again
        engine.__dict__.pop("clip_fp32_gradients", None)


def _as_it_is(loss: Tensor) -> Tensor:
    return loss


def timed(place: Place, model: str, settings: Mapping[str, Any]) -> list[float]:
    """Trains on this rank; the seconds of every run of steps of one kind, guarded and not in turn."""
    torch.set_num_threads(settings["threads"])
    config, batch = SHAPES[settings["preset"]][model]
    task: Task = RandomWords(config, config.max_positions) if isinstance(config, BertConfig) else RandomImages(config, batch)
    steps, count = settings["steps"], 2 * (settings["pairs"] + WARM)
    begun: list[float] = []
    take = loop._Training._step

    def step(training: Any, number: int, *arguments: Any) -> Any:
        if number % steps == 0 and number // steps <= count:
            synchronize()
            begun.append(time.perf_counter())
            switches.setdefault(0, Switch(training.guard)).set(number // steps % 2 == 0)
        return take(training, number, *arguments)

    switches: dict[int, Switch] = {}
    loop._Training._step = step  # type: ignore[method-assign, assignment]
    section = TrainSection(
        steps=steps * count + 1,
        batch_size=batch * place.world_size,
        log_every=10**6,
        checkpoint_every=10**6,
        clip=settings["clip"],
        optimizer=OPTIMIZERS[model],
    )
    torch.manual_seed(0)
    try:
        with folder_of_all(place) as folder, contextlib.redirect_stderr(io.StringIO()):
            loop.train(config.build(), task, section, stage="wide", folder=folder, seed=0, place=place)
    finally:
        loop._Training._step = take  # type: ignore[method-assign]
    return [after - before for before, after in pairwise(begun)]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of the benchmark."""
    tiny = options.preset == "ci"
    settings = {
        "preset": options.preset,
        "threads": options.threads,
        "clip": options.clip,
        "steps": options.steps or (2 if tiny else 5),
        "pairs": options.pairs or (2 if tiny else 20),
    }
    shares: dict[str, list[float]] = {}
    plain: dict[str, float] = {}
    with Crew(1, pinned=options.threads == 1) as crew:
        for model in options.model:
            laps = crew.call(timed, model, settings)[0][2 * WARM :]
            guarded, unguarded = laps[::2], laps[1::2]
            shares[model] = [mine / other - 1 for mine, other in zip(guarded, unguarded, strict=True)]
            plain[model] = median(unguarded) / settings["steps"]
    return {
        "clip": options.clip,
        "steps": settings["steps"],
        "guard_cost": {model: median(found) for model, found in shares.items()},
        "pairs": shares,
        "step_seconds": plain,
    }


def show(figures: dict[str, Any]) -> str:
    """The table."""
    rows = []
    for model, found in figures["pairs"].items():
        ordered = sorted(found)
        middle = ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
        cost = figures["guard_cost"][model]
        share = f"{100 * middle[0]:.2f}% to {100 * middle[1]:.2f}%"
        rows.append([model, f"{1000 * figures['step_seconds'][model]:.2f}", f"{100 * cost:.2f}%", share, str(len(found))])
    return table(["", "ms a step", "guard_cost", "middle half", "pairs"], rows)


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--model", nargs="+", choices=("bert", "resnet"), default=("bert", "resnet"), help="default: both")
    arguments.add_argument("--steps", type=positive, metavar="N", help="steps of one kind before the other's turn (default 5; ci 2)")
    arguments.add_argument("--pairs", type=positive, metavar="N", help="default 20; ci 2")
    arguments.add_argument("--clip", type=float, default=1.0, help="largest norm; 0: none (default 1)")
    return run(measure, arguments, show)


if __name__ == "__main__":
    sys.exit(main())
