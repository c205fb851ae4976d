"""What must not be learned from is not, alike on all ranks and bit for bit: batches that give no numbers, and batches before a spike."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.imitating import SGD, Imitations, apart
from tests.running import BERT, RESNET, Forge, Started, equal_bits, reached, recipe, records, weights, write_recipe
from wtn_pretrain.config import validate
from wtn_pretrain.data.stream import BatchStream
from wtn_pretrain.imitation.plan import parse
from wtn_pretrain.recipe import Recipe
from wtn_pretrain.stages import open_task

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("planted.py")
GRADIENT = {"gradients": [[7, 0]]}


def planted(forge: Forge, config: Path, plants: dict[str, Any], *overrides: str, ranks: int = 1) -> Started:
    """Starts stage 1 with something planted."""
    arguments = ["--plant", json.dumps(plants), "--config", str(config), *overrides]
    return forge.program(PROGRAM, *arguments, cwd=config.parent, ranks=ranks)


def stage_of(config: Path, name: str) -> Path:
    return config.parent / "runs" / name / "wide"


def batch_of(tree: dict[str, Any], step: int, cache: Path) -> tuple[list[int], list[int]]:
    """The samples of a step (from 0), and their seeds."""
    made = validate(Recipe, tree)
    stream = BatchStream(open_task(made, cache).train, made.wide.batch_size, seed=made.run.seed)
    indices, seeds = stream.sample_ids(step)
    return indices.tolist(), seeds.tolist()


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], int]] = {
    # base, changes, plants, ranks; None for the samples: the ninth of the batch of step 7
    "an image, statistics, averages": (RESNET, {"wide.ema": 0.9}, {"samples": None}, 1),
    "an image of one rank of two": (RESNET, {"wide.micro_batch_size": 8, "wide.clip": 0}, {"samples": None}, 2),
    "an image of one of two ranks that normalise alone": (RESNET, {"wide.batch_norms": "rank", "wide.ema": 0.9}, {"samples": None}, 2),
    "ZeRO 2, a gradient on one rank": (BERT, {"wide.deepspeed": "ds_configs/zero2.json"}, {"gradients": [[7, 1]]}, 2),
    "ZeRO 3, a gradient": (BERT, {"wide.deepspeed": "ds_configs/zero3.json"}, {"gradients": [[7, 0]]}, 2),
    "tensor ranks, a gradient on one": (BERT, {"wide.tensor_parallel": 2, "wide.clip": 0}, {"gradients": [[7, 1]]}, 2),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_that_is_left_out_leaves_nothing(name: str, forge: Forge, tmp_path: Path) -> None:
    base, changes, plants, ranks = CASES[name]
    tree = recipe(base, changes)
    if "samples" in plants:
        plants = {"samples": batch_of(tree, 7, tmp_path / "cache")[0][9:10]}
    config = write_recipe(tmp_path / "recipe.yaml", tree)
    left_out = planted(forge, config, plants, "--run.name=left-out", ranks=ranks)
    whole = planted(forge, config, {"left_out": [7]}, "--run.name=whole", ranks=ranks)
    left_out.succeed()
    whole.succeed()
    mine, theirs = (stage_of(config, run) for run in ("left-out", "whole"))
    assert equal_bits(weights(mine), weights(theirs))
    found, reference = records(mine), records(theirs)
    assert [record["step"] for record in found] == list(range(1, 21))
    assert [record["loss"] for record in found if record["step"] != 8] == [record["loss"] for record in reference if record["step"] != 8]
    # counted from the step on at which it happened
    assert [record.get("skipped") for record in found] == [None] * 7 + [1] * 13
    assert (found[7]["loss"] is None) == ("samples" in plants) and found[7]["grad_norm"] is None
    assert [event["step"] for event in records(mine, "event") if event["name"] == "skipped"] == [8]
    assert ", 1 skipped" in left_out.stderr()


def test_too_many_in_a_row_end_the_run(forge: Forge, tmp_path: Path) -> None:
    tree = recipe(RESNET, {"wide.max_skipped": 1, "wide.checkpoint_every": 5})
    samples = {step: batch_of(tree, step, tmp_path / "cache") for step in (7, 8, 10)}
    plants = {"samples": [indices[3] for indices, _ in samples.values()]}
    config = write_recipe(tmp_path / "recipe.yaml", tree)
    started = planted(forge, config, plants, ranks=2)
    assert started.codes() == [2, 2]
    stage = stage_of(config, "resnet")
    (line,) = started.errors()
    path = f"runs/resnet/wide/{'batches-step9.json'}"
    assert re.fullmatch(
        rf"error: wide: the loss is nan at step 9, after 1 steps in a row that were left out for that; the samples are named in {path}; "
        r"look at them, or lower wide\.optimizer\.lr or wide\.clip under another --run\.name \(the checkpoint before it is kept in .*\)",
        line,
    ), line
    told = json.loads((config.parent / path).read_text())
    assert (told["stage"], told["step"], told["why"]) == ("wide", 9, "the loss is nan")
    assert [(batch["step"], batch["batch"]) for batch in told["batches"]] == [(8, 7), (9, 8)]
    for batch in told["batches"]:
        assert (batch["indices"], batch["seeds"]) == samples[batch["batch"]]
    # more may be allowed: it goes on from what is kept, and those that are not in a row are no reason to end
    again = planted(forge, config, plants, "--wide.max_skipped=2", ranks=2)
    again.succeed()
    whole = planted(forge, config, {"left_out": [7, 8, 10]}, "--run.name=whole", ranks=2)
    whole.succeed()
    assert equal_bits(weights(stage), weights(stage_of(config, "whole")))
    assert records(stage)[-1]["skipped"] == 3


SPIKE = {"wide.steps": 60, "wide.spike": 12, "wide.spike_rollbacks": 1, "wide.checkpoint_every": 20, "wide.ema": 0.9}


@pytest.mark.parametrize(
    ("base", "changes", "ranks"),
    [(RESNET, {}, 1), (BERT, {"wide.ema": 0, "wide.deepspeed": "ds_configs/zero2.json"}, 2)],
    ids=["one rank", "ZeRO 2"],
)
def test_a_spike_is_gone_back_from(base: dict[str, Any], changes: dict[str, Any], ranks: int, forge: Forge, tmp_path: Path) -> None:
    tree = recipe(base, {**SPIKE, **changes})
    config = write_recipe(tmp_path / "recipe.yaml", tree)
    # the second spike is one more than the run may go back from
    plants = {"spikes": [33, 64]}
    back = planted(forge, config, plants, "--run.name=back", ranks=ranks)
    # from step 20 on it is 14 batches further: 20 to 33 are passed over
    whole = planted(forge, config, {"jumps": [[20, 14]]}, "--run.name=whole", "--wide.spike_rollbacks=0", ranks=ranks)
    back.succeed()
    whole.succeed()
    mine, theirs = (stage_of(config, run) for run in ("back", "whole"))
    assert equal_bits(weights(mine), weights(theirs))
    losses = {record["step"]: record["loss"] for record in records(mine)}
    assert list(losses) == list(range(1, 61))
    # of the second spike, the loss is larger and the gradient is not
    assert [step for step, loss in losses.items() if abs(loss - records(theirs)[step - 1]["loss"]) > 0] == [51]
    (rolled,) = [event for event in records(mine, "event") if event["name"] == "rollback"]
    assert (rolled["step"], rolled["at"], rolled["number"]) == (20, 34, 1) and rolled["deviations"] > 12
    (spike,) = [event for event in records(mine, "event") if event["name"] == "spike"]
    assert (spike["step"], spike["batches"]) == (51, "batches-step51.json")
    assert "back to the checkpoint of step 20, and past the 14 batches since" in back.stderr()
    told = json.loads((mine / rolled["batches"]).read_text())
    assert [(batch["step"], batch["batch"]) for batch in told["batches"]] == [(34, 33)]
    assert told["batches"][0]["indices"] == batch_of(tree, 33, tmp_path / "cache")[0]
    # killed after it went back, before and after the checkpoint that follows
    for step in (30, 45):
        name = f"killed-{step}"
        started = planted(forge, config, plants, f"--run.name={name}", ranks=ranks)
        stage = stage_of(config, name)
        reached(started, stage, step, when=lambda stage=stage: any(event["name"] == "rollback" for event in records(stage, "event")))
        started.kill()
        started.codes()
        planted(forge, config, plants, f"--run.name={name}", ranks=ranks).succeed()
        assert equal_bits(weights(stage), weights(mine))
        assert {record["step"]: record["loss"] for record in records(stage)} == losses
        assert [event["number"] for event in records(stage, "event") if event["name"] == "rollback"] == [1]


def test_a_spike_with_nothing_to_go_back_to_is_recorded(forge: Forge, tmp_path: Path) -> None:
    config = write_recipe(tmp_path / "recipe.yaml", recipe(RESNET, {**SPIKE, "wide.checkpoint_every": 50}))
    planted(forge, config, {"spikes": [33]}).succeed()
    events = records(stage_of(config, "resnet"), "event")
    assert [event["step"] for event in events if event["name"] == "spike"] == [34]
    assert not any(event["name"] == "rollback" for event in events)


IMITATIONS: dict[str, dict[str, Any]] = {
    # a plan, and what may not change where the units of one process go one by one
    "spans": {"narrow.plan": "0-1,2-3"},
    "replicas of the upper span": {"narrow.plan": "0-1,2-3x2"},
    "replicas, ZeRO 1, micro-batches": {"narrow.plan": "0-3x2", "narrow.deepspeed": "ds_configs/zero1.json", "narrow.micro_batch_size": 16},
    "units that come and go": {"narrow.offload": "disk", "narrow.offload_batches": 3},
}


@pytest.fixture(scope="module")
def imitations(forge: Forge, tmp_path_factory: pytest.TempPathFactory) -> Imitations:
    return Imitations(forge, tmp_path_factory.mktemp("imitations"))


def planted_sample(tree: dict[str, Any], cache: Path, step: int) -> int:
    """One of those that stage 2 is given at a step (from 0)."""
    made = validate(Recipe, tree)
    stream = BatchStream(open_task(made, cache).train, made.narrow.batch_size, seed=made.compare.seeds[0])
    return int(stream.sample_ids(step)[0][9])


@pytest.mark.parametrize("name", IMITATIONS)
def test_imitation_leaves_out_what_one_process_does(name: str, imitations: Imitations, tmp_path: Path) -> None:
    """An image that is no number is in the rows of one replica; all of its units leave the step out, and nobody waits for another."""
    changes = {**SGD, "narrow.init": "random", "narrow.log_every": 1, "narrow.trace": False}
    changes |= {key: value for key, value in IMITATIONS[name].items() if key == "narrow.micro_batch_size"}
    sample = planted_sample(recipe(RESNET, {"narrow.steps": 30, **changes}), tmp_path / "cache", 12)
    found = []
    for more in ({}, IMITATIONS[name]):
        config = imitations.config(RESNET, {**changes, **more})
        ranks = parse(more["narrow.plan"]).ranks if "narrow.plan" in more else 1
        arguments = ["--plant", json.dumps({"stage": "narrow", "samples": [sample]}), "--config", str(config)]
        imitations.forge.program(PROGRAM, *arguments, cwd=config.parent, ranks=ranks).succeed()
        found.append(imitations.left(config))
    alone, together = found
    taken = [[(event["step"], event["units"]) for event in records(left.folder, "event") if event["name"] == "skipped"] for left in found]
    assert (13, [1, 2, 3]) in taken[0] and taken[0] == taken[1]
    assert [record.get("skipped") for record in alone.records] == [record.get("skipped") for record in together.records]
    assert alone.records[-1]["skipped"] == 3 * len(taken[0])
    assert [record["step"] for record in together.records if record["loss"] is None] == [step for step, _ in taken[1]]
    # rounding of sums over replicas, amplified by 30 steps, as in the tests of pipelines
    tolerance = 5e-4 if "x2" in str(IMITATIONS[name]) else 0.0
    assert apart(alone.weights, together.weights)[0] <= tolerance


def test_a_row_that_is_too_long_ends_all_spans(imitations: Imitations, tmp_path: Path) -> None:
    """Every span meets it by itself, the replicas of the upper one at once: one line, whoever is first."""
    changes = {**SGD, "narrow.init": "random", "narrow.trace": False, "narrow.max_skipped": 0, "narrow.plan": "0-1,2-3x2"}
    sample = planted_sample(recipe(RESNET, {"narrow.steps": 30, **changes}), tmp_path / "cache", 12)
    config = imitations.config(RESNET, changes)
    arguments = ["--plant", json.dumps({"stage": "narrow", "samples": [sample]}), "--config", str(config)]
    started = imitations.forge.program(PROGRAM, *arguments, cwd=config.parent, ranks=3)
    assert started.codes(60) == [2, 2, 2]
    (line,) = started.errors()
    found = re.match(
        r"error: narrow: the loss or the gradient of unit [12] is not finite at step (\d+); the samples are named in (\S+);", line
    )
    assert found and int(found[1]) <= 13, line
    (batch,) = json.loads((config.parent / found[2]).read_text())["batches"]
    assert batch["step"] == int(found[1]) and sample in batch["indices"]
