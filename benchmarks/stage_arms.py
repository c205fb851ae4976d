"""What a rank of `stage_plan.py` runs."""

import gc
from typing import Any, NamedTuple

import torch
from peaks import start_of_peak, status
from stage_one import TINY, _run
from stage_one import Work as Training

from wtn_pretrain.kernels.select import activate
from wtn_pretrain.models.base import BlockConfig
from wtn_pretrain.parallel.launch import Place
from wtn_pretrain.planning.profile import RUNTIME, resident


class Ran(NamedTuple):
    """A measured run."""

    seconds: list[float]
    """Of a step, in each repeat."""
    memory: int
    """Bytes of the resident set at most."""


def ran(place: Place, config: BlockConfig, length: int, section: dict[str, Any], warm: int, steps: int, repeats: int) -> Ran:
    """Trains through the package's own loop; see `stage_one`."""
    torch.set_num_threads(1)
    activate("torch")
    work = Training(config, length, section, warm, steps, repeats, "torch", 1, True)
    few = {**section, "batch_size": place.world_size, "micro_batch_size": 0, "tensor_parallel": 1, "sequence_parallel": False}
    # libraries keep buffers from their first use on
    _run(place, work._replace(config=TINY[config.family], length=min(length, 16), section=few, warm=0, steps=1, repeats=1))
    gc.collect()
    start_of_peak()
    _, times, _ = _run(place, work)
    return Ran([(end - begin) / steps for begin, end in zip(times, times[1:], strict=False)], status("VmHWM"))


def base(place: Place) -> int:
    """Bytes of a process before it builds a network."""
    return resident() + RUNTIME
