"""A task owns its inputs, forward, loss and metric; stages 1 and 3 differ only in task and network."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wtn_pretrain.data.lengths import Lengths, length_at
from wtn_pretrain.data.stream import BatchStream, Dataset
from wtn_pretrain.models.base import BlockConfig, BlockNetwork, Flops


class Metric(NamedTuple):
    """The figure by which networks are compared."""

    name: str
    unit: str
    higher_is_better: bool


class Task(ABC):
    """What is learned, on which data, and how well."""

    train: Dataset
    valid: Dataset
    metric: Metric
    workers: int
    length: int | None = None
    """Of sequences; None for what is none."""
    lengths: Lengths = ()
    """Of the shorter sequences that come first."""
    identity: Mapping[str, str] = MappingProxyType({})
    """What a checkpoint notes of the data beside its number of samples, and must find again."""

    @abstractmethod
    def complete(self, config: BlockConfig) -> BlockConfig:
        """`config` with what the data decides (vocabulary, classes, image size) filled in, or a refusal where they disagree."""

    @abstractmethod
    def loss(self, network: BlockNetwork, batch: Mapping[str, Tensor], terms: Tensor | None = None) -> dict[str, Tensor]:
        """The mean loss of a micro-batch under `loss`, with its named components.

        Args:
            terms: what to divide by instead of the number of terms that this micro-batch has, see `terms`.
        """

    def terms(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """How many terms the mean of `loss` is over, a scalar; None where that is as many for all micro-batches of a size.

        Divided by their mean number, losses of unequal micro-batches average to the loss of the whole batch.
        """
        return None

    @abstractmethod
    def tally(self, network: BlockNetwork, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over a batch: `loss`, `right` and `count`, which add up over batches and ranks."""

    @abstractmethod
    def positions(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the head is told beside the carry."""

    @abstractmethod
    def forward_flops(self, config: BlockConfig) -> Flops:
        """FLOPs of a forward pass of one training sample through a network of this shape, by part."""

    def stream(self, batch_size: int, *, steps: int, **settings: Any) -> BatchStream:
        """The training batches of a stage of `steps` steps; `settings` as `BatchStream` takes them."""
        return BatchStream(self.train, batch_size, workers=self.workers, **settings)

    def step_length(self, step: int, steps: int) -> int | None:
        """The length of the sequences of step number `step` (from 0) of `steps`."""
        return None if self.length is None else length_at(self.lengths, self.length, step, steps)

    def step_flops(self, config: BlockConfig, step: int, steps: int) -> Flops:
        """As `forward_flops`, for a sample of step number `step` (from 0) of `steps`."""
        return _counted_once(self, config)

    def stage_flops(self, config: BlockConfig, steps: int) -> float:
        """FLOPs of a forward pass of one sample, in the mean over a stage of `steps` steps."""
        return self.forward_flops(config).total

    @abstractmethod
    def probes(self) -> list[dict[str, Tensor]]:
        """Real validation inputs of several shapes, as an exported network takes them, to compare exports on."""

    @abstractmethod
    def save_preprocessing(self, folder: Path) -> None:
        """Writes what turns raw data into inputs, in Hugging Face's form (tokenizer or image processor)."""

    def score(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Validation figures from tallied sums: `loss` per item and `metric`."""
        count = max(sums["count"], 1.0)
        return {"loss": sums["loss"] / count, "metric": 100.0 * sums["right"] / count}


@lru_cache(maxsize=8)
def _counted_once(task: Task, config: BlockConfig) -> Flops:
    # asked for at every step, and counting takes a while
    return task.forward_flops(config)


class TaskModule(nn.Module):
    """A network with its task's loss as forward, so that DeepSpeed sees one module whose output is the loss."""

    def __init__(self, network: BlockNetwork, task: Task) -> None:
        super().__init__()
        self.network = network
        self.task = task

    def forward(self, batch: Mapping[str, Tensor], measure: bool = False, terms: Tensor | None = None) -> dict[str, Tensor]:
        return self.task.tally(self.network, batch) if measure else self.task.loss(self.network, batch, terms)


def classified(logits: Tensor, targets: Tensor, ignore: int = -100) -> dict[str, Tensor]:
    """Sums of cross-entropy, right answers and items of logits [..., classes] and targets [...]."""
    flat, targets = logits.flatten(0, -2).float(), targets.flatten()
    kept = targets != ignore
    return {
        "loss": nn.functional.cross_entropy(flat, targets, ignore_index=ignore, reduction="sum"),
        "right": ((flat.argmax(-1) == targets) & kept).sum().float(),
        "count": kept.sum().float(),
    }


@torch.no_grad()
def evaluate(network: BlockNetwork, task: Task, batch_size: int = 256) -> dict[str, float]:
    """Validation figures of a network on one process."""
    from wtn_pretrain.data.stream import batches
    from wtn_pretrain.device import to_device

    network.eval()
    sums: dict[str, float] = {"loss": 0.0, "right": 0.0, "count": 0.0}
    for batch in batches(task.valid, batch_size):
        for name, value in task.tally(network, to_device(batch)).items():
            sums[name] += float(value)
    return task.score(sums)
