"""Where no stage is at work ranks are watched as well, one that is alone is watched at work, and all leave their stacks."""

import re
import signal
import time
from pathlib import Path

import pytest

from tests.running import BERT, RESNET, Forge, Started, recipe, write_recipe
from wtn_pretrain.again import AGAIN
from wtn_pretrain.parallel.watch import CONTINUES

pytestmark = pytest.mark.slow

STALLED = Path(__file__).with_name("stalled.py")


def come(folder: Path, started: Started, *ranks: int) -> None:
    """Waits until ranks have come to the place where one stalls."""
    deadline = time.monotonic() + 90
    while not all((folder / f"here-{rank}").exists() for rank in ranks):
        assert not started.ended() and time.monotonic() < deadline, started.stderr()[-4000:]
        time.sleep(0.02)


def one_error(started: Started) -> str:
    (line,) = [line for line in started.errors() if line.startswith("error:")]
    assert "Traceback" not in started.stderr()
    return line


@pytest.mark.parametrize(
    ("place", "stalls", "dies"),
    [("open", 0, 1), ("open", 1, 0), ("network", 0, 1)],
    ids=["the second, while data is opened", "the first, while data is opened", "the second, while the first writes its network"],
)
def test_a_rank_that_dies_where_no_stage_is_at_work(place: str, stalls: int, dies: int, forge: Forge, tmp_path: Path) -> None:
    config = write_recipe(tmp_path / "recipe.yaml", recipe(RESNET))
    started = forge.program(STALLED, place, str(stalls), "--config", str(config), cwd=tmp_path, ranks=2)
    come(tmp_path, started, *([0] if place == "network" else [0, 1]))
    # the other one is on its way to wait for it
    time.sleep(1)
    began = time.monotonic()
    started.kill(dies)
    codes = started.codes()
    assert time.monotonic() - began < 10
    assert codes[dies] == -signal.SIGKILL and codes[1 - dies] == AGAIN
    assert one_error(started) == f"error: rank {dies} has died (killed by SIGKILL); {CONTINUES}"


def test_a_loader_that_stalls_is_named_where_a_rank_is_alone(forge: Forge, tmp_path: Path) -> None:
    config = write_recipe(tmp_path / "recipe.yaml", recipe(RESNET, {"wide.patience": 3, "wide.checkpoint_every": 5}))
    started = forge.program(STALLED, "data", "0", "--config", str(config), cwd=tmp_path)
    assert started.codes() == [AGAIN]
    stacks = "runs/resnet/wide/stacks"
    line = one_error(started)
    assert re.fullmatch(rf"error: rank 0 hangs: no progress for \d+ s at 'data' of step 8, in .*; stacks in {stacks}; {CONTINUES}", line), (
        line
    )
    (left,) = (tmp_path / stacks).iterdir()
    told = left.read_text()
    assert re.match(r"\S+T\S+, rank 0 at 'data' of step 8: rank 0 hangs: no progress for", told)
    assert "stalled.py" in told and "in stall" in told
    forge.start("train_wide.py", config).succeed()


def test_every_rank_leaves_its_stacks(forge: Forge, tmp_path: Path) -> None:
    changes = {"wide.patience": 3, "wide.deepspeed": "ds_configs/zero1.json"}
    config = write_recipe(tmp_path / "recipe.yaml", recipe(BERT, changes))
    started = forge.program(STALLED, "data", "1", "--config", str(config), cwd=tmp_path, ranks=2)
    assert started.codes() == [AGAIN, AGAIN]
    assert "rank 1 hangs" in one_error(started)
    stacks = tmp_path / "runs" / "bert" / "wide" / "stacks"
    assert sorted(path.name for path in stacks.iterdir()) == ["rank-0.txt", "rank-1.txt"]
    waits, hangs = ((stacks / f"rank-{rank}.txt").read_text() for rank in (0, 1))
    assert "rank 1 hangs" in waits.splitlines()[0] and "loop.py" in waits and "in stall" not in waits
    assert "in stall" in hangs
