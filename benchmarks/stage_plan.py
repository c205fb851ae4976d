"""How well tools/plan.py foretells stages 1 and 3: the memory of a rank and the time of a step, predicted and measured.

    python benchmarks/stage_plan.py [--part memory|time|both] [--case NAME] [--repeats N] [--preset ci|full] [--json FILE]

Each case trains through the package's own loop on ranks that are started afresh, processes of one thread pinned to a core each, on data
that cost nothing. Nothing of a run goes into its prediction. Memory is counted from the network's shape (`planning/training/counted.py`)
on top of a process that has trained a network of no size, measured. Time comes from the network's parts, measured one by one on one rank,
and from the link between ranks, measured with two, each just before and just after the runs (the mean counts).

Memory: the peak of a rank's resident set (Linux: VmHWM, begun again once libraries have their buffers) until its last step, the largest
of the ranks. The allocator is told to give back at once what is freed (MALLOC_MMAP_THRESHOLD_): what a plan foretells is what a stage
holds, while the heap of a CPU keeps holes besides, `heap` times as much in the runs whose time is taken, which leave it as it is.

Time: seconds of a step, the median of the repeats of the slowest rank.

JSON keys: `stage_plan_memory` and `stage_plan_time`, the largest of |predicted - measured| / measured over the cases; goals 0.10 and
0.20. `stage_plan_memory_without_base` is that of what is beside the process itself, which no layout can change.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from common import parser, positive, run, table
from ranks import Crew
from stage_arms import Case, Ran, base, link_of, passes_of, ran

from wtn_pretrain.errors import UserError
from wtn_pretrain.models import BertConfig, ResNetConfig
from wtn_pretrain.models.base import BlockConfig
from wtn_pretrain.planning.cluster import Connection, cores
from wtn_pretrain.planning.training.layout import layout_of
from wtn_pretrain.planning.training.memory import memory
from wtn_pretrain.planning.training.pace import pace

GOALS = {"stage_plan_memory": 0.10, "stage_plan_time": 0.20}
BERT = BertConfig(vocab_size=8192, hidden_size=512, layers=6, heads=8, max_positions=128, dropout=0.0, attention_dropout=0.0)
RESNET = ResNetConfig(
    block="bottleneck", depths=(2, 2, 2, 2), channels=(64, 128, 256, 512), stem_channels=64, image_channels=3, image_size=64, classes=100
)
TINY: dict[str, BlockConfig] = {
    "bert": BertConfig(vocab_size=256, hidden_size=32, layers=2, heads=2, max_positions=16),
    "resnet": ResNetConfig(block="basic", depths=(1, 1), channels=(8, 16), stem_channels=8, image_channels=3, image_size=16, classes=10),
}
SGD = {"name": "sgd", "lr": 0.1}


def case(model: str, ranks: int, zero: int, rows: int, passes: int = 1, tensor: int = 1, recompute: bool = False) -> Case:
    """A training of `rows` samples a pass on each data rank."""
    parts = [model, f"{ranks} rank{'s' * (ranks > 1)}", f"ZeRO {zero}", f"tensor {tensor}" * (tensor > 1), "recompute" * recompute]
    parts.append(f"{rows} x {passes}")
    section: dict[str, Any] = {
        "batch_size": rows * passes * (ranks // tensor),
        "micro_batch_size": rows,
        "deepspeed": f"ds_configs/zero{zero}.json",
        "tensor_parallel": tensor,
        "checkpoint_activations": recompute,
        "optimizer": {"name": "adamw", "lr": 1e-4} if model == "bert" else SGD,
    }
    bert = model == "bert"
    return Case(", ".join(filter(None, parts)), BERT if bert else RESNET, 128 if bert else 0, ranks, section)


FULL = (
    case("bert", 1, 0, 8),
    case("bert", 1, 0, 16, recompute=True),
    case("bert", 2, 0, 8, passes=2),
    case("bert", 2, 1, 8),
    case("bert", 2, 2, 8, passes=2),
    case("bert", 2, 3, 8),
    case("bert", 2, 0, 8, tensor=2),
    case("resnet", 1, 0, 32),
    case("resnet", 1, 0, 32, passes=2, recompute=True),
    case("resnet", 2, 1, 16),
    case("resnet", 2, 2, 16, passes=2),
)
CI = (case("bert", 2, 2, 2, passes=2), case("resnet", 1, 0, 2))


@contextmanager
def allocator(tight: bool) -> Iterator[None]:
    """Within, processes that start give back what is freed at once, if `tight`, or have glibc's own heap."""
    before = os.environ.pop("MALLOC_MMAP_THRESHOLD_", None)
    if tight:
        # read when a process starts
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    try:
        yield
    finally:
        os.environ.pop("MALLOC_MMAP_THRESHOLD_", None)
        if before is not None:
            os.environ["MALLOC_MMAP_THRESHOLD_"] = before


def trained(one: Case, warm: int, steps: int, repeats: int, tight: bool) -> list[Ran]:
    """A run on fresh ranks."""
    with allocator(tight), Crew(one.ranks) as crew:
        return crew.call(ran, one, warm, steps, repeats)


def held(one: Case, empty: int) -> dict[str, Any]:
    """Bytes of a rank, predicted on top of those of an `empty` process, and measured."""
    layout = layout_of(one.work().section, "wide", one.ranks)
    told = memory(one.work(), layout, "cpu", empty)
    seen = max(rank.memory for rank in trained(one, 1, 1, 1, tight=True))
    return {
        "predicted_bytes": told.total,
        "measured_bytes": seen,
        "terms": told._asdict(),
        "memory_error": abs(told.total / seen - 1),
        "memory_error_without_base": abs((told.total - empty) / (seen - empty) - 1),
    }


@cache
def empty_of(family: str, ranks: int) -> int:
    """Bytes of the largest of so many processes that hold no network."""
    kind = next(one for one in FULL if one.config.family == family and one.ranks == ranks)
    with allocator(tight=True), Crew(ranks) as crew:
        return max(crew.call(base, kind))


def passes_here(cases: Sequence[Case], repeats: int) -> list[Any]:
    with Crew(1) as crew:
        (found,) = crew.call(passes_of, list(cases), repeats)
    return found


def link_here() -> Connection:
    with Crew(2) as crew:
        found, *_ = crew.call(link_of)
    return found


def timed(cases: Sequence[Case], steps: int, repeats: int) -> list[dict[str, Any]]:
    """Seconds of a step of each case, predicted and measured."""
    # a machine that others use drifts while the cases run
    talks = any(one.ranks > 1 for one in cases)
    before, link_before = passes_here(cases, 5 if repeats > 1 else 1), link_here() if talks else None
    runs = [trained(one, 2, steps, repeats, tight=False) for one in cases]
    link_after, after = link_here() if talks else None, passes_here(cases, 5 if repeats > 1 else 1)
    found = []
    for one, first, then, ranks in zip(cases, before, after, runs, strict=True):
        layout = layout_of(one.work().section, "wide", one.ranks)
        machines = cores(one.ranks)
        told = [
            pace(one.work(), layout, passes, link.of(machines) if link else machines, "cpu")
            for passes, link in ((first, link_before), (then, link_after))
        ]
        seconds = sum(one.step for one in told) / 2
        seen = median(max(rank.seconds[repeat] for rank in ranks) for repeat in range(repeats))
        found.append(
            {
                "predicted_seconds": seconds,
                "measured_seconds": seen,
                "pace": told[1]._asdict(),
                "time_error": abs(seconds / seen - 1),
                "heap_bytes": max(rank.memory for rank in ranks),
            }
        )
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of the benchmark."""
    if not Path("/proc/self/clear_refs").exists():
        raise UserError("the peak of the resident set needs Linux's /proc/self/clear_refs; run this on Linux")
    full = options.preset == "full"
    cases = [
        one if full else one._replace(config=TINY[one.config.family], length=min(one.length, 16))
        for one in (FULL if full else CI)
        if options.case in one.name
    ]
    if not cases:
        raise UserError(f"--case {options.case}: in no name; there are {'; '.join(one.name for one in (FULL if full else CI))}")
    repeats = options.repeats or (3 if full else 1)
    found: list[dict[str, Any]] = [{"case": one.name} for one in cases]
    if options.part != "time":
        for one, figures in zip(cases, found, strict=True):
            figures |= held(one, empty_of(one.config.family, one.ranks))
            if full:
                print(f"{one.name}: {figures['predicted_bytes'] / 1e6:.0f} of {figures['measured_bytes'] / 1e6:.0f} MB", file=sys.stderr)
    if options.part != "memory":
        for figures, more in zip(found, timed(cases, 3 if full else 1, repeats), strict=True):
            figures |= more
    keys = {
        "stage_plan_memory": "memory_error",
        "stage_plan_memory_without_base": "memory_error_without_base",
        "stage_plan_time": "time_error",
    }
    worst = {key: max(one[name] for one in found) for key, name in keys.items() if name in found[0]}
    return {"repeats": repeats, **worst, "cases": found}


def show(figures: dict[str, Any]) -> str:
    """The table, and whether the goals are met."""
    head = ["case", "predicted MB", "measured MB", "ratio", "without base", "heap MB", "predicted ms", "measured ms", "ratio"]
    rows = []
    for one in figures["cases"]:
        cells = [one["case"], *["-"] * (len(head) - 1)]
        if "memory_error" in one:
            told, seen, empty = one["predicted_bytes"], one["measured_bytes"], one["terms"]["base"]
            cells[1:6] = [
                f"{told / 1e6:.0f}",
                f"{seen / 1e6:.0f}",
                f"{told / seen:.3f}",
                f"{(told - empty) / (seen - empty):.3f}",
                f"{one['heap_bytes'] / 1e6:.0f}" if "heap_bytes" in one else "-",
            ]
        if "time_error" in one:
            told, seen = one["predicted_seconds"], one["measured_seconds"]
            cells[6:] = [f"{1e3 * told:.1f}", f"{1e3 * seen:.1f}", f"{told / seen:.3f}"]
        rows.append(cells)
    lines = [table(head, rows), ""]
    for key, goal in GOALS.items():
        if key in figures:
            told = f" (goal: at most {goal}; {'met' if figures[key] <= goal else 'falls short'})" if figures["preset"] == "full" else ""
            lines.append(f"{key} {figures[key]:.3f}{told}")
    return "\n".join(lines)


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--part", choices=("memory", "time", "both"), default="both", help="what is compared (default both)")
    arguments.add_argument("--case", default="", metavar="NAME", help="only cases whose name holds NAME")
    arguments.add_argument("--repeats", type=positive, metavar="N", help="repeats of every run (default 3; ci 1)")
    return run(measure, arguments, show)


if __name__ == "__main__":
    sys.exit(main())
