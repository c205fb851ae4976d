"""The arms of `bert_throughput.py`: the work they share, the clock they carry, and one function each."""

import contextlib
import io
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import optimizer as optimizers

from wtn_pretrain.data.masking import MaskedText
from wtn_pretrain.data.packing import PackedText, Packing
from wtn_pretrain.data.stream import Batch
from wtn_pretrain.data.text import TextData, open_text
from wtn_pretrain.device import device
from wtn_pretrain.kernels.live import using
from wtn_pretrain.kernels.select import choose
from wtn_pretrain.models import BertConfig
from wtn_pretrain.models.base import BlockNetwork
from wtn_pretrain.models.hf import to_hf
from wtn_pretrain.parallel.launch import start_ranks
from wtn_pretrain.tasks.mlm import MlmSection, MlmTask
from wtn_pretrain.training.config import OptimizerSection, TrainSection
from wtn_pretrain.training.loop import train

WARM = 2
"""Steps before the clock starts."""
RATE = 5e-5
"""Learning rate of all arms, the Trainer's default."""
PHASES = ("data", "forward", "backward", "optimizer", "rest")
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Shape(NamedTuple):
    """A network, its rows and its vocabulary."""

    layers: int
    hidden: int
    heads: int
    length: int
    rows: int
    """Packed rows an optimizer step."""
    words: int
    megabytes: float


SHAPES = {
    "mini": Shape(4, 256, 4, 128, 32, 30522, 8.0),
    "large": Shape(24, 1024, 16, 128, 256, 30522, 8.0),
    "ci": Shape(2, 32, 2, 32, 8, 512, 0.2),
}


class Clock:
    """When the steps of one arm did what, and what their batches held."""

    def __init__(self, steps: int, fine: bool) -> None:
        """`fine`: waits at every mark for what the device has to do, and not only where the measured steps begin and end."""
        self.steps, self.fine = steps, fine
        self.marks: dict[str, list[float]] = {name: [] for name in ("begin", "end", "before", "after")}
        self.batches: list[tuple[float, int, int]] = []
        """Of each batch, in order: seconds to make, tokens that are no padding, all tokens."""
        self.loss: Tensor | float = math.nan

    def mark(self, name: str) -> None:
        bound = name == "begin" and len(self.marks[name]) in (WARM, WARM + self.steps)
        if torch.accelerator.is_available() and (self.fine or bound):
            torch.accelerator.synchronize()
        self.marks[name].append(time.perf_counter())

    def batch(self, began: float, kept: Tensor) -> None:
        self.batches.append((time.perf_counter() - began, int((kept > 0).sum()), kept.numel()))

    @contextlib.contextmanager
    def steps_watched(self) -> Iterator[None]:
        """Marks every optimizer's steps within."""
        hooks = (
            optimizers.register_optimizer_step_pre_hook(lambda *_: self.mark("before")),
            optimizers.register_optimizer_step_post_hook(lambda *_: self.mark("after")),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def figures(self) -> dict[str, Any]:
        """Of the steps after the warm-up."""
        steps = self.steps
        window = slice(WARM, WARM + steps)
        taken = self.marks["begin"][WARM + steps] - self.marks["begin"][WARM]
        making, kept, whole = (sum(column) for column in zip(*self.batches[window], strict=True))
        spent = {
            "forward": self._between("begin", "end", window),
            "backward": self._between("end", "before", window),
            "optimizer": self._between("before", "after", window),
            "data": making,
        }
        spent["rest"] = taken - sum(spent.values())
        return {
            "tokens_per_second": kept / taken,
            "padding": 1 - kept / whole,
            "loss": float(self.loss),
            "seconds": {name: spent[name] / steps for name in PHASES},
            "seconds_per_step": taken / steps,
        }

    def _between(self, first: str, second: str, window: slice) -> float:
        return sum(later - earlier for earlier, later in zip(self.marks[first][window], self.marks[second][window], strict=True))


class Timed(MaskedText):
    """A data set that puts what it fetches on the clock."""

    def __init__(self, data: MaskedText, clock: Clock) -> None:
        super().__init__(data.text, data.masker)
        self.clock = clock

    def fetch(self, indices: np.ndarray, seeds: np.ndarray | None) -> Batch:
        began = time.perf_counter()
        batch = super().fetch(indices, seeds)
        self.clock.batch(began, batch.get("segments", batch.get("attention_mask", batch["input_ids"])))
        return batch


class Few(MaskedText):
    """The first row of a data set: there is nothing to validate here."""

    def __len__(self) -> int:
        return 1


class Watched(MlmTask):
    """The task with a clock."""

    clock: Clock

    def loss(self, network: BlockNetwork, batch: Mapping[str, Tensor], terms: Tensor | None = None) -> dict[str, Tensor]:
        self.clock.mark("begin")
        losses = super().loss(network, batch, terms)
        self.clock.mark("end")
        self.clock.loss = losses["loss"].detach()
        return losses


class Work:
    """What all arms share."""

    def __init__(self, shape: Shape, source: Mapping[str, Any], cache: Path, steps: int) -> None:
        self.shape, self.steps, self.cache = shape, steps, cache
        words = {"vocab_size": shape.words, "sequence_length": shape.length, "limit_mb": shape.megabytes}
        self.data = {packing: TextData.model_validate({**source, **words, "packing": packing}) for packing in ("documents", "padded")}
        self.bf16 = torch.accelerator.is_available()
        self.config = BertConfig(
            # rows up to a multiple of 64, as tensor cores like them
            vocab_size=-(-shape.words // 64) * 64,
            hidden_size=shape.hidden,
            layers=shape.layers,
            heads=shape.heads,
            max_positions=max(shape.length, 128),
        )
        rows, self.tokenizer = {}, None
        for packing, data in self.data.items():
            splits = open_text(data, cache)
            rows[packing], self.tokenizer = splits.train, splits.tokenizer
        packed, pieces = rows["documents"], rows["padded"]
        assert isinstance(packed, PackedText)
        assert isinstance(pieces, PackedText)
        self.packed = packed
        self.pieces = [row[kept > 0].tolist() for row, kept in _rows(pieces)]
        self.together = round(shape.rows * len(pieces) / len(packed))
        """Pieces an optimizer step."""
        torch.manual_seed(0)
        self.network = self.config.build()

    def fresh(self) -> BlockNetwork:
        """The network as all arms begin with it."""
        network = self.config.build()
        network.load_state_dict(self.network.state_dict())
        return network

    def forward_flops(self) -> int:
        """Of a packed row, what the training asks for."""
        with contextlib.redirect_stderr(io.StringIO()):
            return MlmTask(MlmSection(), self.data["documents"], self.config, self.cache).forward_flops(self.config).total


def _rows(pieces: PackedText) -> Iterator[tuple[Tensor, Tensor]]:
    for first in range(0, len(pieces), 1024):
        batch = pieces.fetch(np.arange(first, min(first + 1024, len(pieces))), None)
        yield from zip(batch["input_ids"], batch["attention_mask"], strict=True)


def ours(work: Work, packing: Packing, clock: Clock) -> None:
    """The training loop of stages 1 and 3."""
    rows = work.shape.rows if packing == "documents" else work.together
    section = TrainSection(
        steps=WARM + work.steps + 1,
        batch_size=rows,
        optimizer=OptimizerSection(lr=RATE, weight_decay=0.0),
        precision="bf16" if work.bf16 else "fp32",
        log_every=10**6,
        checkpoint_every=10**6,
    )
    kernels = using(choose("auto"))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()), kernels:
        task = Watched(MlmSection(), work.data[packing], work.config, work.cache)
        task.clock = clock
        task.train, task.valid = Timed(task.train, clock), Few(task.valid.text, task.valid.masker)
        train(work.fresh(), task, section, stage="wide", folder=Path(folder), seed=0, place=start_ranks())


def collator(work: Work, clock: Clock) -> Callable[[list[dict[str, Any]]], Any]:
    """Hugging Face's own, on the clock."""
    from transformers import DataCollatorForLanguageModeling

    inner = DataCollatorForLanguageModeling(work.tokenizer, mlm_probability=0.15)

    def collate(examples: list[dict[str, Any]]) -> Any:
        began = time.perf_counter()
        batch = inner(examples)
        clock.batch(began, batch["attention_mask"])
        return batch

    return collate


def theirs(work: Work, clock: Clock) -> nn.Module:
    """Hugging Face's model with the same weights, on the clock."""
    model = to_hf(work.fresh()).train()
    model.register_forward_pre_hook(lambda *_: clock.mark("begin"))

    def done(module: nn.Module, inputs: Any, output: Any) -> None:
        clock.mark("end")
        clock.loss = output.loss.detach()

    model.register_forward_hook(done)
    return model


def trainer(work: Work, clock: Clock) -> None:
    """transformers' Trainer at its defaults."""
    from transformers import Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder, alone():
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=work.together,
            max_steps=WARM + work.steps + 1,
            learning_rate=RATE,
            bf16=work.bf16,
            use_cpu=not work.bf16,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        examples = [{"input_ids": piece, "attention_mask": [1] * len(piece)} for piece in work.pieces]
        made = Trainer(theirs(work, clock), arguments, data_collator=collator(work, clock), train_dataset=examples)
        with contextlib.redirect_stdout(io.StringIO()):
            made.train()


def plain(work: Work, clock: Clock) -> None:
    """A loop as one writes it by hand."""
    here = device()
    model = theirs(work, clock).to(here)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    examples = [{"input_ids": piece, "attention_mask": [1] * len(piece)} for piece in work.pieces]
    loader: Any = torch.utils.data.DataLoader(
        examples,  # type: ignore[arg-type]
        batch_size=work.together,
        shuffle=True,
        collate_fn=collator(work, clock),
        pin_memory=work.bf16,
    )
    batches = (batch for _ in iter(int, 1) for batch in loader)
    for _ in range(WARM + work.steps + 1):
        batch = {name: value.to(here, non_blocking=True) for name, value in next(batches).items()}
        with torch.autocast(here.type, torch.bfloat16, enabled=work.bf16):
            loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Without what marks a process as one of several ranks: the Trainer would wrap its model for them."""
    hidden = {name: os.environ.pop(name) for name in _LAUNCHED if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


ARMS: dict[str, Callable[[Work, Clock], None]] = {
    "ours": lambda work, clock: ours(work, "documents", clock),
    "ours, padded rows": lambda work, clock: ours(work, "padded", clock),
    "Trainer": trainer,
    "plain loop": plain,
}
