"""Real inputs as exported networks take them: at the shapes of the comparison, for the metric, and to calibrate on."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wtn_pretrain.data.hashing import hash_keys, permutation
from wtn_pretrain.data.masking import IGNORED
from wtn_pretrain.data.stream import Dataset
from wtn_pretrain.models.base import BlockConfig
from wtn_pretrain.models.bert.model import restarting
from wtn_pretrain.tasks.base import Task

Inputs = dict[str, Tensor]

BATCHES = (1, 3, 32)
LENGTHS = (1, 7, 128, 512)
LARGEST = 1 << 29
"""Logits of a probe, at most: 2 GiB in fp32, which are there twice. BERT's 30,528 words at 32 x 512 tokens are just below."""


def mixed(dataset: Dataset, count: int, batch: int) -> Iterator[Inputs]:
    """`count` samples (0: all, as it is where there are fewer) in batches, in an order that is always the same and not the files': class
    folders are read class by class. A sample's seed depends on its index alone, as in every evaluation.
    """
    order = permutation(0, 0, len(dataset)).astype(np.int64)[: count or None]
    for first in range(0, len(order), batch):
        indices = order[first : first + batch]
        yield dataset.fetch(indices, hash_keys(0, indices))


def probes(task: Task, config: BlockConfig) -> list[Inputs]:
    """Inputs of `BATCHES` samples, of sequences `LENGTHS` tokens long as far as the positions go; the last row of a batch is padded.

    Where the data has fewer or shorter rows they are repeated and joined. A shape of more than `LARGEST` logits is left out.
    """
    real = next(mixed(task.valid, max(BATCHES), max(BATCHES)))
    if "pixels" in real:
        pixels = real["pixels"]
        return [{"pixels": pixels[torch.arange(count) % len(pixels)]} for count in BATCHES]
    longest: int = config.max_positions  # type: ignore[attr-defined]
    padding = _padding(task)
    lengths = sorted({min(length, longest) for length in LENGTHS})
    made = []
    for length in lengths:
        for count in BATCHES:
            if count > 1 and count * length * config.vocab_size > LARGEST:  # type: ignore[attr-defined]
                continue
            made.append(_rows(real["input_ids"], count, length, padding, config.token_types))  # type: ignore[attr-defined]
    return made


def calibration(task: Task, config: BlockConfig, count: int, batch: int) -> list[Inputs]:
    """`count` training samples as an exported network takes them, in batches."""
    return [inputs_of(apart(real, task), config) for real in mixed(task.train, count, batch)]


def apart(batch: Inputs, task: Task) -> Inputs:
    """Rows of several documents (`segments`) as an exported network can read them: each document in a row of its own, padded to the
    longest, with its share of the positions to predict. Other batches are as they were.
    """
    if "segments" not in batch:
        return batch
    segments = batch["segments"]
    counts = segments.amax(1)
    document = (counts.cumsum(0) - counts)[:, None] + segments - 1
    place = restarting(torch.arange(segments.shape[1]), segments)
    inside, total = segments > 0, int(counts.sum())
    shape = (total, int(place[inside].max()) + 1)
    ids, mask = torch.full(shape, _padding(task)), torch.zeros(shape, dtype=torch.long)
    ids[document[inside], place[inside]] = batch["input_ids"][inside]
    mask[document[inside], place[inside]] = 1
    result = {"input_ids": ids, "attention_mask": mask}
    if "targets" in batch:
        used = batch["targets"] != IGNORED
        row, column = used.nonzero()[:, 0], batch["positions"][used]
        # ascending, as positions are in a row and documents in rows
        owner = document[row, column]
        each = owner.bincount(minlength=total)
        slot = torch.arange(len(owner)) - (each.cumsum(0) - each)[owner]
        result["positions"] = torch.zeros(total, int(each.max()), dtype=torch.long)
        result["targets"] = torch.full_like(result["positions"], IGNORED)
        result["positions"][owner, slot] = place[row, column]
        result["targets"][owner, slot] = batch["targets"][used]
    return result


def inputs_of(batch: Inputs, config: BlockConfig) -> Inputs:
    """What an exported network takes of a batch of the task."""
    if "pixels" in batch:
        return {"pixels": batch["pixels"]}
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids)).long()
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": batch.get("token_type_ids", torch.zeros_like(ids))}


def _rows(ids: Tensor, count: int, length: int, padding: int, token_types: int) -> Inputs:
    """`count` rows of `length` tokens of the text in `ids` [B, S], the last of them padded from two thirds on."""
    text = ids.flatten()
    places = (torch.arange(count)[:, None] * ids.shape[1] + torch.arange(length)) % len(text)
    rows = text[places]
    mask = torch.ones_like(rows)
    # a row of one token has nothing to pad
    mask[-1, max(1, length * 2 // 3) :] = 0
    rows[mask == 0] = padding
    types = torch.zeros_like(rows)
    types[0, length // 2 :] = min(1, token_types - 1)
    return {"input_ids": rows, "attention_mask": mask, "token_type_ids": types}


def _padding(task: Task) -> int:
    tokenizer: Any = getattr(task, "tokenizer", None)
    return tokenizer.pad_token_id if tokenizer is not None else 0
