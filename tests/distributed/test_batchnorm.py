"""Batch norm over ranks that hold different numbers of images is batch norm over all of them."""

import json
from pathlib import Path

import pytest

from tests.running import Forge

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_normalise_together(ranks: int, forge: Forge, tmp_path: Path) -> None:
    forge.program(Path(__file__).with_name("normed.py"), str(tmp_path), cwd=tmp_path, ranks=ranks).succeed()
    for rank in range(ranks):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        print(found)
        # fp32 against double: sums of a hundred numbers
        assert found.keys() == {"output", "input", "weight", "bias", "running_mean", "running_var"}
        assert max(found.values()) < 1e-5
