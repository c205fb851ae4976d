"""Every stage continues from its own checkpoint after `kill -9`, to the same losses and weights, bit for bit, as a run left alone."""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.running import (
    BERT,
    RESNET,
    Forge,
    Started,
    equal_bits,
    kill_at,
    losses,
    reached,
    recipe,
    records,
    steps_logged,
    succeed,
    weights,
    write_recipe,
)

pytestmark = pytest.mark.slow

ALONE, KILLED = "alone", "killed"
DROPOUT = {"model.dropout": 0.1, "model.attention_dropout": 0.1}


@dataclass(frozen=True)
class Case:
    """A stage of a recipe, the steps after which it is killed one start after the other, and where its checkpoints stand."""

    base: dict[str, Any]
    changes: dict[str, Any]
    kills: tuple[int, ...]
    every: int = 5


BOTTOM_UP = {"narrow.schedule": "bottom_up", "narrow.batch_size": 64, "finetune.batch_size": 64}

WIDE = {
    # before the first checkpoint, after the third
    "bert with dropout": Case(BERT, {**DROPOUT, "wide.steps": 60}, (2, 17)),
    "resnet, accumulated": Case(RESNET, {"wide.steps": 60, "wide.micro_batch_size": 8, "wide.optimizer.name": "lars"}, (12,)),
}
NARROW = {
    # steps 1 to 30 are teacher-fed, the rest student-fed
    "hybrid": Case(RESNET, {"narrow.steps": 60}, (13, 47)),
    "hybrid, outer widening": Case(BERT, {"widen": {"inner": 1, "outer": 2}, "narrow.steps": 40, "narrow.loss": "mobilebert"}, (26,)),
    # units of 20 steps, killed in the second and third while the newest periodic checkpoint stands in the one below
    "bottom_up, frozen": Case(BERT, {**BOTTOM_UP, "narrow.steps": 20}, (22, 42), every=13),
    # fewer stored batches than steps: targets come from disk in the second turn
    "bottom_up, stored twice": Case(BERT, {**BOTTOM_UP, "narrow.steps": 20, "narrow.cache_batches": 8}, (42,), every=13),
    "bottom_up, outer widening": Case(RESNET, {**BOTTOM_UP, "widen": {"inner": 1, "outer": 2}, "narrow.steps": 15}, (17, 32), every=11),
    "bottom_up, slow below": Case(RESNET, {**BOTTOM_UP, "narrow.below": "slow", "narrow.steps": 20}, (23,)),
}
FINETUNE = {
    "bert with dropout": Case(BERT, {**DROPOUT, "finetune.steps": 60}, (14,)),
    "resnet": Case(RESNET, {"finetune.steps": 60}, (12,)),
}

Trained = Callable[[dict[str, Any], str], Path]


@pytest.fixture(scope="module")
def trained(forge: Forge, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The folder of a run whose stages up to the named one are finished, made once for each recipe."""
    made: dict[str, Path] = {}

    def find(tree: dict[str, Any], upto: str) -> Path:
        key = str((tree, upto))
        if key not in made:
            folder = tmp_path_factory.mktemp("trained")
            config = write_recipe(folder / "recipe.yaml", tree)
            for script in ("train_wide.py", "imitate.py") if upto == "narrow" else ("train_wide.py",):
                forge.start(script, config).succeed()
            made[key] = folder / "runs" / tree["run"]["name"]
        return made[key]

    return find


def interrupted(forge: Forge, folder: Path, script: str, stage: str, case: Case, finished: Path | None = None, ranks: int = 1) -> None:
    """Runs a stage alone and killed, and compares what the two leave."""
    config = write_recipe(folder / "recipe.yaml", recipe(case.base, {**case.changes, f"{stage}.checkpoint_every": case.every}))
    runs = folder / "runs"
    for name in (ALONE, KILLED) if finished else ():
        # the stages before this one, without the configuration that claims the folder for their run's name
        shutil.copytree(finished, runs / name, ignore=shutil.ignore_patterns("config.yaml"))

    def start(name: str) -> Started:
        return forge.start(script, config, f"--run.name={name}", ranks=ranks)

    start(ALONE).succeed()
    last = 0
    for step in case.kills:
        started = start(KILLED)
        reached(started, runs / KILLED / stage, step)
        started.kill()
        started.codes()
        last = max(steps_logged(runs / KILLED / stage))
        assert not (runs / KILLED / stage / "done.json").exists(), f"the stage was finished before it was killed at step {step}"
    again = start(KILLED)
    again.succeed()
    # the last start did continue: the first step it tells of lies beyond a checkpoint that surely was written
    told = re.search(rf"^{stage} (\d+)/", again.stderr(), re.MULTILINE)
    assert told is not None
    # a stage writes while it goes on: what surely was written is the checkpoint before the newest
    surely = (last - 1) // case.every - 1
    assert surely * case.every < int(told[1]) <= last + 1
    assert losses(runs / KILLED / stage) == losses(runs / ALONE / stage)
    assert [r.get("units") for r in records(runs / KILLED / stage)] == [r.get("units") for r in records(runs / ALONE / stage)]
    assert equal_bits(weights(runs / KILLED / stage), weights(runs / ALONE / stage))


@pytest.mark.parametrize("name", WIDE)
def test_wide(name: str, forge: Forge, tmp_path: Path) -> None:
    interrupted(forge, tmp_path, "train_wide.py", "wide", WIDE[name])


@pytest.mark.parametrize("name", NARROW)
def test_narrow(name: str, forge: Forge, tmp_path: Path, trained: Trained) -> None:
    case = NARROW[name]
    tree = recipe(case.base, {"widen": case.changes.get("widen", case.base["widen"])})
    interrupted(forge, tmp_path, "imitate.py", "narrow", case, trained(tree, "wide"))
    # stored activations are no result
    assert not (tmp_path / "runs" / KILLED / "narrow" / "activations").exists()


@pytest.mark.parametrize("name", FINETUNE)
def test_finetune(name: str, forge: Forge, tmp_path: Path, trained: Trained) -> None:
    case = FINETUNE[name]
    model = {key: value for key, value in case.changes.items() if key.startswith("model.")}
    interrupted(forge, tmp_path, "finetune.py", "finetune", case, trained(recipe(case.base, model), "narrow"))


def test_wide_on_two_ranks_with_zero_2(forge: Forge, tmp_path: Path) -> None:
    case = Case(BERT, {**DROPOUT, "wide.steps": 60, "wide.deepspeed": "ds_configs/zero2.json"}, (13,))
    interrupted(forge, tmp_path, "train_wide.py", "wide", case, ranks=2)


def test_the_whole_method_killed_in_every_stage(tmp_path: Path) -> None:
    """Started as a user starts it."""
    changes: dict[str, Any] = {
        f"{stage}.{key}": value for stage in ("wide", "narrow", "finetune") for key, value in (("steps", 50), ("checkpoint_every", 5))
    }
    config = write_recipe(tmp_path / "recipe.yaml", recipe(RESNET, {**changes, "export.formats": []}))
    runs = tmp_path / "runs"
    succeed("run.py", config, f"--run.name={ALONE}")
    for stage in ("wide", "narrow", "finetune", "scratch"):
        kill_at("run.py", config, f"--run.name={KILLED}", stage=runs / KILLED / stage, step=12)
        assert not (runs / KILLED / stage / "done.json").exists()
    finished = {stage: os.stat(runs / KILLED / stage / "model.safetensors").st_mtime_ns for stage in ("wide", "narrow", "finetune")}
    succeed("run.py", config, f"--run.name={KILLED}")
    for stage in ("wide", "narrow", "finetune", "scratch"):
        assert losses(runs / KILLED / stage) == losses(runs / ALONE / stage), stage
        assert equal_bits(weights(runs / KILLED / stage), weights(runs / ALONE / stage)), stage
    # what was finished before the last start was left alone
    assert finished == {stage: os.stat(runs / KILLED / stage / "model.safetensors").st_mtime_ns for stage in finished}
