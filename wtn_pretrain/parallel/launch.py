"""How a process joins the other ranks, whatever started it (see `launchers`), and what ranks settle with one another through a store."""

import contextlib
import itertools
import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.distributed

from wtn_pretrain.errors import UserError
from wtn_pretrain.parallel.alike import difference, identity
from wtn_pretrain.parallel.launchers import Start, device_index, find_start, host_name
from wtn_pretrain.parallel.meeting import join_seconds, meet

TOGETHER = timedelta(minutes=int(os.environ.get("DEEPSPEED_TIMEOUT", "10")))
"""What torch allows a collective; DeepSpeed's own default and variable. A rank that is lost is noticed sooner (see `watch`)."""


class Place(NamedTuple):
    """Where this process stands."""

    rank: int
    world_size: int


class _Met(NamedTuple):
    """The ranks of a run, as one of them has met the others."""

    start: Start
    store: torch.distributed.Store
    hosts: int
    """How many they stand on; known to rank 0."""


_met: _Met | None = None


def start_ranks(start: Start | None = None) -> Place:
    """Meets the other ranks, initialises DeepSpeed's communication once and returns this rank's place. `start`: as `find_start` has it.

    Raises:
        UserError: rank 0's port is taken, its host is not reached, not all ranks come within `join_seconds`, this rank's code or versions
            are not those of rank 0, or its host has fewer devices than ranks.
    """
    global _met
    if not torch.accelerator.is_available():
        # said before DeepSpeed looks for itself, which it does at length on standard output
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.comm as dist
    from deepspeed.utils import logger

    from wtn_pretrain.device import backend, device, keep_freed_memory

    logger.setLevel("WARNING")
    if not dist.is_initialized():
        start = start or find_start()
        if torch.accelerator.is_available():
            index = device_index(start, torch.accelerator.device_count())
            torch.accelerator.set_device_index(index)
            os.environ["LOCAL_RANK"] = str(index)  # which DeepSpeed takes for the device
        keep_freed_memory()
        # DeepSpeed's shared-memory collectives serve its inference alone; they take a minute and a half to compile, and
        # every launch would leave 66 MiB a rank behind in /dev/shm
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if not torch.distributed.is_initialized():
            store = meet(start, join_seconds())
            _met = _Met(start, store, 1)
            _met = _met._replace(hosts=_require_same_code(start, store))
            store.set_timeout(TOGETHER)
            # as DeepSpeed does: NCCL then connects at once
            bound: dict[str, Any] = {"device_id": device()} if backend() == "nccl" and start.world_size > 1 else {}
            torch.distributed.init_process_group(
                backend(), store=store, rank=start.rank, world_size=start.world_size, timeout=TOGETHER, **bound
            )
        dist.init_distributed(dist_backend=backend(), auto_mpi_discovery=False, verbose=False)
    return Place(dist.get_rank(), dist.get_world_size())


def describe_ranks() -> str:
    """One line on the ranks that have met, as rank 0 knows them; empty where they were not started here."""
    if _met is None:
        return ""
    from wtn_pretrain.device import backend

    start = _met.start
    who = "by hand (RANK is set)" if start.launcher == "hand" else f"by {start.launcher}"
    if start.world_size == 1:
        return f"1 rank, started {who}; {backend()}"
    hosts = f"{_met.hosts} host{'s' if _met.hosts > 1 else ''}"
    return f"{start.world_size} ranks on {hosts}, started {who}; rank 0 at {start.master}; {backend()}"


def _require_same_code(start: Start, store: torch.distributed.Store) -> int:
    """Refuses, on rank 0 and for all, if a rank runs other code or versions than rank 0; how many hosts there are (known to rank 0)."""
    if start.world_size == 1:
        return 1
    store = torch.distributed.PrefixStore("alike", store)
    if start.rank == 0:
        store.set("first", json.dumps(identity()))
        hosts = {host_name()}
        for rank in range(1, start.world_size):
            wait_for_rank(partial(store.check, [str(rank)]))
            host, differs = json.loads(store.get(str(rank)))
            hosts.add(host)
            if differs:
                raise UserError(f"ranks disagree: rank {rank} on {host} {differs}")
        store.set("alike", "yes")
        return len(hosts)
    wait_for_rank(lambda: store.check(["first"]))
    store.set(str(start.rank), json.dumps([host_name(), difference(identity(), json.loads(store.get("first")))]))
    wait_for_rank(lambda: store.check(["alike"]))
    return 1


def first_to_fail() -> bool:
    """Marks that this rank gives up over a user's mistake; whether it is to say why: the first one, or before they have met one a host."""
    if not _together():
        rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
        return "0" in (rank, os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or rank)
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


def after_the_first(seconds: float = 5.0) -> None:
    """Called by all ranks: rank 0 passes, and the others after it, or after so many seconds."""
    if not _together():
        return
    store, deadline = _store(), time.monotonic() + seconds
    with contextlib.suppress(torch.distributed.DistError):
        if _rank() == 0:
            store.set("first-passed", "yes")
        while not store.check(["first-passed"]) and time.monotonic() < deadline:
            time.sleep(0.02)


def stop_ranks() -> None:
    """Leaves the process group, if this process is in one. Rank 0 stays until all have seen how it ended."""
    if not _together():
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return
    store, rank = _store(), _rank()
    ranks = _met.start.world_size if _met is not None else torch.distributed.get_world_size()
    if torch.distributed.is_initialized():
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
        DistError: rank 0 is gone, and the store with it.
    """
    while not ready():
        if _together() and _store().add("failed", 0) > 0:
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
    if _met is not None:
        return _met.start.world_size > 1
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _rank() -> int:
    return _met.start.rank if _met is not None else torch.distributed.get_rank()


def _store() -> torch.distributed.Store:
    return _met.store if _met is not None else torch.distributed.distributed_c10d._get_default_store()
