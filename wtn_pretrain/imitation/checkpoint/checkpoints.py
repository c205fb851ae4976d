"""Saving and resuming stage 2. No rank waits for another: each saves when it reaches the step, and a checkpoint counts once all have.

A step's state is copied before the next step begins; the copy is written, and made to count, in a thread beside the training.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import Store

from wtn_pretrain.checkpoint.files import DamagedError, on_host, part_of, require_same, versions
from wtn_pretrain.checkpoint.keeping import Keep
from wtn_pretrain.checkpoint.together import Together, draft_of, note_newest, switch_in, tried
from wtn_pretrain.errors import UserError
from wtn_pretrain.files import write_beside
from wtn_pretrain.imitation.checkpoint.manifest import (
    FORMAT,
    LATEST,
    Kept,
    Manifest,
    Position,
    Spent,
    Stored,
    checkpoints_in,
    joined,
    optimizer_key,
    unit_key,
)
from wtn_pretrain.imitation.checkpoint.nested import flatten
from wtn_pretrain.imitation.imitator import Imitator, Work
from wtn_pretrain.imitation.learner import Learner, zero_stage
from wtn_pretrain.imitation.plan import parse
from wtn_pretrain.imitation.wiring import Wiring
from wtn_pretrain.parallel.launch import wait_for_rank
from wtn_pretrain.screen import say

CHECK = 1800.0
"""Seconds that looking through the parts of a checkpoint may take before a rank counts as lost."""


class Checkpoints:
    """The checkpoints of a run in `folder`, which all ranks share. Every rank must make one, and save at the same steps."""

    def __init__(
        self,
        folder: Path,
        imitator: Imitator,
        wiring: Wiring,
        store: Store,
        *,
        identity: Mapping[str, int | str],
        starts: Sequence[int],
        keep: Keep,
    ) -> None:
        """
        Args:
            store: shared by all ranks, and nobody else's.
            identity: what a run must have in common with another to continue its checkpoints, `stage` among it.
            starts: steps over all phases before each phase.
        """
        self.folder = folder
        self._imitator, self._wiring, self._store, self._keep = imitator, wiring, store, keep
        self._identity, self._starts, self._stage = dict(identity), list(starts), str(identity["stage"])
        self._together = Together(folder, store, wiring.place)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[tuple[str, str]] | None = None
        self._pending: list[tuple[int, Position, Future[tuple[str, str]], list[str]]] = []
        """What is written, or will be, and must not count yet."""
        self._counting: list[Future[None]] = []
        self._known: list[str] = []
        """Those that are whole, or will be."""
        self._stored: Stored | None = None

    # saving

    def save(self, phase: int, step: int) -> None:
        """Copies this rank's part of the state after `step` steps of a phase and begins to write it; it counts after `settle`."""
        if self._writing is not None:
            # there is never more than one copy in host memory
            self._writing.result()
        imitator, wiring = self._imitator, self._wiring
        part = f"part-{wiring.place.rank:05d}.safetensors"
        copies: dict[str, Tensor] = {}
        kept: dict[str, Kept] = {}

        def keep(key: str, value: Tensor) -> None:
            copies[key], kept[key] = on_host(value), Kept.of(part, value)

        if wiring.leads:
            for unit in imitator.units:
                for name, value in unit.own_state().items():
                    keep(f"{unit_key(unit.index)}/{name}", value)
        optimizers = {
            key: flatten(learner.state(), key, keep)
            for learner in imitator.learning
            if wiring.leads or learner.zero
            for key in [self._optimizer(learner)]
        }
        share = Manifest(
            format=FORMAT,
            identity=self._identity,
            phase=phase,
            step=step,
            done=self._starts[phase] + step,
            plan=str(wiring.plan),
            zero=zero_stage(imitator.section),
            versions=versions(),
            spent=Spent(**vars(imitator.work)),
            tensors=kept,
            optimizers=optimizers,
            parts={},
        )
        name = share.position.name
        self._known = [*(other for other in self._known if other != name), name]
        self._writing = self._thread.submit(self._write, share, part, copies)
        self._pending.append((self._together.endings.begin(), share.position, self._writing, self._known))

    def settle(self, done: int) -> None:
        """Lets checkpoints count that stand at most at step `done` over all phases, once they are written; waits for nothing. What failed
        is said."""
        while self._pending and self._done(self._pending[0][1]) <= done:
            self._counting.append(self._thread.submit(self._count, *self._pending.pop(0)))
        while self._counting and self._counting[0].done():
            self._counting.pop(0).result()
        self._together.endings.hear()

    def wait(self) -> None:
        """Returns when this rank has written all that was settled, or could not, and said so."""
        while self._counting:
            self._counting.pop(0).result()

    def close(self) -> None:
        """Returns when all ranks have written all that they have to.

        Raises:
            UserError: the last checkpoint could not be written; the one before it is kept.
        """
        assert not self._pending, "a checkpoint never counted"
        self.wait()
        self._thread.shutdown()
        last = self._together.endings.last()
        if last and last.problem:
            raise UserError(last.problem)

    def _write(self, share: Manifest, part: str, copies: dict[str, Tensor]) -> tuple[str, str]:
        """Why this rank's part could not be written, if so, and what there is to say of it."""
        name = share.position.name
        path = draft_of(self.folder, name) / part

        def write() -> str:
            if not copies:
                return share.model_dump_json()
            write_beside(path, lambda file: save_file(copies, file))
            return share.model_copy(update={"parts": {part: part_of(path)}}).model_dump_json()

        return tried(self.folder, name, write)

    def _count(self, number: int, position: Position, writing: Future[tuple[str, str]], known: list[str]) -> None:
        """Says that this rank has its part; the last one to say so makes the checkpoint the newest."""
        name = position.name

        def switch(shares: list[str]) -> None:
            manifest = joined([Manifest.model_validate_json(one) for one in shares])
            switch_in(self.folder, name, manifest, manifest.parts)
            note_newest(self.folder / LATEST, json.dumps(position._asdict()))
            self._store.set(f"whole-{name}", "yes")

        def remove_old(lost: set[str]) -> None:
            self._remove_old(position, self._keep.recent([one for one in known if one not in lost]))

        self._together.count(number, name, writing.result(), switch, remove_old)

    def _remove_old(self, position: Position, recent: set[str]) -> None:
        for (phase, step), path in checkpoints_in(self.folder):
            # those of later steps were damaged, and stand there until the training has come to them again
            before = (phase, step) < (position.phase, position.step)
            if before and path.name not in recent and not self._keep.for_good(self._starts[phase] + step):
                shutil.rmtree(path, ignore_errors=True)

    def whole(self, position: Position) -> bool:
        """Whether a checkpoint of this start counts, or is the one that it has gone on from."""
        found = self._stored is not None and self._stored.manifest.position.name == position.name
        return found or self._store.check([f"whole-{position.name}"])

    def _done(self, position: Position) -> int:
        return self._starts[position.phase] + position.step

    def _optimizer(self, learner: Learner) -> str:
        return optimizer_key(learner.units[0].index, self._imitator.replicas.index if learner.zero else None)

    # resuming

    def newest(self) -> Position | None:
        """Where the newest checkpoint stands that is whole and of this run; all ranks find the same. None where there is none.

        Each rank looks at its share of the parts, and at its own units.

        Raises:
            UserError: there are checkpoints, and none can be used.
        """
        found = self._from_first("found", lambda: "\n".join(path.name for _, path in checkpoints_in(self.folder)))
        names = found.splitlines()
        newest = ""
        for number, name in enumerate(names):
            with self._imitator.observer.allow(CHECK, "check"):
                problem = self._problem(self.folder / name)
            problem = self._agreed(name, problem)
            if not problem:
                self._stored = Stored(self.folder / name)
                return self._stored.manifest.position
            newest = newest or problem
            if number + 1 < len(names):
                say(f"{self._stage}: {problem}; the checkpoint before it is used")
        if names:
            raise UserError(f"{newest}; there is no other checkpoint: remove {self.folder} to start {self._stage} again")
        return None

    def begin(self, position: Position | None) -> None:
        """Says that the training goes on from what `newest` has found, and clears away what a start left that ended while it wrote."""
        if position is not None:
            until = (position.phase, position.step)
            self._known = [path.name for order, path in reversed(checkpoints_in(self.folder)) if order <= until]

        def clear() -> str:
            for left in self.folder.glob(".*.part"):
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
            return "yes"

        self._from_first("cleared", clear)

    def restore(self) -> None:
        """Loads the units of this rank's span and, on rank 0, what all of this has cost so far.

        Raises:
            UserError: the checkpoint has changed since it was found.
        """
        assert self._stored is not None
        try:
            for unit in self._imitator.units:
                unit.load_own_state(self._stored.unit(unit.index))
        except DamagedError as error:
            raise self._changed(error) from None
        own, spent, first = self._imitator.work, self._stored.spent, self._wiring.place.rank == 0
        # from here on the first rank carries what was spent before, under whatever plan
        self._imitator.work = Work(
            own.seconds + spent.seconds,
            own.teacher_flops + (spent.teacher_flops if first else 0),
            own.student_flops + (spent.student_flops if first else 0),
            own.skipped + (spent.skipped if first else 0),
        )

    def restore_optimizers(self) -> None:
        """Loads the moments, once the phase of the checkpoint has begun.

        Raises:
            UserError: the checkpoint has changed since it was found.
        """
        assert self._stored is not None
        try:
            for learner in self._imitator.learning:
                learner.load_state(self._stored.optimizer(self._optimizer(learner)))
        except DamagedError as error:
            raise self._changed(error) from None

    def _problem(self, folder: Path) -> str:
        """Why a checkpoint cannot be used, as far as this rank sees; empty: nothing is wrong."""
        place = self._wiring.place
        try:
            stored = Stored(folder)
            self._require_fit(stored)
            stored.check(sorted(stored.manifest.parts)[place.rank :: place.world_size])
        except DamagedError as error:
            return str(error)
        return ""

    def _require_fit(self, stored: Stored) -> None:
        manifest, folder = stored.manifest, stored.folder
        require_same(folder, manifest.identity, self._identity)
        there, here = parse(manifest.plan).units, self._wiring.plan.units
        if there != here:
            raise DamagedError(f"{folder}: belongs to another network ({there} units, and here {here})")
        if manifest.phase >= len(self._starts) or manifest.done != self._starts[manifest.phase] + manifest.step:
            raise DamagedError(f"{folder}: stands at step {manifest.done}, which this schedule has elsewhere")
        for unit in self._imitator.units:
            prefix = unit_key(unit.index) + "/"
            kept = {key: value.shape for key, value in manifest.tensors.items() if key.startswith(prefix)}
            mine = {prefix + name: tuple(value.shape) for name, value in unit.own_state().items()}
            wrong = next((key for key in sorted(kept.keys() | mine.keys()) if kept.get(key) != mine.get(key)), None)
            if wrong is not None:
                raise DamagedError(f"{folder}: belongs to another network ({wrong} {kept.get(wrong)}, and here {mine.get(wrong)})")

    def _agreed(self, name: str, problem: str) -> str:
        """The problem of the first rank that has one."""
        ranks = self._wiring.place.world_size
        keys = [f"problem-{name}-{rank}" for rank in range(ranks)]
        self._store.set(keys[self._wiring.place.rank], problem or " ")
        with self._imitator.observer.waiting():
            wait_for_rank(lambda: self._store.check(keys))
        return next((told for key in keys if (told := self._store.get(key).decode().strip())), "")

    def _from_first(self, key: str, make: Callable[[], str]) -> str:
        """What `make` gives on the first rank, on all of them."""
        if self._wiring.place.rank == 0:
            self._store.set(key, make() or " ")
        with self._imitator.observer.waiting():
            wait_for_rank(lambda: self._store.check([key]))
        return self._store.get(key).decode().strip()

    def _changed(self, error: DamagedError) -> UserError:
        return UserError(f"{error}, and was whole when it was looked through; start {self._stage} again")
