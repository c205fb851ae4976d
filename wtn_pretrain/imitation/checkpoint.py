"""Checkpoints of imitation: a file for every unit, written by whoever holds it; the last one to finish makes it count.

No rank waits for another: each saves when it reaches the step, and a checkpoint counts once all have.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wtn_pretrain.device import device
from wtn_pretrain.errors import UserError
from wtn_pretrain.files import write_file, write_text
from wtn_pretrain.imitation.imitator import Imitator, Work
from wtn_pretrain.imitation.learner import Learner, zero_stage
from wtn_pretrain.imitation.plan import parse
from wtn_pretrain.imitation.wiring import Wiring

LATEST = "latest.json"


class Position(NamedTuple):
    """Where a checkpoint stands."""

    phase: int
    step: int
    """Steps done in the phase."""
    plan: str
    zero: int

    @property
    def name(self) -> str:
        return f"phase{self.phase}-step{self.step}"


class Checkpoints:
    """The checkpoints of a run in `folder`, which all ranks share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, phase: int, step: int, imitator: Imitator, wiring: Wiring) -> Position:
        """Writes this rank's part, which counts once every rank has called `arrive`.

        Raises:
            UserError: the place cannot be written; the checkpoint before it is kept.
        """
        learners = imitator.learning
        position = Position(phase, step, str(wiring.plan), zero_stage(imitator.section))
        place = self.folder / position.name
        if wiring.leads:
            for unit in imitator.units:
                self._write(place / f"unit-{unit.index:04d}.pt", unit.own_state())
        for learner in learners:
            if wiring.leads or learner.zero:
                self._write(place / _optimizer(learner, imitator.replicas.index), learner.state())
        write_text(place / f"work-{wiring.place.rank}.json", json.dumps(vars(imitator.work)))
        return position

    def arrive(self, position: Position, wiring: Wiring, arrived: Callable[[str], int]) -> None:
        """Says that this rank has its part; the last one makes the checkpoint the newest. `arrived` counts the calls of all ranks."""
        if arrived(position.name) == wiring.place.world_size:
            write_text(self.folder / LATEST, json.dumps(position._asdict()))
            for old in self.folder.iterdir():
                # those that a faster rank has begun to write come later
                if old.is_dir() and _order(old.name) < (position.phase, position.step):
                    shutil.rmtree(old, ignore_errors=True)

    def latest(self) -> Position | None:
        """Where the newest whole checkpoint stands."""
        path = self.folder / LATEST
        if not path.exists():
            return None
        try:
            return Position(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise UserError(f"{path}: is damaged; remove {self.folder} to start narrow again") from None

    def restore(self, position: Position, imitator: Imitator, first: bool) -> None:
        """Loads the units of this rank's span; `first`: on rank 0, also what all of this has cost so far."""
        place = self.folder / position.name
        for unit in imitator.units:
            unit.load_own_state(self._read(place / f"unit-{unit.index:04d}.pt"))
        spent = self.spent(position)
        # from here on the first rank carries what was spent before, under whatever plan
        own = imitator.work
        imitator.work = Work(
            own.seconds + spent.seconds,
            own.teacher_flops + (spent.teacher_flops if first else 0),
            own.student_flops + (spent.student_flops if first else 0),
        )

    def restore_optimizers(self, position: Position, imitator: Imitator) -> None:
        """Loads the moments, once the phase of `position` has begun."""
        place = self.folder / position.name
        for learner in imitator.learning:
            learner.load_state(self._read(place / _optimizer(learner, imitator.replicas.index)))

    def unit(self, position: Position, index: int) -> dict[str, Tensor]:
        """The state of one unit, on this rank's device."""
        return self._read(self.folder / position.name / f"unit-{index:04d}.pt")

    def spent(self, position: Position) -> Work:
        """What all ranks have spent: FLOPs summed, seconds of the slowest."""
        # files of other ranks may be left of an earlier start that was killed in this very save
        ranks = range(parse(position.plan).ranks)
        parts = [json.loads((self.folder / position.name / f"work-{rank}.json").read_text(encoding="utf-8")) for rank in ranks]
        return Work(
            max(part["seconds"] for part in parts),
            sum(part["teacher_flops"] for part in parts),
            sum(part["student_flops"] for part in parts),
        )

    @staticmethod
    def _write(path: Path, state: dict[str, Any]) -> None:
        try:
            write_file(path, lambda file: torch.save(state, file))
        except UserError as error:
            raise UserError(f"{error}; the checkpoint before it is kept") from None

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        try:
            return torch.load(path, map_location=device(), weights_only=True)
        except Exception as error:  # torch raises several kinds for a damaged file
            raise UserError(
                f"{path}: cannot be read ({type(error).__name__}); remove {path.parent.parent} to start the stage again"
            ) from None


def _optimizer(learner: Learner, replica: int) -> str:
    return f"optimizer-{learner.units[0].index:04d}" + (f".replica-{replica}" if learner.zero else "") + ".pt"


def _order(name: str) -> tuple[int, int]:
    phase, _, step = name.removeprefix("phase").partition("-step")
    return int(phase), int(step)
