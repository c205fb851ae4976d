"""How a process finds its place among the ranks, whatever started it: `deepspeed`, `torchrun` or plain `python`."""

import contextlib
import itertools
import os
import socket
import time
from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.distributed

from wtn_pretrain.errors import UserError


class Place(NamedTuple):
    """Where this process stands."""

    rank: int
    world_size: int


def start_ranks() -> Place:
    """Initialises DeepSpeed's communication once and returns this rank's place."""
    if not torch.accelerator.is_available():
        # said before DeepSpeed looks for itself, which it does at length on standard output
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.comm as dist
    from deepspeed.utils import logger

    from wtn_pretrain.device import backend

    logger.setLevel("WARNING")
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
        if torch.accelerator.is_available():
            torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
        # DeepSpeed's shared-memory collectives serve its inference alone; they take a minute and a half to compile, and
        # every launch would leave 66 MiB a rank behind in /dev/shm
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        dist.init_distributed(dist_backend=backend(), auto_mpi_discovery=False, verbose=False)
    return Place(dist.get_rank(), dist.get_world_size())


def first_to_fail() -> bool:
    """Marks that this rank gives up over a user's mistake; whether it is the first, which says why."""
    if not _together():
        return os.environ.get("RANK", "0") == "0"
    return _store().add("failed", 1) == 1


def another_failed() -> bool:
    """Whether a rank has given up over a user's mistake."""
    if not _together():
        return False
    try:
        return _store().add("failed", 0) > 0
    except torch.distributed.DistError:
        # who kept the store has left, which it does only when it has failed
        return True


def stop_ranks() -> None:
    """Leaves the process group, if this process is in one. Rank 0 stays until all have seen how it ended."""
    if not torch.distributed.is_initialized():
        return
    store = _store()
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.distributed.destroy_process_group()
    with contextlib.suppress(torch.distributed.DistError):
        store.add("left", 1)
        deadline = time.monotonic() + 5
        # the store lives in rank 0's process
        while rank == 0 and store.add("left", 0) < ranks and time.monotonic() < deadline:
            time.sleep(0.02)


_stores = itertools.count()


def shared_store(place: Place) -> torch.distributed.Store:
    """A fresh store of small values that all ranks share; every rank must ask for its stores in the same order."""
    if place.world_size == 1:
        return torch.distributed.HashStore()
    return torch.distributed.PrefixStore(f"shared-{next(_stores)}", _store())


def wait_for_rank(ready: Callable[[], bool], pause: float = 0.02) -> None:
    """Returns when another rank has made `ready` true; gives up when a rank has given up.

    Raises:
        RuntimeError: a rank has given up over a user's mistake, which it says itself.
    """
    while not ready():
        if another_failed():
            raise RuntimeError("another rank has given up")
        time.sleep(pause)
        pause = min(1.2 * pause, 0.5)


def wait_for_all(place: Place) -> None:
    """Returns when every rank has come here, however long one takes."""
    store = shared_store(place)
    store.add("here", 1)
    wait_for_rank(lambda: store.add("here", 0) == place.world_size, pause=0.1)


def require_same(place: Place, text: str) -> None:
    """Refuses, on rank 0 and for all, if a rank was started with another configuration `text` than rank 0.

    Raises:
        UserError: names the rank and the first line that differs.
    """
    if place.world_size == 1:
        return
    store = shared_store(place)
    store.set(f"config-{place.rank}", text)
    if place.rank == 0:
        for rank in range(1, place.world_size):
            wait_for_rank(partial(store.check, [f"config-{rank}"]))
            theirs = store.get(f"config-{rank}").decode()
            if theirs != text:
                pairs = zip_longest(text.splitlines(), theirs.splitlines(), fillvalue="")
                mine, other = next((mine, other) for mine, other in pairs if mine != other)
                raise UserError(
                    f"ranks disagree: rank {rank} was started with {other.strip()!r} where rank 0 has {mine.strip()!r}; "
                    "give every rank the same configuration"
                )
        store.set("same", "yes")
    else:
        wait_for_rank(lambda: store.check(["same"]))


def _together() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _store() -> torch.distributed.Store:
    return torch.distributed.distributed_c10d._get_default_store()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
