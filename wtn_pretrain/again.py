"""A run that was left early and is to be started again: its exit code, and a mark on disk where a launcher gives another code."""

import os
import time
from pathlib import Path

from wtn_pretrain.files import write_text

AGAIN = 75
"""The exit code of a run that the same command continues (EX_TEMPFAIL): it was told to end, or one of its ranks has ended it."""
MARK = "preempted"
"""The file that says that the last start of a run was told to end and has kept all that it did; in the run's folder."""


def mark_of(run: Path) -> Path:
    """Where the mark of a run stands: in its folder, or where the variable WTN_MARK says."""
    return Path(os.environ.get("WTN_MARK") or run / MARK)


def mark(run: Path, why: str) -> None:
    """Leaves the mark, with the line that says `why`."""
    write_text(mark_of(run), f"{why}\n")


def unmark(run: Path) -> None:
    """Takes the mark away, as every start of the run does."""
    mark_of(run).unlink(missing_ok=True)


def restarted() -> bool:
    """Whether torchrun has started this process in the place of one that ended (`--max-restarts`)."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


def left_before(run: Path) -> str | None:
    """Why the run has been left on demand, where torchrun starts it again for all that: it takes every exit code but 0 for a failure."""
    if not restarted():
        return None
    try:
        return mark_of(run).read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def seconds_before() -> float:
    """For how long torchrun had been at work when it started this process again; 0 for a first start. By a clock that nobody sets."""
    if not restarted():
        return 0.0
    try:
        # proc(5): the 22nd field, behind a name that may hold anything, is when a process began, in ticks since the machine did
        text = Path(f"/proc/{os.getppid()}/stat").read_text(encoding="utf-8", errors="replace")
        began = int(text[text.rindex(")") + 1 :].split()[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began)
    except (OSError, ValueError, IndexError):
        return 0.0
