"""All stages after a wide network that tensor ranks have trained: what they leave is whole, and the stages above take it as any other."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.running import BERT, Forge, losses, recipe, records, weights, write_recipe

pytestmark = pytest.mark.slow

ALL: dict[str, Any] = {"compare.scratch": False, "export.formats": ["hf"]}
DIVIDED: dict[str, Any] = {"wide.tensor_parallel": 2, "wide.sequence_parallel": True, "finetune.tensor_parallel": 2}


def test_stages_go_on_from_a_divided_teacher(forge: Forge, tmp_path: Path) -> None:
    runs = {}
    for name, changes in (("whole", {}), ("divided", DIVIDED)):
        folder = tmp_path / name
        folder.mkdir()
        forge.start("run.py", write_recipe(folder / "recipe.yaml", recipe(BERT, {**ALL, **changes})), ranks=2).succeed(240)
        runs[name] = folder / "runs" / "bert"
    whole, divided = runs["whole"], runs["divided"]
    for stage in ("wide", "narrow", "finetune"):
        assert {key: value.shape for key, value in weights(divided / stage).items()} == {
            key: value.shape for key, value in weights(whole / stage).items()
        }
    units = {name: [record["units"] for record in records(run / "narrow")] for name, run in runs.items()}
    pairs = [
        pair for rows in zip(units["divided"], units["whole"], strict=True) for pair in zip(*rows, strict=True) if pair != (None, None)
    ]
    imitated = max(abs(one / other - 1) for one, other in pairs)
    tuned = max(abs(one / other - 1) for one, other in zip(losses(divided / "finetune"), losses(whole / "finetune"), strict=True))
    print(f"units {imitated:.1e}, fine-tuning {tuned:.1e}")
    # teachers differ by round-off, along which AdamW takes whole steps where gradients are round-off themselves
    assert imitated < 1e-4
    assert tuned < 1e-4
    assert json.loads((divided / "export" / "hf" / "parity.json").read_text())["max_difference"] < 1e-4
