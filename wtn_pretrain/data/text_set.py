"""Running text in rows of fixed length, alone or as pairs of segments."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from wtn_pretrain.data.hashing import uniforms
from wtn_pretrain.errors import UserError

Pair = Literal["sop", "nsp"]

_CUT, _ORDER, _OTHER = 11, 12, 13


@dataclass(frozen=True)
class TextSet:
    """A Dataset of full rows packed from running text: {"input_ids": int64 [B, S]} = [CLS] tokens [SEP].

    With `pair` a row is [CLS] a [SEP] b [SEP], and "token_type_ids" int64 [B, S] (0 up to the first [SEP], 1 after) and "pair_label"
    int64 [B] join it: "sop" swaps a and b in half of the rows (label 1), "nsp" takes b from another row in half of them (label 1).
    `with_mask` adds "attention_mask", all ones, for rows that stand beside padded ones.
    Rows follow each other in the text and may run over the end of a document; the last, short one is dropped.
    """

    tokens: Any  # 1-D ids, memory-mapped
    sequence_length: int
    cls_id: int
    sep_id: int
    pair: Pair | None = None
    with_mask: bool = False

    def __len__(self) -> int:
        return len(self.tokens) // (self.sequence_length - 2)

    def with_pairs(self, pair: Pair | None) -> "TextSet":
        """The same text in rows of sentence pairs."""
        return replace(self, pair=pair)

    def fetch(self, indices: np.ndarray, seeds: np.ndarray | None) -> dict[str, torch.Tensor]:
        """See `wtn_pretrain.data.stream.Dataset`. Without seeds pairs are cut in the middle and in order."""
        starts = indices * (self.sequence_length - 2)
        batch = self._rows(starts) if self.pair is None else self._pairs(indices, starts, seeds)
        return batch | ({"attention_mask": torch.ones_like(batch["input_ids"])} if self.with_mask else {})

    def _rows(self, starts: np.ndarray) -> dict[str, torch.Tensor]:
        rows = np.empty((len(starts), self.sequence_length), np.int64)
        rows[:, 0], rows[:, -1] = self.cls_id, self.sep_id
        rows[:, 1:-1] = self.tokens[starts[:, None] + np.arange(self.sequence_length - 2)]
        return {"input_ids": torch.from_numpy(rows)}

    def _pairs(self, indices: np.ndarray, starts: np.ndarray, seeds: np.ndarray | None) -> dict[str, torch.Tensor]:
        count, length = len(indices), self.sequence_length - 3
        cuts, changed = np.full(count, length // 2), np.zeros(count, bool)
        if seeds is not None:
            cuts = 1 + np.floor(uniforms(seeds, _CUT, 1)[:, 0] * (length - 1)).astype(np.int64)
            changed = uniforms(seeds, _ORDER, 1)[:, 0] < 0.5
        first, a_starts, b_starts = cuts, starts, starts + cuts
        if self.pair == "sop":
            first = np.where(changed, length - cuts, cuts)
            a_starts, b_starts = np.where(changed, b_starts, a_starts), np.where(changed, a_starts, b_starts)
        elif seeds is not None:
            if len(self) < 2:
                raise UserError("pairs of kind nsp need two rows of text or more; give more text or a shorter data.sequence_length")
            other = (indices + 1 + np.floor(uniforms(seeds, _OTHER, 1)[:, 0] * (len(self) - 1)).astype(np.int64)) % len(self)
            b_starts = np.where(changed, other * (self.sequence_length - 2) + cuts, b_starts)
        # position p of a row holds token p - 1 of a, or p - first - 2 of b
        position = np.arange(self.sequence_length)[None, :]
        in_b = position > first[:, None] + 1
        source = np.where(in_b, b_starts[:, None] + position - first[:, None] - 2, a_starts[:, None] + position - 1)
        separator = (position == first[:, None] + 1) | (position == self.sequence_length - 1)
        special = separator | (position == 0)
        rows = self.tokens[np.where(special, 0, source)].astype(np.int64)
        rows[separator] = self.sep_id
        rows[:, 0] = self.cls_id
        return {
            "input_ids": torch.from_numpy(rows),
            "token_type_ids": torch.from_numpy(in_b.astype(np.int64)),
            "pair_label": torch.from_numpy(changed.astype(np.int64)),
        }
