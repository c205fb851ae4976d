"""Rows that grow while training goes on: what the task counts and gives at each step."""

from pathlib import Path

import pytest

from tests.running import BERT, recipe
from wtn_pretrain.config import validate
from wtn_pretrain.recipe import Recipe
from wtn_pretrain.stages import open_task


@pytest.mark.parametrize("packing", ["none", "documents"])
def test_flops_and_batches_follow_the_lengths(tmp_path: Path, packing: str) -> None:
    made = validate(Recipe, recipe(BERT, {"data.lengths": [[0.25, 8], [0.5, 16]], "data.packing": packing}))
    plain = validate(Recipe, recipe(BERT, {"data.packing": packing}))
    task, full = (open_task(one, tmp_path / "cache") for one in (made, plain))
    shape = task.complete(made.model)
    stream = task.stream(4, steps=8, seed=0)
    widths = [stream.micro_batch(step, 0)["input_ids"].shape[1] for step in range(8)]
    assert widths == [8, 8, 16, 16, 24, 24, 24, 24]
    assert stream.micro_batch(0, 0)["positions"].shape[1] == 1 and stream.micro_batch(7, 0)["positions"].shape[1] == 3
    assert [task.step_length(step, 8) for step in range(8)] == widths and full.step_length(0, 8) == 24
    counted = [task.step_flops(shape, step, 8) for step in range(8)]
    assert counted[0].total < counted[2].total < counted[4].total == full.forward_flops(shape).total == task.forward_flops(shape).total
    assert task.stage_flops(shape, 8) == pytest.approx(sum(one.total for one in counted) / 8)
    assert full.stage_flops(shape, 8) == full.forward_flops(shape).total
