"""A run that was left early and is to be started again: its exit code, and a mark in its folder where a launcher gives another code."""

from pathlib import Path

from wtn_pretrain.files import write_text

AGAIN = 75
"""The exit code of a run that the same command continues (EX_TEMPFAIL): it was told to end, or one of its ranks has ended it."""
MARK = "preempted"
"""The file in a run's folder that says that the last start was told to end and has kept all that it did."""


def mark(run: Path, why: str) -> None:
    """Leaves the mark in the folder of a run, with the line that says `why`."""
    write_text(run / MARK, f"{why}\n")


def unmark(run: Path) -> None:
    """Takes the mark away, as every start of the run does."""
    (run / MARK).unlink(missing_ok=True)
