"""How a process finds its place among the ranks, whatever started it: `deepspeed`, `torchrun` or plain `python`."""

import contextlib
import os
import socket
import time
from typing import NamedTuple

import torch
import torch.distributed


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
        if os.environ["WORLD_SIZE"] == "1":
            # the shared-memory collectives take a minute and a half to compile, and one rank has nobody to share with
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
        return False


def stop_ranks() -> None:
    """Leaves the process group, if this process is in one. After a mistake rank 0 stays until all have seen that there was one."""
    if not torch.distributed.is_initialized():
        return
    failed, store = another_failed(), _store()
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.distributed.destroy_process_group()
    if failed:
        with contextlib.suppress(torch.distributed.DistError):
            store.add("left", 1)
            deadline = time.monotonic() + 5
            # the store lives in rank 0's process
            while rank == 0 and store.add("left", 0) < ranks and time.monotonic() < deadline:
                time.sleep(0.05)


def _together() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _store() -> torch.distributed.Store:
    return torch.distributed.distributed_c10d._get_default_store()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
