"""Imitation on several ranks as tests run it: the wide network is trained once, each run starts in a folder of its own."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from torch import Tensor

from tests.running import Forge, Started, recipe, records, weights, write_recipe
from wtn_pretrain.imitation.plan import parse
from wtn_pretrain.models.base import flops
from wtn_pretrain.models.store import load_shape

OUTER = {"widen": {"inner": 1, "outer": 2}}
SGD = {"narrow.optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}}


class Left(NamedTuple):
    """What a run of stage 2 leaves."""

    weights: dict[str, Tensor]
    records: list[dict[str, Any]]
    done: dict[str, Any]
    folder: Path


class Imitations:
    """Runs of stage 2 on networks that have been trained once."""

    def __init__(self, forge: Forge, folder: Path) -> None:
        self.forge, self._folder, self._count = forge, folder, 0
        self._trained: dict[str, Path] = {}
        self._alone: dict[str, Left] = {}

    def config(self, base: Mapping[str, Any], changes: Mapping[str, Any]) -> Path:
        """The configuration of a new run, whose folder holds the trained wide network."""
        tree = recipe(base, {"narrow.steps": 30, **changes})
        folder = self._folder / str(self._count)
        self._count += 1
        trained = self._wide(base, changes)
        shutil.copytree(trained, folder / "runs" / tree["run"]["name"], ignore=shutil.ignore_patterns("config.yaml"))
        return write_recipe(folder / "recipe.yaml", tree)

    def stage(self, config: Path) -> Path:
        """The folder of stage 2."""
        return next((config.parent / "runs").iterdir()) / "narrow"

    def start(self, config: Path, *overrides: str, ranks: int) -> Started:
        """Starts stage 2."""
        return self.forge.start("imitate.py", config, *overrides, ranks=ranks)

    def left(self, config: Path) -> Left:
        """What the run of a configuration has left."""
        stage = self.stage(config)
        return Left(weights(stage), records(stage), json.loads((stage / "done.json").read_text()), stage)

    def under(self, plan: str, base: Mapping[str, Any], changes: Mapping[str, Any]) -> Left:
        """A run under a plan, on as many ranks as it takes."""
        config = self.config(base, {**changes, "narrow.plan": plan})
        self.start(config, ranks=parse(plan).ranks).succeed()
        return self.left(config)

    def on(self, ranks: int, base: Mapping[str, Any], changes: Mapping[str, Any]) -> Left:
        """A run under the plan of its own choice."""
        config = self.config(base, changes)
        self.start(config, ranks=ranks).succeed()
        return self.left(config)

    def alone(self, base: Mapping[str, Any], changes: Mapping[str, Any]) -> Left:
        """The run of one process, made once."""
        key = str((base, changes))
        if key not in self._alone:
            self._alone[key] = self.on(1, base, changes)
        return self._alone[key]

    def _wide(self, base: Mapping[str, Any], changes: Mapping[str, Any]) -> Path:
        """A run's folder with its first stage done."""
        tree = recipe(base, {"wide.log_every": 20, **{key: value for key, value in changes.items() if not key.startswith("narrow.")}})
        key = str((tree["model"], tree["widen"]))
        if key not in self._trained:
            folder = self._folder / f"wide-{len(self._trained)}"
            folder.mkdir()
            self.forge.start("train_wide.py", write_recipe(folder / "recipe.yaml", tree)).succeed()
            self._trained[key] = folder / "runs" / tree["run"]["name"]
        return self._trained[key]


def apart(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], but: str = " ") -> tuple[float, str]:
    """Largest difference of a weight over the largest of its tensor, and which tensor; those with `but` in their name are left out.

    A tensor all of whose weights are below 0.01 counts as if it had one of 0.01.
    """
    assert mine.keys() == theirs.keys()
    found = [(0.0, "")]
    for name, value in mine.items():
        other = theirs[name].double()
        if but not in name:
            found.append((float((value.double() - other).abs().max() / other.abs().max().clamp_min(0.01)), name))
    return max(found)


def losses_apart(mine: Left, theirs: Left) -> float:
    """Largest relative difference of the loss of a unit at any step that was logged; both have logged the same ones."""
    assert [record["step"] for record in mine.records] == [record["step"] for record in theirs.records]
    pairs = [
        (ours, other)
        for record, reference in zip(mine.records, theirs.records, strict=True)
        for ours, other in zip(record["units"], reference["units"], strict=True)
    ]
    assert all((ours is None) == (other is None) for ours, other in pairs)
    return max(abs(ours - other) / abs(other) for ours, other in pairs if other is not None)


def teacher_once(left: Left) -> int:
    """FLOPs of the teacher's stem and blocks, on every micro-batch once."""
    run = left.folder.parent
    tree = yaml.safe_load((run / "config.yaml").read_text())
    counts = flops(load_shape(run / "wide"), tree["data"].get("sequence_length"))
    return (counts.stem + sum(counts.blocks)) * tree["narrow"]["batch_size"] * tree["narrow"]["steps"]
