"""Kill -9 of a random rank at random moments, again and again, and what must come of it: the run that nobody disturbed, bit for bit."""

import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.layouts import LAYOUTS, Layout, Runs
from tests.running import Started, equal_bits

NOTICED = 60.0
"""Seconds in which the other ranks of a stage at work must have ended."""
LAUNCHER = 5.0
"""Seconds after which those are ended that had not met yet: nobody but a launcher sees a rank die there."""


class Kill(NamedTuple):
    """One rank killed."""

    rank: int
    moment: str
    """What was waited for."""
    at_work: bool
    """Whether the stage had begun to train; if not, its ranks may not have met."""
    in_save: bool
    """Whether a part of a checkpoint was left."""
    seconds: float
    """Until the last rank had ended."""
    newest: str
    """The newest checkpoint that stood there."""


class Trial(NamedTuple):
    """A run that was killed several times and came to its end."""

    layout: str
    seed: int
    kills: list[Kill]
    starts: int
    problems: list[str]
    """What must not have happened; empty: nothing."""


def trial(runs: Runs, name: str, seed: int, times: int) -> Trial:
    """Runs a layout, kills a rank up to `times` times, lets it come to its end, and compares. The same seed chooses the same ranks and the
    same kinds of moments; where they find the run depends on the machine."""
    layout, choose = LAYOUTS[name], random.Random(seed)
    whole, seconds = runs.whole(name)
    config = runs.config(layout)
    stage = runs.stage(layout, config)
    kills: list[Kill] = []
    problems: list[str] = []
    starts, before = 0, ""
    while len(kills) < times:
        started = runs.start(layout, config)
        starts += 1
        kill = _kill(started, layout, stage, choose, seconds)
        problems += _lost(started, layout, before)
        if kill is None:
            # it came to its end before the moment did
            break
        kills.append(kill)
        if kill.at_work and kill.seconds > NOTICED:
            problems.append(f"the others ended {kill.seconds:.0f} s after rank {kill.rank}")
        before = kill.newest
    if not (stage / "done.json").exists():
        started = runs.start(layout, config)
        starts += 1
        codes = started.codes(300)
        problems += _lost(started, layout, before)
        if any(codes):
            problems.append(f"ended with {codes}: {started.stderr()[-2000:]}")
    if not problems:
        problems += _differences(runs, layout, config, whole)
    return Trial(name, seed, kills, starts, problems)


def _kill(started: Started, layout: Layout, stage: Path, choose: random.Random, seconds: float) -> Kill | None:
    """Waits for a random moment, kills a random rank, and waits until all have ended; None where the run ended first."""
    rank = choose.randrange(layout.ranks)
    moment = choose.choice(["time", "save", "save", "step"])
    pids = started.pids()
    if moment == "time":
        until = started.began + choose.uniform(0, seconds)
        met = _until(started, lambda: time.monotonic() >= until)
    elif moment == "save":
        saves, later = choose.randrange(4), choose.uniform(0, 0.01)
        met = _until(started, _SaveSeen(stage / "checkpoints", saves))
        time.sleep(later)
    else:
        steps = choose.randrange(1, 40)
        path = stage / "metrics.jsonl"
        _until(started, path.exists)
        begin = _lines(path)
        met = _until(started, lambda: _lines(path) >= begin + steps)
    if not met:
        started.codes(300)
        return None
    at_work = _first_step(started, layout.stage) is not None
    began = time.monotonic()
    try:
        os.kill(pids[rank], signal.SIGKILL)
    except ProcessLookupError:
        started.codes(300)
        return None
    if not at_work:
        _until(started, lambda: time.monotonic() > began + LAUNCHER)
        if not started.ended():
            started.kill()
    codes = started.codes(300)
    if codes[rank] != -signal.SIGKILL:
        # it had ended while it was aimed at
        return None
    # before the first step there may be drafts that an earlier start has left
    in_save = at_work and bool(_drafts(stage / "checkpoints"))
    return Kill(rank, moment, at_work, in_save, time.monotonic() - began, _newest(stage / "checkpoints"))


def _until(started: Started, met: Any) -> bool:
    """Waits for a moment; whether it came before the end."""
    while not met():
        if started.ended():
            return False
        time.sleep(0.0005)
    return True


class _SaveSeen:
    """Becomes true when so many saves have been seen, and then another begins."""

    def __init__(self, folder: Path, saves: int) -> None:
        self._folder, self._left, self._within = folder, saves, False
        # what an earlier start has left
        self._old = set(_drafts(folder))

    def __call__(self) -> bool:
        within = bool(set(_drafts(self._folder)) - self._old)
        if within and not self._within:
            self._left -= 1
        self._within = within
        return self._left < 0


def _drafts(folder: Path) -> list[str]:
    """What is written and does not count yet."""
    found = []
    for root, folders, files in os.walk(folder):
        found += [os.path.join(root, name) for name in (*folders, *files) if name.startswith(".") and name.endswith(".part")]
    return found


def _newest(folder: Path) -> str:
    """The newest checkpoint that counts; empty: none."""
    names = [path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")] if folder.is_dir() else []
    if not any((folder / name).exists() for name in ("latest", "latest.json")):
        return ""
    return max(names, key=lambda name: tuple(map(int, re.findall(r"\d+", name))), default="")


def _first_step(started: Started, stage: str) -> int | None:
    """The first step that a start has reported."""
    found = re.search(rf"^{stage} (\d+)/", started.stderr(), re.MULTILINE)
    return int(found[1]) if found else None


def _lost(started: Started, layout: Layout, before: str) -> list[str]:
    """Whether a start has gone back behind a checkpoint that stood there."""
    first, problems = _first_step(started, layout.stage), []
    if "there is no other checkpoint" in started.stderr() or "is not as it was written" in started.stderr():
        problems.append(f"a checkpoint is damaged: {started.stderr()[-1000:]}")
    if before and first is not None:
        # those of stage 2 are named by phase
        kept = int(before.removeprefix("step")) if before.startswith("step") else 1
        if first <= kept:
            problems.append(f"went on at step {first}, though {before} stood there")
    return problems


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _differences(runs: Runs, layout: Layout, config: Path, whole: Any) -> list[str]:
    try:
        left = runs.left(layout, config)
    except (AssertionError, OSError) as error:
        return [str(error)]
    problems = []
    if left.losses != whole.losses:
        wrong = next((mine[0] for mine, theirs in zip(left.losses, whole.losses, strict=False) if mine != theirs), len(left.losses))
        problems.append(f"losses differ from step {wrong} on ({len(left.losses)} of {len(whole.losses)} steps)")
    if not equal_bits(left.weights, whole.weights):
        problems.append("weights differ")
    return problems
