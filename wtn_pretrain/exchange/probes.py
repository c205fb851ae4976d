"""Real validation inputs at the shapes at which an export is compared with its original."""

from typing import Any

import torch
from torch import Tensor

from wtn_pretrain.data.stream import batches
from wtn_pretrain.models.base import BlockConfig
from wtn_pretrain.tasks.base import Task

Inputs = dict[str, Tensor]

BATCHES = (1, 3, 32)
LENGTHS = (1, 7, 128, 512)
LARGEST = 1 << 29
"""Logits of a probe, at most: 2 GiB in fp32, which are there twice. BERT's 30,528 words at 32 x 512 tokens are just below."""


def probes(task: Task, config: BlockConfig) -> list[Inputs]:
    """Inputs of `BATCHES` samples, of sequences `LENGTHS` tokens long as far as the positions go; the last row of a batch is padded.

    Where the data has fewer or shorter rows they are repeated and joined. A shape of more than `LARGEST` logits is left out.
    """
    real = next(batches(task.valid, max(BATCHES)))
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
            made.append(_rows(real["input_ids"], count, length, padding))
    return made


def calibration(task: Task, config: BlockConfig, count: int, batch: int) -> list[Inputs]:
    """`count` training samples as an exported network takes them, in batches."""
    found: list[Inputs] = []
    for real in batches(task.train, batch):
        found.append(inputs_of(real, config))
        if sum(len(next(iter(inputs.values()))) for inputs in found) >= count:
            break
    return found


def inputs_of(batch: Inputs, config: BlockConfig) -> Inputs:
    """What an exported network takes of a batch of the task."""
    if "pixels" in batch:
        return {"pixels": batch["pixels"]}
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids)).long()
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": batch.get("token_type_ids", torch.zeros_like(ids))}


def _rows(ids: Tensor, count: int, length: int, padding: int) -> Inputs:
    """`count` rows of `length` tokens of the text in `ids` [B, S], the last of them padded from two thirds on."""
    text = ids.flatten()
    places = (torch.arange(count)[:, None] * ids.shape[1] + torch.arange(length)) % len(text)
    rows = text[places]
    mask = torch.ones_like(rows)
    # a row of one token has nothing to pad
    mask[-1, max(1, length * 2 // 3) :] = 0
    rows[mask == 0] = padding
    types = torch.zeros_like(rows)
    types[0, length // 2 :] = 1
    return {"input_ids": rows, "attention_mask": mask, "token_type_ids": types}


def _padding(task: Task) -> int:
    tokenizer: Any = getattr(task, "tokenizer", None)
    return tokenizer.pad_token_id if tokenizer is not None else 0
