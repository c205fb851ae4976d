"""Tensor parallelism: a divided BERT is the whole one."""

import json
from pathlib import Path

import pytest

from tests.running import Forge

pytestmark = pytest.mark.slow

ROUND_OFF = 1e-5
"""fp32 sums over 2 or 4 parts in another order: 1e-7 a layer, two layers and their gradients."""


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("sequence", [False, True], ids=["whole positions", "sequence parallel"])
@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_divided_network_is_the_whole_one(ranks: int, norm: str, sequence: bool, dropout: float, forge: Forge, tmp_path: Path) -> None:
    program = Path(__file__).with_name("divided.py")
    flags = ["--sequence"] if sequence else []
    started = forge.program(program, str(tmp_path), "--norm", norm, "--dropout", str(dropout), *flags, cwd=tmp_path, ranks=ranks)
    started.succeed()
    for rank in range(ranks):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        print(f"rank {rank}: {found}")
        assert max(found["loss"], found["gradient"], found["logits"]) < ROUND_OFF
        # each rank holds its part, and the little that all need
        assert found["share"] < 1 / ranks + 0.2


def test_divided_positions_are_kept_divided(forge: Forge, tmp_path: Path) -> None:
    forge.program(Path(__file__).with_name("columns.py"), str(tmp_path), cwd=tmp_path, ranks=2).succeed()
    for rank in range(2):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert found == {"whole": 3 * 8 * 16, "parts": 3 * 4 * 16}
