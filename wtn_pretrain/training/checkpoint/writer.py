"""Writing a checkpoint beside the training: every rank its part, and the last one to finish makes it count."""

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from wtn_pretrain.checkpoint.files import part_of
from wtn_pretrain.checkpoint.keeping import Keep
from wtn_pretrain.checkpoint.together import Together, draft_of, switch_in, tried
from wtn_pretrain.errors import UserError
from wtn_pretrain.files import write_beside, write_text
from wtn_pretrain.parallel.launch import Place, shared_store
from wtn_pretrain.training.checkpoint.manifest import LATEST, Manifest, checkpoints_in


class Writer:
    """Writes checkpoints into `folder` in a thread of its own, one at a time.

    Every rank must make one, and start the same writes in the same order; none waits for another before the end. A write that fails is
    said, and leaves what was there before.
    """

    def __init__(self, folder: Path, place: Place, keep: Keep) -> None:
        """`keep`: which checkpoints are kept."""
        self.folder = folder
        self._place, self._keep = place, keep
        self._together = Together(folder, shared_store(place), place)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._steps: list[int] = []
        """Of the checkpoints that are whole, or will be when the writing is done."""

    @property
    def part(self) -> str:
        """The file that this rank writes."""
        return f"part-{self._place.rank:05d}.safetensors"

    def continues(self, step: int) -> None:
        """Says that the training goes on from the checkpoint of a step; later ones are damaged and do not count."""
        self._steps = [found for found, _ in reversed(checkpoints_in(self.folder)) if found <= step]

    def start(self, manifest: Manifest, tensors: dict[str, Tensor]) -> None:
        """Begins to write this rank's part, once the one before is written.

        Args:
            manifest: says of parameters and other tensors only those of this rank, and of parts nothing.
            tensors: on the CPU, contiguous, and nobody else's.
        """
        self.wait()
        self._steps.append(manifest.step)
        self._writing = self._thread.submit(self._write, self._together.endings.begin(), manifest, tensors, list(self._steps))

    def wait(self) -> None:
        """Returns when this rank has written what was begun, or could not."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
        self._together.endings.hear()

    def close(self) -> None:
        """Returns when all ranks have written what was begun.

        Raises:
            UserError: the last checkpoint could not be written; the one before it is kept.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
        self._thread.shutdown()
        last = self._together.endings.last()
        if last and last.problem:
            raise UserError(last.problem)

    def _write(self, number: int, manifest: Manifest, tensors: dict[str, Tensor], steps: list[int]) -> None:
        step, name = manifest.step, f"step{manifest.step}"
        draft = draft_of(self.folder, name)
        mine = tried(self.folder, name, lambda: self._share(draft, manifest, tensors))

        def switch(shares: list[str]) -> None:
            switch_in(self.folder, name, _joined([Manifest.model_validate_json(one) for one in shares]))
            write_text(self.folder / LATEST, f"{name}\n")

        def remove_old(lost: set[str]) -> None:
            self._remove_old(step, self._keep.recent([one for one in steps if f"step{one}" not in lost]))

        self._together.count(number, name, mine, switch, remove_old)

    def _share(self, draft: Path, manifest: Manifest, tensors: dict[str, Tensor]) -> str:
        """Writes this rank's part; what it has to say of it."""
        if tensors:
            write_beside(draft / self.part, lambda path: save_file(tensors, path))
            manifest = manifest.model_copy(update={"parts": {self.part: part_of(draft / self.part)}})
        return manifest.model_dump_json()

    def _remove_old(self, step: int, kept: set[int]) -> None:
        for other, path in checkpoints_in(self.folder):
            # those of later steps were damaged, and stand there until the training has come to them again
            if other < step and other not in kept and not self._keep.for_good(other):
                shutil.rmtree(path, ignore_errors=True)


def _joined(shares: list[Manifest]) -> Manifest:
    """What all ranks have written of a checkpoint."""
    return shares[0].model_copy(
        update={
            name: {key: value for share in shares for key, value in getattr(share, name).items()}
            for name in ("parameters", "others", "parts")
        }
    )
