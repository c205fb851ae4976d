"""A folder of a process's own on NVMe.

DeepSpeed names the files that it swaps by rank alone and leaves them behind: two runs that name one folder would write over each other's
weights, and every run that has ended would keep its room.
"""

import contextlib
import fcntl
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from wtn_pretrain.training.offload import OPTIMIZER

_PREFIX, _LOCK = "swap-", "lock"


class OwnFolder:
    """A folder of this process's own inside the nvme_path of a `zero_optimization` section, which is changed to name it."""

    def __init__(self, zero: Mapping[str, Any]) -> None:
        self._held: list[tuple[Path, BinaryIO]] = []
        section = zero.get(OPTIMIZER) or {}
        if section.get("device") == "nvme":
            path = Path(section["nvme_path"])
            _clear(path)
            self._held.append(_own(path))
            section["nvme_path"] = str(self._held[0][0])

    def go_with(self, engine: Any) -> None:
        """Removes the folder once `engine` is gone, at the latest when the process ends; of one that was killed, the next start does."""
        weakref.finalize(engine, _remove, self._held)


def _own(path: Path) -> tuple[Path, BinaryIO]:
    """A new folder, and the lock that says that its process lives: nobody sees the one without the other."""
    hidden = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=path))
    lock = (hidden / _LOCK).open("wb")
    fcntl.flock(lock, fcntl.LOCK_EX)
    folder = hidden.with_name(hidden.name[1:])
    hidden.rename(folder)
    return folder, lock


def _clear(path: Path) -> None:
    """Removes the folders of processes that were killed."""
    for left in path.glob(f"{_PREFIX}*"):
        # in use, or removed by another process meanwhile
        with contextlib.suppress(OSError), (left / _LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)


def _remove(held: list[tuple[Path, BinaryIO]]) -> None:
    for folder, lock in held:
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()
