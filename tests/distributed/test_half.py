"""fp16 as DeepSpeed has it: losses are scaled until no gradient overflows, a step that overflows is left out and counted."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.running import BERT, Forge, error_lines, losses, recipe, records, weights, write_recipe

pytestmark = pytest.mark.slow

HALF = Path(__file__).with_name("half.py")
STAGES = [1, 2, 3]


@pytest.fixture(scope="module")
def fp32(forge: Forge, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses in full precision."""
    folder = tmp_path_factory.mktemp("fp32")
    forge.start("train_wide.py", write_recipe(folder / "recipe.yaml", recipe(BERT)), ranks=2).succeed()
    return losses(folder / "runs" / "bert" / "wide")


def half(forge: Forge, folder: Path, stage: int, power: int, changes: dict[str, Any] | None = None) -> Path:
    """Trains in fp16 from a loss scale of 2 ** `power` on two ranks; the folder that the stage leaves."""
    tree = {"zero_optimization": {"stage": stage}, "fp16": {"initial_scale_power": power, "hysteresis": 1}}
    (folder / "mine.json").write_text(json.dumps(tree))
    config = write_recipe(
        folder / "recipe.yaml", recipe(BERT, {"wide.precision": "fp16", "wide.deepspeed": "mine.json", **(changes or {})})
    )
    forge.program(HALF, "--config", str(config), cwd=folder, ranks=2).succeed()
    return folder / "runs" / "bert" / "wide"


@pytest.mark.parametrize("stage", STAGES)
def test_fp16_stays_near_fp32(stage: int, tmp_path: Path, forge: Forge, fp32: list[float]) -> None:
    folder = half(forge, tmp_path, stage, 8)
    apart = max(abs(mine - other) / other for mine, other in zip(losses(folder), fp32, strict=True))
    print(f"fp16, ZeRO {stage}: {apart:.1e}")
    # 11 bits of mantissa
    assert 0 < apart < 0.01
    assert {record["loss_scale"] for record in records(folder)} == {256}
    assert {record["overflows"] for record in records(folder)} == {0}
    state = weights(folder)
    assert all(value.dtype == torch.float32 for value in state.values())
    assert all((value.half().float() != value).float().mean() > 0.5 for value in state.values() if value.dim() > 1)


@pytest.mark.parametrize("stage", STAGES)
def test_steps_that_overflow_are_left_out_and_counted(stage: int, tmp_path: Path, forge: Forge) -> None:
    folder = half(forge, tmp_path, stage, 24)
    told = records(folder)
    skipped = [record["overflows"] for record in told]
    scales = [record["loss_scale"] for record in told]
    assert skipped == sorted(skipped) and 0 < skipped[-1] < 15, skipped
    # every step that was left out has halved the scale, and its gradient had no norm
    assert scales == [2 ** (24 - count) for count in skipped]
    assert [record["grad_norm"] is None for record in told] == [now > before for now, before in zip(skipped, [0, *skipped], strict=False)]
    curve = losses(folder)
    assert all(map(math.isfinite, curve)) and curve[-1] < 0.95 * curve[0]


def test_fp16_is_refused_where_the_device_has_none(tmp_path: Path, forge: Forge) -> None:
    started = forge.start("train_wide.py", write_recipe(tmp_path / "recipe.yaml", recipe(BERT, {"wide.precision": "fp16"})), ranks=2)
    if started.codes() == [0, 0]:
        pytest.skip("this CPU computes in half precision")
    assert started.codes() == [2, 2], started.stderr()
    (line,) = error_lines(started.stderr())
    assert line.startswith("error: wide.precision: fp16 is not supported on this device") and line.endswith("use bf16 or fp32")
