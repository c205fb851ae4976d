"""Throughput of the pipelined engine on two ranks of one core each, against two other ways to imitate on the same ranks.

    python benchmarks/pipeline.py [--model M] [--blocks N] [--widening W] [--repeats N] [--preset ci|full] [--json FILE]

It starts its own ranks, processes of one thread pinned to a core each: a crew of two, and a crew of one for what one core does.
  (a) naive      block after block on both ranks, each of which takes half of every batch: for every block and batch the teacher again
                 from its stem to that block, gradients averaged and batch norms synchronised over the ranks;
  (b) prefix     every block a task of its own, without communication, on whole batches: the teacher again from its stem. Tasks are dealt
                 to the ranks longest first, each to the rank that has least (the LS baseline of Pipe-BD);
  (c) engine     the spans of the planner's plan, from unit costs and the link measured here: schedule parallel, teacher-fed;
  (c) on 1 rank  the same engine with all units on one core.
All arms train the same student from the same start with the engine's own units, learners (DeepSpeed, AdamW, clipped) and batches in
memory, and every block takes the same number of optimizer steps on the same batches. To show it, (c) is also run for just as many
steps as (a) and (b) take, and `weight_difference` is the largest distance of a block's students of (a) and (b) from those of (c) over
the way that these went; above 0.05 the benchmark fails. It is 0 but for the fp32 round-off of half batches, which the first steps of
AdamW, near to signs, magnify. Left out are blocks that a constrained bridge feeds: R = pinv(E) takes E from the block below, which in
(c) learns at the same time and in (a) and (b) before or elsewhere, so their students differ by design (`compared` counts the others).

Widenings: inner 4x (bottlenecks, as WIN widens them), outer 2x and 4x (residual blocks of two 3x3 convolutions, as Wide ResNets are
widened outside; BERT's hidden size) with bridges at every boundary. Thin widths are such that the teachers cost about the same.

Throughput is samples a second in the steady part: of (a) and (b) without the first step of a block, of (c) from the step at which the
pipeline is full, by the slowest rank. With 24 blocks (a) and (b) run on evenly spread blocks
only (`sampled`; of fewer all): the prefix's time is then the least-squares line through theirs, the student's their mean. Repeats
interleave the arms in rotating order; ratios are medians over repeats of what one repeat gives.

At full width (`--full-width yes`, the default): thin networks of the widths of BERT-Base and of ResNet-50 and -18, of four or six blocks,
through (c) alone. What is no product, such as norms and activations, weighs the more the narrower a network is, and the networks above are
narrow so that (a) and (b) end at all.

JSON keys, each the worst over all cases with the figures of every case in `cases`:
  speedup_over_naive      (c) over (a): the smallest at 24 blocks (or the most that was run) with a teacher of 4x width; goal 7.4
  share_of_work_ratio     (c) over (a), as measured, over the analytic ratio of the work; goal 0.9. With the seconds T of a unit's teacher
                          and s of its student's step, both measured in the run on one rank, (a) takes for block k the T of all units up
                          to k and its s, L(L+1)/2 T + L s in all, and (c) L T + L s
  speedup_over_prefix     (c) over (b)
  scaling_2_over_1        (c) over (c) on 1 rank; goal 1.8
  scaling_bound           what two cores of this machine give at all: all units on each of two ranks that exchange nothing, over the
                          same on one; they share caches, memory and power. `scaling_share`: scaling_2_over_1 over that
  gemm_share              model FLOP/s of teacher and student (products, convolutions and attention; the backward pass as computed) of a
                          rank of (c), over what one core of this machine computes of the same matrix products and convolutions one by
                          one in a loop; goal 0.8. Taken at full width, see below; the table has it for every case
  idle_share              time in which the ranks of (c) did not work, from the trace of the steady part; goal at most 0.05
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from common import parser, positive, run, table
from pairs import MODELS, Shape, Widening, resnet
from pipeline_arms import Case, Taken, by_block, by_itself, link_of, plan_of, products, stream
from ranks import Crew

from wtn_pretrain.errors import UserError
from wtn_pretrain.imitation.plan import single
from wtn_pretrain.training.utilisation import bubble, utilisation

WIDENINGS = {"inner4": Widening(4, 1), "outer2": Widening(1, 2), "outer4": Widening(1, 4)}
FULL = {
    ("bert", "inner4"): Shape(384, 64, 4, 64),
    ("bert", "outer2"): Shape(256, 64, 8, 64),
    ("bert", "outer4"): Shape(128, 64, 8, 64),
    ("resnet", "inner4"): Shape(128, 16, 32),
    ("resnet", "outer2"): Shape(64, 16, 16, "basic"),
    ("resnet", "outer4"): Shape(32, 16, 16, "basic"),
}
CI = {
    "bert": Shape(32, 16, 4, 16),
    "resnet": Shape(16, 8, 4, "basic"),
}
WIDE = {
    ("bert", "inner4"): (4, Shape(768, 128, 8, 64)),
    ("bert", "outer2"): (4, Shape(768, 128, 8, 64)),
    ("bert", "outer4"): (4, Shape(768, 128, 8, 64)),
    ("resnet", "inner4"): (6, Shape(256, 16, 32)),
    ("resnet", "outer2"): (6, Shape(64, 16, 32, "basic")),
    ("resnet", "outer4"): (6, Shape(64, 16, 32, "basic")),
}
"""Blocks and shapes at full width."""
DEPTHS = {"full": (6, 12, 24), "ci": (3,)}
RANKS = 2
WHOLE, SAMPLED = 13, 6
"""Most blocks (stem included) that (a) and (b) run, and how many stand for more."""
SETTLE = 4
"""Steps after which the pipeline is full: what two boxes of two micro-batches hold."""
STEPS = {"full": 14, "ci": 7}
"""Steps of (c)."""
TOLERANCE = 0.05
GOALS = {"speedup_over_naive": 7.4, "share_of_work_ratio": 0.9, "scaling_2_over_1": 1.8, "gemm_share": 0.8}
MOST_IDLE = 0.05


def steps_of(blocks: int) -> int:
    """Optimizer steps of a block in (a) and (b); the first is not timed."""
    return 3 if blocks > 6 else 5


def spread(blocks: Sequence[int], count: int) -> list[int]:
    """`count` of `blocks`, each in the middle of its share."""
    if len(blocks) <= count:
        return list(blocks)
    return [blocks[int((place + 0.5) * len(blocks) / count)] for place in range(count)]


def longest_first(costs: dict[int, float], ranks: int) -> list[list[int]]:
    """The tasks of each rank: the longest first, each to the rank that has least."""
    tasks: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for block in sorted(costs, key=lambda block: -costs[block]):
        least = loads.index(min(loads))
        tasks[least].append(block)
        loads[least] += costs[block]
    return [sorted(mine) for mine in tasks]


def all_of(taken: dict[int, Taken], blocks: Sequence[int]) -> float:
    """Seconds of one step of each of `blocks`, from those that were timed."""
    if set(blocks) <= set(taken):
        return sum(sum(taken[block]) for block in blocks)
    line = np.polynomial.Polynomial.fit(list(taken), [one.prefix for one in taken.values()], 1)
    return float(sum(line(block) for block in blocks)) + len(blocks) * mean(one.student for one in taken.values())


def steady(done: Sequence[Sequence[float]], settle: int) -> float:
    """Seconds a step of the slowest rank, after the first `settle` steps."""
    return max((times[-1] - times[settle]) / (len(times) - 1 - settle) for times in done)


def unit_costs(events: Sequence[dict[str, Any]], units: int, settle: int) -> tuple[list[float], list[float]]:
    """Seconds of each unit's teacher and of its student's step, medians over the steps of a run on one rank.

    The optimizers step together, so each unit that learns has an equal share of that.
    """
    seconds: dict[tuple[str, int], list[float]] = {}
    for event in events:
        if event.get("ph") == "X" and event["name"] in ("teacher", "student", "optimizer") and event["args"]["step"] > settle:
            seconds.setdefault((event["name"], event["args"].get("unit", -1)), []).append(event["dur"] / 1e6)
    students = [unit for unit in range(units) if ("student", unit) in seconds]
    step = median(seconds["optimizer", -1]) / len(students)
    teachers = [median(seconds["teacher", unit]) for unit in range(units)]
    return teachers, [median(seconds["student", unit]) + step if unit in students else 0.0 for unit in range(units)]


def analytic(teachers: Sequence[float], students: Sequence[float]) -> float:
    """Seconds of work of (a) over that of (c): a unit whose student does not learn is nobody's task."""
    naive = sum(sum(teachers[: unit + 1]) + own for unit, own in enumerate(students) if own)
    return naive / (sum(teachers) + sum(students))


def difference(folder: Path, units: Sequence[int], arms: Sequence[str]) -> tuple[float, int]:
    """The largest distance of `arms` from (c) over the way of (c), of weights or batch-norm statistics, and how many students had one."""

    def read(arm: str, unit: int) -> dict[str, torch.Tensor]:
        return torch.load(folder / f"{arm}-{unit}.pt", weights_only=True)

    def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], statistics: bool) -> float:
        names = [name for name in one if ("running_" in name) == statistics]
        return sum(float((one[name].double() - other[name].double()).square().sum()) for name in names) ** 0.5

    worst, compared = 0.0, 0
    for unit in units:
        for arm in arms:
            if not (folder / f"{arm}-{unit}.pt").exists():
                continue
            start, reference, student = (read(kind, unit) for kind in ("start", "c", arm))
            compared += 1
            for statistics in (False, True):
                way = distance(reference, start, statistics)
                if way:
                    worst = max(worst, distance(student, reference, statistics) / way)
    return worst, compared


def measure_case(case: Case, two: Crew, one: Crew, options: argparse.Namespace, known: dict[Any, float]) -> dict[str, Any]:
    """The figures of one pair of networks. `known`: rates of products, measured once for all depths."""
    repeats = options.repeats or (1 if options.preset == "ci" else 3)
    steps, own_steps = STEPS[options.preset], steps_of(case.blocks)
    connection, *_ = two.call(link_of)
    (planned,) = one.call(plan_of, case, RANKS, connection, 1 if options.preset == "ci" else 3)
    alone = str(single(case.blocks + 1))
    # at other depths the same shapes come back, in nearly the same shares
    kind = case.model, case.widening
    (work,) = one.call(products, case, known.get(kind))
    known[kind] = work["rate"]
    costs: tuple[list[float], list[float]] = ([], [])

    def engine_alone() -> float:
        nonlocal costs
        (ran,) = one.call(stream, case, alone, own_steps + 1, one.folder())
        costs = unit_costs(ran["events"], case.blocks + 1, 1)
        return steady([ran["done"]], 1)

    engine_alone()
    teachers, students = costs
    tasks = longest_first({unit: sum(teachers[: unit + 1]) + own for unit, own in enumerate(students) if own}, RANKS)
    blocks = sorted(block for mine in tasks for block in mine)
    whole = len(blocks) <= WHOLE
    shared = blocks if whole else spread(blocks, SAMPLED)
    own = tasks if whole else [spread(mine, SAMPLED // RANKS) for mine in tasks]
    folder = two.folder()
    two.call(stream, case, planned["plan"], own_steps, folder, True)

    def naive() -> float:
        return max(all_of(taken, blocks) for taken in two.call(by_block, case, [shared] * RANKS, True, own_steps, folder))

    def prefix() -> float:
        taken = two.call(by_block, case, own, False, own_steps, folder)
        return max(all_of(timed, mine) for timed, mine in zip(taken, tasks, strict=True))

    def engine() -> tuple[float, float]:
        ran = two.call(stream, case, planned["plan"], steps, two.folder())
        uses = utilisation([event for rank in ran for event in rank["events"]], settle=SETTLE)
        return steady([rank["done"] for rank in ran], SETTLE), bubble(uses)

    def bound() -> float:
        (alone,) = one.call(by_itself, case, own_steps)
        return RANKS * alone / max(two.call(by_itself, case, own_steps))

    rows: list[dict[str, float]] = []
    for repeat in range(repeats):
        found: dict[str, Any] = {}
        arms = {"naive": naive, "prefix": prefix, "bound": bound, "engine": engine, "alone": engine_alone}
        order = list(arms)
        for arm in order[repeat % len(arms) :] + order[: repeat % len(arms)]:
            found[arm] = arms[arm]()
        seconds, idle = found["engine"]
        ratio = analytic(*costs)
        rows.append(
            {
                "naive": case.shape.batch / found["naive"],
                "prefix": case.shape.batch / found["prefix"],
                "engine": case.shape.batch / seconds,
                "engine_1_rank": case.shape.batch / found["alone"],
                "speedup_over_naive": found["naive"] / seconds,
                "analytic": ratio,
                "share_of_work_ratio": found["naive"] / seconds / ratio,
                "speedup_over_prefix": found["prefix"] / seconds,
                "scaling_2_over_1": found["alone"] / seconds,
                "scaling_bound": found["bound"],
                "scaling_share": found["alone"] / seconds / found["bound"],
                "gemm_share": work["flops"] / seconds / RANKS / work["rate"],
                "idle_share": idle,
                "teacher_seconds": sum(costs[0]) / case.blocks,
                "student_seconds": sum(costs[1]) / case.blocks,
            }
        )
    apart, compared = difference(folder, blocks, ("a", "b"))
    if apart > TOLERANCE:
        raise UserError(f"{case}: the arms did not do the same job: their students are {apart:.3g} of their way apart")
    figures = {key: median(row[key] for row in rows) for key in rows[0]}
    return {
        **planned,
        **figures,
        "measured_seconds": case.shape.batch / figures["engine"],
        "product_flops_per_second": work["rate"],
        "flops_per_batch": work["flops"],
        "weight_difference": apart,
        "compared": compared,
        "steps": own_steps,
        "sampled": None if whole else {"naive": shared, "prefix": own},
        "repeats": rows,
    }


def measure_width(case: Case, two: Crew, one: Crew, options: argparse.Namespace) -> dict[str, Any]:
    """The rate and the idle time of (c) alone."""
    steps = SETTLE + 5
    connection, *_ = two.call(link_of)
    (planned,) = one.call(plan_of, case, RANKS, connection, 3)
    (work,) = one.call(products, case, None)
    rows = []
    for _ in range(options.repeats or 3):
        ran = two.call(stream, case, planned["plan"], steps, two.folder())
        seconds = steady([rank["done"] for rank in ran], SETTLE)
        idle = bubble(utilisation([event for rank in ran for event in rank["events"]], settle=SETTLE))
        rows.append({"seconds": seconds, "gemm_share": work["flops"] / seconds / RANKS / work["rate"], "idle_share": idle})
    figures = {key: median(row[key] for row in rows) for key in rows[0]}
    return {**planned, **figures, "product_flops_per_second": work["rate"], "flops_per_batch": work["flops"], "repeats": rows}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of the benchmark."""
    models = MODELS if options.model == "both" else (options.model,)
    depths = (options.blocks,) if options.blocks else DEPTHS[options.preset]
    widenings = tuple(WIDENINGS) if options.widening == "all" else (options.widening,)
    cases = {}
    for model in models:
        for name in widenings:
            shape = FULL[model, name] if options.preset == "full" else CI[model]
            for blocks in depths:
                if model == "resnet":
                    resnet(blocks, shape)  # refuses other depths before anything is measured
                cases[f"{model} {name} {blocks}"] = Case(model, blocks, shape, WIDENINGS[name])
    found: dict[str, dict[str, Any]] = {}
    known: dict[Any, float] = {}
    with Crew(RANKS) as two, Crew(1) as one:
        for name, case in cases.items():
            found[name] = measure_case(case, two, one, options, known)
            if options.preset == "full":
                print(f"{name}: {found[name]['speedup_over_naive']:.2f}", file=sys.stderr, flush=True)
    wide: dict[str, dict[str, Any]] = {}
    if options.preset == "full" and options.full_width == "yes":
        with Crew(RANKS) as two, Crew(1) as one:
            for (model, name), (blocks, shape) in WIDE.items():
                if model in models and name in widenings:
                    case = Case(model, blocks, shape, WIDENINGS[name])
                    wide[f"{model} {name}"] = {**case._asdict(), **measure_width(case, two, one, options)}
                    print(f"{model} {name}, full width: {wide[f'{model} {name}']['gemm_share']:.2f}", file=sys.stderr, flush=True)
    deepest = {name: found[name] for name, case in cases.items() if case.blocks == max(depths)}
    fourfold = {name: figures for name, figures in deepest.items() if 4 in cases[name].widening} or deepest
    return {
        "speedup_over_naive": min(figures["speedup_over_naive"] for figures in fourfold.values()),
        "speedup_over_naive_each": {name: figures["speedup_over_naive"] for name, figures in deepest.items()},
        **{key: min(figures[key] for figures in found.values()) for key in KEYS},
        "gemm_share": min(figures["gemm_share"] for figures in (wide or found).values()),
        "idle_share": max(figures["idle_share"] for figures in [*found.values(), *wide.values()]),
        "weight_difference": max(figures["weight_difference"] for figures in found.values()),
        "cases": {name: {**cases[name]._asdict(), **figures} for name, figures in found.items()},
        "full_width": wide,
    }


KEYS = ("share_of_work_ratio", "speedup_over_prefix", "scaling_2_over_1", "scaling_bound", "scaling_share")


def show(figures: dict[str, Any]) -> str:
    """The table, and which goals are met."""
    head = [
        "samples/s",
        "plan",
        "(a)",
        "(b)",
        "(c)",
        "1 rank",
        "(c)/(a)",
        "analytic",
        "share",
        "(c)/(b)",
        "2/1 ranks",
        "bound",
        "GEMM share",
        "idle",
    ]
    head += ["T ms", "s ms", "apart"]
    rows = []
    for name, of_case in figures["cases"].items():
        rates = [f"{of_case[key]:.1f}" for key in ("naive", "prefix", "engine", "engine_1_rank")]
        keys = (
            "speedup_over_naive",
            "analytic",
            "share_of_work_ratio",
            "speedup_over_prefix",
            "scaling_2_over_1",
            "scaling_bound",
            "gemm_share",
        )
        ratios = [f"{of_case[key]:.2f}" for key in keys]
        times = [f"{1e3 * of_case[key]:.1f}" for key in ("teacher_seconds", "student_seconds")]
        rows.append([name, of_case["plan"], *rates, *ratios, f"{of_case['idle_share']:.3f}", *times, f"{of_case['weight_difference']:.0e}"])
    lines = [table(head, rows), ""]
    if figures["full_width"]:
        head = ["full width", "thin", "plan", "s a step", "GFLOP/s a rank", "GEMM share", "idle"]
        rows = []
        for name, of_case in figures["full_width"].items():
            achieved = of_case["flops_per_batch"] / of_case["seconds"] / RANKS
            row = [f"{of_case['seconds']:.2f}", f"{achieved / 1e9:.1f}", f"{of_case['gemm_share']:.2f}", f"{of_case['idle_share']:.3f}"]
            rows.append([name, str(of_case["shape"][0]), of_case["plan"], *row])
        lines += [table(head, rows), ""]
    for key, goal in GOALS.items():
        line = f"{key} {figures[key]:.3f}"
        if figures["preset"] == "full":
            line += f" (goal: at least {goal}; {'met' if figures[key] >= goal else 'falls short'})"
        lines.append(line)
    idle = figures["idle_share"]
    told = f" (goal: at most {MOST_IDLE}; {'met' if idle <= MOST_IDLE else 'falls short'})" if figures["preset"] == "full" else ""
    lines += [f"idle_share {idle:.3f}{told}", f"speedup_over_prefix {figures['speedup_over_prefix']:.3f}"]
    return "\n".join([*lines, *(f"{key} {figures[key]:.3f}" for key in ("scaling_bound", "scaling_share"))])


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--model", choices=(*MODELS, "both"), default="both", help="which networks (default both)")
    arguments.add_argument("--blocks", type=positive, metavar="N", help="only this depth (default 6, 12 and 24; ci 3)")
    arguments.add_argument("--widening", choices=(*WIDENINGS, "all"), default="all", help="only this teacher (default all)")
    arguments.add_argument("--repeats", type=positive, metavar="N", help="runs of every arm (default 3; ci 1)")
    arguments.add_argument("--full-width", choices=("yes", "no"), default="yes", help="also the engine alone at full width")
    return run(measure, arguments, show)


if __name__ == "__main__":
    sys.exit(main())
