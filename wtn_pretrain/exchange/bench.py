"""The work of tools/bench_latency.py: arguments in, tables, figures and a plot out."""

import argparse
import importlib.util
import json
import os
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from wtn_pretrain.arguments import Parser
from wtn_pretrain.device import hardware
from wtn_pretrain.errors import UserError
from wtn_pretrain.exchange.command import commit
from wtn_pretrain.exchange.latency import ARMS, has_compiler, least, measure, pairs, plot
from wtn_pretrain.files import write_text

PICTURES = (".png", ".svg", ".pdf")


def run(doc: str, argv: list[str]) -> None:
    """Measures, prints the tables and writes what was asked for.

    Raises:
        UserError: one line that names the argument and the remedy.
    """
    options = _parser(doc).parse_args(argv)
    for file in (options.json, options.plot):
        if file is not None and not file.absolute().parent.is_dir():
            raise UserError(f"{file}: no folder {file.parent}; create it or name another file")
    if options.threads < 1:
        raise UserError(f"--threads {options.threads}: give 1 or more")
    if options.plot is not None:
        if options.plot.suffix.lower() not in PICTURES:
            raise UserError(f"--plot {options.plot}: cannot be drawn; name a file that ends in {', '.join(PICTURES)}")
        if importlib.util.find_spec("matplotlib") is None:
            raise UserError("--plot: needs matplotlib; install it or leave the plot out")
    if options.compile and not has_compiler():
        raise UserError("--compile: torch.compile needs a C++ compiler on this CPU; install one or leave it out")
    arms = tuple(arm for arm in ARMS if options.compile or not arm.endswith("compile"))
    seconds = {"ci": 0.2, "benchmark": 6.0, "full": 20.0}[options.preset]
    wanted = {name: pair for name, pair in pairs(options.preset).items() if options.model in (None, name)}
    found = {name: measure(pair, arms, options.threads, seconds) for name, pair in wanted.items()}
    figures: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "commit": commit(),
        "hardware": f"{hardware()} of {os.cpu_count()} cores",
        "torch": torch.__version__,
        "command": f"python tools/bench_latency.py {shlex.join(argv)}",
        "preset": options.preset,
        "ort_over_hf_eager": least(found),
        "models": found,
    }
    parts = [_table(name, result) for name, result in found.items()]
    if figures["ort_over_hf_eager"] is not None:
        parts.append(f"Hugging Face eager over ONNX Runtime at batch 1: {figures['ort_over_hf_eager']:.2f} (goal 1.5)")
    # first of all, so that a disk that is full costs no more than a file
    print("\n\n".join(parts), flush=True)
    if options.json:
        write_text(options.json, json.dumps(figures, indent=2) + "\n")
    if options.plot:
        try:
            plot(found, options.plot)
        except OSError as error:
            raise UserError(f"--plot {options.plot}: cannot be written ({error.strerror}); name another file") from None


def _parser(doc: str) -> argparse.ArgumentParser:
    made = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--preset", choices=("ci", "benchmark", "full"), default="benchmark", help="what is measured (default benchmark)")
    made.add_argument("--model", choices=("bert", "resnet"), help="one of them alone")
    made.add_argument("--compile", action="store_true", help="torch.compile as well; each shape compiles for a minute or more")
    made.add_argument("--threads", type=int, default=1, metavar="N", help="threads of each engine (default 1)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE as well")
    made.add_argument("--plot", type=Path, metavar="FILE", help="draw them to FILE (.png, .svg or .pdf)")
    return made


def _table(name: str, found: dict[str, Any]) -> str:
    rows = []
    for row in found["rows"]:
        ratio = f"{row['ort_over_hf_eager']:.2f}" if "ort_over_hf_eager" in row else ""
        size, peak = (f"{found[key][row['arm']] / 2**20:.1f}" for key in ("bytes", "peak_memory"))
        shape = f"{row['batch']} x {row['length']}"
        rows.append([row["arm"], shape, f"{row['p50_ms']:.2f}", f"{row['p99_ms']:.2f}", size, peak, ratio])
    head = [name, "batch x length", "p50 ms", "p99 ms", "MiB on disk", "MiB at the peak", "HF / ORT"]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in (head, *rows))
