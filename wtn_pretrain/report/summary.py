"""The figures of a run: three arms, what WIN gained over training from scratch, and their JSON form."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from wtn_pretrain.errors import UserError
from wtn_pretrain.files import write_text

# a diverged arm keeps its NaN: a run of days must not end in an exception over it
STRICT = ConfigDict(extra="forbid", ser_json_inf_nan="constants")


@dataclass(frozen=True, config=STRICT)
class Metric:
    """What quality is measured in; `unit` may be empty."""

    name: str
    unit: str
    higher_is_better: bool


@dataclass(frozen=True, config=STRICT)
class Training:
    """What training an arm cost, for one seed."""

    steps: int
    flops: float
    seconds: float


@dataclass(frozen=True, config=STRICT)
class Arm:
    """One network of the comparison. `values` has the metric of each seed; `spread` is their sample standard deviation,
    0 for one seed; `flops` are those of one sample's forward pass; figures that were not taken are None."""

    mean: float
    spread: float
    values: list[float]
    parameters: int
    flops: float | None
    latency_ms: float | None
    training: Training | None

    @staticmethod
    def statistics(values: Sequence[float]) -> dict[str, Any]:
        """`mean`, `spread` and `values` of the seeds, to be passed on to `Arm(...)` or `WinArm(...)`."""
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        return {"mean": float(np.mean(values)), "spread": spread, "values": [float(value) for value in values]}


@dataclass(frozen=True, config=STRICT)
class WinArm(Arm):
    """The thin network by WIN, with the imitation error of each block at the end of stage 2."""

    imitation_error: list[float | None] = field(default_factory=list)


@dataclass(frozen=True, config=STRICT)
class Gain:
    """`mean`: WIN less scratch, in units of the metric. `standard_error`: Welch's, None unless both arms have two seeds.
    `within_spread`: the difference is no larger than the spread between seeds or than two standard errors."""

    mean: float
    standard_error: float | None
    within_spread: bool


@dataclass(frozen=True, config=STRICT)
class Summary:
    """`summary.json` of one run of one model; `thin_scratch` and `gain` are None where no scratch arm was trained."""

    model: str
    name: str
    metric: Metric
    date: str
    commit: str | None
    hardware: str
    wide: Arm
    thin_scratch: Arm | None
    thin_win: WinArm
    gain: Gain | None
    export: dict[str, Any] = field(default_factory=dict)
    curves: Any = None

    def arms(self) -> dict[str, Arm]:
        """The arms there are, under the names a reader sees."""
        arms = {"wide": self.wide, "thin from scratch": self.thin_scratch, "thin by WIN": self.thin_win}
        return {name: arm for name, arm in arms.items() if arm is not None}


ONE: TypeAdapter[Summary] = TypeAdapter(Summary)
MANY: TypeAdapter[dict[str, Summary]] = TypeAdapter(dict[str, Summary], config=ConfigDict(ser_json_inf_nan="constants"))


def gain(win: Arm, scratch: Arm) -> Gain:
    """What WIN gained over scratch, with Welch's standard error of the difference of two means."""
    mean = win.mean - scratch.mean
    error = None
    if min(len(win.values), len(scratch.values)) > 1:
        error = math.sqrt(win.spread**2 / len(win.values) + scratch.spread**2 / len(scratch.values))
    within = abs(mean) <= max(win.spread, scratch.spread) or (error is not None and abs(mean) < 2 * error)
    return Gain(mean=mean, standard_error=error, within_spread=within)


def write_summary(path: Path, summary: Summary) -> None:
    """Write `summary.json` of one run, whole or not at all."""
    write_text(path, ONE.dump_json(summary, indent=2).decode() + "\n")


def read_summary(path: Path) -> Summary:
    """The `summary.json` of one run; `UserError` names the file and the key that is wrong."""
    try:
        return ONE.validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"summary {path}: {error.strerror}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise UserError(f"summary {path}: {key + ': ' if key else ''}{problem['msg']}; finish the run again to write it anew") from None


def write_summaries(path: Path, summaries: Mapping[str, Summary]) -> None:
    """Write the combined `summary.json` of several runs."""
    write_text(path, MANY.dump_json(dict(summaries), indent=2).decode() + "\n")


def collect(folder: Path) -> dict[str, Summary]:
    """All `folder/*/summary.json` in the order of their folders, keyed by model; a second run of a model by its name."""
    found: dict[str, Summary] = {}
    for path in sorted(folder.glob("*/summary.json")):
        summary = read_summary(path)
        place = path.parent.name
        keys = itertools.chain((summary.model, summary.name, place), (f"{place}-{count}" for count in itertools.count(2)))
        found[next(key for key in keys if key not in found)] = summary
    return found
