"""A plan in words: a table of its spans, a timeline of its first micro-batches, how long the stage takes."""

import math
from collections.abc import Sequence

from wtn_pretrain.imitation.config import ImitateSection
from wtn_pretrain.imitation.plan import Plan
from wtn_pretrain.planning.cluster import Cluster
from wtn_pretrain.planning.costs import UnitCost
from wtn_pretrain.planning.duration import lasting, streams
from wtn_pretrain.planning.predict import Prediction, Stage, predict
from wtn_pretrain.planning.simulate import simulate
from wtn_pretrain.planning.spans import Flow

WIDTH = 140
ROWS = 24
"""Spans that are shown one by one; of more, the first and the last."""
MARKS = {"wait": ".", "teacher": "T", "student": "S", "reduce": "r"}
HEAD = ["span", "units", "ranks", "nodes", "rows", "teacher", "student", "reduce", "relay", "step", "idle", "memory"]


def describe(plan: Plan, costs: Sequence[UnitCost], cluster: Cluster, flow: Flow, section: ImitateSection) -> str:
    """Table, timeline and totals of a plan, plain text of at most 140 columns."""
    prediction = predict(plan, costs, cluster, flow)
    parts = [table(prediction, cluster)]
    if streams(section):
        parts.append(timeline(prediction))
    parts.append(totals(plan, costs, cluster, flow, section))
    return "\n\n".join(parts)


def table(prediction: Prediction, cluster: Cluster) -> str:
    """A line for every span: times in milliseconds of a micro-batch, memory in GB of a rank."""
    rows = [HEAD, *(_cells(number, stage, prediction) for number, stage in enumerate(prediction.stages))]
    if len(rows) > ROWS + 1:
        cut = ROWS // 2
        rows = [*rows[: cut + 1], ["..."] + [""] * (len(HEAD) - 1), *rows[-cut:]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    largest = max(prediction.stages, key=lambda stage: stage.memory.total)
    terms = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in zip(largest.memory._fields, largest.memory, strict=True) if size >= 5e5)
    limit = f" of {cluster.memory / 1e9:.3g}" if math.isfinite(cluster.memory) else ""
    return "\n".join(
        [
            *lines,
            "",
            "milliseconds of a micro-batch; GB of a rank",
            f"largest rank {float(largest.memory.total) / 1e9:.3g}{limit} GB: {terms}",
        ]
    )


def timeline(prediction: Prediction, packets: int = 4) -> str:
    """What every span does from the start until the top one has finished `packets` micro-batches, a character a moment."""
    stages = len(prediction.stages)
    events = simulate(prediction, packets + stages)
    end = max(event.end for event in events if event.span == stages - 1 and event.packet < packets and event.kind != "send")
    names = [str(number) for number in range(stages)]
    indent = max(map(len, names)) + 2
    columns = WIDTH - indent
    shown = range(stages) if stages <= ROWS else [*range(ROWS // 2), *range(stages - ROWS // 2, stages)]
    lines = []
    for number in shown:
        if number and number - 1 not in shown:
            lines.append("...")
        share: list[dict[str, float]] = [{} for _ in range(columns)]
        for event in events:
            if event.span == number and event.kind in MARKS:
                _spread(share, event.kind, event.start * columns / end, event.end * columns / end)
        text = "".join(MARKS[max(cell, key=lambda kind: cell[kind])] if cell else "." for cell in share)
        lines.append(names[number].rjust(indent - 2) + "  " + text)
    legend = ", ".join(f"{mark} {kind}" for kind, mark in MARKS.items())
    return "\n".join([f"the first {seconds(end)}: {legend}", *lines])


def totals(plan: Plan, costs: Sequence[UnitCost], cluster: Cluster, flow: Flow, section: ImitateSection) -> str:
    """A line for every phase of the schedule, and how long the stage takes."""
    lines, whole = [], 0.0
    for phase, step, total, prediction in lasting(plan, costs, cluster, flow, section):
        rest = ""
        if prediction is not None:
            idle = sum(prediction.idle(stage) * stage.span.replicas for stage in prediction.stages) / plan.ranks
            rest = f", {100 * idle:.1f}% idle, filled after {seconds(prediction.fill)}"
        whole += total
        rate = section.batch_size / step
        lines.append(f"{phase.name}: {phase.steps:,} steps of {seconds(step)}, {rate:,.0f} samples/s{rest}: {seconds(total)}")
    if len(lines) > ROWS:
        lines = [*lines[: ROWS // 2], "...", *lines[-ROWS // 2 :]]
    return "\n".join([*lines, f"whole stage: {seconds(whole)} on {plan.ranks} ranks (data, validation and start-up not counted)"])


def seconds(value: float) -> str:
    """Seconds, in the unit that suits them."""
    if value < 1e-3:
        return f"{value * 1e6:.3g} us"
    if value < 1:
        return f"{value * 1e3:.3g} ms"
    for size, unit, above in ((1, "s", 120), (60, "min", 7200), (3600, "h", 172800)):
        if value < above:
            return f"{value / size:.3g} {unit}"
    return f"{value / 86400:.1f} days"


def _cells(number: int, stage: Stage, prediction: Prediction) -> list[str]:
    first, last = stage.span.first, stage.span.last
    ranks = stage.ranks
    times = [stage.teacher, stage.student, stage.reduce, max(stage.received, stage.sent), stage.busy]
    return [
        str(number),
        f"{first}-{last}" if last > first else str(first),
        f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0]),
        str(stage.nodes),
        str(stage.rows),
        *(f"{1e3 * value:.3g}" if value < 1 else f"{1e3 * value:.0f}" for value in times),
        f"{100 * prediction.idle(stage):.1f}%",
        f"{float(stage.memory.total) / 1e9:.3g}",
    ]


def _spread(share: list[dict[str, float]], kind: str, start: float, end: float) -> None:
    """Adds to each cell how much of it [start, end) covers."""
    for cell in range(int(start), min(math.ceil(end), len(share))):
        covered = min(end, cell + 1) - max(start, cell)
        share[cell][kind] = share[cell].get(kind, 0.0) + covered
