"""What a training stage does, with neither data nor weights: the network's shape, the task's own loss, batches of the right shapes."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple, cast

import torch
from torch import Tensor

from wtn_pretrain.models.base import BlockConfig, Flops, flops, parameter_count
from wtn_pretrain.models.bert.config import BertConfig
from wtn_pretrain.models.resnet.config import ResNetConfig
from wtn_pretrain.tasks.base import Task
from wtn_pretrain.tasks.classify import ClassifyTask
from wtn_pretrain.tasks.mlm import MlmTask
from wtn_pretrain.training.config import TrainSection


class _Text(MlmTask):
    """The loss of masked language modelling."""

    def __init__(self) -> None:
        pass


class _Images(ClassifyTask):
    """The loss of classification."""

    def __init__(self) -> None:
        self.smoothing = 0.0


class Work(NamedTuple):
    """A stage to be planned. A shape and a section of the configuration; nothing of it is built."""

    config: BlockConfig
    section: TrainSection
    length: int = 0
    """Tokens of a sequence; 0 for images."""
    masked: int = 0
    """Positions of a sequence that are predicted."""

    def task(self) -> Task:
        return cast(Task, _Text() if isinstance(self.config, BertConfig) else _Images())

    def batch(self, rows: int, device: torch.device | str) -> dict[str, Tensor]:
        """A micro-batch as the task's loss takes it; its numbers mean nothing."""
        made = self.config.example_inputs(rows, device, self.length or None)
        if isinstance(self.config, BertConfig):
            positions = torch.arange(self.masked, device=device).expand(rows, -1).contiguous()
            return {**made, "positions": positions, "targets": torch.ones_like(positions)}
        assert isinstance(self.config, ResNetConfig)
        return {**made, "labels": torch.zeros(rows, dtype=torch.long, device=device)}

    def flops(self) -> Flops:
        """FLOPs of a forward pass of one sample."""
        return _flops(self.config, self.length, self.masked)

    def parameters(self) -> int:
        return _parameters(self.config)

    @property
    def dtype(self) -> torch.dtype:
        """Of the network's weights."""
        return {"bf16_weights": torch.bfloat16, "fp16": torch.float16}.get(self.section.precision, torch.float32)

    @contextmanager
    def cast(self, device: str) -> Iterator[None]:
        """The precision of a forward pass."""
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.section.precision == "bf16"):
            yield

    @property
    def weight_bytes(self) -> int:
        """Of one weight in the network; its master and its states have four each."""
        return self.dtype.itemsize


@lru_cache(maxsize=64)
def _flops(config: BlockConfig, length: int, masked: int) -> Flops:
    # asked for with every layout, and counting takes a while
    if len(config.stages) == 1 and config.stages[0] > 2:
        # blocks of one stage differ in nothing but the first of them
        first = _flops(config.widen(1.0, 1.0, (2,)), length, masked)
        return first._replace(blocks=(first.blocks[0], *[first.blocks[1]] * (config.stages[0] - 1)))
    if not length:
        return flops(config)
    return flops(config, length, positions=torch.zeros(1, masked, dtype=torch.long, device="meta"))


@lru_cache(maxsize=64)
def _parameters(config: BlockConfig) -> int:
    with torch.device("meta"):
        return parameter_count(config.build())
