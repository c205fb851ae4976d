"""The pairs that imitation is measured on: a thin BERT or ResNet of any depth, and its teacher of four times the inner width."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wtn_pretrain.data.stream import Batch, BatchStream
from wtn_pretrain.device import device
from wtn_pretrain.errors import UserError
from wtn_pretrain.imitation.config import ImitateSection
from wtn_pretrain.imitation.engine import Imitator
from wtn_pretrain.imitation.pairing import pair
from wtn_pretrain.imitation.units import make_units, start_from_teacher
from wtn_pretrain.models import BertConfig, ResNetConfig
from wtn_pretrain.models.base import BlockConfig, BlockNetwork, flops

MODELS = ("bert", "resnet")
INNER = 4.0
VOCABULARY = 512
SAMPLES = 1024

# hidden size, sequence length and batch; channels of the first stage, image size and batch
BERT = {"ci": (32, 16, 8), "full": (64, 64, 32)}
RESNET = {"ci": (16, 8, 8), "full": (64, 16, 32)}


class InMemory:
    """Samples drawn once; `fetch` indexes them, so that data costs next to nothing in any arm."""

    def __init__(self, samples: Batch) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return SAMPLES

    def fetch(self, indices: np.ndarray, seeds: np.ndarray | None) -> Batch:
        chosen = torch.from_numpy(indices)
        return {name: values[chosen] for name, values in self.samples.items()}


class Pair:
    """A thin network, its frozen teacher and the data; every `imitator` starts from the same student weights."""

    def __init__(self, model: str, blocks: int, preset: str, resnet_stages: int = 3) -> None:
        torch.manual_seed(0)
        if model == "bert":
            hidden, length, self.batch_size = BERT[preset]
            self.thin: BlockConfig = bert(blocks, hidden, length)
            samples = {"input_ids": torch.randint(VOCABULARY, (SAMPLES, length)), "attention_mask": _padding(length)}
        else:
            channels, side, self.batch_size = RESNET[preset]
            self.thin = resnet(blocks, channels, side, resnet_stages)
            samples = {"pixels": torch.randn(SAMPLES, 3, side, side)}
        self.wide = self.thin.widen(INNER, 1.0, None)
        self.pairing = pair(self.thin, self.wide)
        self.counts = flops(self.thin), flops(self.wide)
        self.dataset = InMemory(samples)
        self.teacher = self.wide.build().to(device())
        _calibrate(self.teacher, self.stream().micro_batch(0, 0))

    def stream(self) -> BatchStream:
        """The same batches each time."""
        return BatchStream(self.dataset, self.batch_size, seed=0)

    def imitator(self, section: ImitateSection) -> Imitator:
        """A fresh student of the teacher, started as stage 2 starts it."""
        torch.manual_seed(1)
        thin = self.thin.build().to(device())
        thin.start_stem_from(self.teacher, None)
        units = make_units(thin, self.teacher, self.pairing, {}, section, self.counts)
        for unit in units[1:]:
            start_from_teacher(unit)
        return Imitator(units, section)


def bert(blocks: int, hidden: int, length: int) -> BertConfig:
    """A thin BERT encoder with heads of 32."""
    # positions end at the length of the sequences, the length at which FLOPs are counted
    return BertConfig(vocab_size=VOCABULARY, hidden_size=hidden, layers=blocks, heads=hidden // 32, max_positions=length)


def resnet(blocks: int, channels: int, side: int, stages: int) -> ResNetConfig:
    """A thin bottleneck ResNet with `blocks` spread over `stages`, channels doubling and resolution halving from stage to stage."""
    if blocks % stages:
        raise UserError(f"--blocks {blocks}: the ResNet has {stages} stages of one depth; give a multiple of {stages}")
    return ResNetConfig(
        stem="cifar",
        depths=(blocks // stages,) * stages,
        channels=tuple(channels * 2**stage for stage in range(stages)),
        stem_channels=channels // 4,
        image_channels=3,
        image_size=side,
        classes=10,
    )


def state(imitator: Imitator) -> dict[str, Tensor]:
    """A copy of every floating tensor of the students, batch-norm statistics included."""
    named: dict[str, Any] = {f"{unit.index}.{name}": value for unit in imitator.units for name, value in unit.student.state_dict().items()}
    return {name: value.detach().cpu().clone() for name, value in named.items() if value.is_floating_point()}


def _padding(length: int) -> Tensor:
    """Attention masks int64 [SAMPLES, length]: at least half of each sample is text."""
    lengths = torch.randint(length // 2, length + 1, (SAMPLES, 1))
    return (torch.arange(length) < lengths).long()


@torch.no_grad()
def _calibrate(teacher: BlockNetwork, batch: Batch) -> None:
    """Gives an untrained teacher's batch norms the statistics of data, without which activations grow from block to block."""
    norms = [module for module in teacher.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train()
        norm.momentum = None  # a plain average, here of one batch
    if norms:
        teacher.features({name: value.to(device()) for name, value in batch.items()})
    teacher.eval()
