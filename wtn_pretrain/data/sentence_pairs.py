"""Pairs of segments cut between sentences, for next-sentence and sentence-order prediction."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from wtn_pretrain.data.hashing import uniforms
from wtn_pretrain.data.packing import pieces_of
from wtn_pretrain.errors import UserError

PAIR_SPECIAL = 3
"""Special tokens of a row: [CLS] a [SEP] b [SEP]."""

_CUT, _CHANGE, _OTHER = 11, 12, 13


@dataclass(frozen=True)
class Runs:
    """Consecutive sentences of one document that fit into a row together."""

    bounds: np.ndarray
    """int64 [P + 1]: where each sentence, or piece of a long one, begins, and the end."""
    first: np.ndarray
    """int64 [R]: the first sentence of each run."""
    last: np.ndarray
    """int64 [R]: one past its last; a run holds two or more."""
    document: np.ndarray
    """int64 [R], ascending."""

    def words(self) -> np.ndarray:
        """int64 [R]: tokens of text in each."""
        return self.bounds[self.last] - self.bounds[self.first]


def words_of(runs: Runs, sequence_length: int) -> np.ndarray:
    """How many runs hold so many tokens: int64 [sequence_length]."""
    return np.bincount(runs.words(), minlength=sequence_length)


def runs_of(sentences: np.ndarray, documents: np.ndarray, sequence_length: int) -> Runs:
    """The runs of a text, each as long as it can be; one sentence at the end of a document is joined by the one before it, which is
    then in two runs. A document of a single sentence gives no pair and is left out.

    Args:
        sentences: int64 [S + 1], where each begins in tokens, and the end. Those longer than half a row are cut.
        documents: int64 [D + 1], the first sentence of each document, and the end.
    """
    room = sequence_length - PAIR_SPECIAL
    lengths = np.diff(sentences)
    starts, _ = pieces_of(sentences, max(1, room // 2))
    bounds = np.append(starts, sentences[-1])
    # how many pieces there are before each sentence
    before = np.concatenate([[0], np.cumsum(-(-lengths // max(1, room // 2)))])
    ends = before[documents]
    firsts: list[np.ndarray] = []
    lasts: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    # every document is one run further on in each turn
    owner = np.flatnonzero(np.diff(ends) > 1)
    place = ends[:-1][owner]
    while len(owner):
        stop = ends[1:][owner]
        following = np.minimum(np.searchsorted(bounds, bounds[place] + room, side="right") - 1, stop)
        alone = following - place == 1
        firsts.append(np.where(alone, place - 1, place))
        lasts.append(following)
        owners.append(owner)
        left = following < stop
        owner, place = owner[left], following[left]
    if not firsts:
        return Runs(bounds, *(np.zeros(0, np.int64) for _ in range(3)))
    first, last, document = (np.concatenate(some) for some in (firsts, lasts, owners))
    order = np.argsort(first, kind="stable")
    return Runs(bounds, first[order], last[order], document[order])


@dataclass(frozen=True)
class SentencePairs:
    """A Dataset of rows [CLS] a [SEP] b [SEP] and padding: "input_ids", "token_type_ids" (1 in b and its [SEP]) and "attention_mask"
    int64 [B, S], "pair_label" int64 [B].

    A row holds a run, cut between two sentences. "sop" swaps the two in half of the rows (label 1); "nsp" replaces b in half of them
    (label 1) by the beginning of a run of another document, as long as b where that is long enough, so that lengths tell nothing.
    """

    tokens: Any  # 1-D ids
    runs: Runs
    sequence_length: int
    cls_id: int
    sep_id: int
    pad_id: int
    pair: Literal["sop", "nsp"]
    known: np.ndarray | None = None
    """`words`, where it is known already."""

    @cached_property
    def words(self) -> np.ndarray:
        """int64 [S]: how many rows hold so many tokens of text."""
        return words_of(self.runs, self.sequence_length) if self.known is None else self.known

    def __len__(self) -> int:
        return len(self.runs.first)

    def fetch(self, indices: np.ndarray, seeds: np.ndarray | None) -> dict[str, torch.Tensor]:
        """See `wtn_pretrain.data.stream.Dataset`. Without seeds a run is cut in the middle and stays in order."""
        runs, count = self.runs, len(indices)
        first, last = runs.first[indices], runs.last[indices]
        cuts, changed = first + (last - first) // 2, np.zeros(count, bool)
        if seeds is not None:
            cuts = first + 1 + np.floor(uniforms(seeds, _CUT, 1)[:, 0] * (last - first - 1)).astype(np.int64)
            changed = uniforms(seeds, _CHANGE, 1)[:, 0] < 0.5
        a_start, cut, b_end = runs.bounds[first], runs.bounds[cuts], runs.bounds[last]
        a_size, b_start, b_size = cut - a_start, cut, b_end - cut
        if self.pair == "sop":
            a_start, b_start = np.where(changed, b_start, a_start), np.where(changed, a_start, b_start)
            a_size, b_size = np.where(changed, b_size, a_size), np.where(changed, a_size, b_size)
        elif seeds is not None:
            other = self._others(indices, uniforms(seeds, _OTHER, 1)[:, 0])
            there = runs.bounds[runs.first[other]]
            b_size = np.where(changed, np.minimum(b_size, runs.bounds[runs.last[other]] - there), b_size)
            b_start = np.where(changed, there, b_start)
        # position p of a row holds token p - 1 of a, or p - a_size - 2 of b
        position = np.arange(self.sequence_length)[None, :]
        middle, end = (a_size + 1)[:, None], (a_size + b_size + 2)[:, None]
        in_b, inside = position > middle, position <= end
        source = np.where(in_b, (b_start - a_size)[:, None] + position - 2, a_start[:, None] + position - 1)
        separator = (position == middle) | (position == end)
        text = inside & ~separator & (position > 0)
        # tokens that are not needed are read where others of the row are
        rows = np.where(text, np.asarray(self.tokens[np.where(text, source, a_start[:, None])]).astype(np.int64), self.pad_id)
        rows[separator] = self.sep_id
        rows[:, 0] = self.cls_id
        return {
            "input_ids": torch.from_numpy(rows),
            "token_type_ids": torch.from_numpy((in_b & inside).astype(np.int64)),
            "attention_mask": torch.from_numpy(inside.astype(np.int64)),
            "pair_label": torch.from_numpy(changed.astype(np.int64)),
        }

    def _others(self, indices: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """A run of another document for each, all of them equally likely."""
        owner = self.runs.document[indices]
        begin = np.searchsorted(self.runs.document, owner, side="left")
        own = np.searchsorted(self.runs.document, owner, side="right") - begin
        if (own == len(self)).any():
            raise UserError("pairs of kind nsp need two documents or more; give more text, or set model.pair_head to sop")
        drawn = np.floor(draws * (len(self) - own)).astype(np.int64)
        return drawn + np.where(drawn >= begin, own, 0)
