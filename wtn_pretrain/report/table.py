"""The comparison in words and columns, for the terminal and for the page."""

import math
from collections.abc import Iterable

from wtn_pretrain.report.summary import Arm, Metric, Summary


def table(summaries: Iterable[Summary]) -> str:
    """Aligned plain text: for each run a heading, the arms a line each, and what the comparison says."""
    parts = []
    for summary in summaries:
        better = "higher" if summary.metric.higher_is_better else "lower"
        heading = f"{summary.model} / {summary.name}: {measure(summary.metric)}, {better} is better"
        rows = [columns(summary), *([name, *cells(summary.metric, arm)] for name, arm in summary.arms().items())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        rule = "  ".join("-" * width for width in widths)
        parts.append("\n".join([heading, "", lines[0], rule, *lines[1:], "", verdict(summary)]))
    return "\n\n\n".join(parts)


def columns(summary: Summary) -> list[str]:
    """The column heads; the first stands over the names of the arms."""
    return ["", measure(summary.metric), "parameters", "FLOPs", "CPU latency", "training FLOPs", "training time"]


def cells(metric: Metric, arm: Arm) -> list[str]:
    """The cells of one arm under `columns`, without its name."""
    value = quality(metric, arm.mean)
    if len(arm.values) > 1:
        value += f" +- {quality(metric, arm.spread)} ({len(arm.values)} seeds)"
    cost = arm.training
    return [
        value,
        amount(arm.parameters),
        amount(arm.flops),
        "-" if arm.latency_ms is None else f"{arm.latency_ms:.3g} ms" if arm.latency_ms < 1000 else f"{arm.latency_ms:,.0f} ms",
        "-" if cost is None else amount(cost.flops),
        "-" if cost is None else duration(cost.seconds),
    ]


def verdict(summary: Summary) -> str:
    """One sentence that says what the comparison shows, and no more."""
    gain, scratch, win = summary.gain, summary.thin_scratch, summary.thin_win
    if gain is None or scratch is None:
        return "No thin network was trained from scratch, so there is nothing to compare WIN with."
    if not math.isfinite(gain.mean):
        return "WIN and scratch cannot be compared: a value is not finite."
    if gain.mean == 0:
        return "WIN and scratch come out equal."
    ahead = (gain.mean > 0) == summary.metric.higher_is_better
    size = quality(summary.metric, abs(gain.mean))
    unit = " points" if summary.metric.unit == "%" else f" {summary.metric.unit}" if summary.metric.unit else ""
    start = f"WIN is {'ahead of' if ahead else 'behind'} scratch by {size}{unit}"
    if gain.standard_error is None:
        few = "one seed each" if len(scratch.values) == len(win.values) == 1 else "one arm has a single seed"
        known = "this is within the spread between seeds" if gain.within_spread else "only more seeds can tell whether this is chance"
        return f"{start} ({few}, so no standard error); {known}."
    start += f" (+- {quality(summary.metric, gain.standard_error)} standard error, {len(win.values)} and {len(scratch.values)} seeds)"
    if gain.within_spread:
        return f"{start}; this is within the spread between seeds, so it does not show that either is better."
    return f"{start}; this is more than the spread between seeds."


def measure(metric: Metric) -> str:
    """The metric with its unit."""
    return f"{metric.name} ({metric.unit})" if metric.unit else metric.name


def quality(metric: Metric, value: float) -> str:
    """A value of the metric as printed: two decimals of a percentage, else four digits."""
    return f"{value:.2f}" if metric.unit == "%" else f"{value:.4g}"


def amount(count: float | None) -> str:
    """A count with three digits and k, M, G, T, P or E; a dash where there is none."""
    if count is None or not math.isfinite(count):
        return "-"
    for power, prefix in enumerate(("", " k", " M", " G", " T", " P")):
        scaled = count / 1000**power
        if abs(scaled) < 999.5:
            return f"{scaled:.0f}" if power == 0 else f"{scaled:.3g}{prefix}"
    return f"{count / 1e18:.3g} E"


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days, in two units at most."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, unit, smaller, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {part}"
    return f"{whole} s"
