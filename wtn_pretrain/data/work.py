"""How much there is to compute in rows that are not full."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from wtn_pretrain.data.blend import Blend
from wtn_pretrain.data.packing import PackedText
from wtn_pretrain.data.sentence_pairs import PAIR_SPECIAL, SentencePairs
from wtn_pretrain.data.stream import Dataset


class Work(NamedTuple):
    """Means over the rows of a set, in the proportions in which training takes them."""

    tokens: float
    """Tokens, padding not counted."""
    pairs: float
    """Pairs of tokens that see one another."""
    predicted: float
    """Hidden tokens."""


def mean_work(text: Dataset, sequence_length: int, budgets: Callable[[np.ndarray], np.ndarray]) -> Work | None:
    """The work of a row of `text`; None: all rows are full and see the whole of themselves. `budgets` as `Masker.budgets`."""
    if isinstance(text, PackedText):
        rows, found = len(text), text.summary
        return Work(found.tokens / rows, found.pairs / rows, float(found.words @ budgets(np.arange(len(found.words)))) / rows)
    if isinstance(text, SentencePairs):
        rows, counts = len(text), text.words
        tokens = np.arange(len(counts)) + PAIR_SPECIAL
        predicted = budgets(np.arange(len(counts)))
        return Work(float(counts @ tokens) / rows, float(counts @ tokens**2) / rows, float(counts @ predicted) / rows)
    if isinstance(text, Blend):
        parts = [mean_work(part, sequence_length, budgets) for part in text.parts]
        if any(parts):
            full = Work(sequence_length, sequence_length**2, float(budgets(np.array(sequence_length - 2))))
            shares = np.array(text.weights) / sum(text.weights)
            return Work(*(shares @ np.array([part or full for part in parts])).tolist())
    return None
