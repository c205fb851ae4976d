"""A rank that dies, hangs, is stopped or falls behind is named in one line, and ends the run in bounded time."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.running import environment, free_port
from wtn_pretrain.again import AGAIN
from wtn_pretrain.parallel.watch import CONTINUES, TERM_EXIT

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("watched.py")
RANKS = 3
PATIENCE = 2.0
NAMES = [f"rank {rank} (units {3 * rank}-{3 * rank + 2})" for rank in range(RANKS)]
SLACK = 8.0  # seconds on a machine that others use too


class Ended(NamedTuple):
    code: int
    codes: list[int]
    """Of the ranks, where they were started without a launcher."""
    errors: list[str]
    stderr: str
    seconds: float
    """From the signal to the end, or from the start."""


class Run:
    """Ranks of `watched.py`, started by a launcher or by nothing at all."""

    def __init__(self, folder: Path, *arguments: object, launcher: str = "") -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        tools = Path(sys.executable).parent
        call: Sequence[object] = {
            "": [sys.executable, PROGRAM, "--ranks", RANKS],
            "deepspeed": [tools / "deepspeed", "--num_accelerators", RANKS, "--master_port", free_port(), PROGRAM],
            "torchrun": [tools / "torchrun", "--standalone", "--nproc_per_node", RANKS, PROGRAM],
        }[launcher]
        meeting = {} if launcher else {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            list(map(str, [*call, folder, "--patience", PATIENCE, *arguments])),
            env={**environment(), **meeting},
            stdout=subprocess.DEVNULL,
            stderr=(folder / "stderr").open("w"),
            start_new_session=True,
        )

    def at_work(self) -> list[int]:
        """Waits until all ranks are at work; their process numbers."""
        files = [self.folder / f"rank-{rank}" for rank in range(RANKS)]
        deadline = time.monotonic() + 90
        while not all(file.exists() for file in files):
            assert time.monotonic() < deadline and self.process.poll() is None, (self.folder / "stderr").read_text()[-4000:]
            time.sleep(0.02)
        return [int(file.read_text()) for file in files]

    def signal(self, number: signal.Signals, *processes: int) -> None:
        self.began = time.monotonic()
        for process in processes:
            os.kill(process, number)

    def said(self) -> float:
        """Waits for the line; the seconds since the signal."""
        while "error:" not in (self.folder / "stderr").read_text():
            assert time.monotonic() < self.began + 60 and self.process.poll() is None
            time.sleep(0.02)
        return time.monotonic() - self.began

    def end(self) -> Ended:
        try:
            code = self.process.wait(timeout=60)
        finally:
            self.stop()
        stderr = (self.folder / "stderr").read_text()
        codes = json.loads((self.folder / "codes").read_text()) if (self.folder / "codes").exists() else []
        errors = [line for line in stderr.splitlines() if line.startswith("error:")]
        return Ended(code, codes, errors, stderr, time.monotonic() - self.began)

    def stop(self) -> None:
        if self.process.poll() is None or (self.folder / "codes").exists() is False:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                return
            self.process.wait()


@pytest.fixture
def runs() -> Iterator[list[Run]]:
    """Whatever is put in here is gone at the end of the test."""
    started: list[Run] = []
    yield started
    for run in started:
        run.stop()


def one_line(ended: Ended, said: str) -> None:
    assert len(ended.errors) == 1, ended.stderr[-4000:]
    assert re.fullmatch(f"error: {said}; {CONTINUES}", ended.errors[0]), ended.errors[0]


def test_a_killed_rank_is_named_at_once(tmp_path: Path, runs: list[Run]) -> None:
    runs += [Run(tmp_path / str(culprit), "--how", "orphan", "--culprit", culprit) for culprit in range(RANKS)]
    for culprit, run in enumerate(runs):
        run.signal(signal.SIGKILL, run.at_work()[culprit])
        assert run.said() < PATIENCE  # by its connection, not by its silence, and though a child of it lives on
    for culprit, run in enumerate(runs):
        ended = run.end()
        assert ended.codes == [-signal.SIGKILL if rank == culprit else AGAIN for rank in range(RANKS)]
        one_line(ended, re.escape(f"{NAMES[culprit]} has died (killed by SIGKILL)"))
        assert "Traceback" not in ended.stderr


def test_a_stopped_rank_is_named_when_patience_is_over(tmp_path: Path, runs: list[Run]) -> None:
    runs += [Run(tmp_path / str(culprit)) for culprit in range(2)]
    for culprit, run in enumerate(runs):
        run.signal(signal.SIGSTOP, run.at_work()[culprit])
    for culprit, run in enumerate(runs):
        ended = run.end()
        assert PATIENCE - 1 < ended.seconds < PATIENCE + SLACK
        assert ended.codes == [-signal.SIGKILL if rank == culprit else AGAIN for rank in range(RANKS)]
        one_line(ended, re.escape(f"{NAMES[culprit]} has been stopped for 2 s (process ") + r"\d+, SIGSTOP\)")


def test_the_one_that_hangs_is_named_and_not_those_that_wait(tmp_path: Path, runs: list[Run]) -> None:
    stacks = tmp_path / "stacks"
    runs += [
        Run(tmp_path / "sleep", "--how", "sleep", "--culprit", 0),
        Run(tmp_path / "spin", "--how", "spin", "--culprit", 2, "--stacks", stacks),
        Run(tmp_path / "slow", "--how", "slow", "--culprit", 1),
        Run(tmp_path / "abandon", "--how", "abandon", "--culprit", 1),
    ]
    sleep, spin, slow, abandon = (run.end() for run in runs)
    for ended in (sleep, spin, slow, abandon):
        assert ended.codes == [AGAIN] * RANKS
    hangs = r" hangs: no progress for 2 s at 'teacher' of step 15, in misbehave \(watched.py:\d+\)"
    one_line(sleep, re.escape(NAMES[0]) + hangs)
    assert sleep.stderr.count("(most recent call first)") == 2 and "in misbehave" in sleep.stderr  # the two threads of one rank
    one_line(spin, re.escape(NAMES[2]) + hangs + re.escape(f"; stacks in {stacks}"))
    assert sorted(path.name for path in stacks.iterdir()) == ["rank-0.txt", "rank-1.txt", "rank-2.txt"]
    assert "in misbehave" in (stacks / "rank-2.txt").read_text() and "(most recent call first)" not in spin.stderr
    assert re.search("in (recv|send)", (stacks / "rank-1.txt").read_text())
    one_line(slow, re.escape(NAMES[1]) + r" has fallen behind: \d s of its own work on step 15 so far, at 'data' now, .*")
    one_line(abandon, "no rank can go on: .*")
    assert f"{NAMES[1]} (at 'teacher' of step 15) waits for {NAMES[0]}" in abandon.errors[0]
    assert f"{NAMES[0]} (at 'student' of step 15) waits for {NAMES[1]}" in abandon.errors[0]


def test_ranks_that_fail_by_themselves(tmp_path: Path, runs: list[Run]) -> None:
    """One traceback or one line, whether one rank fails or all of them, and none of those that this leaves alone."""
    cases = [("raise", 1), ("raise", -1), ("user", 0), ("user", 2), ("user", -1)]
    runs += [Run(tmp_path / f"{how}{culprit}", "--how", how, "--culprit", culprit) for how, culprit in cases]
    for (how, _), run in zip(cases, runs, strict=True):
        ended = run.end()
        assert ended.codes == [1 if how == "raise" else 2] * RANKS
        assert ended.stderr.count("Traceback") == (1 if how == "raise" else 0), ended.stderr[-4000:]
        assert ended.errors == ([] if how == "raise" else ["error: wrong.png: no image"])
        assert (how == "raise") == ("ValueError: a mistake of this program" in ended.stderr)


def test_a_rank_that_leaves_without_a_word(tmp_path: Path, runs: list[Run]) -> None:
    runs.append(Run(tmp_path, "--how", "leave", "--culprit", 1))
    ended = runs[0].end()
    assert ended.codes == [AGAIN, 3, AGAIN]
    one_line(ended, re.escape(f"{NAMES[1]} has died (ended with exit code 3)"))


def test_a_run_that_ends_well_is_silent(tmp_path: Path, runs: list[Run]) -> None:
    """Also when ranks finish seconds apart, one saves for longer than the patience, or a child of one is told to end."""
    for how, culprit in (("late", 0), ("late", 2), ("save", 1), ("fork", 0)):
        runs.append(Run(tmp_path / f"{how}{culprit}", "--how", how, "--culprit", culprit, "--steps", 40))
    for run in runs:
        ended = run.end()
        assert (ended.codes, ended.stderr) == ([0] * RANKS, "")


def test_told_to_end_a_run_ends_without_a_word(tmp_path: Path, runs: list[Run]) -> None:
    cases = [[1], [0, 1, 2]]
    runs += [Run(tmp_path / str(len(whom))) for whom in cases]
    for run, whom in zip(runs, cases, strict=True):
        processes = run.at_work()
        run.signal(signal.SIGTERM, *(processes[rank] for rank in whom))
        ended = run.end()
        assert ended.seconds < SLACK / 2
        assert (ended.codes, ended.stderr) == ([TERM_EXIT] * RANKS, "")


def test_told_to_end_while_stuck(tmp_path: Path, runs: list[Run]) -> None:
    """The main threads are inside gloo, where Python hears no signal."""
    run = Run(tmp_path, "--how", "abandon", "--culprit", 2, "--patience", 60)
    runs.append(run)
    deadline = time.monotonic() + 60
    while not (tmp_path / "turned-2").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(1)
    run.signal(signal.SIGTERM, *(int((tmp_path / f"turned-{rank}").read_text()) for rank in range(RANKS)))
    ended = run.end()
    assert ended.seconds < SLACK / 2
    assert (ended.codes, ended.stderr) == ([TERM_EXIT] * RANKS, "")


@pytest.mark.parametrize(("launcher", "culprit"), [("deepspeed", 0), ("torchrun", 2)])
def test_under_a_launcher_that_ends_the_others(launcher: str, culprit: int, tmp_path: Path, runs: list[Run]) -> None:
    run = Run(tmp_path, launcher=launcher)
    runs.append(run)
    run.signal(signal.SIGKILL, run.at_work()[culprit])
    assert run.said() < PATIENCE
    ended = run.end()
    assert ended.code != 0
    # the launcher may have buried it, and with it the reason
    one_line(ended, re.escape(f"{NAMES[culprit]} has died (") + r"(killed by SIGKILL|its process is gone)\)")


def test_a_stopped_rank_does_not_hold_up_its_launcher(tmp_path: Path, runs: list[Run]) -> None:
    run = Run(tmp_path, launcher="deepspeed")
    runs.append(run)
    run.signal(signal.SIGSTOP, run.at_work()[1])
    ended = run.end()
    assert ended.code != 0 and ended.seconds < PATIENCE + 15  # and not the launcher's half minute more
    one_line(ended, re.escape(f"{NAMES[1]} has been stopped for 2 s") + ".*")


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_launcher_that_is_told_to_end(launcher: str, tmp_path: Path, runs: list[Run]) -> None:
    run = Run(tmp_path, launcher=launcher)
    runs.append(run)
    processes = run.at_work()
    run.signal(signal.SIGTERM, run.process.pid)
    ended = run.end()
    assert ended.code != 0 and ended.seconds < SLACK and ended.errors == []
    assert "watch.py" not in ended.stderr
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{process}").exists() for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.05)
