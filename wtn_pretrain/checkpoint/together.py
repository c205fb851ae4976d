"""How ranks make a checkpoint together: each tells what it has written, and the last one to tell makes it count. None waits for another."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel
from torch.distributed import Store

from wtn_pretrain.checkpoint.endings import Ending, Endings
from wtn_pretrain.checkpoint.files import write_sealed
from wtn_pretrain.errors import UserError
from wtn_pretrain.files import switch_folder
from wtn_pretrain.parallel.launch import Place

KEPT = "the checkpoint before it is kept"


def draft_of(folder: Path, name: str) -> Path:
    """Where a checkpoint of this name is put together."""
    return folder / f".{name}.part"


class Together:
    """The checkpoints of one stage in `folder`. Every rank must make one, and have a part in the same checkpoints."""

    def __init__(self, folder: Path, store: Store, place: Place) -> None:
        """`store`: shared by all ranks, and nobody else's."""
        self.folder, self.endings = folder, Endings(store)
        self._store, self._place = store, place

    def count(
        self, number: int, name: str, mine: tuple[str, str], switch: Callable[[list[str]], None], remove_old: Callable[[set[str]], None]
    ) -> None:
        """Says that this rank has its part of checkpoint `name`; the last one to say so makes the checkpoint count.

        Args:
            number: of the save, as `endings.begin` gave it.
            mine: what `tried` has given of this rank's part: why it could not be written, and what there is to say of it.
            switch: makes the checkpoint count, given what all ranks have to say of their parts.
            remove_old: removes older ones, given the names of those that were lost.
        """
        shares = self._tell(name, json.dumps(mine))
        if shares is None:
            return
        told = [json.loads(one) for one in shares]
        problem = next((theirs for theirs, _ in told if theirs), "")
        if not problem:
            problem, _ = tried(self.folder, name, lambda: switch([share for _, share in told]) or "")
        if problem:
            shutil.rmtree(draft_of(self.folder, name), ignore_errors=True)
        else:
            remove_old(self.endings.lost(number))
        self.endings.tell(number, Ending(name, problem))

    def _tell(self, name: str, share: str) -> list[str] | None:
        """Says what this rank has of checkpoint `name`; the shares of all ranks, for the last one to say so, None for the others."""
        keys, told = [f"share-{name}-{rank}" for rank in range(self._place.world_size)], f"told-{name}"
        self._store.set(keys[self._place.rank], share)
        if self._store.add(told, 1) < self._place.world_size:
            return None
        shares = [self._store.get(key).decode() for key in keys]
        # a run that goes back comes to the same step again
        for key in (*keys, told):
            self._store.delete_key(key)
        return shares


def switch_in(folder: Path, name: str, manifest: BaseModel) -> None:
    """Makes a checkpoint count whose parts are all in its draft.

    Raises:
        OSError, UserError: the place refuses; what was there before is whole.
    """
    draft = draft_of(folder, name)
    write_sealed(draft, manifest)
    switch_folder(draft, folder / name)


def cannot_write(folder: Path, name: str, error: OSError | UserError) -> UserError:
    """What a user hears of a checkpoint that could not be written."""
    if isinstance(error, OSError):
        return UserError(f"{folder}: checkpoint {name} cannot be written ({error.strerror}); {KEPT}")
    return UserError(f"{error}; {KEPT}")


def tried(folder: Path, name: str, work: Callable[[], str]) -> tuple[str, str]:
    """Why `work`, which writes a checkpoint, could not be done, if so, and what it gives."""
    try:
        return "", work()
    except (OSError, UserError) as error:
        return str(cannot_write(folder, name, error)), ""
