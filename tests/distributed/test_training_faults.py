"""Stages 1 and 3 when a rank dies or stops: it is named in bounded time, and the run continues bit for bit."""

import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.distributed.test_preemption import LONG
from tests.running import BERT, Forge, equal_bits, losses, reached, recipe, weights, write_recipe
from wtn_pretrain.again import AGAIN
from wtn_pretrain.parallel.watch import CONTINUES

pytestmark = pytest.mark.slow

EVERY: dict[str, Any] = {**LONG, "wide.checkpoint_every": 15, "wide.deepspeed": "ds_configs/zero1.json"}


Whole = tuple[list[float], dict[str, Tensor]]


@pytest.fixture(scope="module")
def whole(forge: Forge, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """What a run leaves that nobody disturbs."""
    config = write_recipe(tmp_path_factory.mktemp("whole") / "recipe.yaml", recipe(BERT, EVERY))
    forge.start("train_wide.py", config, ranks=2).succeed()
    stage = config.parent / "runs" / "bert" / "wide"
    return losses(stage), weights(stage)


@pytest.mark.parametrize(
    ("culprit", "by", "says", "within"),
    [
        (0, signal.SIGKILL, r"has died \(killed by SIGKILL\)", 10.0),
        (1, signal.SIGKILL, r"has died \(killed by SIGKILL\)", 10.0),
        # a minute is promised; it is not heard for 30 s
        (1, signal.SIGSTOP, r".*stopped.*", 60.0),
    ],
    ids=["the first killed", "the second killed", "stopped"],
)
def test_a_lost_rank_is_named(
    culprit: int, by: signal.Signals, says: str, within: float, whole: Whole, forge: Forge, tmp_path: Path
) -> None:
    config = write_recipe(tmp_path / "recipe.yaml", recipe(BERT, EVERY))
    stage = tmp_path / "runs" / "bert" / "wide"
    started = forge.start("train_wide.py", config, ranks=2)
    reached(started, stage, 40)
    began = time.monotonic()
    started.kill(culprit, by=by)
    codes = started.codes()
    seconds = time.monotonic() - began
    print(f"rank {culprit}, {by.name}: {seconds:.1f} s")
    assert seconds < within
    assert codes[1 - culprit] == AGAIN
    (said,) = [line for line in started.errors() if line.startswith("error:")]
    assert re.fullmatch(rf"error: rank {culprit} {says}; {CONTINUES}", said), said
    assert "Traceback" not in started.stderr()
    forge.start("train_wide.py", config, ranks=2).succeed()
    assert losses(stage) == whole[0]
    assert equal_bits(weights(stage), whole[1])


def test_a_batch_may_take_as_long_as_a_step(forge: Forge, tmp_path: Path) -> None:
    config = write_recipe(tmp_path / "recipe.yaml", recipe(BERT))
    program = Path(__file__).with_name("slow_data.py")
    started = forge.program(program, "--config", str(config), cwd=tmp_path, ranks=2)
    started.succeed()
    assert time.monotonic() - started.began > 5
    # but not longer
    again = forge.program(program, "--config", str(config), "--run.name=again", "--wide.patience=2", cwd=tmp_path, ranks=2)
    assert set(again.codes()) == {AGAIN}
    (said,) = [line for line in again.errors() if line.startswith("error:")]
    assert re.match(r"error: rank 1 hangs: no progress for \d+ s at 'data' of step 8, ", said), said
