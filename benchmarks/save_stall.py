"""How much of the time of stage 1 is lost to saving: steps beside a save against steps without one, of the same run.

    python benchmarks/save_stall.py [--every N] [--pairs N] [--batch N] [--ranks N] [--zero NAME] [--folder FOLDER] [--threads N]
                                    [--preset ci|full] [--json FILE]

The preset full trains a BERT of 29 M parameters on random words, through `wtn_pretrain.training.loop.train` itself. After every `--every`
steps (2S) it saves: weights and both moments, 12 bytes a parameter, are copied to host memory, and written and made durable in a thread
beside the next steps. A pair is the S steps from the one at whose end the save begins, against the S steps that follow them; a writing that
takes longer than S steps, which `write_fits` would say, spills over into the second half and is then not seen whole. Of the saves every
second one is waited for instead: what a save costs that is not written beside the training.

Where files go is `--folder`, as the speed of that disk is in the figures.

JSON keys: `save_stall` (median over pairs of the time lost to a save written beside the training, over the time of `every` steps without
any), `save_stall_waited` (the same of those that are waited for), `stalls` and `stalls_waited` (every pair's), `held_seconds` (median
for which `save` itself holds the training up: the wait for the one before, and the copy), `bytes` (of a save, on rank 0), `step_seconds`
(median, without saves), `parameters`, `write_fits`.
"""

import argparse
import contextlib
import io
import sys
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import parser, positive, run, table
from ranks import Crew, folder_of_all
from stage_one import OPTIMIZERS, RandomWords
from torch import Tensor

from wtn_pretrain.models import BertConfig
from wtn_pretrain.models.base import BlockNetwork, parameter_count
from wtn_pretrain.parallel.launch import Place
from wtn_pretrain.training.checkpoint.checkpoints import Checkpoints, Saved
from wtn_pretrain.training.config import TrainSection
from wtn_pretrain.training.loop import train
from wtn_pretrain.training.monitor import METRICS, read_metrics

SHAPES = {
    "ci": (BertConfig(layers=2, hidden_size=32, heads=2, vocab_size=512, max_positions=32), 32, 8),
    "full": (BertConfig(layers=8, hidden_size=512, heads=8, vocab_size=8192, max_positions=128), 128, 8),
}
"""Network, length of the rows, rows a step and rank."""
WARM = 2
"""Pairs that are not counted: a first step compiles and allocates."""


def timed(place: Place, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Trains on this rank; when each step began, and what each save took."""
    torch.set_num_threads(settings["threads"])
    config, length, _ = SHAPES[settings["preset"]]
    task = RandomWords(config, length)
    begun: list[float] = []
    inner, save = task.loss, Checkpoints.save
    saves: list[float] = []

    def loss(network: BlockNetwork, batch: Mapping[str, Tensor], terms: Tensor | None = None) -> dict[str, Tensor]:
        begun.append(time.perf_counter())
        return inner(network, batch, terms)

    def saved(checkpoints: Checkpoints, step: int, seconds: float) -> Saved:
        found = save(checkpoints, step, seconds)
        began = time.perf_counter()
        if len(saves) % 2:
            checkpoints.settle()
        saves.append(time.perf_counter() - began)
        return found

    task.loss = loss  # type: ignore[method-assign]
    Checkpoints.save = saved  # type: ignore[method-assign, assignment]
    every, count = settings["every"], 2 * settings["pairs"] + WARM
    section = TrainSection(
        steps=every * (count + 1) + 1,
        batch_size=settings["batch"] * place.world_size,
        checkpoint_every=every,
        log_every=10**6,
        deepspeed=f"ds_configs/{settings['zero']}.json",
        optimizer=OPTIMIZERS["bert"],
    )
    torch.manual_seed(0)
    try:
        with folder_of_all(place, settings["folder"]) as folder, contextlib.redirect_stderr(io.StringIO()):
            train(config.build(), task, section, stage="wide", folder=folder, seed=0, place=place)
            records = read_metrics(folder / METRICS) if place.rank == 0 else []
    finally:
        Checkpoints.save = save  # type: ignore[method-assign]
    events = [record for record in records if record["kind"] == "event" and record["name"] == "checkpoint"]
    return {"begun": begun, "waited": saves, "held": [event["seconds"] for event in events], "bytes": [event["bytes"] for event in events]}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of the benchmark."""
    config, _, batch = SHAPES[options.preset]
    every = 2 * max(1, (options.every or (6 if options.preset == "ci" else 20)) // 2)
    settings = {
        "preset": options.preset,
        "threads": options.threads,
        "every": every,
        "pairs": options.pairs or (2 if options.preset == "ci" else 5),
        "batch": options.batch or batch,
        "zero": options.zero,
        "folder": str(options.folder) if options.folder else None,
    }
    with Crew(options.ranks, pinned=options.threads == 1) as crew:
        first = crew.call(timed, settings)[0]
    begun = first["begun"]
    steps = [after - before for before, after in pairwise(begun)]
    half = every // 2
    stalls: dict[bool, list[float]] = {False: [], True: []}
    plain: list[float] = []
    for number in range(WARM, 2 * settings["pairs"] + WARM):
        # the save comes at the end of this step
        last = (number + 1) * every - 1
        beside, without = steps[last : last + half], steps[last + half : last + every]
        plain += without
        stalls[bool(number % 2)].append(sum(beside) / half - sum(without) / half)
    step = median(plain)
    share = {waited: [lost * half / (every * step) for lost in found] for waited, found in stalls.items()}
    held = [seconds for number, seconds in enumerate(first["held"]) if number >= WARM and number % 2 == 0]
    writing = [seconds for number, seconds in enumerate(first["waited"]) if number >= WARM and number % 2]
    with torch.device("meta"):
        parameters = parameter_count(config.build())
    return {
        "every": every,
        "pairs": settings["pairs"],
        "ranks": options.ranks,
        "zero": options.zero,
        "parameters": parameters,
        "step_seconds": step,
        "held_seconds": median(held),
        "write_seconds": median(writing),
        "write_fits": max(writing) < half * step,
        "bytes": first["bytes"][-1],
        "save_stall": median(share[False]),
        "save_stall_waited": median(share[True]),
        "stalls": share[False],
        "stalls_waited": share[True],
    }


def show(figures: dict[str, Any]) -> str:
    """The table."""

    def row(name: str, key: str, pairs: str) -> list[str]:
        found = figures[pairs]
        lost = figures[key] * figures["every"] * figures["step_seconds"]
        return [name, f"{100 * figures[key]:.2f}%", f"{100 * min(found):.2f}% to {100 * max(found):.2f}%", f"{lost:.3f}"]

    rows = [row("written beside the training", "save_stall", "stalls"), row("waited for", "save_stall_waited", "stalls_waited")]
    return "\n".join(
        [
            "{parameters:,} parameters, {ranks} ranks, {zero}; a save of {bytes:,} bytes every {every} steps".format(**figures),
            "a step {step_seconds:.3f} s; a save holds it up for {held_seconds:.3f} s and is then written in {write_seconds:.3f} s".format(
                **figures
            ),
            "" if figures["write_fits"] else "the writing takes longer than half of the steps between saves: give a larger --every",
            table(["save", "lost", "range", "seconds a save"], rows),
            "",
            f"save_stall {figures['save_stall']:.4f}",
        ]
    )


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--every", type=positive, metavar="N", help="steps between saves (default 20; ci 6)")
    arguments.add_argument("--pairs", type=positive, metavar="N", help="saves of either kind (default 5; ci 2)")
    arguments.add_argument("--batch", type=positive, metavar="N", help="rows a step and rank (default 8)")
    arguments.add_argument("--ranks", type=positive, default=1, metavar="N", help="default 1")
    arguments.add_argument("--zero", choices=("zero0", "zero1", "zero2", "zero3"), default="zero0", help="DeepSpeed file (default zero0)")
    arguments.add_argument("--folder", type=Path, help="where checkpoints are written (default: the place of temporary files)")
    return run(measure, arguments, show)


if __name__ == "__main__":
    sys.exit(main())
