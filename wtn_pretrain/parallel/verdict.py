"""What ranks tell of themselves and what follows from it: at work, waiting, hung, fallen behind, silent. No clock and no socket."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

TOLERANCE = 2.0
"""A rank hangs after this many times its longest pause so far, but not before the watch's patience is over."""
SLOWER = 5.0
"""A rank has fallen behind after this many times its slowest step so far, but not before the watch's patience is over."""
STEPS_TO_COMPARE = 3
"""Steps whose times are known before a rank is measured by them."""

ALL = -1
"""Stands for all other ranks."""


class Beat(NamedTuple):
    """What a rank tells once a second."""

    marks: int = 0
    """How often it has said where it is."""
    step: int = 0
    what: str = "start"
    waits: tuple[int, ...] = ()
    """The ranks it waits for, all of them (`(ALL,)`: every other); none while it is at work."""


class Pace:
    """How long a rank has been at work without a mark and at the same step, measured by what it took before.

    Time that it waits for others does not count, nor does time for which it was excused count as a pause of its own.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._before: Beat | None = None
        self._quiet = self._longest_quiet = 0.0
        self._spent = self._longest_step = 0.0
        self._steps = -1  # the first is seen in part only
        self._excused = False

    def tick(self, seconds: float, beat: Beat, allowance: float = 0.0) -> str | None:
        """Takes the next `seconds` into account; a sentence's end once the rank hangs or has fallen behind.

        `allowance`: seconds that what it does now may take (0: the patience), as a long save or a compilation does.
        """
        before, self._before = self._before, beat
        if before is None:
            return None
        if beat.step != before.step:
            # of fast steps many pass between two looks
            self._steps += max(1, beat.step - before.step)
            if self._steps > 0:
                self._longest_step = max(self._longest_step, self._spent)
            self._spent = 0.0
        if beat.marks != before.marks:
            if not self._excused:
                self._longest_quiet = max(self._longest_quiet, self._quiet)
            self._quiet = 0.0
            self._excused = False
        elif not beat.waits:
            self._quiet += seconds
        self._excused = self._excused or allowance > 0
        if not beat.waits and not allowance:
            self._spent += seconds
        limit = max(self._patience, allowance, TOLERANCE * self._longest_quiet)
        if self._quiet > limit:
            return f"hangs: no progress for {self._quiet:.0f} s at {beat.what!r} of step {beat.step}"
        at_work = self._quiet < self._spent / 2  # else it may hang, which is said when that is certain
        if at_work and self._steps >= STEPS_TO_COMPARE and self._spent > max(self._patience, SLOWER * self._longest_step):
            return (
                f"has fallen behind: {self._spent:.0f} s of its own work on step {beat.step} so far, at {beat.what!r} now, "
                f"and no more than {max(self._longest_step, seconds):.2g} s on a step before"
            )
        return None


class Ledger:
    """What is known of every rank: when it was last heard, and who waits for whom."""

    def __init__(self, ranks: int, patience: float, together: float | None = None) -> None:
        """`together`: seconds that ranks may wait for one another; None: the patience."""
        self._patience, self._together = patience, patience if together is None else together
        self.beats: list[Beat | None] = [None] * ranks
        self.silence = [0.0] * ranks
        """Seconds since the last beat of each rank, or since the start."""
        self.gone: set[int] = set()
        """Ranks that have ended as they should."""
        self._marks = [-1] * ranks
        self._caught = [0.0] * ranks
        self._longest_caught = [0.0] * ranks

    def heard(self, rank: int, beat: Beat) -> None:
        self.beats[rank] = beat
        self.silence[rank] = 0.0

    def tick(self, seconds: float) -> None:
        caught = self._caught_now()
        for rank, beat in enumerate(self.beats):
            self.silence[rank] += seconds
            if rank in caught and beat is not None and beat.marks == self._marks[rank]:
                self._caught[rank] += seconds
            else:
                self._longest_caught[rank] = max(self._longest_caught[rank], self._caught[rank])
                self._caught[rank] = 0.0
            self._marks[rank] = beat.marks if beat is not None else -1

    def silent(self) -> int | None:
        """The rank that has not been heard for longest, if that is longer than the patience."""
        quiet = [(silence, rank) for rank, silence in enumerate(self.silence) if rank not in self.gone and silence > self._patience]
        return max(quiet)[1] if quiet else None

    def stuck(self) -> list[int]:
        """Ranks that have waited for one another, or for one that has ended, for too long."""
        return [
            rank
            for rank, (caught, longest) in enumerate(zip(self._caught, self._longest_caught, strict=True))
            if rank not in self.gone and caught > max(self._together, TOLERANCE * longest)
        ]

    def _caught_now(self) -> set[int]:
        """Ranks that wait for one that has ended, or from whom no chain of waits leads to a rank at work."""
        waiting = {rank: self.waited(rank) for rank in range(len(self.beats)) if rank not in self.gone and self.waited(rank)}
        lost = {rank for rank, waits in waiting.items() if waits & self.gone}
        free = {rank for rank in range(len(self.beats)) if rank not in waiting and rank not in self.gone}
        while True:
            freed = {rank for rank, waits in waiting.items() if rank not in free | lost and waits & free}
            if not freed:
                return waiting.keys() - free
            free |= freed

    def waited(self, rank: int) -> set[int]:
        """The others for whom a rank waits."""
        beat = self.beats[rank]
        waits = set(beat.waits) if beat is not None else set()
        return (set(range(len(self.beats))) if ALL in waits else waits) - {rank}


def stuck_sentence(names: Sequence[str], ledger: Ledger, stuck: Sequence[int]) -> str:
    """Who waits for whom, in a sentence of at most three ranks."""

    def of(rank: int) -> str:
        beat = ledger.beats[rank] or Beat()
        others = sorted(ledger.waited(rank))
        ended = [f"{names[other]}, which has ended" for other in others if other in ledger.gone]
        everyone = ALL in beat.waits and len(others) > 2
        told = ended[:2] or (["all others"] if everyone else [names[other] for other in others[:2]])
        return f"{names[rank]} (at {beat.what!r} of step {beat.step}) waits for {' and '.join(told)}"

    more = f" and {len(stuck) - 3} more ranks wait" if len(stuck) > 3 else ""
    return f"no rank can go on: {'; '.join(of(rank) for rank in stuck[:3])}{more}"


class Process(NamedTuple):
    """A process as others can find it again: where its number holds, the number and when it was born, which no other process shares."""

    host: str
    place: str
    pid: int
    born: int


def this_process(host: str) -> Process:
    """This process; its `place` is the machine's boot and the container's process table."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        place = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        place = ""
    fields = _status(os.getpid())
    return Process(host, place, os.getpid(), int(fields[19]) if fields else 0)


def state_of(process: Process) -> str | None:
    """How a process of this machine stands, as `/proc` has it (R, S, D, T, ...), or E while it ends; None when it is gone.

    A process that has ended and is not yet buried is told as `killed by SIGKILL` or `ended with exit code 3`.
    """
    fields = _status(process.pid)
    if not fields or int(fields[19]) != process.born:
        return None
    if fields[0] not in "ZX":
        return fields[0] if int(fields[20]) else "E"  # without memory
    status = int(fields[49])
    if status & 0x7F:
        try:
            return f"killed by {signal.Signals(status & 0x7F).name}"
        except ValueError:
            return f"killed by signal {status & 0x7F}"
    return f"ended with exit code {status >> 8}"


def _status(pid: int) -> list[str]:
    """The fields of `/proc/PID/stat` from the state on (proc(5) counts it as the third); none without the process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text[text.rindex(")") + 1 :].split()


class Verdict(NamedTuple):
    """Who has ended the run, in words, and the process to be killed if it is still there and does not end by itself."""

    rank: int
    line: str
    process: Process | None = None


def of_lost_link(name: str, process: Process | None, me: Process, final: bool) -> str | None:
    """What it means that the connection to a rank has ended; None while that cannot be told yet, unless this is `final`."""
    if process is None or not process.place or process.place != me.place:
        return f"{name}{f' on {process.host}' if process else ''} has died or lost its link"
    state = state_of(process)
    if state is None or len(state) > 1:
        return f"{name} has died ({state or 'its process is gone'})"
    if not final:
        return None
    return f"{name} has died (its process is ending)" if state == "E" else f"{name} has lost its link"


def of_silence(name: str, process: Process | None, me: Process, seconds: float) -> str:
    """What it means that a rank has not been heard for so long (None: that it was never heard)."""
    if process is None:
        return f"{name} has not arrived within {seconds:.0f} s"
    if not process.place or process.place != me.place:
        return f"{name} on {process.host} has not answered for {seconds:.0f} s: it has died, is stopped or has lost its link"
    state = state_of(process)
    if state == "T":
        return f"{name} has been stopped for {seconds:.0f} s (process {process.pid}, SIGSTOP)"
    return f"{name} has not answered for {seconds:.0f} s (process {process.pid} is {f'in state {state}' if state else 'gone'})"
