"""The cross-entropy of a vocabulary that is divided over tensor ranks: that of the whole one, and its logits are never whole."""

import json
from pathlib import Path

import pytest

from tests.distributed.vocabulary import CASES
from tests.running import Forge

pytestmark = pytest.mark.slow

ROUND_OFF = {"fp64": 1e-12, "bf16": 2e-2, "large logits": 1e-4}
"""Of sums in another order, fp32 unless named (1e-5). bf16: logits and gradients are rounded to 8 bits; large logits: to 1e-7 of 1000."""


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_divided_vocabulary_has_the_loss_of_the_whole_one(ranks: int, forge: Forge, tmp_path: Path) -> None:
    forge.program(Path(__file__).with_name("vocabulary.py"), str(tmp_path), cwd=tmp_path, ranks=ranks).succeed()
    for rank in range(ranks):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert found.keys() == CASES.keys()
        for case, errors in found.items():
            largest = errors.pop("largest")
            print(f"rank {rank}, {case}: {errors}, largest tensor {largest:.2f} of the logits")
            assert max(errors.values()) < ROUND_OFF.get(case, 1e-5), case
            if case == "several chunks":
                # the gradient of the weight, 40 x 8 or 60 x 8, and chunks of 7 x the ranks rows
                assert largest < 0.5
