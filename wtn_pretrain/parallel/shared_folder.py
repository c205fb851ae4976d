"""Whether all ranks see one folder: on a disk of its own each would keep its part of a checkpoint, and none a whole one."""

import json
import os
import secrets
import time
from functools import partial
from pathlib import Path

from wtn_pretrain.errors import UserError
from wtn_pretrain.parallel.launch import Place, shared_store, wait_for_rank
from wtn_pretrain.parallel.launchers import host_name

SECONDS = 60.0
"""For which a rank looks: file systems on the network show others' files late."""


def require_shared(place: Place, folder: Path) -> None:
    """Refuses, on rank 0 and for all, if a rank does not see in `folder` what rank 0 has just put there. Every rank must call it.

    Raises:
        UserError: names the rank and its host.
    """
    if place.world_size == 1:
        return
    store = shared_store(place)
    if place.rank:
        wait_for_rank(lambda: store.check(["name"]))
        seen = _seen(folder, store.get("name").decode())
        store.set(str(place.rank), json.dumps([host_name(), str(folder.absolute()), seen]))
        wait_for_rank(lambda: store.check(["shared"]))
        return
    probe = folder / f".probe-{secrets.token_hex(8)}"
    try:
        probe.touch()
        store.set("name", probe.name)
        for rank in range(1, place.world_size):
            wait_for_rank(partial(store.check, [str(rank)]))
            host, path, seen = json.loads(store.get(str(rank)))
            if not seen:
                raise UserError(
                    f"run.folder: rank {rank} on {host} does not see in {path} what rank 0 on {host_name()} has put into "
                    f"{folder.absolute()}; choose a --run.folder on a file system that all hosts share"
                )
        store.set("shared", "yes")
    finally:
        probe.unlink(missing_ok=True)


def _seen(folder: Path, name: str) -> bool:
    """Whether a file is there, or comes in time."""
    deadline, pause = time.monotonic() + SECONDS, 0.02
    while True:
        # a listing, since that a name is not there may be remembered
        if folder.is_dir() and name in os.listdir(folder):
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(1.5 * pause, 1.0)
