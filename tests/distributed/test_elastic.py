"""Under `torchrun --max-restarts` a run of which a rank dies comes back by itself, and one that leaves on demand stays away."""

import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_pipeline_faults import is_rank
from tests.running import BERT, ROOT, Forge, environment, equal_bits, losses, recipe, steps_logged, weights, write_recipe
from wtn_pretrain.again import MARK

pytestmark = pytest.mark.slow

LONG: dict[str, Any] = {"wide.steps": 150, "wide.checkpoint_every": 20, "wide.deepspeed": "ds_configs/zero2.json"}


def torchrun(config: Path, restarts: int, *overrides: str) -> subprocess.Popen[str]:
    launcher = Path(sys.executable).parent / "torchrun"
    call = [launcher, "--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts), ROOT / "scripts" / "train_wide.py"]
    with (config.parent / "stderr").open("w") as file:
        return subprocess.Popen(
            [*map(str, call), "--config", str(config), *overrides],
            cwd=config.parent,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=file,
            text=True,
            start_new_session=True,
        )


def ended(process: subprocess.Popen[str], timeout: float = 200) -> int:
    try:
        return process.wait(timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_rank_that_dies_brings_the_run_back(forge: Forge, tmp_path: Path) -> None:
    config = write_recipe(tmp_path / "recipe.yaml", recipe(BERT, LONG))
    forge.start("train_wide.py", config, "--run.name=whole", ranks=2).succeed()
    stage = tmp_path / "runs" / "bert" / "wide"
    process = torchrun(config, 2)
    deadline = time.monotonic() + 120
    while max(steps_logged(stage), default=0) < 50:
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "stderr").read_text()[-4000:]
        time.sleep(0.01)
    (rank,) = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit() and is_rank(folder, 1, config)]
    os.kill(rank, signal.SIGKILL)
    assert ended(process) == 0, (tmp_path / "stderr").read_text()[-4000:]
    said = (tmp_path / "stderr").read_text()
    assert re.search(r"^error: rank 1 has died \(", said, re.MULTILINE) or "Signal 9" in said, said[-4000:]
    # the second start went on from a checkpoint
    first = [int(step) for step in re.findall(r"^wide (\d+)/150 loss", said, re.MULTILINE)]
    back = next(after for before, after in pairwise(first) if after <= before)
    assert back > 20
    whole = tmp_path / "runs" / "whole" / "wide"
    assert losses(stage) == losses(whole)
    assert equal_bits(weights(stage), weights(whole))


def test_a_run_that_leaves_on_demand_stays_away(tmp_path: Path) -> None:
    config = write_recipe(tmp_path / "recipe.yaml", recipe(BERT, {**LONG, "wide.steps": 100_000}))
    stage = tmp_path / "runs" / "bert" / "wide"
    # three seconds after its start
    process = torchrun(config, 1, "--run.time_limit=0.05")
    assert ended(process) != 0
    said = (tmp_path / "stderr").read_text()
    left = re.findall(r"^wide: left after step (\d+) of 100000 on the time limit of 0.05 minutes, all saved; .*$", said, re.MULTILINE)
    # torchrun has started it again, which left at once
    assert len(left) == 2 and len(set(left)) == 1, said[-4000:]
    assert steps_logged(stage) == list(range(1, int(left[0]) + 1))
    assert (tmp_path / "runs" / "bert" / MARK).read_text().startswith(f"wide: left after step {left[0]} ")
