"""Masked language modelling, with next-sentence or sentence-order prediction where the network has the head for it."""

import json
import sys
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from wtn_pretrain.config import Section
from wtn_pretrain.data.contents import rows_digest
from wtn_pretrain.data.lengths import LengthenedStream, begins, length_at
from wtn_pretrain.data.masking import IGNORED, MaskedText, Masker
from wtn_pretrain.data.packing import PackedText
from wtn_pretrain.data.stream import BatchStream, batches
from wtn_pretrain.data.text import TextData, open_text
from wtn_pretrain.data.work import mean_work
from wtn_pretrain.errors import UserError
from wtn_pretrain.files import write_text
from wtn_pretrain.models.base import BlockConfig, BlockNetwork, Flops, flops
from wtn_pretrain.models.bert.config import BertConfig
from wtn_pretrain.tasks.base import Metric, Task, classified


class MlmSection(Section):
    """Masked language modelling (Devlin et al. 2019)."""

    kind: Literal["mlm"] = "mlm"
    """Task."""
    mask_probability: float = Field(0.15, gt=0, lt=1)
    """Share of the tokens to predict; of them 80% are masked, 10% replaced, 10% kept."""
    whole_word: bool = False
    """Choose whole words instead of word pieces."""
    span: int = Field(0, ge=0)
    """Choose spans of up to so many whole words instead (Joshi et al. 2020: 10); 0: off."""


class MlmTask(Task):
    """Predict masked tokens; the loss is the mean over them, plus the pair head's if there is one.

    Training takes the mean over all hidden tokens of a step, however unequally rows, micro-batches and ranks share them (`terms`).
    """

    metric = Metric("masked accuracy", "%", True)
    train: MaskedText
    valid: MaskedText
    length: int

    def __init__(self, section: MlmSection, data: TextData, config: BertConfig, cache: Path) -> None:
        if data.packing != "none" and config.pair_head != "none":
            raise UserError(
                f"data.packing: {data.packing} has no pairs of segments for model.pair_head {config.pair_head}; set one of them to none"
            )
        splits = open_text(data, cache)
        self.tokenizer: PreTrainedTokenizerBase = splits.tokenizer
        self.identity = {"data": splits.identity} if splits.identity else {"data.rows": rows_digest(splits.train)}
        masker = Masker(splits.tokenizer, probability=section.mask_probability, whole_word=section.whole_word, span=section.span)
        if isinstance(splits.train, PackedText):
            _announce(splits.train)

        def masked(text: Any) -> MaskedText:
            return MaskedText(text if config.pair_head == "none" else text.with_pairs(config.pair_head), masker)

        self.train, self.valid = masked(splits.train), masked(splits.valid)
        self.lengths = data.lengths
        self._shorter = {
            length: masked(open_text(data.model_copy(update={"sequence_length": length}), cache).train) for _, length in data.lengths
        }
        self.length, self.longest = data.sequence_length, config.max_positions
        self.predictions = masker.slots(data.sequence_length)
        self.workers = data.workers

    def complete(self, config: BlockConfig) -> BlockConfig:
        assert isinstance(config, BertConfig)
        words = len(self.tokenizer)
        if config.vocab_size and config.vocab_size < words:
            raise UserError(
                f"model.vocab_size: the embedding has {config.vocab_size} rows and the tokenizer {words} tokens; "
                f"set model.vocab_size to {words} or more, or 0 to take the tokenizer's"
            )
        if self.length > config.max_positions:
            raise UserError(
                f"data.sequence_length: {self.length} is longer than model.max_positions {config.max_positions}; raise that or shorten this"
            )
        return config.model_copy(update={"vocab_size": config.vocab_size or words})

    def loss(self, network: BlockNetwork, batch: Mapping[str, Tensor], terms: Tensor | None = None) -> dict[str, Tensor]:
        carry = network.features(batch)
        total, count = network.head.losses(carry, batch["positions"], batch["targets"], IGNORED)
        # whole words may leave a batch without a single target: a loss of zero then, not zero by zero
        masked = total / (count.clamp_min(1) if terms is None else terms)
        if "pair_label" not in batch:
            return {"loss": masked}
        pair = F.cross_entropy(network.head.pair_logits(carry).float(), batch["pair_label"])
        return {"loss": masked + pair, "masked": masked, "pair": pair}

    def terms(self, batch: Mapping[str, Tensor]) -> Tensor:
        return (batch["targets"] != IGNORED).sum()

    def tally(self, network: BlockNetwork, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return classified(network(batch, positions=batch["positions"]), batch["targets"])

    def positions(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"positions": batch["positions"]}

    def probes(self) -> list[dict[str, Tensor]]:
        batch = next(batches(self.valid, 8))
        ids, mask = batch["input_ids"], torch.ones_like(batch["input_ids"])
        if "segments" in batch:
            # an exported network takes documents one by one
            mask = (batch["segments"] == 1).long()
        mask = batch.get("attention_mask", mask)
        probes = []
        for count, length in ((1, 7), (3, self.length), (len(ids), max(7, self.length // 2))):
            part, kept = ids[:count, :length].clone(), mask[:count, :length].clone()
            kept[-1, length * 2 // 3 :] = 0
            part[kept == 0] = self.tokenizer.pad_token_id
            probes.append({"input_ids": part, "attention_mask": kept, "token_type_ids": torch.zeros_like(part)})
        return probes

    def save_preprocessing(self, folder: Path) -> None:
        # so that programs which cut long texts know where; here nothing is cut by the tokenizer
        limit, self.tokenizer.model_max_length = self.tokenizer.model_max_length, self.longest
        try:
            self.tokenizer.save_pretrained(folder)
        finally:
            self.tokenizer.model_max_length = limit
        told = folder / "tokenizer_config.json"
        settings = json.loads(told.read_text(encoding="utf-8"))
        if settings.get("tokenizer_class") == "TokenizersBackend":
            # its name before transformers 5, which every version opens
            write_text(told, json.dumps({**settings, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")

    def stream(self, batch_size: int, *, steps: int, **settings: Any) -> BatchStream:
        """The training batches of a stage of `steps` steps, of the lengths that `data.lengths` says; `settings` are those of
        `BatchStream`."""
        if not self.lengths:
            return super().stream(batch_size, steps=steps, **settings)
        phases = [(first, self._rows(length)) for first, length in begins(self.lengths, self.length, steps)]
        return LengthenedStream(phases, batch_size, workers=self.workers, **settings)

    def forward_flops(self, config: BlockConfig) -> Flops:
        """Of what the training asks for: where rows hold whole documents, the mean over all rows, without padding and without attention
        from one document to another, whatever a kernel computes beside that."""
        return _counted_once(self, config, self.length)

    def step_flops(self, config: BlockConfig, step: int, steps: int) -> Flops:
        """As `forward_flops`, for the rows of step number `step` (from 0) of a stage of `steps`."""
        return _counted_once(self, config, length_at(self.lengths, self.length, step, steps))

    def stage_flops(self, config: BlockConfig, steps: int) -> float:
        """FLOPs of a forward pass of one sample, in the mean over a stage of `steps` steps."""
        phases = [*begins(self.lengths, self.length, steps), (steps, 0)]
        return sum(_counted_once(self, config, at).total * (end - first) for (first, at), (end, _) in pairwise(phases)) / steps

    def _rows(self, length: int) -> MaskedText:
        return self.train if length == self.length else self._shorter[length]

    def count(self, config: BlockConfig, length: int) -> Flops:
        """As `forward_flops`, for rows of `length` tokens."""
        masked = self._rows(length)
        work = mean_work(masked.text, length, masked.masker.budgets)
        if work is None:
            return flops(config, length, positions=torch.zeros(1, masked.masker.slots(length), dtype=torch.long, device="meta"))
        # a block's work is a n + b n^2 for n tokens, and the head's proportional to the positions
        positions = torch.zeros(1, 1, dtype=torch.long, device="meta")
        one, two = (flops(config, count, positions=positions) for count in (1, 2))
        blocks = []
        for single, double in zip(one.blocks, two.blocks, strict=True):
            quadratic = (double - 2 * single) / 2
            blocks.append(round((single - quadratic) * work.tokens + quadratic * work.pairs))
        return Flops(one.stem, tuple(blocks), round(one.head * work.predicted))


@lru_cache(maxsize=32)
def _counted_once(task: MlmTask, config: BlockConfig, length: int) -> Flops:
    # asked for at every step, and counting takes a while
    return task.count(config, length)


def _announce(text: PackedText) -> None:
    """Says once, on the first rank, how full the rows are."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        pieces, rows = len(text.layout.starts), len(text)
        print(
            f"data: {pieces} documents or pieces of them in {rows} rows of {text.sequence_length} tokens, {text.padding():.1%} padding",
            file=sys.stderr,
        )
