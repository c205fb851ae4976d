"""What a training stage does, with neither data nor weights: the network's shape, the task's own loss, batches of the right shapes."""

from collections.abc import Iterator
from contextlib import contextmanager
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
        if not self.length:
            return flops(self.config)
        return flops(self.config, self.length, positions=torch.zeros(1, self.masked, dtype=torch.long, device="meta"))

    def parameters(self) -> int:
        with torch.device("meta"):
            return parameter_count(self.config.build())

    @contextmanager
    def cast(self, device: str) -> Iterator[None]:
        """The precision of a forward pass."""
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.section.precision == "bf16"):
            yield

    @property
    def weight_bytes(self) -> int:
        """Of one weight in the network; its master and its states have four each."""
        return 2 if self.section.precision in ("bf16_weights", "fp16") else 4
