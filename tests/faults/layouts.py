"""The runs that faults are injected into: every stage, under several layouts, each a few seconds long with a save every few steps."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.distributed.imitating import OUTER, SGD
from tests.running import BERT, RESNET, Forge, Started, recipe, records, weights, write_recipe

SCRIPTS = {"wide": "train_wide.py", "narrow": "imitate.py", "finetune": "finetune.py"}
STAGES = list(SCRIPTS)


class Layout(NamedTuple):
    """A stage as some ranks run it."""

    stage: str
    ranks: int
    base: Mapping[str, Any]
    changes: dict[str, Any]


def _trained(stage: str, ranks: int, base: Mapping[str, Any], **keys: Any) -> Layout:
    return Layout(stage, ranks, base, {f"{stage}.{key}": value for key, value in {"steps": 80, "checkpoint_every": 5, **keys}.items()})


def _imitated(ranks: int, base: Mapping[str, Any], **changes: Any) -> Layout:
    keys = {f"narrow.{key}": value for key, value in {"steps": 60, "checkpoint_every": 5, **changes.pop("keys", {})}.items()}
    return Layout("narrow", ranks, base, {**changes, **keys})


LAYOUTS: dict[str, Layout] = {
    "wide, alone": _trained("wide", 1, RESNET, ema=0.9),
    "wide, ZeRO 0": _trained("wide", 2, BERT, micro_batch_size=4),
    "wide, ZeRO 1": _trained("wide", 2, BERT, deepspeed="ds_configs/zero1.json"),
    "wide, ZeRO 2": _trained("wide", 2, BERT, deepspeed="ds_configs/zero2.json"),
    "wide, ZeRO 3": _trained("wide", 2, BERT, deepspeed="ds_configs/zero3.json"),
    "wide, 2 tensor ranks": _trained("wide", 2, BERT, tensor_parallel=2),
    "narrow, alone": _imitated(1, BERT),
    "narrow, 2 spans": _imitated(2, BERT, **OUTER, keys={"plan": "0-1,2-3"}),
    "narrow, 2 replicas, ZeRO 1": _imitated(2, BERT, keys={"plan": "0-3x2", "deepspeed": "ds_configs/zero1.json"}),
    "narrow, bottom_up": _imitated(2, RESNET, **SGD, keys={"schedule": "bottom_up", "steps": 30}),
    "narrow, 2 spans, a cache": _imitated(2, BERT, keys={"plan": "0-1,2-3", "cache": "cache", "cache_batches": 30}),
    "finetune, alone": _trained("finetune", 1, RESNET),
    "finetune, ZeRO 2": _trained("finetune", 2, BERT, deepspeed="ds_configs/zero2.json"),
}


class Left(NamedTuple):
    """What a stage has left, as far as another run of it must leave the same."""

    weights: dict[str, Any]
    losses: list[tuple[int, float, Any]]
    """Step, loss, and in stage 2 the losses of the units; each step once."""


class Runs:
    """Starts layouts, each run in a folder of its own in which the stages before it are done."""

    def __init__(self, forge: Forge, folder: Path) -> None:
        self.forge, self._folder, self._count = forge, folder, 0
        self._ready: dict[str, Path] = {}
        self._whole: dict[str, tuple[Left, float]] = {}

    def config(self, layout: Layout, changes: Mapping[str, Any] | None = None) -> Path:
        """The configuration of a new run."""
        folder = self._folder / f"run-{self._count}"
        self._count += 1
        tree = recipe(layout.base, {**layout.changes, **(changes or {})})
        folder.mkdir()
        if layout.stage != "wide":
            ready = self._before(layout)
            shutil.copytree(ready, folder / "runs", ignore=shutil.ignore_patterns("config.yaml", ".lock"))
        return write_recipe(folder / "recipe.yaml", tree)

    def stage(self, layout: Layout, config: Path) -> Path:
        """The folder of the layout's stage."""
        return config.parent / "runs" / layout.base["run"]["name"] / layout.stage

    def start(self, layout: Layout, config: Path, *overrides: str, variables: Mapping[str, str] | None = None) -> Started:
        return self.forge.start(SCRIPTS[layout.stage], config, *overrides, ranks=layout.ranks, variables=variables)

    def left(self, layout: Layout, config: Path) -> Left:
        """What a run has left.

        Raises:
            AssertionError: a step is missing from its records, or there twice.
        """
        stage = self.stage(layout, config)
        found = records(stage)
        steps = [record["step"] for record in found]
        assert steps == list(range(1, len(steps) + 1)), f"{stage}: records of steps {steps}"
        return Left(weights(stage), [(record["step"], record["loss"], record.get("units")) for record in found])

    def whole(self, name: str) -> tuple[Left, float]:
        """What a run of a layout leaves that nobody disturbs, made once; and the seconds it takes."""
        if name not in self._whole:
            layout = LAYOUTS[name]
            config = self.config(layout)
            started = self.start(layout, config)
            started.succeed(timeout=300)
            self._whole[name] = self.left(layout, config), started.seconds()
        return self._whole[name]

    def _before(self, layout: Layout) -> Path:
        """The folder `runs` of a run in which the stages before the layout's are done."""
        tree = recipe(layout.base, {key: value for key, value in layout.changes.items() if not key.startswith(f"{layout.stage}.")})
        earlier = STAGES[: STAGES.index(layout.stage)]
        key = str((tree["model"], tree["widen"], earlier))
        if key not in self._ready:
            folder = self._folder / f"ready-{len(self._ready)}"
            folder.mkdir()
            config = write_recipe(folder / "recipe.yaml", tree)
            for stage in earlier:
                self.forge.start(SCRIPTS[stage], config).succeed(timeout=300)
            self._ready[key] = folder / "runs"
        return self._ready[key]
