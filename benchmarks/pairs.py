"""The pairs that imitation is measured on: a thin BERT or ResNet of any depth, and a teacher of a multiple of its width."""

from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from wtn_pretrain.data.stream import Batch, BatchStream
from wtn_pretrain.device import device
from wtn_pretrain.errors import UserError
from wtn_pretrain.imitation.bridges import bridge_kinds, place_bridges
from wtn_pretrain.imitation.config import ImitateSection
from wtn_pretrain.imitation.imitator import Imitator
from wtn_pretrain.imitation.observer import Observer
from wtn_pretrain.imitation.pairing import pair
from wtn_pretrain.imitation.units import make_units, start_from_teacher
from wtn_pretrain.models import BertConfig, ResNetConfig
from wtn_pretrain.models.base import BlockConfig, BlockNetwork, flops
from wtn_pretrain.parallel.replicas import Replicas

MODELS = ("bert", "resnet")
VOCABULARY = 512
SAMPLES = 1024


class Shape(NamedTuple):
    """The sizes of a thin network and of its batches."""

    width: int
    """Hidden size, or channels of the first stage."""
    size: int
    """Length of the sequences, or side of the images."""
    batch: int
    part: int | str = 0
    """Width of a head (0: 32), or kind of residual block (0: bottleneck)."""
    stages: int = 3
    """Stages of a ResNet."""


class Widening(NamedTuple):
    """How much wider the teacher is: inside its blocks, and in what flows between them."""

    inner: float = 4.0
    outer: float = 1.0


SHAPES = {
    "bert": {"ci": Shape(32, 16, 8), "full": Shape(64, 64, 32)},
    "resnet": {"ci": Shape(16, 8, 8), "full": Shape(64, 16, 32)},
}
INNER = Widening()


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

    def __init__(self, model: str, blocks: int, shape: Shape | str, widening: Widening = INNER) -> None:
        """`shape`: sizes, or the preset whose sizes are taken."""
        torch.manual_seed(0)
        shape = SHAPES[model][shape] if isinstance(shape, str) else shape
        self.batch_size = shape.batch
        if model == "bert":
            self.thin: BlockConfig = bert(blocks, shape)
            length = shape.size
            samples = {"input_ids": torch.randint(VOCABULARY, (SAMPLES, length)), "attention_mask": _padding(length)}
        else:
            self.thin = resnet(blocks, shape)
            samples = {"pixels": torch.randn(SAMPLES, 3, shape.size, shape.size)}
        self.wide = self.thin.widen(*widening, None)
        self.pairing = pair(self.thin, self.wide)
        self.counts = flops(self.thin), flops(self.wide)
        with torch.device("meta"):
            small, large = self.thin.build(), self.wide.build()
            self.kinds = bridge_kinds(small, large, self.pairing, "auto")
            self._widths = small.widths(), large.widths()
        self.dataset = InMemory(samples)

    @cached_property
    def teacher(self) -> BlockNetwork:
        """The wide network, built when it is first asked for."""
        torch.manual_seed(0)
        teacher = self.wide.build().to(device())
        _calibrate(teacher, self.stream().micro_batch(0, 0))
        return teacher

    @property
    def learns_stem(self) -> bool:
        """Whether the stem is a unit that learns: it is a copy of the teacher's unless that is wider outside."""
        return self.kinds[0] is not None

    def stream(self, part: tuple[int, int] | None = None) -> BatchStream:
        """The same batches each time; `part`: first row and number of rows of each."""
        return BatchStream(self.dataset, self.batch_size, seed=0, micro_batch_size=self.batch_size, part=part)

    def imitator(
        self,
        section: ImitateSection,
        replicas: Replicas | None = None,
        only: range | None = None,
        observer: Observer | None = None,
    ) -> Imitator:
        """A fresh student of the teacher, started as stage 2 starts it; of `only` these units (0 is the stem).

        Without `replicas` this process is the one rank of its group (`start_ranks`).
        """
        torch.manual_seed(1)
        thin = self.thin.build().to(device())
        bridges = place_bridges(self._maps(), self.pairing, self.kinds)
        thin.start_stem_from(self.teacher, bridges[0].reduce().detach() if 0 in bridges else None)
        units = make_units(thin, self.teacher, self.pairing, bridges, section, self.counts, only)
        for unit in units:
            if unit.index:
                start_from_teacher(unit)
        return Imitator(units, section, replicas or Replicas.alone(0), observer)

    def _maps(self) -> dict[int, Tensor]:
        """Orthonormal maps for the bridges to start from: where they start costs a step nothing, and finding better ones takes long."""
        small, large = self._widths
        maps = {}
        for student, teacher, kind in zip(self.pairing.student, self.pairing.teacher, self.kinds, strict=True):
            if kind:
                generator = torch.Generator().manual_seed(student)
                maps[student] = torch.linalg.qr(torch.randn(large[teacher], small[student], generator=generator))[0].to(device())
        return maps


def bert(blocks: int, shape: Shape) -> BertConfig:
    """A thin BERT encoder."""
    head = int(shape.part) or 32
    # positions end at the length of the sequences, the length at which FLOPs are counted
    return BertConfig(vocab_size=VOCABULARY, hidden_size=shape.width, layers=blocks, heads=shape.width // head, max_positions=shape.size)


def resnet(blocks: int, shape: Shape) -> ResNetConfig:
    """A thin ResNet with `blocks` spread over its stages, channels doubling and resolution halving from stage to stage."""
    stages = shape.stages
    if blocks % stages:
        raise UserError(f"--blocks {blocks}: the ResNet has {stages} stages of one depth; give a multiple of {stages}")
    block: Literal["basic", "bottleneck"] = "basic" if shape.part == "basic" else "bottleneck"
    return ResNetConfig(
        block=block,
        stem="cifar",
        depths=(blocks // stages,) * stages,
        channels=tuple(shape.width * 2**stage for stage in range(stages)),
        stem_channels=shape.width if block == "basic" else shape.width // 4,
        image_channels=3,
        image_size=shape.size,
        classes=10,
    )


def state(imitator: Imitator) -> dict[str, Tensor]:
    """A copy of every floating tensor of the students, batch-norm statistics and bridges included."""
    named: dict[str, Any] = {f"{unit.index}.{name}": value for unit in imitator.units for name, value in unit.own_state().items()}
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
