"""A run that is told to end leaves after the same step on all ranks, with all of it kept, and continues bit for bit."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.imitating import OUTER, Imitations, losses_apart
from tests.running import (
    BERT,
    RESNET,
    Forge,
    Started,
    command,
    environment,
    equal_bits,
    losses,
    reached,
    recipe,
    steps_logged,
    weights,
    write_recipe,
)
from wtn_pretrain.cli import AGAIN

pytestmark = pytest.mark.slow

LONG = {"wide.steps": 150, "wide.checkpoint_every": 100, "wide.batch_size": 24}
"""The checkpoint of its own comes late, so that what continues is the one that the signal asked for."""
NARROW = {"narrow.steps": 120, "narrow.checkpoint_every": 100}


def told_at(started: Started, stage: Path, step: int, *ranks: int, by: signal.Signals) -> list[int]:
    """Sends a signal once a stage has logged a step; the exit codes."""
    reached(started, stage, step)
    started.kill(*ranks, by=by)
    return started.codes()


def left_after(started: Started, stage: str, why: str) -> int:
    """The step after which a stage says, in one line, that it has left."""
    said = [line for line in started.stderr().splitlines() if " left after step " in line]
    assert len(said) == 1, started.stderr()[-4000:]
    found = re.fullmatch(rf"{stage}: left after step (\d+) of \d+ on {why}, all saved; the same command continues", said[0])
    assert found, said[0]
    assert "Traceback" not in started.stderr()
    return int(found[1])


@pytest.mark.parametrize(
    ("base", "changes", "ranks", "to", "by"),
    [
        (BERT, {"model.dropout": 0.1}, 1, (0,), signal.SIGTERM),
        (BERT, {"wide.deepspeed": "ds_configs/zero2.json"}, 2, (1,), signal.SIGUSR1),
        (RESNET, {"wide.ema": 0.9}, 3, (0, 1, 2), signal.SIGTERM),
    ],
    ids=["one rank", "one of two ranks", "all of three ranks"],
)
def test_training_leaves_and_continues(
    base: dict[str, Any], changes: dict[str, Any], ranks: int, to: tuple[int, ...], by: signal.Signals, forge: Forge, tmp_path: Path
) -> None:
    kept = []
    for name in ("whole", "left"):
        config = write_recipe(tmp_path / f"{name}.yaml", recipe(base, {**LONG, **changes, "run.name": name}))
        stage = tmp_path / "runs" / name / "wide"
        if name == "left":
            started = forge.start("train_wide.py", config, ranks=ranks)
            assert told_at(started, stage, 20, *to, by=by) == [AGAIN] * ranks
            step = left_after(started, "wide", by.name)
            assert 20 <= step < 100
            assert (stage / "checkpoints" / f"step{step}").is_dir()
            assert not (stage / "done.json").exists()
            # every step that was taken is recorded, none beyond
            assert steps_logged(stage) == list(range(1, step + 1))
        again = forge.start("train_wide.py", config, ranks=ranks)
        again.succeed()
        kept.append((losses(stage), weights(stage)))
    assert kept[0][0] == kept[1][0]
    assert equal_bits(kept[0][1], kept[1][1])


@pytest.mark.parametrize(
    ("base", "changes", "ranks"),
    [
        (BERT, {**OUTER, "narrow.plan": "0-1,2-3"}, 2),
        (BERT, {"narrow.plan": "0-1,2-3x2", "narrow.deepspeed": "ds_configs/zero1.json", "narrow.micro_batch_size": 8}, 3),
        # units come and go, three steps a visit
        (BERT, {**OUTER, "narrow.plan": "0-1,2-3", "narrow.offload": "disk", "narrow.offload_batches": 3}, 2),
        # no rank waits for another where the teacher's answers are known: one may be ahead
        (BERT, {"narrow.plan": "0-1,2-3", "narrow.cache": "cache", "narrow.cache_batches": 20, "narrow.schedule": "parallel"}, 2),
        (RESNET, {"narrow.schedule": "bottom_up", "narrow.steps": 60}, 2),
    ],
    ids=["spans", "replicas with ZeRO 1", "units that come and go", "a cache", "bottom_up"],
)
def test_imitation_leaves_and_continues(base: dict[str, Any], changes: dict[str, Any], ranks: int, imitations: Imitations) -> None:
    changes = {**NARROW, **changes}
    whole = imitations.on(ranks, base, changes)
    config = imitations.config(base, changes)
    stage = imitations.stage(config)
    started = imitations.start(config, ranks=ranks)
    assert told_at(started, stage, 30, ranks - 1, by=signal.SIGUSR1) == [AGAIN] * ranks
    step = left_after(started, "narrow", "SIGUSR1")
    assert steps_logged(stage) == list(range(1, step + 1))
    again = imitations.start(config, ranks=ranks)
    again.succeed()
    told = re.search(r"^narrow (\d+)/", again.stderr(), re.MULTILINE)
    assert told is not None and int(told[1]) > step
    left = imitations.left(config)
    assert losses_apart(left, whole) == 0
    assert equal_bits(left.weights, whole.weights)


def test_a_time_limit_ends_a_run_of_all_stages(forge: Forge, tmp_path: Path) -> None:
    config = write_recipe(tmp_path / "recipe.yaml", recipe(BERT, {**LONG, "compare.scratch": False, "export.formats": []}))
    # a second after its start
    started = forge.start("run.py", config, "--run.time_limit=0.017", ranks=2)
    assert started.codes() == [AGAIN, AGAIN]
    left_after(started, "wide", "the time limit of 0.017 minutes")
    forge.start("run.py", config, ranks=2).succeed()
    assert (tmp_path / "runs" / "bert" / "summary.json").exists()


def test_everyone_is_told_under_the_launcher(forge: Forge, tmp_path: Path) -> None:
    """As a batch system does it: SIGTERM for the launcher and the ranks at once, which the launcher passes on to them again."""
    kept = []
    for name in ("whole", "left"):
        config = write_recipe(tmp_path / f"{name}.yaml", recipe(BERT, {**LONG, "run.name": name}))
        stage = tmp_path / "runs" / name / "wide"
        if name == "left":
            process = subprocess.Popen(
                command("train_wide.py", config, ranks=2),
                cwd=tmp_path,
                env=environment(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            deadline = time.monotonic() + 90
            while max(steps_logged(stage), default=0) < 20:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.005)
            os.killpg(process.pid, signal.SIGTERM)
            _, said = process.communicate(timeout=60)
            assert process.returncode != 0
            assert re.search(r"^wide: left after step \d+ of 150 on SIGTERM, all saved; the same command continues$", said, re.MULTILINE), (
                said
            )
            assert "Traceback" not in said
            assert not (stage / "done.json").exists()
        forge.start("train_wide.py", config, ranks=2).succeed()
        kept.append((losses(stage), weights(stage)))
    assert kept[0][0] == kept[1][0]
    assert equal_bits(kept[0][1], kept[1][1])
