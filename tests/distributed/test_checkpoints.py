"""Checkpoints of stages 1 and 3: whatever ranks, ZeRO stage, precision and optimizer wrote one, any other layout continues from it."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.running import BERT, RESNET, Forge, compiled, equal_bits, losses, recipe, weights, write_recipe

pytestmark = pytest.mark.slow

RELAID = Path(__file__).parent / "relaid.py"
SAME = 1e-5
"""Largest relative difference of the next two losses: fp32, the samples summed in another order."""


def move(forge: Forge, folder: Path, ranks: int, layouts: str, *arguments: str) -> list[dict[str, Any]]:
    """Moves the training in `folder` through layouts on so many ranks; what was found after each move."""
    forge.program(RELAID, str(folder), *arguments, *layouts.split(), cwd=folder, ranks=ranks).succeed()
    return json.loads((folder / f"moves-{ranks}.json").read_text())


def require_same(moves: Sequence[dict[str, Any]], into_zero3: float = SAME, losses: int = 2) -> None:
    """`into_zero3`: the largest relative difference between ZeRO 3 and another stage; `losses`: how many of the next two are compared."""
    for before, record in zip([None, *moves[:-1]], moves, strict=True):
        print(record)
        assert record.get("as_deepspeed_says", True)
        if record["step"]:
            assert record["as_stored"]
            assert record["seconds"] == record["step"] / 3
            crosses = before is not None and (before["layout"] == "z3") != (record["layout"] == "z3")
            assert record["losses"][:losses] == pytest.approx(record["expected"][:losses], rel=into_zero3 if crosses else SAME)
    # the training moves on, so that an old state would be seen
    assert len({record["losses"][0] for record in moves}) == len(moves)


def test_any_number_of_ranks_under_any_zero_stage(forge: Forge, tmp_path: Path) -> None:
    # 3 ranks divide neither the partitions nor the shares of a parameter evenly
    moves = [*move(forge, tmp_path, 2, "z0 z1 z2 z3 z0"), *move(forge, tmp_path, 1, "z1"), *move(forge, tmp_path, 3, "z2 z3")]
    assert [record["step"] for record in moves] == list(range(0, 24, 3))
    assert all(record["states"] == ["exp_avg", "exp_avg_sq"] for record in moves)
    require_same(moves)


@pytest.mark.parametrize(
    ("optimizer", "layouts", "states"),
    [
        ("sgd", "z0 z2 z3 z0", ["momentum_buffer"]),
        ("lamb", "z0 z2 z0", ["exp_avg", "exp_avg_sq"]),
        ("lars", "z0 z1 z0", ["momentum_buffer"]),
    ],
)
def test_any_optimizer(optimizer: str, layouts: str, states: list[str], forge: Forge, tmp_path: Path) -> None:
    moves = move(forge, tmp_path, 2, layouts, "--optimizer", optimizer)
    assert all(record["states"] == states for record in moves)
    require_same(moves)


@pytest.mark.parametrize(("precision", "layouts"), [("bf16", "z0 z1 z3 z3 z0"), ("bf16_weights", "z1 z2 z3 z3 z1")])
def test_rounded_weights_keep_their_masters(precision: str, layouts: str, forge: Forge, tmp_path: Path) -> None:
    # each rank has the same samples and the same weights, so that even bf16 gives the same loss, but for ZeRO 3: there DeepSpeed adds a
    # linear layer's bias after the product was rounded to 8 bits, and goes on to do so in a process that has once had it
    require_same(move(forge, tmp_path, 2, layouts, "--precision", precision), into_zero3=2**-9, losses=1)


def test_an_average_is_kept_beside_the_engine(forge: Forge, tmp_path: Path) -> None:
    require_same(move(forge, tmp_path, 2, "z0 z1 z0t2 z2", "--ema"), losses=1)


def test_tensor_parallel_parts_are_stored_whole(forge: Forge, tmp_path: Path) -> None:
    require_same(move(forge, tmp_path, 2, "z0t2 z1 z1t2 z2t2 z0t2"), losses=1)
    require_same(move(forge, tmp_path, 4, "z0t4 z1t4 z1t2"), losses=1)
    require_same(move(forge, tmp_path, 1, "z0 z2"), losses=1)


@pytest.mark.skipif(not compiled("async_io"), reason="DeepSpeed's async_io is not compiled here, which needs libaio-dev and two minutes")
@pytest.mark.parametrize(("optimizer", "layouts"), [("adamw", "z1 z3n z3n z0"), ("lars", "z0 z3n z2")])
def test_what_lies_on_disk_continues_anywhere_and_back(optimizer: str, layouts: str, forge: Forge, tmp_path: Path) -> None:
    moves = move(forge, tmp_path, 2, layouts, "--large", "--optimizer", optimizer)
    require_same(moves)
    assert all((record["on_disk"] > 0) == (record["layout"] == "z3n") for record in moves)


@pytest.mark.skipif(not compiled("cpu_adam"), reason="DeepSpeed's CPUAdam is not compiled here, which takes two minutes")
def test_deepspeeds_kernel_and_torchs_continue_one_another(forge: Forge, tmp_path: Path) -> None:
    moves = move(forge, tmp_path, 2, "z2o z2k z3k z0 z1k")
    assert all(record["states"] == ["exp_avg", "exp_avg_sq"] for record in moves)
    require_same(moves)


def steps_of(stage: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step")) for path in (stage / "checkpoints").glob("step*"))


def again_from(stage: Path, step: int) -> None:
    """Leaves of a finished stage what a run that was killed after a checkpoint leaves."""
    (stage / "done.json").unlink()
    (stage / "model.safetensors").unlink()
    for other in steps_of(stage):
        if other > step:
            shutil.rmtree(stage / "checkpoints" / f"step{other}")


def layout(config: Path, zero: int) -> None:
    """The ZeRO stage of the next start, in the DeepSpeed file that the recipe names."""
    (config.parent / "mine.json").write_text(json.dumps({"zero_optimization": {"stage": zero}}))


@pytest.mark.parametrize(
    ("base", "starts"),
    [(BERT, ((2, 0, 8), (1, 1, 10), (3, 2, 12), (2, 3, 14))), (RESNET, ((2, 0, 8), (1, 0, 10), (3, 2, 12)))],
    ids=["bert", "resnet"],
)
def test_a_stage_continues_on_other_ranks(
    base: dict[str, Any], starts: tuple[tuple[int, int, int], ...], forge: Forge, tmp_path: Path
) -> None:
    config = write_recipe(
        tmp_path / "recipe.yaml", recipe(base, {"wide.deepspeed": "mine.json", "wide.batch_size": 24, "wide.checkpoint_keep": 20})
    )
    stage = tmp_path / "runs" / base["run"]["name"] / "wide"
    curves = []
    # each start saves once, and the next one goes on from there
    for ranks, zero, saved in starts:
        layout(config, zero)
        if curves:
            again_from(stage, max(step for step in steps_of(stage) if step < saved))
        forge.start("train_wide.py", config, f"--wide.checkpoint_every={saved}", ranks=ranks).succeed()
        assert saved in steps_of(stage)
        curves.append(losses(stage))
    apart = [max(abs(one / other - 1) for one, other in zip(curve, curves[0], strict=True)) for curve in curves]
    print(f"{base['run']['name']}: {apart}")
    # the steps after the move learn under the new layout, whose sums are in another order; before it they are the old run's records
    assert max(apart) <= SAME
    assert len(curves[0]) == 20


def test_the_same_layout_continues_bit_for_bit(forge: Forge, tmp_path: Path) -> None:
    often = {"wide.checkpoint_every": 6, "wide.checkpoint_keep": 3}
    changes = {"wide.deepspeed": "mine.json", "wide.batch_size": 24, "model.dropout": 0.1, **often}
    config = write_recipe(tmp_path / "recipe.yaml", recipe(BERT, changes))
    layout(config, 3)
    stage = tmp_path / "runs" / "bert" / "wide"
    forge.start("train_wide.py", config, ranks=2).succeed()
    assert steps_of(stage) == [12, 18, 20]
    alone, state = losses(stage), weights(stage)
    again_from(stage, 12)
    forge.start("train_wide.py", config, ranks=2).succeed()
    assert losses(stage) == alone
    assert equal_bits(weights(stage), state)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(forge: Forge, tmp_path: Path) -> None:
    config = write_recipe(tmp_path / "recipe.yaml", recipe(BERT, {"wide.checkpoint_every": 6, "wide.checkpoint_keep": 3}))
    stage = tmp_path / "runs" / "bert" / "wide"
    forge.start("train_wide.py", config, ranks=2).succeed()
    alone, state = losses(stage), weights(stage)
    again_from(stage, 18)
    # what the second rank looks at
    path = stage / "checkpoints" / "step18" / "part-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    again = forge.start("train_wide.py", config, ranks=2)
    again.succeed()
    said = [line for line in again.stderr().splitlines() if "step18" in line]
    (line,) = said
    assert "part-00001.safetensors: is not as it was written; the checkpoint before it is used" in line
    assert losses(stage) == alone
    assert equal_bits(weights(stage), state)

    again_from(stage, 18)
    for manifest in (stage / "checkpoints").rglob("manifest.json"):
        manifest.write_bytes(b"")
    refused = forge.start("train_wide.py", config, ranks=2)
    assert refused.codes() == [2, 2]
    (line,) = [line for line in refused.stderr().splitlines() if line.startswith("error")]
    assert "step18/manifest.json: is not as it was written; there is no other checkpoint: remove " in line
