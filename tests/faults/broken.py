"""Disks that are full, broken or read-only, and a clock that jumps: a shim in front of libc, and what must come of it."""

import errno
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.layouts import LAYOUTS, Layout, Runs
from tests.running import Started, equal_bits, reached, records, steps_logged
from wtn_pretrain.errors import UserError
from wtn_pretrain.verify import find

SOURCE = Path(__file__).with_name("shim.c")
DAY = 86_400


def compiler() -> str | None:
    """What compiles the shim; None: there is nothing."""
    return shutil.which("cc") or shutil.which("gcc")


def build(folder: Path) -> Path:
    """The shim, compiled."""
    path = folder / "shim.so"
    subprocess.run([compiler() or "cc", "-shared", "-fPIC", "-O1", "-o", path, SOURCE, "-ldl", "-lpthread"], check=True)
    return path


class Fault(NamedTuple):
    """Calls that fail."""

    call: str
    error: int
    path: str
    """What the file's path has in it."""
    skip: int = 0
    """Calls before the first that fails."""
    count: int = -1
    """Calls that fail; -1: all further ones."""

    def __str__(self) -> str:
        return f"{self.call}:{self.error}:{self.path}:{self.skip}:{self.count}"


class Case(NamedTuple):
    """What is broken in a run, and how it ends."""

    faults: tuple[Fault, ...]
    rank: int | None
    """Whose calls fail; None: those of all."""
    layout: str
    says: str
    """Words of the one line that is said."""
    code: int = 0
    begins: bool = True
    """Whether it comes to its first checkpoint."""


# saves come after every fifth of 80 steps; a part is written through `.part-...part` in a draft `.step30.part`
CASES: dict[str, Case] = {
    "full while a part is written": Case((Fault("write", errno.ENOSPC, ".step30.part/"),), 0, "wide, alone", "No space left on device"),
    "full on the second rank": Case((Fault("write", errno.ENOSPC, ".step30.part/"),), 1, "wide, ZeRO 2", "No space left on device"),
    "full for three saves": Case(
        tuple(Fault("write", errno.ENOSPC, f".step{step}.part/") for step in (30, 35, 40)), 0, "wide, alone", "No space left on device"
    ),
    "broken while a part is made durable": Case((Fault("fsync", errno.EIO, ".step30.part/"),), 0, "wide, ZeRO 2", "Input/output error"),
    "broken while a checkpoint is switched in": Case(
        (Fault("rename", errno.EIO, ".step30.part>"),), None, "wide, ZeRO 2", "Input/output error"
    ),
    "broken while any file is switched in": Case((Fault("rename", errno.EIO, ".step30.part"),), 0, "wide, alone", "Input/output error"),
    "read-only for a save": Case(
        (Fault("mkdir", errno.EROFS, ".step30.part"), Fault("open", errno.EROFS, ".step30.part")), 0, "wide, alone", "Read-only file system"
    ),
    "full where records go": Case((Fault("write", errno.ENOSPC, "metrics.jsonl", 20, 25),), 0, "wide, alone", "wait in memory"),
    "full where charts go": Case((Fault("write", errno.ENOSPC, "events.out", 0, 3),), 0, "wide, alone", "TensorBoard"),
    "full for the last saves": Case(
        tuple(Fault("write", errno.ENOSPC, f".step{step}.part/") for step in (70, 75, 80)), 0, "wide, alone", "No space left on device", 2
    ),
    "stage 2: full while a part is written": Case(
        (Fault("write", errno.ENOSPC, ".phase0-step20.part/"),), 1, "narrow, 2 spans", "No space left on device"
    ),
    "stage 2: broken while a checkpoint is switched in": Case(
        (Fault("rename", errno.EIO, ".phase1-step10.part>"),), None, "narrow, 2 replicas, ZeRO 1", "Input/output error"
    ),
    "stage 2: full for the last save": Case(
        (Fault("write", errno.ENOSPC, ".phase1-step30.part/"),), 0, "narrow, 2 spans", "No space left on device", 2
    ),
    "not allowed at the start": Case((Fault("open", errno.EACCES, ".probe-"),), None, "wide, ZeRO 2", "run.folder", 2, False),
    "read-only at the start": Case((Fault("mkdir", errno.EROFS, "runs"),), None, "wide, alone", "Read-only file system", 2, False),
    "full at the start": Case((Fault("write", errno.ENOSPC, "config.yaml"),), 0, "wide, ZeRO 2", "config.yaml", 2, False),
    "full where the network goes": Case((Fault("write", errno.ENOSPC, ".model.safetensors"),), 0, "wide, alone", "model.safetensors", 2),
}


class Outcome(NamedTuple):
    """What came of a case."""

    name: str
    code: int
    said: list[str]
    problems: list[str]
    seconds: float


def broken(runs: Runs, name: str) -> Outcome:
    """Runs a case on ranks that have the shim; a run that ends is started again on a disk that works."""
    case = CASES[name]
    layout = LAYOUTS[case.layout]
    config = runs.config(layout)
    variables = {"FAULTS": ";".join(map(str, case.faults)), "FAULTY_RANK": "" if case.rank is None else str(case.rank)}
    started = runs.start(layout, config, variables=variables)
    codes = started.codes(300)
    said, problems = _said(started, layout.stage), []
    if set(codes) != {case.code}:
        problems.append(f"ended with {codes}, not {case.code}: {started.stderr()[-2000:]}")
    if case.says and (not said or any(case.says not in line for line in said)):
        problems.append(f"said {said}")
    if any("Traceback" in line for line in started.stderr().splitlines()):
        problems.append(f"a traceback: {started.stderr()[-2000:]}")
    stage = runs.stage(layout, config)
    if case.begins:
        problems += _kept(stage / "checkpoints")
    elif stage.exists():
        problems.append(f"{stage}: something was begun")
    if case.code:
        if not said or not said[-1].startswith("error: "):
            problems.append(f"no line of an error: {said}")
        runs.start(layout, config).succeed(300)
    problems += _differences(runs, case.layout, config)
    return Outcome(name, max(codes), said, problems, started.seconds())


def jumping(runs: Runs, name: str) -> Outcome:
    """A run whose wall clock goes a day forth and two back every second."""
    layout = LAYOUTS[name]
    config = runs.config(layout)
    started = runs.start(layout, config, variables={"FAULTY_CLOCK": str(DAY)})
    codes = started.codes(300)
    problems = [f"ended with {codes}: {started.stderr()[-2000:]}"] if any(codes) else _differences(runs, name, config)
    days = {record["time"][:10] for record in records(runs.stage(layout, config))}
    if not any(codes) and len(days) < 2:
        problems.append(f"the clock did not jump ({days}): the run is too short")
    result = json.loads((runs.stage(layout, config) / "done.json").read_text()) if not any(codes) else {"seconds": 0.0}
    if not 0 <= result["seconds"] < 300:
        problems.append(f"{result['seconds']} s were counted")
    return Outcome(f"{name}, clock", max(codes), [], problems, started.seconds())


def twice(runs: Runs, name: str) -> Outcome:
    """A run that is started a second time while it is at work."""
    layout = LAYOUTS[name]
    config = runs.config(layout, {f"{layout.stage}.steps": 2000})
    first = runs.start(layout, config)
    reached(first, runs.stage(layout, config), 5)
    second = runs.start(layout, config)
    codes = second.codes(120)
    said = _said(second, layout.stage)
    problems = [] if set(codes) == {2} and len(said) == 1 and "works on this run" in said[0] else [f"ended with {codes}, said {said}"]
    before = max(steps_logged(runs.stage(layout, config)))
    reached(first, runs.stage(layout, config), before + 20)
    first.kill()
    first.codes(120)
    return Outcome(f"{name}, twice", max(codes), said, problems, second.seconds())


def frozen(runs: Runs, name: str, number: int) -> Outcome:
    """A run of which one rank gets a signal while it is at work; the seconds until the others have ended."""
    layout = LAYOUTS[name]
    config = runs.config(layout, {f"{layout.stage}.steps": 2000})
    started = runs.start(layout, config)
    reached(started, runs.stage(layout, config), 20)
    began = time.monotonic()
    started.kill(layout.ranks - 1, by=signal.Signals(number))
    codes = started.codes(120)
    seconds = time.monotonic() - began
    said = [line for line in started.errors() if line.startswith("error: ")]
    problems = [] if 0 not in codes else [f"ended with {codes}"]
    if seconds > 60:
        problems.append(f"noticed after {seconds:.0f} s")
    if len(said) != 1 or f"rank {layout.ranks - 1}" not in said[0]:
        problems.append(f"said {said}")
    return Outcome(f"{name}, {signal.Signals(number).name}", max(codes), said, problems, seconds)


def shimmed(shim: Path) -> Mapping[str, str]:
    """The environment of a forge whose ranks have the shim."""
    return {"LD_PRELOAD": f"{shim}{os.pathsep}{os.environ['LD_PRELOAD']}" if os.environ.get("LD_PRELOAD") else str(shim)}


def _said(started: Started, stage: str) -> list[str]:
    """What the run itself has said beside its progress; libraries warn of other things."""
    return [line for line in started.stderr().splitlines() if line.startswith(("error: ", "runs/", f"{stage}: "))]


def _kept(folder: Path) -> list[str]:
    """What of the checkpoints that stand there is damaged; one must stand there."""
    try:
        found = find(folder)
    except UserError as error:
        return [str(error)]
    problems = []
    for path, look in found:
        try:
            look(path)
        except Exception as error:
            problems.append(str(error))
    return problems


def _differences(runs: Runs, name: str, config: Path) -> list[str]:
    layout: Layout = LAYOUTS[name]
    whole, _ = runs.whole(name)
    try:
        left: Any = runs.left(layout, config)
    except (AssertionError, OSError) as error:
        return [str(error)]
    problems = [] if left.losses == whole.losses else ["losses differ"]
    return problems if equal_bits(left.weights, whole.weights) else [*problems, "weights differ"]
