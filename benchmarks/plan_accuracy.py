"""How well the planner foretells what a plan does: the time of a step and the memory of every rank, predicted and measured.

    python benchmarks/plan_accuracy.py [--model M] [--steps N] [--repeats N] [--preset ci|full] [--json FILE]

Under each plan the engine runs (schedule parallel, teacher-fed) on two ranks, processes of one thread pinned to a core each, which are
started afresh and hold only the units of their span. The prediction comes from the costs of every unit and of the link between ranks,
measured on the same machine in processes that hold no network, as `tools/plan.py --profile` measures them: just before and just after the
plans of a network ran, and the mean of the two is what counts.

Time: seconds a step of the slowest rank in the steady part, once the pipeline is full; the median of `--repeats` runs. Memory: the
peak of a rank's resident set (Linux: VmHWM, begun again once its units are built and what was freed is handed back) until its last
step, the largest of the runs.

JSON keys: `step_time_error` and `memory_error`, the largest over all plans (and ranks) of |predicted - measured| / measured; goals 0.15
and 0.10. `memory_error_without_base` is that of what is beside the process itself (interpreter and libraries), which no plan can
change. `plans` holds the figures of each.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from common import parser, positive, run, table
from pairs import MODELS, Shape, Widening
from pipeline import CI, FULL, RANKS, SETTLE, WIDENINGS, steady
from pipeline_arms import Case, link_of, predictions, stream
from ranks import Crew

from wtn_pretrain.errors import UserError

PLANS = {
    ("bert", "inner4"): ("0-3,4-6", "0-2,3-6", "0-6x2"),
    ("bert", "outer2"): ("0-3,4-6", "0-6x2"),
    ("resnet", "inner4"): ("0-3,4-6", "0-4,5-6", "0-6x2"),
    ("resnet", "outer4"): ("0-3,4-6", "0-6x2"),
}
"""Networks of 6 blocks -> plans."""
FEW = {("bert", "inner4"): ("0-1,2-3", "0-3x2")}
"""Networks of 3 blocks -> plans of preset ci."""
GOALS = {"step_time_error": 0.15, "memory_error": 0.10}


def measure_plan(case: Case, plan: str, steps: int, repeats: int) -> tuple[float, list[int]]:
    """Seconds of a step, and bytes of each rank."""
    seconds: list[float] = []
    resident = [0] * RANKS
    for _ in range(repeats):
        with Crew(RANKS) as crew:
            ran = crew.call(stream, case, plan, steps, crew.folder(), False, True)
        seconds.append(steady([rank["done"] for rank in ran], SETTLE))
        resident = [max(before, rank["resident"]) for before, rank in zip(resident, ran, strict=True)]
    return median(seconds), resident


def foretell(case: Case, plans: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """What the planner says of each plan, from what is measured now."""
    with Crew(RANKS) as crew:
        connection, *_ = crew.call(link_of)
    with Crew(1) as crew:
        (foretold,) = crew.call(predictions, case, list(plans), connection, repeats)
    return foretold


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of the benchmark."""
    if not Path("/proc/self/clear_refs").exists():
        raise UserError("the peak of the resident set needs Linux's /proc/self/clear_refs; run this on Linux")
    full = options.preset == "full"
    steps, repeats = options.steps or (24 if full else 7), options.repeats or (3 if full else 1)
    if steps < SETTLE + 3:
        raise UserError(f"--steps {steps}: the pipeline is full after {SETTLE}; give at least {SETTLE + 3}")
    models = MODELS if options.model == "both" else (options.model,)
    chosen = {key: plans for key, plans in (PLANS if full else FEW).items() if key[0] in models}
    if not chosen:
        raise UserError(f"--model {options.model}: preset {options.preset} has no plans for it; use --preset full")
    found = []
    for (model, name), plans in chosen.items():
        shape: Shape = FULL[model, name] if full else CI[model]
        widening: Widening = WIDENINGS[name]
        case = Case(model, 6 if full else 3, shape, widening)
        before = foretell(case, plans, 5 if full else 1)
        ran = [measure_plan(case, plan, steps, repeats) for plan in plans]
        for prediction, after, (seconds, resident) in zip(before, foretell(case, plans, 5 if full else 1), ran, strict=True):
            # a machine that others use drifts while the plans run
            prediction["seconds"] = (prediction["seconds"] + after["seconds"]) / 2
            base = prediction["terms"][0]["base"]
            found.append(
                {
                    "case": f"{model} {name}",
                    "plan": prediction["plan"],
                    "predicted_seconds": prediction["seconds"],
                    "measured_seconds": seconds,
                    "step_time_error": abs(prediction["seconds"] / seconds - 1),
                    "predicted_bytes": prediction["memory"],
                    "measured_bytes": resident,
                    "memory_error": max(_errors(prediction["memory"], resident)),
                    "memory_error_without_base": max(
                        _errors([size - base for size in prediction["memory"]], [size - base for size in resident])
                    ),
                    "terms": prediction["terms"],
                }
            )
            if full:
                print(f"{model} {name} {prediction['plan']}", file=sys.stderr, flush=True)
    keys = (*GOALS, "memory_error_without_base")
    return {"steps": steps, "runs": repeats, **{key: max(plan[key] for plan in found) for key in keys}, "plans": found}


def _errors(predicted: list[float], measured: list[int]) -> list[float]:
    return [abs(told / seen - 1) if seen else 0.0 for told, seen in zip(predicted, map(float, measured), strict=True)]


def show(figures: dict[str, Any]) -> str:
    """The table, and whether the goals are met."""
    head = ["plan", "predicted ms", "measured ms", "ratio", "predicted MB", "measured MB", "error", "without base"]
    rows = []
    for plan in figures["plans"]:
        sizes = [" ".join(f"{size / 1e6:.0f}" for size in plan[key]) for key in ("predicted_bytes", "measured_bytes")]
        rows.append(
            [
                f"{plan['case']} {plan['plan']}",
                f"{1e3 * plan['predicted_seconds']:.1f}",
                f"{1e3 * plan['measured_seconds']:.1f}",
                f"{plan['predicted_seconds'] / plan['measured_seconds']:.3f}",
                *sizes,
                f"{plan['memory_error']:.3f}",
                f"{plan['memory_error_without_base']:.3f}",
            ]
        )
    lines = [table(head, rows), ""]
    for key, goal in GOALS.items():
        told = f" (goal: at most {goal}; {'met' if figures[key] <= goal else 'falls short'})" if figures["preset"] == "full" else ""
        lines.append(f"{key} {figures[key]:.3f}{told}")
    return "\n".join([*lines, f"memory_error_without_base {figures['memory_error_without_base']:.3f}"])


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--model", choices=(*MODELS, "both"), default="both", help="which networks (default both)")
    arguments.add_argument("--steps", type=positive, metavar="N", help="steps of a run (default 24; ci 7)")
    arguments.add_argument("--repeats", type=positive, metavar="N", help="runs of every plan (default 3; ci 1)")
    return run(measure, arguments, show)


if __name__ == "__main__":
    sys.exit(main())
