"""Layouts in words: what one takes, a table of others, and how many devices are enough."""

import math
from collections.abc import Sequence

from wtn_pretrain.planning.show import seconds
from wtn_pretrain.planning.training.search import Answer

ROWS = 16


def describe(found: Answer, steps: int, limit: float, price: float) -> str:
    """One layout: where its memory and its time go, how long the stage takes and what it costs."""
    held, times = found.memory, found.pace
    terms = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in held._asdict().items() if size >= 5e5 and name != "host")
    room = f" of {limit / 1e9:.3g}" if math.isfinite(limit) else ""
    lines = [
        str(found.layout),
        f"memory of a rank {held.total / 1e9:.3g}{room} GB: {terms}"
        + (f"; in host memory {held.host / 1e9:.3g} GB a rank" if held.host else "")
        + ("  DOES NOT FIT" if held.total > limit else ""),
        f"step {seconds(times.step)}: "
        + ", ".join(f"{name} {seconds(value)}" for name, value in times._asdict().items() if value >= 1e-3 * times.step),
        f"whole stage, {steps:,} steps: {total(found, steps, price)} (data, validation, checkpoints and start-up not counted)",
    ]
    return "\n".join(lines)


def total(found: Answer, steps: int, price: float) -> str:
    """How long a stage takes, and what it costs."""
    spent = found.seconds(steps)
    hours = found.layout.ranks * spent / 3600
    return f"{seconds(spent)}, {hours:,.4g} device hours" + (f", {hours * price:,.0f} in all" if price else "")


def table(answers: Sequence[Answer], steps: int, limit: float, price: float) -> str:
    """A line for every layout."""
    head = ["ranks", "ZeRO", "offload", "tensor", "recompute", "rows x passes", "GB a rank", "step", "stage", "device h", "cost", ""]
    rows = [head]
    for found in answers:
        layout, hours = found.layout, found.layout.ranks * found.seconds(steps) / 3600
        rows.append(
            [
                str(layout.ranks),
                str(layout.zero),
                {"none": "-", "optimizer": "states", "both": "all"}[layout.offload],
                str(layout.tensor),
                "-" if not layout.checkpoint else "all" if layout.checkpoint == 1 else f"1 in {layout.checkpoint}",
                f"{layout.micro} x {layout.accumulation}",
                f"{found.memory.total / 1e9:.3g}",
                seconds(found.pace.step),
                seconds(found.seconds(steps)),
                f"{hours:,.4g}",
                f"{hours * price:,.0f}" if price else "-",
                "does not fit" if found.memory.total > limit else "",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
