"""The curves of a run, read from every `metrics.jsonl` below its folder."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wtn_pretrain.training.monitor import METRICS, RESERVED, read_metrics

Floats = npt.NDArray[np.float64]
STAGES = ("wide", "narrow", "finetune", "scratch")
FIRST_SEED = "seed-0"


@dataclass(frozen=True)
class Log:
    """The records of one stage of one seed, oldest first."""

    seed: str
    stage: str
    records: list[dict[str, Any]]

    @property
    def last_step(self) -> int:
        """The last step that was recorded, 0 for none."""
        return max((int(record["step"]) for record in self.records), default=0)

    def names(self, kind: str) -> set[str]:
        """What single numbers the records of `kind` hold."""
        return {
            name
            for record in self.records
            if record["kind"] == kind
            for name, value in record.items()
            if name not in RESERVED and isinstance(value, int | float)
        }

    def series(self, kind: str, name: str) -> tuple[Floats, Floats]:
        """Steps and values of a number, ascending; of several records of a step the last counts; null is NaN."""
        points = {int(record["step"]): record[name] for record in self.records if record["kind"] == kind and name in record}
        ordered = sorted(points.items())
        values = [value if isinstance(value, int | float) else np.nan for _, value in ordered]
        return np.array([step for step, _ in ordered], dtype=np.float64), np.array(values, dtype=np.float64)

    def units(self) -> tuple[Floats, Floats]:
        """Steps [T] and imitation errors [T, blocks], NaN where a block was not trained."""
        for kind in ("train", "valid"):
            points = {int(r["step"]): r["units"] for r in self.records if r["kind"] == kind and isinstance(r.get("units"), list)}
            if points:
                break
        else:
            return np.empty(0), np.empty((0, 0))
        values = np.full((len(points), max(map(len, points.values()))), np.nan)
        for row, (_, errors) in enumerate(sorted(points.items())):
            values[row, : len(errors)] = [error if isinstance(error, int | float) else np.nan for error in errors]
        return np.array(sorted(points), dtype=np.float64), values

    def phases(self) -> list[tuple[float, str]]:
        """The first step and name of each phase of training, in order."""
        found: list[tuple[float, str]] = []
        for record in sorted((r for r in self.records if r["kind"] == "train"), key=lambda r: int(r["step"])):
            phase = record.get("phase")
            if isinstance(phase, str) and (not found or found[-1][1] != phase):
                found.append((float(record["step"]), phase))
        return found


def read_logs(folder: Path) -> list[Log]:
    """Every stage of every seed below a run's folder; none is required. A corrupt file raises `UserError`.

    Below `seed-N/` a stage belongs to that seed, elsewhere to the first. A stage is named by its folder where that is one
    of `STAGES`, since a thin network from scratch is trained by the code that finetunes, else by its records.
    """
    gathered: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted(folder.rglob(METRICS)):
        parts = path.relative_to(folder).parts[:-1]
        seed = next((part for part in parts if part.startswith("seed-")), FIRST_SEED)
        named = next((part for part in reversed(parts) if part in STAGES), None)
        for record in read_metrics(path):
            gathered.setdefault((seed, named or str(record["stage"])), []).append(record)
    return [Log(seed, stage, records) for (seed, stage), records in gathered.items()]


def thin(steps: Floats, values: Floats, most: int = 240) -> tuple[Floats, Floats]:
    """At most `most` points: means over neighbours ([T] or [T, blocks]), so that a page stays small and a line readable."""
    if len(steps) <= most:
        return steps, values
    groups = np.array_split(np.arange(len(steps)), most)
    return np.array([steps[group].mean() for group in groups]), np.array([mean_of(values[group]) for group in groups])


def mean_of(rows: Floats) -> Floats:
    """Mean over the first axis without NaN; NaN where nothing is left."""
    known = np.isfinite(rows)
    count = known.sum(axis=0)
    total = np.where(known, rows, 0.0).sum(axis=0)
    return np.asarray(np.where(count > 0, total / np.maximum(count, 1), np.nan), dtype=np.float64)


def average(lines: Iterable[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    """The mean of several seeds' lines over the steps that all of them have reached; lines without points do not count."""
    present = [(steps, values) for steps, values in lines if len(steps)]
    if not present:
        return np.empty(0), np.empty(0)
    end = min(steps[-1] for steps, _ in present)
    grid = min((steps for steps, _ in present), key=lambda steps: float(steps[-1]))
    grid = grid[grid <= end]
    return grid, mean_of(np.array([np.interp(grid, steps, values) for steps, values in present]))
