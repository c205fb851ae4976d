"""Batch norm over ranks that hold different numbers of images is batch norm over all of them; norms of ranks by themselves."""

import json
from pathlib import Path

import pytest

from tests.running import RESNET, Forge, equal_bits, losses, reached, recipe, weights, write_recipe

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_normalise_together(ranks: int, forge: Forge, tmp_path: Path) -> None:
    forge.program(Path(__file__).with_name("normed.py"), str(tmp_path), cwd=tmp_path, ranks=ranks).succeed()
    for rank in range(ranks):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        print(found)
        # fp32 against double: sums of a hundred numbers
        running = {"running_mean", "running_var"}
        assert found.keys() == {"output", "input", "weight", "bias", *running, *(f"average of {name}" for name in running)}
        assert max(found.values()) < 1e-5


ALONE = {"wide.batch_norms": "rank"}


def test_ranks_that_normalise_alone_are_micro_batches_of_one(forge: Forge, tmp_path: Path) -> None:
    """Losses and weights: a rank's samples are a micro-batch. Running statistics are averaged there and follow one another here."""
    stage = tmp_path / "runs" / "resnet" / "wide"
    half = RESNET["wide"]["batch_size"] // 2
    found = {}
    for name, changes, ranks in (("alone", ALONE, 2), ("one", {"wide.micro_batch_size": half}, 1), ("together", {}, 2)):
        config = write_recipe(tmp_path / f"{name}.yaml", recipe(RESNET, {**changes, "run.name": name}))
        forge.start("train_wide.py", config, ranks=ranks).succeed()
        found[name] = losses(stage.parents[1] / name / "wide"), weights(stage.parents[1] / name / "wide")
    mine, theirs = found["alone"], found["one"]
    # fp32 over 20 steps, as for the other layouts
    assert mine[0] == pytest.approx(theirs[0], rel=1e-5)
    for key, value in mine[1].items():
        if "running" not in key and "tracked" not in key:
            assert float((value - theirs[1][key]).abs().max()) <= 1e-4, key
    assert mine[0] != pytest.approx(found["together"][0], rel=1e-3)


def test_one_pixel_of_a_rank_is_too_little(forge: Forge, tmp_path: Path) -> None:
    changes = {**ALONE, "model.channels": [4, 4, 4, 4], "model.depths": [1, 1, 1, 1], "wide.batch_size": 2}
    started = forge.start("train_wide.py", write_recipe(tmp_path / "recipe.yaml", recipe(RESNET, changes)), ranks=2)
    assert started.codes() == [2, 2]
    (line,) = started.errors()
    assert line.startswith("error: wide.micro_batch_size: ") and line.endswith("fewer ranks or wide.batch_norms all")


def test_ranks_that_normalise_alone_resume_bit_for_bit(forge: Forge, tmp_path: Path) -> None:
    changes = {**ALONE, "wide.steps": 60, "wide.checkpoint_every": 10, "wide.ema": 0.9}
    stage = tmp_path / "runs" / "resnet" / "wide"
    config = write_recipe(tmp_path / "recipe.yaml", recipe(RESNET, changes))
    forge.start("train_wide.py", config, "--run.name=whole", ranks=2).succeed()
    started = forge.start("train_wide.py", config, ranks=2)
    reached(started, stage, 25)
    started.kill(0, 1)
    started.codes()
    forge.start("train_wide.py", config, ranks=2).succeed()
    whole = stage.parents[1] / "whole" / "wide"
    assert losses(stage) == losses(whole) and equal_bits(weights(stage), weights(whole))
