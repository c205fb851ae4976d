"""Teacher work and wall time of block-wise imitation, against the naive order.

    python benchmarks/imitation_cost.py [--model bert|resnet|both] [--steps N] [--repeats N] [--preset ci|full] [--json FILE]

Three arms train the same student blocks on the same batches, each block for `--steps` optimizer steps, teacher-fed:
  naive       for every block and batch, the teacher again from its stem to that block (L (L + 1) / 2 teacher blocks a batch);
  bottom_up   the engine's schedule, blocks below frozen: inputs and targets from activation stores, written and read (L blocks);
  parallel    the engine's schedule: one pass of the teacher feeds every block (L blocks).
A fourth row, bottom_up in its default student-fed form, is beside them, run once: it does another job and enters no minimum.

The arms of a repeat run one after the other in rotating order; a wall ratio is the median over repeats of naive / arm in the
same repeat, and the CPU ratio likewise for the process's CPU time, which a busy machine disturbs less. Checkpoints every so
many steps are off, since the naive arm has none; the one that bottom_up writes before each block is part of its time. Teacher
FLOPs are counted unit by unit, as the engine does. JSON keys: `teacher_flops_ratio` and `wall_ratio`, each the smallest over
the engine's two arms and over models, and `cpu_ratio` beside them; `models` holds the figures of each. `weight_difference` is
how far an arm's final students are from the naive ones, over how far the naive ones moved (L2 norms; of weights and of
batch-norm statistics, the larger): 0 where the arms did the same job bit for bit, about 0.01 where they differ by the fp32
round-off of a few steps of AdamW. Claim, for 12 blocks: at least 4 in FLOPs and at least 3 in time.
"""

import argparse
import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from common import parser, positive, run, table
from pairs import MODELS, SHAPES, Pair, resnet, state
from torch import Tensor

from wtn_pretrain.data.stream import BatchStream
from wtn_pretrain.device import to_device
from wtn_pretrain.imitation.config import ImitateSection
from wtn_pretrain.imitation.engine import Run
from wtn_pretrain.imitation.imitator import Imitator
from wtn_pretrain.imitation.schedules import Phase, phases
from wtn_pretrain.models.base import Flow
from wtn_pretrain.parallel.launch import start_ranks, stop_ranks

ARMS = {
    "naive": {"schedule": "bottom_up", "feed": "teacher"},
    "bottom_up": {"schedule": "bottom_up", "feed": "teacher"},
    "parallel": {"schedule": "parallel", "feed": "teacher"},
    "bottom_up, student-fed": {"schedule": "bottom_up", "feed": "student"},
}
NEVER = 10**9
"""Steps between checkpoints."""
COUNTED = ("bottom_up", "parallel")
"""The arms whose ratios make the claim."""
RATIOS = ("teacher_flops_ratio", "wall_ratio", "cpu_ratio")


def naive(imitator: Imitator, plan: list[Phase], stream: BatchStream) -> None:
    """The peer: block after block, each on teacher activations made anew from the bottom for every batch."""
    for phase in plan:
        (index,) = phase.losses
        imitator.begin(phase)
        for step in range(phase.steps):
            flow: Flow = to_device(stream.micro_batch(step, 0))
            for unit in imitator.units[: index + 1]:
                target, taps = imitator.teach(unit, flow)
                entered, flow = flow, target
            imitator.step_one(imitator.units[index], "teacher", entered, entered, target, taps)
            imitator.update(phase, step)


def run_arm(pair: Pair, arm: str, steps: int) -> tuple[float, float, Imitator]:
    """Wall and CPU seconds of one arm from a fresh student, the engine's activation stores included."""
    own = {"steps": steps, "batch_size": pair.batch_size, "checkpoint_every": NEVER}
    section = ImitateSection.model_validate({**ARMS[arm], **own})
    imitator, stream = pair.imitator(section), pair.stream()
    plan = phases(section, len(imitator.units) - 1, learns_stem=False)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        began, worked = time.perf_counter(), time.process_time()
        if arm == "naive":
            naive(imitator, plan, stream)
        else:
            Run(imitator, plan, stream, Path(folder)).go()
        # reading a weight waits for whatever the device still has to do
        float(next(imitator.units[-1].parameters()).sum())
        taken = time.perf_counter() - began, time.process_time() - worked
    imitator.close()
    return *taken, imitator


def difference(student: Mapping[str, Tensor], reference: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """Distance of `student` from `reference` over the way of `reference` from `start`, the larger of weights and statistics."""

    def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor], statistics: bool) -> float:
        names = [name for name in one if ("running_" in name) == statistics]
        return sum(float((one[name].double() - other[name].double()).square().sum()) for name in names) ** 0.5

    ways = {statistics: distance(reference, start, statistics) for statistics in (False, True)}
    return max(distance(student, reference, statistics) / way for statistics, way in ways.items() if way)


def analytic(pair: Pair) -> float:
    """Teacher FLOPs of the naive order over those of one pass: (L + 1) / 2 where blocks cost alike and the stem nothing."""
    stem, blocks, _ = pair.counts[1]
    return sum(stem + sum(blocks[: index + 1]) for index in range(len(blocks))) / (stem + sum(blocks))


def measure_model(model: str, blocks: int, preset: str, steps: int, repeats: int) -> dict[str, Any]:
    """The figures of one pair."""
    pair = Pair(model, blocks, preset)
    start = state(pair.imitator(ImitateSection()))
    for arm in COUNTED:  # the first run of a process pays for imports and allocation
        run_arm(pair, arm, 1)
    wall: dict[str, list[float]] = {arm: [] for arm in ARMS}
    cpu: dict[str, list[float]] = {arm: [] for arm in ARMS}
    last: dict[str, Imitator] = {}
    for repeat in range(repeats):
        order = list(ARMS)
        for arm in order[repeat % len(order) :] + order[: repeat % len(order)]:
            if repeat and arm not in ("naive", *COUNTED):
                continue
            taken, worked, last[arm] = run_arm(pair, arm, steps)
            wall[arm].append(taken)
            cpu[arm].append(worked)
    reference, trained = last["naive"], state(last["naive"])
    arms: dict[str, dict[str, Any]] = {}
    for arm, imitator in last.items():
        arms[arm] = {
            "teacher_flops": imitator.work.teacher_flops,
            "student_flops": imitator.work.student_flops,
            "wall_seconds": wall[arm],
            "cpu_seconds": cpu[arm],
            "teacher_flops_ratio": reference.work.teacher_flops / imitator.work.teacher_flops,
            "wall_ratio": _paired(wall, arm),
            "cpu_ratio": _paired(cpu, arm),
            "weight_difference": difference(state(imitator), trained, start),
        }
    figures: dict[str, Any] = {key: min(arms[arm][key] for arm in COUNTED) for key in RATIOS}
    return {**figures, "analytic_ratio": analytic(pair), "arms": {arm: arms[arm] for arm in ARMS}}


def _paired(seconds: Mapping[str, list[float]], arm: str) -> float:
    """Median over the arm's repeats of naive / arm, both of one repeat."""
    return median(slow / fast for slow, fast in zip(seconds["naive"], seconds[arm], strict=False))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of the benchmark."""
    steps = options.steps or (2 if options.preset == "ci" else 8)
    repeats = options.repeats or (1 if options.preset == "ci" else 3)
    chosen = MODELS if options.model == "both" else (options.model,)
    if "resnet" in chosen:
        resnet(options.blocks, SHAPES["resnet"][options.preset])  # refuses other depths before anything is measured
    start_ranks()
    models = {model: measure_model(model, options.blocks, options.preset, steps, repeats) for model in chosen}
    stop_ranks()
    least = {key: min(figures[key] for figures in models.values()) for key in RATIOS}
    return {"blocks": options.blocks, "steps": steps, "repeats": repeats, **least, "models": models}


def show(figures: dict[str, Any]) -> str:
    """The table, and whether the claim holds."""
    head = ["", "teacher GFLOPs", "naive / arm", "analytic", "student GFLOPs"]
    head += ["wall s", "naive / arm", "CPU s", "naive / arm", "weight difference"]
    rows = []
    for model, of_model in figures["models"].items():
        for arm, row in of_model["arms"].items():
            rows.append(
                [
                    f"{model} {arm}",
                    f"{row['teacher_flops'] / 1e9:.3f}",
                    f"{row['teacher_flops_ratio']:.2f}",
                    "1.00" if arm == "naive" else f"{of_model['analytic_ratio']:.2f}",
                    f"{row['student_flops'] / 1e9:.3f}",
                    f"{median(row['wall_seconds']):.2f}",
                    f"{row['wall_ratio']:.2f}",
                    f"{median(row['cpu_seconds']):.2f}",
                    f"{row['cpu_ratio']:.2f}",
                    f"{row['weight_difference']:.1e}",
                ]
            )
    parts = [table(head, rows), f"{figures['blocks']} blocks, {figures['steps']} steps a block, median of {figures['repeats']} repeats"]
    for key, bound in (("teacher_flops_ratio", 4), ("wall_ratio", 3)):
        line = f"{key} {figures[key]:.2f}"
        if figures["blocks"] == 12 and figures["preset"] == "full":
            line += f" (claim for 12 blocks: at least {bound}; {'holds' if figures[key] >= bound else 'falls short'})"
        parts.append(line)
    parts.append(f"cpu_ratio {figures['cpu_ratio']:.2f}")
    return "\n".join([parts[0], "", *parts[1:]])


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--model", choices=(*MODELS, "both"), default="both", help="which pair (default both)")
    arguments.add_argument("--blocks", type=positive, default=12, metavar="N", help="blocks of both networks (default 12)")
    arguments.add_argument("--steps", type=positive, metavar="N", help="optimizer steps of every block (default 8; ci 2)")
    arguments.add_argument("--repeats", type=positive, metavar="N", help="runs of every arm (default 3; ci 1)")
    return run(measure, arguments, show)


if __name__ == "__main__":
    sys.exit(main())
