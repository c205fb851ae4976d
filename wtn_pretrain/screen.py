"""What a run says to people, once for all ranks."""

import os
import sys

from tqdm import tqdm


def say(message: str) -> None:
    """Print one line on standard error, on rank 0 only, without tearing a progress bar."""
    import torch.distributed as dist  # here, since reading metrics needs no torch

    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else int(os.environ.get("RANK", "0"))
    if rank == 0:
        tqdm.write(message, file=sys.stderr)
