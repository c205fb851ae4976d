"""Writing a checkpoint beside the training: every rank its part, and the last one to finish makes it count."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from wtn_pretrain.errors import UserError
from wtn_pretrain.files import switch_folder, write_beside, write_text
from wtn_pretrain.parallel.launch import Place, shared_store
from wtn_pretrain.training.checkpoint.endings import Ending, Endings
from wtn_pretrain.training.checkpoint.manifest import LATEST, Manifest, checkpoints_in, part_of, write_manifest
from wtn_pretrain.training.monitor import say

_KEPT = "the checkpoint before it is kept"


class Writer:
    """Writes checkpoints into `folder` in a thread of its own, one at a time.

    Every rank must make one, and start the same writes in the same order; none waits for another before the end. A write that fails is
    said, and leaves what was there before.
    """

    def __init__(self, folder: Path, place: Place, keep: int) -> None:
        """`keep`: how many checkpoints are kept."""
        self.folder = folder
        self._place, self._keep = place, keep
        self._store = shared_store(place)
        self._endings = Endings(self._store)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._steps: list[int] = []
        """Of the checkpoints that are whole, or will be when the writing is done."""

    @property
    def part(self) -> str:
        """The file that this rank writes."""
        return f"part-{self._place.rank:05d}.safetensors"

    def continues(self, step: int) -> None:
        """Says that the training goes on from the checkpoint of a step, which is kept until there are others."""
        self._steps = [step]

    def start(self, manifest: Manifest, tensors: dict[str, Tensor]) -> None:
        """Begins to write this rank's part, once the one before is written.

        Args:
            manifest: says of parameters and other tensors only those of this rank, and of parts nothing.
            tensors: on the CPU, contiguous, and nobody else's.
        """
        self.wait()
        self._steps.append(manifest.step)
        self._writing = self._thread.submit(self._write, self._endings.begin(), manifest, tensors, list(self._steps))

    def wait(self) -> None:
        """Returns when this rank has written what was begun, or could not."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
        for ending in self._endings.news():
            self._say(ending)

    def close(self) -> None:
        """Returns when all ranks have written what was begun.

        Raises:
            UserError: the last checkpoint could not be written; the one before it is kept.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
        self._thread.shutdown()
        last = self._endings.last(self._say)
        if last and last.problem:
            raise UserError(f"{last.problem}; {_KEPT}")

    def _say(self, ending: Ending) -> None:
        if ending.problem:
            failed = f"{self._endings.failed} so far" if self._endings.failed > 1 else "the first"
            say(f"{ending.problem}; {_KEPT}, and the training goes on to the next one ({failed})")

    def _write(self, number: int, manifest: Manifest, tensors: dict[str, Tensor], steps: list[int]) -> None:
        step = manifest.step
        draft = self.folder / f".step{step}.part"
        problem, share = self._tried(step, lambda: self._share(draft, manifest, tensors))
        shares = self._all_of(number, problem, share)
        if shares is None:
            return
        problem = next((theirs for theirs, _ in shares if theirs), "")
        if not problem:
            everything = _joined([Manifest.model_validate_json(share) for _, share in shares])
            problem, _ = self._tried(step, lambda: self._switch_in(draft, everything))
        if problem:
            shutil.rmtree(draft, ignore_errors=True)
        else:
            self._remove_old(step, set([one for one in steps if one not in self._endings.lost(number)][-self._keep :]))
        self._endings.tell(number, Ending(step, problem))

    def _tried(self, step: int, work: Callable[[], str]) -> tuple[str, str]:
        """Why `work` could not be done, if so, and what it gives."""
        try:
            return "", work()
        except OSError as error:
            return f"{self.folder}: checkpoint of step {step} cannot be written ({error.strerror})", ""
        except UserError as error:
            return str(error), ""

    def _share(self, draft: Path, manifest: Manifest, tensors: dict[str, Tensor]) -> str:
        """Writes this rank's part; what it has to say of it."""
        if tensors:
            write_beside(draft / self.part, lambda path: save_file(tensors, path))
            manifest = manifest.model_copy(update={"parts": {self.part: part_of(draft / self.part)}})
        return manifest.model_dump_json()

    def _switch_in(self, draft: Path, manifest: Manifest) -> str:
        write_manifest(draft, manifest)
        switch_folder(draft, self.folder / f"step{manifest.step}")
        write_text(self.folder / LATEST, f"step{manifest.step}\n")
        return ""

    def _remove_old(self, step: int, kept: set[int]) -> None:
        for other, path in checkpoints_in(self.folder):
            # those of later steps were damaged, and stand there until the training has come to them again
            if other < step and other not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def _all_of(self, number: int, problem: str, share: str) -> list[tuple[str, str]] | None:
        """The problems and shares of all ranks in a write, for the last one to say so; None for the others."""
        keys = [f"{number}-{rank}" for rank in range(self._place.world_size)]
        self._store.set(keys[self._place.rank], json.dumps((problem, share)))
        if self._store.add(str(number), 1) < self._place.world_size:
            return None
        shares = [json.loads(self._store.get(key)) for key in keys]
        for key in keys:
            self._store.delete_key(key)
        return shares


def _joined(shares: list[Manifest]) -> Manifest:
    """What all ranks have written of a checkpoint."""
    return shares[0].model_copy(
        update={
            name: {key: value for share in shares for key, value in getattr(share, name).items()}
            for name in ("parameters", "others", "parts")
        }
    )
