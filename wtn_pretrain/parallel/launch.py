"""How a process finds its place among the ranks, whatever started it: `deepspeed`, `torchrun` or plain `python`."""

import os
import socket
from typing import NamedTuple

import torch


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


def stop_ranks() -> None:
    """Leaves the process group, if this process is in one."""
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
