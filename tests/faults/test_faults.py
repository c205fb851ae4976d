"""The quick part of the faults, for CI: `python -m tests.faults` does all of it."""

import pytest

from tests.faults.broken import CASES, broken, compiler, jumping
from tests.faults.kills import trial
from tests.faults.layouts import Runs

pytestmark = pytest.mark.slow

needs_shim = pytest.mark.skipif(compiler() is None, reason="no C compiler to build the shim with that makes calls fail")


@pytest.mark.parametrize(("name", "seed"), [("wide, ZeRO 2", 1), ("narrow, 2 spans", 2), ("finetune, alone", 3)])
def test_killed_and_killed_again(name: str, seed: int, runs: Runs) -> None:
    done = trial(runs, name, seed, times=2)
    print(done)
    assert not done.problems
    assert done.kills


@needs_shim
@pytest.mark.parametrize(
    "name",
    [
        "full on the second rank",
        "broken while a part is made durable",
        "read-only for a save",
        "full where records go",
        "full for the last saves",
    ],
)
def test_a_disk_that_fails(name: str, runs: Runs) -> None:
    done = broken(runs, name)
    print(done)
    assert not done.problems
    assert done.code == CASES[name].code


@needs_shim
def test_a_clock_that_jumps(runs: Runs) -> None:
    done = jumping(runs, "wide, ZeRO 2")
    assert not done.problems
