"""A run that was left early and is to be started again: its exit code, and a mark on disk where a launcher gives another code."""

import os
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
