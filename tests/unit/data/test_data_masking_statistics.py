"""Masking over ten million tokens, within three standard deviations of its definition."""

from typing import Any

import numpy as np
import pytest

from wtn_pretrain.data.hashing import hash_keys
from wtn_pretrain.data.masking import Masker

ROWS, LENGTH, WORDS = 80_000, 128, 200
CLS, SEP, MASK = 2, 3, 4


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import BertTokenizer

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(WORDS))]
    return BertTokenizer(vocab={name: number for number, name in enumerate(names)})


def test_ten_million_tokens(tokenizer: Any) -> None:
    masker, generator = Masker(tokenizer), np.random.default_rng(0)
    slots = masker.slots(LENGTH)
    assert slots == round(0.15 * (LENGTH - 2))
    kinds, places = np.zeros(3, np.int64), np.zeros(LENGTH, np.int64)
    drawn, hidden, seen = np.zeros(WORDS + 5, np.int64), np.zeros(WORDS + 5, np.int64), np.zeros(WORDS + 5, np.int64)
    neighbours = 0
    for first in range(0, ROWS, 4000):
        rows = generator.integers(5, 5 + WORDS, (4000, LENGTH))
        rows[:, 0], rows[:, -1] = CLS, SEP
        masked, positions, targets = masker(rows, hash_keys(7, np.arange(first, first + 4000)))
        # exactly as many of every row, never a special token, everything else as it was
        assert (targets >= 5).all()
        assert (np.diff(positions, axis=1) > 0).all()
        rest = masked.copy()
        np.put_along_axis(rest, positions, targets, 1)
        assert (rest == rows).all()
        now = np.take_along_axis(masked, positions, 1)
        kinds += [(now == MASK).sum(), ((now != MASK) & (now != targets)).sum(), (now == targets).sum()]
        places += np.bincount(positions.ravel(), minlength=LENGTH)
        drawn += np.bincount(now[(now != MASK) & (now != targets)], minlength=WORDS + 5)
        hidden += np.bincount(targets.ravel(), minlength=WORDS + 5)
        seen += np.bincount(rows[:, 1:-1].ravel(), minlength=WORDS + 5)
        neighbours += int((np.diff(positions, axis=1) == 1).sum())
    chosen = ROWS * slots
    assert ROWS * LENGTH > 10_000_000 and kinds.sum() == chosen

    def sigmas(count: float, trials: float, probability: float) -> float:
        return abs(count - trials * probability) / np.sqrt(trials * probability * (1 - probability))

    # a random word is the old one once in WORDS
    for count, probability in zip(kinds, (0.8, 0.1 * (1 - 1 / WORDS), 0.1 * (1 + 1 / WORDS)), strict=True):
        assert sigmas(count, chosen, probability) < 3
    # every place alike: the sum of squared deviations is chi-square, whose standard deviation is the root of twice its freedom
    for counts, expected in (
        (places[1:-1], np.full(LENGTH - 2, chosen / (LENGTH - 2))),
        (drawn[5:], np.full(WORDS, kinds[1] / WORDS)),
        (hidden[5:], seen[5:] * (chosen / seen.sum())),
    ):
        freedom = len(counts) - 1
        # a row's places are drawn without replacement, which makes them more even
        assert abs(((counts - expected) ** 2 / expected).sum() - freedom) < 3 * np.sqrt(2 * freedom) + 0.15 * freedom
    assert places[0] == places[-1] == 0 and drawn[:5].sum() == 0
    # neighbours no more often than by chance: (slots - 1) slots / (LENGTH - 2) of a row in the mean
    assert abs(neighbours / ROWS - slots * (slots - 1) / (LENGTH - 2)) < 3 * 1.7 / np.sqrt(ROWS)
