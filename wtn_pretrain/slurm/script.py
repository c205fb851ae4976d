"""The batch scripts of scripts/slurm, filled in: nodes, ranks, memory and time in the place of the defaults that they carry."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "scripts" / "slurm"

SCRIPTS = {"wide": "wide.sbatch", "imitate": "imitate.sbatch", "finetune": "finetune.sbatch", "method": "method.sbatch"}
"""What can be submitted, in the order of the method: stage -> its batch script."""
SWEEP = "sweep.sbatch"
ENTRY = {"wide": "scripts/train_wide.py", "imitate": "scripts/imitate.py", "finetune": "scripts/finetune.py", "method": "scripts/run.py"}
"""Stage -> the script that its ranks run."""


class Size(NamedTuple):
    """What a job asks for."""

    nodes: int
    per_node: int
    """Ranks on each."""
    gpus_per_node: int
    cpus_per_rank: int
    memory: str
    """As Slurm writes it, for each node; 0: all it has."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node

    def options(self) -> dict[str, str | None]:
        """Options of sbatch; None takes one out."""
        return {
            "nodes": str(self.nodes),
            "ntasks-per-node": str(self.per_node),
            "gpus-per-node": str(self.gpus_per_node) if self.gpus_per_node else None,
            "cpus-per-task": str(self.cpus_per_rank),
            "mem": self.memory,
        }


def fill(text: str, options: Mapping[str, str | None], variables: Mapping[str, str], comments: Sequence[str] = ()) -> str:
    """A batch script with `options` of sbatch in its head; those that it does not carry are added after the others.

    Args:
        options: name -> value; empty where an option has none, None takes it out.
        variables: set for it, whatever of its environment a site passes on.
        comments: lines that follow the head.
    """
    lines, waiting = [], dict(options)
    for line in text.splitlines():
        found = re.match(r"##?SBATCH --([\w-]+)=", line)
        if found and found[1] in waiting:
            value = waiting.pop(found[1])
            if value is None:
                continue
            line = _line(found[1], value)
        lines.append(line)
    end = max(number for number, line in enumerate(lines) if re.match("##?SBATCH", line)) + 1
    added = [_line(name, value) for name, value in waiting.items() if value is not None]
    added += [f"# {comment}" for comment in comments]
    added += [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    return "\n".join([*lines[:end], *added, *lines[end:]]) + "\n"


def _line(name: str, value: str) -> str:
    return f"#SBATCH --{name}={value}" if value else f"#SBATCH --{name}"


def minutes(value: float) -> str:
    """A time as Slurm writes it: days-hours:minutes:00."""
    whole = max(1, round(value))
    return f"{whole // 1440}-{whole // 60 % 24:02}:{whole % 60:02}:00"
