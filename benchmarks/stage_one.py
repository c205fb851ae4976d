"""Stage 1 on data that cost nothing to make: the package's own tasks and training loop, timed after a warm-up, on the ranks of a `Crew`."""

import contextlib
import io
import time
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from peaks import peak, rates, start_of_peak, synchronize
from ranks import folder_of_all
from torch import Tensor

from wtn_pretrain.data.images import ImageData, ImageSet, ImageSplits
from wtn_pretrain.data.masking import MaskedText, Masker
from wtn_pretrain.data.packing import PackedText
from wtn_pretrain.data.stream import Batch
from wtn_pretrain.data.text import TextSet
from wtn_pretrain.device import SideStream, peak_flops
from wtn_pretrain.errors import UserError
from wtn_pretrain.kernels.select import activate
from wtn_pretrain.models import BertConfig, ResNetConfig
from wtn_pretrain.models.base import BlockConfig, BlockNetwork, parameter_count
from wtn_pretrain.parallel.launch import Place
from wtn_pretrain.tasks.base import Task
from wtn_pretrain.tasks.classify import ClassifySection, ClassifyTask
from wtn_pretrain.tasks.mlm import MlmTask
from wtn_pretrain.training.config import OptimizerSection, TrainSection
from wtn_pretrain.training.loop import train
from wtn_pretrain.training.monitor import METRICS, read_metrics

ROWS = 4096
"""Different rows of random words."""


class Numbers:
    """What masking asks of a tokenizer, without words: the first five numbers are special."""

    mask_token_id = 4
    all_special_ids = tuple(range(5))

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [str(number) for number in ids]


class RandomText:
    """Full rows of random words, int64 [B, S], each between two special tokens."""

    def __init__(self, rows: int, length: int, words: int) -> None:
        self._ids = np.random.default_rng(0).integers(5, words, (rows, length))
        self._ids[:, 0], self._ids[:, -1] = 2, 3

    def __len__(self) -> int:
        return len(self._ids)

    def fetch(self, indices: np.ndarray, seeds: np.ndarray | None) -> Batch:
        return {"input_ids": torch.from_numpy(self._ids[indices])}


class RandomWords(MlmTask):
    """Masked language modelling on `RandomText`: masks, loss and count of FLOPs are the task's."""

    def __init__(self, config: BertConfig, length: int) -> None:
        self.tokenizer = cast(Any, Numbers(config.vocab_size))
        masker = Masker(self.tokenizer)
        made = [RandomText(rows, length, config.vocab_size) for rows in (ROWS, 1)]
        self.train, self.valid = (MaskedText(cast("TextSet | PackedText", text), masker) for text in made)
        self.length, self.predictions, self.workers = length, masker.slots(length), 0


class Noise:
    """Images of noise, normalised and channels last: always the first ones, where an accelerator's copies begin (page-locked memory)."""

    def __init__(self, images: int, most: int, channels: int, size: int, classes: int) -> None:
        """`most`: images that are ever fetched together; `images`: how many there seem to be."""
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(most, channels, size, size, generator=generator).contiguous(memory_format=torch.channels_last)
        self._pixels = pixels.pin_memory() if SideStream().pinned else pixels
        self._labels = torch.randint(classes, (most,), generator=generator)
        self._images = images

    def __len__(self) -> int:
        return self._images

    def fetch(self, indices: np.ndarray, seeds: np.ndarray | None) -> Batch:
        return {"pixels": self._pixels[: len(indices)], "labels": self._labels[: len(indices)]}


class RandomImages(ClassifyTask):
    """Image classification of `Noise`; loss and count of FLOPs are the task's."""

    def __init__(self, config: ResNetConfig, most: int) -> None:
        shape = (config.image_channels, config.image_size, config.classes)
        train, valid = (cast(ImageSet, Noise(images, least, *shape)) for images, least in ((10**6, most), (1, 1)))
        classes = tuple(map(str, range(config.classes)))
        self.data, self.train, self.valid = ImageData(), train, valid
        self.splits = ImageSplits(train, valid, classes, config.image_channels, config.image_size, (), ())
        self.smoothing, self.workers = ClassifySection().label_smoothing, 0


class Work(NamedTuple):
    """A training to be timed."""

    config: BlockConfig
    length: int
    """Of sequences; 0 for images."""
    section: Mapping[str, Any]
    """Of the `TrainSection` what is not given below."""
    warm: int
    """Steps before the clock starts."""
    steps: int
    """Steps of a repeat; repeats follow one after the other."""
    repeats: int
    kernels: str
    threads: int
    small: bool
    """Whether the rate of products is to be taken of small ones."""


class Laps:
    """When the repeats of a training began and ended: the device is waited for there, and nowhere else."""

    def __init__(self, work: Work, accumulation: int) -> None:
        self._bounds = {(work.warm + repeat * work.steps) * accumulation for repeat in range(work.repeats + 1)}
        self._forwards = 0
        self.times: list[float] = []

    def watch(self, task: Task) -> None:
        """Counts the forward passes of a task."""
        inner = task.loss

        def loss(network: BlockNetwork, batch: Mapping[str, Tensor], terms: Tensor | None = None) -> dict[str, Tensor]:
            if self._forwards in self._bounds:
                synchronize()
                self.times.append(time.perf_counter())
            self._forwards += 1
            return inner(network, batch, terms)

        task.loss = loss  # type: ignore[method-assign]


def trained(place: Place, work: Work) -> dict[str, Any]:
    """What a rank of a `Crew` measures; a mistake of the user's as `refused`, for the caller to raise."""
    try:
        return _trained(place, work)
    except UserError as error:
        return {"refused": str(error)}


def _trained(place: Place, work: Work) -> dict[str, Any]:
    torch.set_num_threads(work.threads)
    choice = activate(work.kernels)  # type: ignore[arg-type]
    tiny = TINY[work.config.family]
    settings = {**work.section, "batch_size": place.world_size, "micro_batch_size": 0, "compile": False}
    # libraries keep buffers from their first use on
    _run(place, work._replace(config=tiny, length=min(work.length, 16), section=settings, warm=0, steps=1, repeats=1))
    before = start_of_peak()
    task, times, loss = _run(place, work)
    most = peak() - before
    section = TrainSection.model_validate(work.section)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(section.products, torch.float32)
    with torch.device("meta"):
        parameters = parameter_count(work.config.build())
    return {
        "samples_per_second": [work.steps * section.batch_size / (end - begin) for begin, end in pairwise(times)],
        "memory": most,
        "parameters": parameters,
        # a backward pass costs twice a forward pass
        "flops_per_sample": 3 * task.forward_flops(work.config).total,
        "peak_flops": peak_flops(section.products),
        "product_rate": rates(0.002 if work.small else 0.1, dtype, work.small)[1],
        "loss": loss,
        "kernels": choice.describe(),
    }


def _run(place: Place, work: Work) -> tuple[Task, list[float], float | None]:
    """Trains; the task, when repeats began and the last one ended, and the last loss (on rank 0)."""
    steps = work.warm + work.steps * work.repeats + 1
    section = TrainSection.model_validate({**work.section, "steps": steps, "log_every": 10**6, "checkpoint_every": 10**6})
    config, share = work.config, section.micro_batch_size or max(1, section.batch_size // place.world_size)
    task: Task = RandomWords(config, work.length) if isinstance(config, BertConfig) else RandomImages(cast(ResNetConfig, config), share)
    laps = Laps(work, max(1, section.batch_size // (share * place.world_size)))
    laps.watch(task)
    torch.manual_seed(0)
    with folder_of_all(place) as folder, contextlib.redirect_stderr(io.StringIO()):
        train(config.build(), task, section, stage="wide", folder=folder, seed=0, place=place)
        records = read_metrics(folder / METRICS) if place.rank == 0 else []
    return task, laps.times, next((record["loss"] for record in reversed(records) if record["kind"] == "train"), None)


TINY: dict[str, BlockConfig] = {
    "bert": BertConfig(layers=1, hidden_size=16, heads=2, vocab_size=64, max_positions=16),
    "resnet": ResNetConfig(block="basic", depths=(1,), channels=(8,), stem_channels=8, image_channels=3, image_size=16, classes=2),
}
"""Trained for a step before memory is measured, by family."""
OPTIMIZERS = {
    "bert": OptimizerSection(lr=1e-4),
    "resnet": OptimizerSection(name="sgd", lr=0.01, momentum=0.9, weight_decay=5e-5),
}
"""By family."""
