"""What a rank of `stage_plan.py` runs."""

import contextlib
import gc
import io
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from peaks import start_of_peak, status
from ranks import folder_of_all
from stage_one import TINY, RandomImages, RandomWords
from torch import Tensor

from wtn_pretrain.kernels.select import activate
from wtn_pretrain.models import BertConfig, ResNetConfig
from wtn_pretrain.models.base import BlockConfig, BlockNetwork
from wtn_pretrain.parallel.launch import Place
from wtn_pretrain.planning.cluster import Connection, measure_link
from wtn_pretrain.planning.profile import resident
from wtn_pretrain.planning.training.layout import layout_of
from wtn_pretrain.planning.training.measured import measured
from wtn_pretrain.planning.training.pace import Passes
from wtn_pretrain.planning.training.work import Work
from wtn_pretrain.tasks.base import Task
from wtn_pretrain.training.config import TrainSection
from wtn_pretrain.training.loop import train


class Ran(NamedTuple):
    """A measured run."""

    seconds: list[float]
    """Of a step, in each repeat."""
    memory: int
    """Bytes of the resident set at most."""


class Case(NamedTuple):
    """A training that is measured."""

    name: str
    config: BlockConfig
    length: int
    ranks: int
    section: Mapping[str, Any]

    def work(self) -> Work:
        section = TrainSection.model_validate(self.section)
        masked = RandomWords(self.config, self.length).predictions if isinstance(self.config, BertConfig) else 0
        return Work(self.config, section, self.length, masked)


def ran(place: Place, case: Case, warm: int, steps: int, repeats: int) -> Ran:
    """Trains through the package's own loop; what the network is gathered in at the end does not count."""
    torch.set_num_threads(1)
    activate("torch")
    _work_once(place, case)
    start_of_peak()
    times, most = _train(place, case, warm, steps, repeats)
    return Ran([(end - begin) / steps for begin, end in pairwise(times)], most)


def _train(place: Place, case: Case, warm: int, steps: int, repeats: int) -> tuple[list[float], int]:
    """When the repeats began and ended, and the most that was resident until then."""
    last = warm + steps * repeats
    section = TrainSection.model_validate({**case.section, "steps": last + 1, "log_every": 10**6, "checkpoint_every": 10**6})
    data = place.world_size // section.tensor_parallel
    share = section.micro_batch_size or max(1, section.batch_size // data)
    passes = max(1, section.batch_size // (share * data))
    config = case.config
    task: Task = RandomWords(config, case.length) if isinstance(config, BertConfig) else RandomImages(cast(ResNetConfig, config), share)
    bounds = {(warm + repeat * steps) * passes for repeat in range(repeats + 1)}
    times: list[float] = []
    inner, forwards, most = task.loss, 0, 0

    def loss(network: BlockNetwork, batch: Mapping[str, Tensor], terms: Tensor | None = None) -> dict[str, Tensor]:
        nonlocal forwards, most
        if forwards in bounds:
            times.append(time.perf_counter())
            most = status("VmHWM")
        forwards += 1
        return inner(network, batch, terms)

    task.loss = loss  # type: ignore[method-assign]
    torch.manual_seed(0)
    with folder_of_all(place) as folder, contextlib.redirect_stderr(io.StringIO()):
        train(config.build(), task, section, stage="wide", folder=folder, seed=0, place=place)
    return times, most


def base(place: Place, case: Case) -> int:
    """Bytes of a process that holds no network and has trained one of no size: from their first use on libraries keep buffers."""
    torch.set_num_threads(1)
    activate("torch")
    _work_once(place, case)
    return resident()


def _work_once(place: Place, case: Case) -> None:
    few = {**case.section, "batch_size": place.world_size, "micro_batch_size": 0, "tensor_parallel": 1, "sequence_parallel": False}
    _train(place, Case(case.name, TINY[case.config.family], min(case.length, 16), case.ranks, few), 0, 1, 1)
    gc.collect()


def link_of(place: Place) -> Connection:
    """The link between ranks 0 and 1."""
    return measure_link()


def passes_of(place: Place, cases: Sequence[Case], repeats: int) -> list[Passes]:
    """What a rank computes in each case, measured part by part on this rank alone."""
    torch.set_num_threads(1)
    activate("torch")
    return [measured(case.work(), layout_of(case.work().section, "wide", case.ranks), repeats) for case in cases]
