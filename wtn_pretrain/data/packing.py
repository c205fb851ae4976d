"""Whole documents in rows of fixed length: which pieces share a row, and the rows.

Rows that hold several documents must be read with attention inside each document alone, and positions that begin anew with each: that
is what `segments` says. A packing is a function of the documents' lengths and of the row's length, of nothing else.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

Packing = Literal["none", "documents", "padded"]

SPECIAL = 2
"""Tokens that each piece brings with it: [CLS] and [SEP]."""


class Layout(NamedTuple):
    """Pieces of documents, row by row."""

    starts: np.ndarray
    """int64 [N]: first token of each piece."""
    lengths: np.ndarray
    """int32 [N]: its tokens, special ones not counted."""
    rows: np.ndarray
    """int64 [R + 1]: row r holds the pieces rows[r] to rows[r + 1] - 1."""

    def words(self) -> np.ndarray:
        """int64 [R]: tokens of text in each row."""
        return self._per_row(self.lengths.astype(np.int64))

    def tokens(self) -> np.ndarray:
        """int64 [R]: tokens in each row, special ones counted and padding not."""
        return self._per_row(self.lengths.astype(np.int64) + SPECIAL)

    def pairs(self) -> np.ndarray:
        """int64 [R]: pairs of tokens of one document in each row, which is what attention computes."""
        return self._per_row((self.lengths.astype(np.int64) + SPECIAL) ** 2)

    def _per_row(self, values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values, self.rows[:-1]) if len(values) else np.zeros(0, np.int64)


class Summary(NamedTuple):
    """What is asked of a whole layout."""

    words: np.ndarray
    """int64 [S]: how many rows hold so many tokens of text."""
    pieces: int
    pairs: int
    """Pairs of tokens of one document, of all rows."""

    @property
    def tokens(self) -> int:
        """Of all rows, special ones counted and padding not."""
        return int(self.words @ np.arange(len(self.words))) + SPECIAL * self.pieces


def summarise(layout: Layout, sequence_length: int) -> Summary:
    """The summary of a layout in rows of `sequence_length`."""
    return Summary(np.bincount(layout.words(), minlength=sequence_length), len(layout.starts), int(layout.pairs().sum()))


def lay_out(documents: np.ndarray, sequence_length: int, packing: Packing) -> Layout:
    """Rows of `sequence_length` from documents that begin at documents[:-1] and end at documents[1:] (int64, ascending).

    A document longer than a row is cut into full rows and a rest. "padded" gives each piece a row of its own; "documents" lets short
    ones share: best fit, longest first, over the histogram of lengths (Krell et al. 2021, "Efficient Sequence Packing without
    Cross-contamination", section 3). Rows are in the order in which their first pieces stand in the text.
    """
    starts, lengths = pieces_of(documents, sequence_length - SPECIAL)
    if packing == "padded":
        return Layout(starts, lengths, np.arange(len(starts) + 1))
    row = _in_order(best_fit(lengths + SPECIAL, sequence_length))
    order = np.argsort(row, kind="stable")
    return Layout(starts[order], lengths[order], np.concatenate([[0], np.cumsum(np.bincount(row))]).astype(np.int64))


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each item, int64 [N], by decreasing size into the fullest row that has room: every row holds `capacity` at most.

    Args:
        sizes: int [N], from 1 to `capacity`.
    """
    by_size = np.argsort(-sizes, kind="stable")
    bounds = np.concatenate([[0], np.cumsum(np.bincount(sizes, minlength=capacity + 1)[::-1])])
    row = np.empty(len(sizes), np.int64)
    free: dict[int, np.ndarray] = {}  # room -> rows that have as much left
    count = 0
    for size in range(capacity, 0, -1):
        items = by_size[bounds[capacity - size] : bounds[capacity - size + 1]]
        while len(items):
            # the least room that is enough; rows alike are filled at once, each as far as it goes before the next
            room = min((room for room in free if room >= size), default=capacity)
            together = room // size
            if room in free:
                rows = free.pop(room)
            else:
                rows = np.arange(count, count - (-len(items) // together))
                count += len(rows)
            taken = min(len(items), len(rows) * together)
            row[items[:taken]] = np.repeat(rows, together)[:taken]
            items = items[taken:]
            full, rest = divmod(taken, together)
            for some, left in (
                (rows[:full], room - together * size),
                (rows[full : full + bool(rest)], room - rest * size),
                (rows[full + bool(rest) :], room),
            ):
                if left and len(some):
                    free[left] = np.concatenate([free[left], some]) if left in free else some
    return row


@dataclass(frozen=True)
class PackedText:
    """A Dataset of rows laid out by `lay_out`: {"input_ids": int64 [B, S]} = [CLS] piece [SEP] for each piece, then padding, and with it

    "segments" int64 [B, S], 1, 2, ... for the pieces of the row and 0 for padding, or, where each piece has a row of its own,
    "attention_mask" int64 [B, S], 1 and 0.
    """

    tokens: Any  # 1-D ids, memory-mapped
    layout: Layout
    sequence_length: int
    cls_id: int
    sep_id: int
    pad_id: int
    packing: Packing
    known: Summary | None = None
    """Of the layout, where it is known already."""

    def __len__(self) -> int:
        return len(self.layout.rows) - 1

    @cached_property
    def summary(self) -> Summary:
        """Of all rows."""
        return self.known or summarise(self.layout, self.sequence_length)

    def padding(self) -> float:
        """The share of the rows' tokens that is padding."""
        return 1 - self.summary.tokens / max(1, len(self) * self.sequence_length)

    def fetch(self, indices: np.ndarray, seeds: np.ndarray | None) -> dict[str, torch.Tensor]:
        """See `wtn_pretrain.data.stream.Dataset`; nothing is random here."""
        firsts = self.layout.rows[indices]
        counts = self.layout.rows[indices + 1] - firsts
        owner = np.repeat(np.arange(len(indices)), counts)
        number = _within(counts)
        piece = firsts[owner] + number
        sizes = self.layout.lengths[piece].astype(np.int64) + SPECIAL
        # cells count through all rows; a piece begins where the pieces before it in its row end
        ends = np.cumsum(sizes)
        begins = ends - sizes
        begins += owner * self.sequence_length - begins[np.cumsum(counts) - counts][owner]
        place = _within(sizes)
        cell = np.repeat(begins, sizes) + place
        last = np.repeat(sizes, sizes) - 1
        inside = (place > 0) & (place < last)
        source = np.where(inside, np.repeat(self.layout.starts[piece], sizes) + place - 1, 0)
        ids = np.full(len(indices) * self.sequence_length, self.pad_id, np.int64)
        ids[cell] = np.where(inside, self.tokens[source], np.where(place == 0, self.cls_id, self.sep_id))
        segments = np.zeros(len(ids), np.int64)
        segments[cell] = np.repeat(number + 1, sizes)
        name = "attention_mask" if self.packing == "padded" else "segments"
        shape = (len(indices), self.sequence_length)
        return {"input_ids": torch.from_numpy(ids.reshape(shape)), name: torch.from_numpy(segments.reshape(shape))}


def _within(counts: np.ndarray) -> np.ndarray:
    """0 .. counts[0] - 1, 0 .. counts[1] - 1, ...: int64."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)


def pieces_of(documents: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts, int64, and lengths, int32, of pieces of at most `room` tokens."""
    counts = -(-np.diff(documents) // room)
    starts = np.repeat(documents[:-1], counts) + _within(counts) * room
    lengths = np.minimum(np.repeat(documents[1:], counts) - starts, room)
    return starts.astype(np.int64), lengths.astype(np.int32)


def _in_order(row: np.ndarray) -> np.ndarray:
    """The same rows, numbered in the order of their first items."""
    if not len(row):
        return row
    _, first, inverse = np.unique(row, return_index=True, return_inverse=True)
    number = np.empty(len(first), np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    return number[inverse]
