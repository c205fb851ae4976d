"""The plots of a report, as SVG that stands in a page of either theme."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from wtn_pretrain.report.curves import Floats, Log, average, thin
from wtn_pretrain.report.summary import Summary
from wtn_pretrain.report.table import amount, measure, quality
from wtn_pretrain.training.utilisation import Use, bubble

NEUTRAL = "#767779"  # written as this, replaced by currentColor: the page's own text colour
COLOURS = {"wide": "#7482dd", "thin from scratch": "#db7f2e", "thin by WIN": "#16a085"}
ARMS = {"wide": "wide", "scratch": "thin from scratch", "finetune": "thin by WIN"}
# of middling lightness throughout, to be seen on white and on black
DEPTH = LinearSegmentedColormap.from_list("depth", ["#2f9bea", "#8478e0", "#cf5fa6", "#ef7444"])
WORK = ["#7482dd", "#16a085", "#db7f2e", "#cf5fa6", "#2f9bea"]
WAITS = {"waits for input": "#b9a44c", "waits for output": "#c9605b"}
MOST_ROWS = 24
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8.5,
    "text.color": NEUTRAL,
    "axes.labelcolor": NEUTRAL,
    "axes.edgecolor": NEUTRAL,
    "xtick.color": NEUTRAL,
    "ytick.color": NEUTRAL,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.color": NEUTRAL,
    "grid.alpha": 0.22,
    "grid.linewidth": 0.5,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",  # text stays text: small, searchable and in the page's font
    "text.parse_math": False,  # names come from users; a dollar sign is no formula
}


@dataclass(frozen=True)
class Plot:
    """A figure of the page: `svg` is markup, `title` and `caption` are plain text."""

    title: str
    svg: str
    caption: str


def training_plots(logs: Sequence[Log], prefix: str) -> list[Plot]:
    """Training loss, validation loss and the other validation figures over steps: seeds thin, their mean bold."""
    wanted = [("train", "loss"), ("valid", "loss")]
    measured = {name for log in logs if log.stage in ARMS for name in log.names("valid")} - {"loss", "rate"}
    wanted += [("valid", name) for name in sorted(measured)[:2]]
    return [plot for kind, name in wanted if (plot := _curves(logs, kind, name, prefix)) is not None]


def imitation_plots(logs: Sequence[Log], prefix: str) -> list[Plot]:
    """Imitation error per block over time, as lines and as a map, of the first seed that has it."""
    for log in logs:
        steps, errors = log.units()
        if log.stage == "narrow" and np.isfinite(errors).any() and (errors[np.isfinite(errors)] > 0).any():
            errors = np.where(errors > 0, errors, np.nan)  # both axes are logarithmic
            return [_block_lines(log, steps, errors, prefix), _block_map(log, steps, errors, prefix)]
    return []


def comparison_plots(summary: Summary, prefix: str) -> list[Plot]:
    """Every seed of every arm, and quality against the number of parameters."""
    arms = summary.arms()
    with _figure() as (figure, axes):
        for place, (name, arm) in enumerate(arms.items()):
            values = np.array(arm.values)
            spots = place + np.linspace(-0.14, 0.14, len(values)) if len(values) > 1 else np.array([place])
            axes.hlines(arm.mean, place - 0.3, place + 0.3, color=COLOURS[name], linewidth=2)
            axes.plot(spots, values, "o", color=COLOURS[name], markersize=5, alpha=0.75, markeredgewidth=0)
            axes.annotate(quality(summary.metric, arm.mean), (place + 0.34, arm.mean), va="center")
        axes.set(xlim=(-0.5, len(arms) - 0.3), ylabel=measure(summary.metric))
        axes.set_xticks(range(len(arms)), list(arms))
        axes.tick_params(axis="x", length=0)
        axes.grid(visible=False, axis="x")
        axes.margins(y=0.15)
        svg = _svg(figure, f"{prefix}-seeds")
    better = "Higher" if summary.metric.higher_is_better else "Lower"
    seeds = Plot("Every seed", svg, f"A dot is one seed, the bar their mean. {better} is better; the axis does not start at zero.")
    with _figure() as (figure, axes):
        for name, arm in arms.items():
            axes.errorbar(arm.parameters, arm.mean, yerr=arm.spread or None, fmt="o", color=COLOURS[name], markersize=7, capsize=3)
            right = arm.parameters * 2 < max(other.parameters for other in arms.values())
            shift = (9, 0) if right else (-9, 0)
            axes.annotate(name, (arm.parameters, arm.mean), shift, textcoords="offset points", va="center", ha="left" if right else "right")
        axes.set_xscale("log")
        counts = [arm.parameters for arm in arms.values()]
        axes.set(xlabel="parameters", ylabel=measure(summary.metric), xlim=(min(counts) / 1.6, max(counts) * 1.6))
        axes.margins(y=0.15)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        _plain_log(axes, "x")
        svg = _svg(figure, f"{prefix}-size")
    return [seeds, Plot("Quality against size", svg, "Error bars are one sample standard deviation over the seeds.")]


def rank_plots(uses: Sequence[Use], prefix: str) -> list[Plot]:
    """What each rank does in the steady part of a pipelined stage: one bar a rank."""
    if not uses:
        return []
    picked = sorted({round(place) for place in np.linspace(0, len(uses) - 1, min(len(uses), MOST_ROWS))})
    shown = [uses[place] for place in picked]
    # the largest kinds of work have a colour each, the rest share one
    totals: dict[str, float] = {}
    for use in uses:
        for kind, share in use.work.items():
            totals[kind] = totals.get(kind, 0.0) + share
    kinds = sorted(totals, key=lambda kind: -totals[kind])
    named, rest = (kinds, []) if len(kinds) <= len(WORK) else (kinds[: len(WORK) - 1], kinds[len(WORK) - 1 :])
    parts = [(kind, colour, [use.work.get(kind, 0.0) for use in shown]) for kind, colour in zip(named, WORK, strict=False)]
    if rest:
        parts.append(("other work", WORK[-1], [sum(use.work.get(kind, 0.0) for kind in rest) for use in shown]))
    waits = [[use.input for use in shown], [use.output for use in shown]]
    parts += [(kind, colour, shares) for (kind, colour), shares in zip(WAITS.items(), waits, strict=True)]
    with _figure((9.8, 1.15 + 0.27 * len(shown))) as (figure, axes):
        left = np.zeros(len(shown))
        for kind, colour, shares in parts:
            if max(shares) > 0:
                axes.barh(range(len(shown)), shares, left=left, height=0.66, color=colour, label=kind, linewidth=0)
                left = left + np.array(shares)
        axes.barh(range(len(shown)), 1 - left, left=left, height=0.66, color=NEUTRAL, alpha=0.18, label="idle", linewidth=0)
        for row, use in enumerate(shown):
            axes.annotate(f"{use.busy:.1%} at work", (1.01, row), va="center", annotation_clip=False)
        axes.set(xlim=(0, 1), ylim=(len(shown) - 0.5, -0.5), xlabel="share of time")
        axes.set_yticks(range(len(shown)), [use.name for use in shown])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_axisbelow(True)
        axes.spines["left"].set_visible(False)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(parts) + 1, handlelength=0.9, columnspacing=1.3)
        svg = _svg(figure, f"{prefix}-ranks")
    worst = max(uses, key=lambda use: 1 - use.busy)
    caption = (
        f"{max(use.seconds for use in uses):.3g} s in which all ranks were at work, without filling and draining. "
        f"Bubble: {bubble(uses):.1%} of the ranks' time, {1 - worst.busy:.1%} at most ({worst.name})."
    )
    if len(shown) < len(uses):
        caption += f" {len(shown)} of {len(uses)} ranks are shown."
    return [Plot("What each rank does", svg, caption)]


def _curves(logs: Sequence[Log], kind: str, name: str, prefix: str) -> Plot | None:
    imitated = {log.seed: log.last_step for log in logs if log.stage == "narrow"}
    drawn: list[Floats] = []
    with _figure() as (figure, axes):
        for stage, arm in ARMS.items():
            lines = []
            for log in logs:
                steps, values = log.series(kind, name)
                if log.stage == stage and np.isfinite(values).any():
                    shift = imitated.get(log.seed, 0) if stage == "finetune" else 0
                    lines.append(thin(steps + shift, values))
            for steps, values in lines if len(lines) > 1 else []:
                axes.plot(steps, values, color=COLOURS[arm], linewidth=0.7, alpha=0.45)
            steps, values = average(lines)
            if len(steps):
                mark = "o" if len(steps) <= 30 else ""
                axes.plot(steps, values, color=COLOURS[arm], linewidth=1.8, marker=mark, markersize=3, label=arm)
            drawn += [values for _, values in lines]
        if not drawn:
            return None
        whole = np.concatenate(drawn)
        whole = whole[np.isfinite(whole)]
        if (whole > 0).all() and np.percentile(whole, 99) > 20 * np.percentile(whole, 1):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=9))
            _plain_log(axes, "y")
        axes.set(xlabel="steps", ylabel=name)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
        offset = max(imitated.values(), default=0)
        if offset and any(log.stage == "finetune" for log in logs):
            axes.axvline(offset, color=COLOURS["thin by WIN"], linewidth=0.9, linestyle=(0, (2, 3)))
        axes.legend(loc="best")
        svg = _svg(figure, f"{prefix}-{kind}-{re.sub(r'[^A-Za-z0-9]+', '-', name)}")
    caption = "Steps of the thin network include its imitation, which ends at the dotted line." if offset else "Steps of each network."
    return Plot(f"{'Training' if kind == 'train' else 'Validation'} {name}", svg, caption)


def _block_lines(log: Log, steps: Floats, errors: Floats, prefix: str) -> Plot:
    blocks = errors.shape[1]
    with _figure() as (figure, axes):
        for block in range(blocks):
            known = np.isfinite(errors[:, block])
            axes.plot(*thin(steps[known], errors[known, block], 160), color=DEPTH(block / max(blocks - 1, 1)), linewidth=1.1)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=9))
        _plain_log(axes, "y")
        axes.set(xlabel="imitation steps", ylabel="imitation error")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        _mark_phases(axes, log, steps)
        scale = mpl.cm.ScalarMappable(mpl.colors.BoundaryNorm(np.arange(-0.5, blocks), 256) if blocks > 1 else None, DEPTH)
        ticks = sorted({round(tick) for tick in np.linspace(0, blocks - 1, min(blocks, 5))})
        _bar(figure, axes, scale, "block", ticks, [str(tick) for tick in ticks])
        svg = _svg(figure, f"{prefix}-blocks")
    return Plot("Imitation error of each block", svg, "One line a block, coloured by depth; dotted lines part the phases.")


def _block_map(log: Log, steps: Floats, errors: Floats, prefix: str) -> Plot:
    columns = 120
    edges = np.linspace(steps[0], steps[-1], columns) if len(steps) > 1 else steps
    nearest = np.abs(edges[:, None] - steps[None, :]).argmin(axis=1)
    cells = np.ma.masked_invalid(errors[nearest].T)
    with _figure() as (figure, axes):
        low, high = float(cells.min()), float(cells.max())
        high = high if high > low else low * 10
        extent = (float(steps[0]), max(float(steps[-1]), float(steps[0]) + 1), -0.5, errors.shape[1] - 0.5)
        image = axes.imshow(
            cells, norm=LogNorm(low, high), cmap="viridis", aspect="auto", origin="lower", interpolation="nearest", extent=extent
        )
        axes.set(xlabel="imitation steps", ylabel="block")
        axes.grid(visible=False)
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        _mark_phases(axes, log, steps, "#ffffff")
        ticks = np.geomspace(low, high, 4)
        _bar(figure, axes, image, "imitation error", list(ticks), [f"{tick:.2g}" for tick in ticks])
        svg = _svg(figure, f"{prefix}-map")
    return Plot("Where imitation is hard", svg, "Imitation error of blocks over time: the brighter, the farther from the wide network.")


def _mark_phases(axes: Axes, log: Log, steps: Floats, colour: str = NEUTRAL) -> None:
    phases = log.phases()
    ends = [begin for begin, _ in phases[1:]] + [float(steps[-1])]
    for (begin, name), end in zip(phases, ends, strict=True):
        if end - begin < 0.2 * (steps[-1] - steps[0]):
            continue  # bottom_up has a phase a block: their names would overlap
        axes.text((begin + end) / 2, 1.02, name, transform=axes.get_xaxis_transform(), ha="center", fontsize=8.5)
    for begin, _ in phases[1:]:
        axes.axvline(begin, color=colour, linewidth=1, linestyle=(0, (2, 2)))


def _bar(figure: Figure, axes: Axes, scale: mpl.cm.ScalarMappable, label: str, ticks: Sequence[float], names: Sequence[str]) -> None:
    bar = figure.colorbar(scale, ax=axes, label=label, pad=0.03, aspect=28)
    bar.set_ticks(ticks, labels=names)
    bar.minorticks_off()
    bar.outline.set_visible(False)


def _plain_log(axes: Axes, which: str) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    number = FuncFormatter(lambda value, _: amount(value) if value >= 1000 else f"{value:g}")
    axis.set_major_formatter(number)
    axis.set_minor_formatter(NullFormatter())
    axis.set_tick_params(which="minor", length=0)


@contextmanager
def _figure(size: tuple[float, float] = (4.9, 3.1)) -> Iterator[tuple[Figure, Axes]]:
    """A small figure in the report's style: two stand side by side on a screen, one fills a phone. `size` in inches."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, figure.subplots()


def _svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element whose ids start with `name`, so that many can share a page."""
    out = io.StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\s(xmlns(:xlink)?|version|width|height)="[^"]*"', "", text[: text.index(">")]) + text[text.index(">") :]
    text = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    return text.replace(NEUTRAL, "currentColor")
