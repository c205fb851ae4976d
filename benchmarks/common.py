"""What the benchmarks share: the command line, the printed table, the JSON file and the record of where a figure was measured."""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import torch

from wtn_pretrain.device import hardware
from wtn_pretrain.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def parser(doc: str) -> Parser:
    """The options that every benchmark has; `doc` is the script's docstring."""
    made = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE as well")
    made.add_argument("--preset", choices=("ci", "full"), default="full", help="ci: tiny, seconds; full: as recorded (default)")
    made.add_argument("--threads", type=positive, default=1, metavar="N", help="CPU threads (default 1)")
    return made


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def run(measure: Callable[[argparse.Namespace], dict[str, Any]], arguments: Parser, show: Callable[[dict[str, Any]], str]) -> int:
    """Parses, measures, prints where and what, writes `--json`; the exit status."""
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    try:
        if options.json and not options.json.parent.is_dir():
            raise UserError(f"--json {options.json}: no folder {options.json.parent}; create it or name another file")
        figures = {**record(), "preset": options.preset, **measure(options)}
        print("\n".join(f"{key + ':':10}{figures[key]}" for key in ("date", "commit", "hardware", "command")), show(figures), sep="\n\n")
        if options.json:
            options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    except (UserError, OSError) as error:
        print(f"{arguments.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def record() -> dict[str, str]:
    """When, at which commit, on what and with which command."""
    arguments = sys.argv[1:]
    if "--json" in arguments:  # where the figures go says nothing about them
        place = arguments.index("--json")
        arguments = arguments[:place] + arguments[place + 2 :]
    arguments = [argument for argument in arguments if not argument.startswith("--json=")]
    threads = os.environ.get("OMP_NUM_THREADS")
    prefix = [f"OMP_NUM_THREADS={threads}"] if threads else []
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "commit": _commit(),
        "hardware": f"{hardware()} of {os.cpu_count()} cores",
        "torch": torch.__version__,
        "command": " ".join([*prefix, "python", f"benchmarks/{Path(sys.argv[0]).name}", shlex.join(arguments)]).strip(),
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned plain text, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in (head, *rows)]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _commit() -> str:
    """The short commit, and whether the measured code differs from it."""

    def git(*arguments: str) -> str:
        # no optional locks: a benchmark must not disturb a commit that is being made
        done = subprocess.run(["git", "--no-optional-locks", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = " with uncommitted changes" if git("status", "--porcelain", "--", "wtn_pretrain", "benchmarks/*.py") else ""
        return git("rev-parse", "--short", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
