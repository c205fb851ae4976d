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
        layout = text.layout
        return Work(float(layout.tokens().mean()), float(layout.pairs().mean()), float(budgets(layout.words()).mean()))
    if isinstance(text, SentencePairs):
        words = text.runs.words()
        return Work(float((words + PAIR_SPECIAL).mean()), float(((words + PAIR_SPECIAL) ** 2.0).mean()), float(budgets(words).mean()))
    if isinstance(text, Blend):
        parts = [mean_work(part, sequence_length, budgets) for part in text.parts]
        if any(parts):
            full = Work(sequence_length, sequence_length**2, float(budgets(np.array(sequence_length - 2))))
            shares = np.array(text.weights) / sum(text.weights)
            return Work(*(shares @ np.array([part or full for part in parts])).tolist())
    return None
