"""Stage 2 on several ranks when ranks die, stop, resume elsewhere, or are given what cannot run."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.imitating import OUTER, SGD, Imitations, apart, losses_apart
from tests.running import BERT, RESNET, Started, command, contents, environment, equal_bits, error_lines, reached, start, steps_logged
from wtn_pretrain.again import AGAIN
from wtn_pretrain.imitation.plan import Plan, Span, parse, write
from wtn_pretrain.parallel.watch import CONTINUES

pytestmark = pytest.mark.slow

LONG = {"narrow.steps": 120, "narrow.checkpoint_every": 20}
"""Seconds, so that a signal comes before the end."""
SPANS = {**LONG, "narrow.plan": "0-1,2-3"}
ZERO_1 = {"narrow.deepspeed": "ds_configs/zero1.json"}
REPLICAS = {**LONG, **ZERO_1, "narrow.plan": "0-3x2"}
BOTTOM_UP = {**SGD, "narrow.schedule": "bottom_up", "narrow.steps": 60, "narrow.checkpoint_every": 20}


def killed_at(imitations: Imitations, config: Path, step: int, ranks: int, *overrides: str) -> None:
    """Starts a run and kills all of its ranks at a step beyond its first checkpoint."""
    started = imitations.start(config, *overrides, ranks=ranks)
    reached(started, imitations.stage(config), step)
    started.kill()
    started.codes()
    assert not (imitations.stage(config) / "done.json").exists()
    assert (imitations.stage(config) / "checkpoints" / "latest.json").exists()


def continued(started: Started, beyond: int) -> None:
    """Waits for a run that must succeed, and have started behind a step."""
    started.succeed()
    told = re.search(r"^narrow (\d+)/", started.stderr(), re.MULTILINE)
    assert told is not None and int(told[1]) > beyond


RESUMED: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    # base, changes, step at which all ranks are killed (hybrid's student-fed pass begins at 60)
    "spans, outer widening": (BERT, {**SPANS, **OUTER}, 75),
    "replicas with ZeRO 1": (BERT, REPLICAS, 45),
    "bottom_up": (RESNET, BOTTOM_UP, 100),
    "units that come and go": (BERT, {**SPANS, **OUTER, "narrow.offload": "disk", "narrow.offload_batches": 3}, 75),
    "a cache": (BERT, {**SPANS, "narrow.cache": "cache", "narrow.cache_batches": 50}, 75),
    "accumulated": (BERT, {**SPANS, "narrow.micro_batch_size": 4}, 75),
}


@pytest.mark.parametrize("name", RESUMED)
def test_killed_ranks_continue_bitwise(name: str, imitations: Imitations) -> None:
    base, changes, step = RESUMED[name]
    whole = imitations.on(2, base, changes)
    config = imitations.config(base, changes)
    killed_at(imitations, config, step, ranks=2)
    # what is surely written is the checkpoint before the newest
    continued(imitations.start(config, ranks=2), beyond=step - 45)
    again = imitations.left(config)
    assert equal_bits(again.weights, whole.weights)
    assert losses_apart(again, whole) == 0
    assert again.done["imitation_error"] == whole.done["imitation_error"]
    assert sorted(path.name for path in again.folder.iterdir()) == sorted(path.name for path in whole.folder.iterdir())


@pytest.mark.parametrize(("first", "then"), [("0-1,2-3", ("0-3", "0-0,1-3x3")), ("0-3x2", ("0-2,3-3",))])
def test_a_checkpoint_continues_under_another_plan(first: str, then: Sequence[str], imitations: Imitations) -> None:
    changes = {**LONG, **SGD}
    alone = imitations.alone(BERT, changes)
    config = imitations.config(BERT, changes)
    killed_at(imitations, config, 45, 2, f"--narrow.plan={first}")
    for plan in then:
        copied = imitations.config(BERT, changes)
        shutil.copytree(config.parent / "runs", copied.parent / "runs", dirs_exist_ok=True)
        continued(imitations.start(copied, f"--narrow.plan={plan}", ranks=parse(plan).ranks), beyond=20)
        left = imitations.left(copied)
        loss, (weight, name) = losses_apart(left, alone), apart(left.weights, alone.weights)
        print(f"{first} then {plan}: losses {loss:.1e}, weights {weight:.1e} ({name})")
        # four times the steps of the other comparisons
        assert max(loss, weight) <= 2e-4


def test_a_damaged_checkpoint_is_named_once_and_the_one_before_it_used(imitations: Imitations) -> None:
    changes = {**SPANS, **OUTER, "narrow.steps": 60, "narrow.checkpoint_keep": 9}
    whole = imitations.on(2, BERT, changes)
    config = imitations.config(BERT, changes)
    shutil.copytree(whole.folder, imitations.stage(config), dirs_exist_ok=True)
    checkpoints = imitations.stage(config) / "checkpoints"
    # as after a kill behind the second checkpoint
    (imitations.stage(config) / "done.json").unlink()
    shutil.rmtree(checkpoints / "phase1-step30")
    # what the second rank has written, which is what it looks at
    part = checkpoints / "phase1-step10" / "part-00001.safetensors"
    content = bytearray(part.read_bytes())
    content[-9] ^= 1
    part.write_bytes(content)
    started = imitations.start(config, ranks=2)
    continued(started, beyond=20)
    (line,) = [line for line in started.stderr().splitlines() if "phase1-step10" in line]
    assert line.endswith("part-00001.safetensors: is not as it was written; the checkpoint before it is used")
    again = imitations.left(config)
    assert equal_bits(again.weights, whole.weights)
    assert losses_apart(again, whole) == 0
    # the other rank's part of another checkpoint in its place: all ranks refuse together
    (imitations.stage(config) / "done.json").unlink()
    for folder in checkpoints.glob("phase*"):
        shutil.copy(folder / "part-00000.safetensors", folder / "part-00001.safetensors")
    line = refused(imitations.start(config, ranks=2), {}, config.parent)
    assert "phase1-step30/part-00001.safetensors: " in line and "there is no other checkpoint: remove" in line


def one_error(said: Sequence[str], words: str) -> None:
    """Of all that was said one line is an error, with these words."""
    errors = [line for line in said if line.startswith("error:")]
    assert len(errors) == 1, said
    assert re.match(f"error: {words}", errors[0]), errors[0]
    assert not any("Traceback" in line for line in said), said


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_killed_rank_is_named_and_the_run_continues(culprit: int, imitations: Imitations) -> None:
    changes = {**SPANS, **OUTER}
    whole = imitations.on(2, BERT, changes)
    config = imitations.config(BERT, changes)
    started = imitations.start(config, ranks=2)
    reached(started, imitations.stage(config), 45)
    began = time.monotonic()
    started.kill(culprit)
    codes = started.codes()
    assert time.monotonic() - began < 10
    assert codes[culprit] == -signal.SIGKILL and codes[1 - culprit] == AGAIN
    units = ("units 0-1", "units 2-3")[culprit]
    one_error(started.errors(), rf"rank {culprit} \({units}\) has died \(killed by SIGKILL\); {CONTINUES}")
    continued(imitations.start(config, ranks=2), beyond=20)
    assert equal_bits(imitations.left(config).weights, whole.weights)


def test_a_stopped_rank_is_named(imitations: Imitations) -> None:
    config = imitations.config(BERT, {**LONG, "narrow.plan": "0-3x2", "narrow.patience": 5})
    started = imitations.start(config, ranks=2)
    reached(started, imitations.stage(config), 25)
    began = time.monotonic()
    started.kill(1, by=signal.SIGSTOP)
    codes = started.codes()
    assert time.monotonic() - began < 20
    assert codes == [AGAIN, -signal.SIGKILL]
    one_error(started.errors(), r"rank 1 \(units 0-3, replica 2 of 2\) has been stopped for 5 s")
    started = imitations.start(config, ranks=2)
    continued(started, beyond=0)


def test_a_rank_that_hangs_is_named_and_the_run_continues(imitations: Imitations, tmp_path: Path) -> None:
    """Rank 1 never comes back from a teacher block; rank 0 waits for it and is not to blame."""
    changes = {**SPANS, **OUTER, "narrow.patience": 3}
    whole = imitations.on(2, BERT, changes)
    config = imitations.config(BERT, changes)
    began = time.monotonic()
    program = Path(__file__).with_name("stuck.py")
    started = imitations.forge.program(program, "--config", str(config), cwd=config.parent, ranks=2)
    assert started.codes() == [AGAIN] * 2
    assert time.monotonic() - began < 60
    (line,) = [line for line in started.errors() if line.startswith("error:")]
    assert re.match(r"error: rank 1 \(units 2-3\) hangs: no progress for 3 s at 'teacher 2' of step \d+, in ", line), line
    continued(imitations.start(config, ranks=2), beyond=20)
    assert equal_bits(imitations.left(config).weights, whole.weights)


def test_a_killed_rank_under_the_launcher(imitations: Imitations, tmp_path: Path) -> None:
    config = imitations.config(BERT, {**SPANS, "narrow.steps": 400})
    with (
        (tmp_path / "stderr").open("w") as file,
        subprocess.Popen(
            command("imitate.py", config, ranks=2), cwd=config.parent, env=environment(), stdout=file, stderr=file, start_new_session=True
        ) as process,
    ):
        try:
            deadline = time.monotonic() + 90
            while max(steps_logged(imitations.stage(config)), default=0) < 30:
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "stderr").read_text()[-4000:]
                time.sleep(0.01)
            (rank,) = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit() and is_rank(folder, 1, config)]
            os.kill(rank, signal.SIGKILL)
            began = time.monotonic()
            assert process.wait(timeout=60) != 0
            assert time.monotonic() - began < 30
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    one_error(error_lines((tmp_path / "stderr").read_text(), launched=True), r"rank 1 \(units 2-3\) has died \(")


def is_rank(folder: Path, rank: int, config: Path) -> bool:
    """Whether a process is the rank of this number that was started with a configuration."""
    try:
        return f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0") and str(config).encode() in (
            folder / "cmdline"
        ).read_bytes().split(b"\0")
    except OSError:
        return False


PLAN_FILE = "plan.json"
SMALL = {"narrow.schedule": "joint", "narrow.batch_size": 2, "finetune.batch_size": 2}
REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    # changes, ranks, the line
    "more ranks than rows": (SMALL, 3, r"narrow.plan: 0-3x3 splits 2 samples over 3 ranks; .*"),
    "more ranks than units and rows": (
        {"narrow.batch_size": 1, "finetune.batch_size": 1},
        5,
        r"5 ranks: 4 units and micro-batches of 1 rows have work for 4, .*",
    ),
    "a plan for other ranks": ({"narrow.plan": "0-1,2-3"}, 3, r"narrow.plan: .* is for 2 ranks and this run has 3; .*--ranks 3"),
    "a plan that is none": ({"narrow.plan": "0-1,2..3"}, 2, r"narrow.plan: '2..3' is no span; write FIRST-LASTxREPLICAS, .*"),
    "a plan with a gap": ({"narrow.plan": "0-1,3-3"}, 2, r"narrow.plan: span 3-3x1 does not follow 0-1x1; .*"),
    "a plan of another depth": ({"narrow.plan": "0-1,2-7"}, 2, r"narrow.plan: .* covers units 0 to 7; the model has 0 \(the stem\) to 3"),
    "a plan file for another model": ({"narrow.plan": PLAN_FILE}, 2, r"narrow.plan: plan.json was made for other networks.*"),
    "no plan file": ({"narrow.plan": "absent.json"}, 2, r"narrow.plan: absent.json cannot be read.*"),
    "a plan where batches are split": (
        {"narrow.plan": "0-1,2-3", "narrow.schedule": "joint"},
        2,
        r"narrow: plan 0-1,2-3 does not fit schedule joint.*",
    ),
    "ZeRO 3": ({"narrow.deepspeed": "ds_configs/zero3.json"}, 2, r"narrow.deepspeed: .* is ZeRO 3, .* use ZeRO 0, 1 or 2"),
}


def refused(started: Started, before: dict[str, bytes], folder: Path) -> str:
    """The one line by which all ranks end; what was there is untouched."""
    codes = started.codes(timeout=60)
    assert set(codes) == {2}, (codes, started.stderr()[-4000:])
    lines = started.errors()
    assert len(lines) == 1 and lines[0].startswith("error: "), started.stderr()[-4000:]
    after = contents(folder)
    assert {name: after.get(name) for name in before} == before
    return lines[0]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused_once(name: str, imitations: Imitations) -> None:
    changes, ranks, words = REFUSED[name]
    config = imitations.config(BERT, changes)
    write(config.parent / PLAN_FILE, Plan((Span(0, 1), Span(2, 3))), "another model")
    before = contents(config.parent)
    line = refused(imitations.start(config, ranks=ranks), before, config.parent)
    assert re.fullmatch(f"error: {words}", line), line


def test_ranks_that_disagree(imitations: Imitations) -> None:
    config = imitations.config(BERT, {})
    before = contents(config.parent)
    started = imitations.forge.start("imitate.py", config, ranks=3, each=[[], ["--narrow.steps=30"], ["--narrow.steps=31"]])
    line = refused(started, before, config.parent)
    assert line == (
        "error: ranks disagree: rank 2 was started with 'steps: 31' where rank 0 has 'steps: 30'; give every rank the same configuration"
    )
    assert contents(config.parent) == before


OTHER_RANKS = {
    "ZeRO": (BERT, {**LONG, **ZERO_1, "narrow.schedule": "parallel"}, 45, "ZeRO has divided its optimizer"),
    "stored activations": (RESNET, BOTTOM_UP, 70, "its stored activations are those of the old ranks"),
}


@pytest.mark.parametrize("name", OTHER_RANKS)
def test_a_checkpoint_of_other_ranks_is_refused(name: str, imitations: Imitations) -> None:
    base, changes, step, words = OTHER_RANKS[name]
    config = imitations.config(base, changes)
    killed_at(imitations, config, step, ranks=2)
    before = contents(config.parent)
    for ranks in (1, 3):
        line = refused(imitations.start(config, ranks=ranks), before, config.parent)
        assert words in line and "checkpoints: written under plan" in line and "remove the folder" in line
    # started as before, it goes on
    continued(imitations.start(config, ranks=2), beyond=20)


def test_a_refusal_under_the_launcher(imitations: Imitations) -> None:
    config = imitations.config(BERT, {"narrow.plan": "0-3"})
    done = start("imitate.py", config, ranks=2)
    assert done.returncode == 2
    assert len(error_lines(done.stderr, launched=True)) == 1, done.stderr
    one_error(done.stderr.splitlines(), r"narrow.plan: 0-3x1 is for 1 ranks and this run has 2")
