"""Masking as in BERT: 15% of a row's tokens chosen, of which 80% become [MASK], 10% a random token and 10% stay.

Tokens are chosen one by one, by whole words, or in spans of words (Joshi et al. 2020, "SpanBERT", section 3.1).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from wtn_pretrain.data.hashing import uniforms, uniforms_at
from wtn_pretrain.data.packing import SPECIAL
from wtn_pretrain.data.sentence_pairs import PAIR_SPECIAL
from wtn_pretrain.data.stream import Dataset
from wtn_pretrain.data.tokenizer import continuations, unused_ids
from wtn_pretrain.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
_CHOICE, _ACTION, _REPLACEMENT, _SPAN = 21, 22, 23, 24
_SPAN_END = 0.2
"""Probability that a span ends with a word, before it is cut at its longest: SpanBERT's."""


class Masker:
    """Chooses P = max(1, round(probability * (S - 2))) tokens of each row of S, the same P for all rows, and hides them; fewer where
    a row is said to hold fewer than S - 2 tokens of text.

    Special tokens are never chosen, [UNK] included. With `whole_word` the pieces of a word (a piece and the ## pieces after it) are
    chosen together: words in random order, those that no longer fit left out, and what remains of P unused. With `span` runs of up to
    so many whole words are: of geometric length from a random word on, cut at what is chosen already, at special tokens and where P is
    reached; and what becomes of one token of a span becomes of all.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, probability: float = 0.15, whole_word: bool = False, span: int = 0) -> None:
        if not 0 < probability < 1:
            raise UserError(f"masking probability {probability} is not between 0 and 1; BERT's is 0.15")
        self.probability, self.whole_word, self.span = probability, whole_word, span
        self.mask_id = int(tokenizer.mask_token_id)
        size = len(tokenizer)
        self._special = np.zeros(size, bool)
        self._special[[number for number in tokenizer.all_special_ids if number < size]] = True
        # BERT's own vocabularies have entries that no text gets: as random words they would give the place away
        self._ordinary = np.setdiff1d(np.flatnonzero(~self._special), unused_ids(tokenizer))
        if not len(self._ordinary):
            raise UserError(f"the tokenizer's vocabulary of {size} holds special tokens only; give one with words")
        self._continues = continuations(tokenizer)

    def slots(self, sequence_length: int) -> int:
        """P for rows of `sequence_length` tokens."""
        return max(1, round(self.probability * (sequence_length - 2)))

    def budgets(self, words: np.ndarray) -> np.ndarray:
        """How many of so many tokens of text are chosen: int64, the shape of `words`."""
        return np.maximum(1, np.rint(self.probability * words).astype(np.int64))

    def __call__(
        self, input_ids: np.ndarray, seeds: np.ndarray, words: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masked copy [B, S] of `input_ids` int64 [B, S]; positions int64 [B, P], ascending; targets int64 [B, P], the hidden ids.

        `seeds` uint64 [B] decide everything; `words` int [B] are the tokens of text in each row, None: S - 2. A slot without a token
        has target -100 and position S - 1. Raises a UserError for ids that the tokenizer does not have.
        """
        if input_ids.size and not 0 <= input_ids.min() <= input_ids.max() < len(self._special):
            wrong = int(input_ids.max() if input_ids.max() >= len(self._special) else input_ids.min())
            raise UserError(
                f"token id {wrong} is outside the tokenizer's vocabulary of {len(self._special)}; use the tokenizer that made the ids"
            )
        slots = self.slots(input_ids.shape[1])
        budgets = np.full(len(input_ids), slots) if words is None else np.minimum(self.budgets(words), slots)
        eligible = ~self._special[input_ids]
        head: np.ndarray | None = None
        if self.span:
            chosen, head = self._choose_spans(input_ids, eligible, seeds, budgets)
        else:
            keys = uniforms(seeds, _CHOICE, input_ids.shape[1])
            if self.whole_word:
                chosen = self._choose_words(input_ids, eligible, keys, budgets)
            else:
                chosen = _smallest(np.where(eligible, keys, 2.0), budgets, slots)
        positions, used = _positions(chosen, slots)
        # every place has draws of its own, of which only the chosen ones' are made
        actions = uniforms_at(seeds, _ACTION, positions if head is None else np.take_along_axis(head, positions, 1))
        picks = np.floor(uniforms_at(seeds, _REPLACEMENT, positions) * len(self._ordinary)).astype(np.int64)
        words_there = np.take_along_axis(input_ids, positions, 1)
        seen = np.where(actions < 0.8, self.mask_id, np.where(actions >= 0.9, self._ordinary[picks], words_there))
        masked = input_ids.copy()
        rows = np.broadcast_to(np.arange(len(input_ids))[:, None], positions.shape)
        masked[rows[used], positions[used]] = seen[used]
        return masked, positions, np.where(used, words_there, IGNORED)

    def _choose_words(self, input_ids: np.ndarray, eligible: np.ndarray, keys: np.ndarray, budgets: np.ndarray) -> np.ndarray:
        rows = np.arange(len(input_ids))
        words, lengths = self._words(input_ids, eligible)
        # word w draws key w; words that do not exist have length 0 and change nothing
        taken, count = np.zeros(words.shape, bool), np.zeros(len(rows), np.int64)
        for word in np.argsort(np.where(lengths > 0, keys, 2.0), axis=1).T:
            length = lengths[rows, word]
            fits = (length > 0) & (count + length <= budgets)
            taken[rows, word] = fits
            count += length * fits
            if (count == budgets).all():
                break
        return np.take_along_axis(taken, words, 1) & eligible

    def _choose_spans(
        self, input_ids: np.ndarray, eligible: np.ndarray, seeds: np.ndarray, budgets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """What is chosen, bool [B, S], and the number of the span's first word for each token, int64 [B, S]."""
        rows, width = np.arange(len(input_ids)), input_ids.shape[1]
        words, lengths = self._words(input_ids, eligible)
        total = (lengths > 0).sum(1)
        # where each word begins, to tell neighbours from words with special tokens between them
        starts = np.full(words.shape, width)
        np.minimum.at(starts, (rows[:, None], words), np.where(eligible, np.arange(width), width))
        taken, first = np.zeros(words.shape, bool), np.zeros(words.shape, np.int64)
        count = np.zeros(len(rows), np.int64)
        # as many for every row of this length, whichever others are in the batch
        attempts = 4 + 2 * self.slots(width)
        draws = uniforms(seeds, _SPAN, 2 * attempts)
        # the inverse of the geometric distribution's cumulative one
        sizes = np.minimum(1 + np.floor(np.log1p(-draws[:, ::2]) / np.log1p(-_SPAN_END)), self.span).astype(np.int64)
        places = np.floor(draws[:, 1::2] * total[:, None]).astype(np.int64)
        for size, place in zip(sizes.T, places.T, strict=True):
            going = total > 0
            for step in range(int(size.max(initial=0))):
                word = np.minimum(place + step, width - 1)
                length = lengths[rows, word]
                going = going & (step < size) & (length > 0) & ~taken[rows, word] & (count + length <= budgets)
                if step:
                    going &= starts[rows, word] == starts[rows, word - 1] + lengths[rows, word - 1]
                taken[rows[going], word[going]] = True
                first[rows[going], word[going]] = place[going]
                count += length * going
            if (count == budgets).all():
                break
        return np.take_along_axis(taken, words, 1) & eligible, np.take_along_axis(first, words, 1)

    def _words(self, input_ids: np.ndarray, eligible: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The word of each token where it is eligible, and the tokens of each word, 0 where there is none: both int64 [B, S]."""
        after_special = np.concatenate([np.ones((len(input_ids), 1), bool), ~eligible[:, :-1]], 1)
        heads = eligible & (~self._continues[input_ids] | after_special)
        words = np.maximum(np.cumsum(heads, 1) - 1, 0)
        lengths = np.zeros_like(words)
        np.add.at(lengths, (np.arange(len(input_ids))[:, None], words), eligible)
        return words, lengths


class MaskedText:
    """A Dataset of rows with hidden tokens: {"input_ids" int64 [B, S], "positions" int64 [B, P], "targets" int64 [B, P], -100 where a
    slot is unused}, "token_type_ids" and "pair_label" where the text has pairs, "segments" or "attention_mask" where rows hold whole
    documents. Without seeds nothing is hidden and all slots are unused."""

    def __init__(self, text: Dataset, masker: Masker) -> None:
        self.text, self.masker = text, masker

    def __len__(self) -> int:
        return len(self.text)

    @property
    def shares(self) -> tuple[tuple[int, ...], tuple[float, ...]] | None:
        """Sizes and weights of the texts that are blended here; None: there is one."""
        return getattr(self.text, "shares", None)

    def fetch(self, indices: np.ndarray, seeds: np.ndarray | None) -> dict[str, torch.Tensor]:
        """See `wtn_pretrain.data.stream.Dataset`."""
        batch = self.text.fetch(indices, seeds)
        rows = batch["input_ids"].numpy()
        if seeds is None:
            shape = (len(rows), self.masker.slots(rows.shape[1]))
            positions, targets = np.full(shape, rows.shape[1] - 1), np.full(shape, IGNORED)
        else:
            rows, positions, targets = self.masker(rows, seeds, _words(batch))
        batch |= {"input_ids": torch.from_numpy(rows), "positions": torch.from_numpy(positions), "targets": torch.from_numpy(targets)}
        return batch


def _words(batch: Mapping[str, torch.Tensor]) -> np.ndarray | None:
    """Tokens of text in each row, int64 [B]; None where rows are full and hold two special tokens each."""
    if "segments" in batch:
        segments = batch["segments"].numpy()
        return (segments > 0).sum(1) - SPECIAL * segments.max(1)
    if "attention_mask" in batch:
        return batch["attention_mask"].numpy().sum(1) - (PAIR_SPECIAL if "pair_label" in batch else SPECIAL)
    return None


def _smallest(keys: np.ndarray, counts: np.ndarray, most: int) -> np.ndarray:
    """Marks the `counts` [B] (at most `most`) smallest keys below 1 of each row: bool, the shape of `keys`."""
    most = min(most, keys.shape[1])
    chosen = np.zeros(keys.shape, bool)
    places = np.argpartition(keys, most - 1, axis=1)[:, :most]
    if (counts < most).any():
        places = np.take_along_axis(places, np.argsort(np.take_along_axis(keys, places, 1), axis=1), 1)
    np.put_along_axis(chosen, places, np.arange(most) < counts[:, None], 1)
    return chosen & (keys < 1.0)


def _positions(chosen: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each row of `chosen` [B, S] is set, ascending [B, slots], and which of these slots are used."""
    length = chosen.shape[1]
    order = np.sort(np.where(chosen, np.arange(length), length), axis=1)[:, :slots]
    order = np.pad(order, ((0, 0), (0, slots - order.shape[1])), constant_values=length)
    return np.minimum(order, length - 1), order < length
