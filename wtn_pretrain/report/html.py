"""The page of a run and of a folder of runs: one file each, which asks for nothing from anywhere else."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from wtn_pretrain.errors import UserError
from wtn_pretrain.files import write_text
from wtn_pretrain.report.curves import STAGES, read_logs
from wtn_pretrain.report.figures import COLOURS, Plot, comparison_plots, imitation_plots, rank_plots, training_plots
from wtn_pretrain.report.summary import Summary, read_summary
from wtn_pretrain.report.table import cells, columns, quality, verdict
from wtn_pretrain.training.monitor import METRICS
from wtn_pretrain.training.utilisation import UTILISATION, read_utilisation

PAGE = "report.html"


@dataclass(frozen=True)
class Page:
    """What the templates show of a run; `run` is None until it has a summary."""

    name: str
    link: str
    run: dict[str, Any] | None
    training: list[Plot]
    imitation: list[Plot]
    ranks: list[Plot]
    config: str


def is_run(folder: Path) -> bool:
    """Whether `folder` is one run rather than a folder of runs, which has a `summary.json` too, but no stages.

    Raises `UserError` where it is neither.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a run's folder or a folder of runs")
    if _holds_run(folder):
        return True
    if any(_holds_run(child) for child in folder.iterdir() if child.is_dir()):
        return False
    if (folder / "summary.json").is_file():
        return True
    raise UserError(f"{folder}: neither a run (config.yaml, summary.json) nor a folder of runs; give one of these")


def write_report(run_folder: Path) -> Path:
    """Write `run_folder/report.html` from its `summary.json`, `config.yaml` and every `metrics.jsonl` below; none is required.

    Raises `UserError` for a summary or metrics file that cannot be read.
    """
    return _write("template.html", run_folder, vars(_page(run_folder)))


def write_index(folder: Path) -> Path:
    """Write `folder/report.html` over all runs in `folder`, and the report of each run that it links to."""
    pages = []
    for number, run_folder in enumerate(sorted(child for child in folder.iterdir() if child.is_dir() and _holds_run(child))):
        write_report(run_folder)
        pages.append(_page(run_folder, f"r{number}"))
    return _write("index.html", folder, {"name": folder.resolve().name, "pages": pages})


def _holds_run(folder: Path) -> bool:
    if (folder / "config.yaml").is_file() or any((folder / stage / METRICS).is_file() for stage in STAGES):
        return True
    return (folder / "summary.json").is_file() and not any((child / "summary.json").is_file() for child in folder.iterdir())


def _page(folder: Path, prefix: str = "r") -> Page:
    summary = read_summary(folder / "summary.json") if (folder / "summary.json").is_file() else None
    config = folder / "config.yaml"
    logs = read_logs(folder)
    used = next((path for stage in STAGES for path in sorted(folder.rglob(f"{stage}/{UTILISATION}"))), None)
    return Page(
        name=summary.name if summary else folder.resolve().name,
        link=f"{quote(folder.name)}/{PAGE}",
        run=_shown(summary, prefix) if summary else None,
        training=training_plots(logs, prefix),
        imitation=imitation_plots(logs, prefix),
        ranks=rank_plots(read_utilisation(used), prefix) if used else [],
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
    )


def _shown(summary: Summary, prefix: str) -> dict[str, Any]:
    arms = [
        {"name": name, "colour": COLOURS[name], "cells": [cell.replace("+-", "±") for cell in cells(summary.metric, arm)]}
        for name, arm in summary.arms().items()
    ]
    return {
        "model": summary.model,
        "date": summary.date,
        "commit": (summary.commit or "")[:12],
        "hardware": summary.hardware,
        "columns": columns(summary),
        "arms": arms,
        "verdict": verdict(summary).replace("+-", "±"),
        "standing": _standing(summary),
        "cards": _cards(summary),
        "plots": comparison_plots(summary, prefix),
        "export": summary.export,
    }


def _standing(summary: Summary) -> str:
    gain = summary.gain
    if gain is None or gain.standard_error is None or gain.within_spread or not math.isfinite(gain.mean):
        return "unsure"
    return "ahead" if (gain.mean > 0) == summary.metric.higher_is_better else "behind"


def _cards(summary: Summary) -> list[tuple[str, str]]:
    """The few figures to read first, as figure and meaning."""
    win, wide, unit = summary.thin_win, summary.wide, summary.metric.unit
    cards = [(f"{quality(summary.metric, win.mean)}{' ' + unit if unit else ''}", f"{summary.metric.name} of the thin network by WIN")]
    if wide.parameters:
        cards.append((f"{win.parameters / wide.parameters:.1%}", "of the wide network's parameters"))
    if wide.flops and win.flops:
        cards.append((f"{win.flops / wide.flops:.1%}", "of the wide network's FLOPs"))
    if wide.latency_ms and win.latency_ms:
        cards.append((f"{win.latency_ms / wide.latency_ms:.1%}", "of the wide network's latency on the CPU"))
    return cards


def _write(template: str, folder: Path, shown: dict[str, Any]) -> Path:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    target = folder / PAGE
    write_text(target, environment.get_template(template).render(shown))
    return target
