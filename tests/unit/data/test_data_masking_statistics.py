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
    # Every place and word alike: the sum of squared deviations over what is expected is chi-square, whose standard deviation is the root
    # of twice its freedom, times a factor. Of n places k are drawn without replacement, so that counts of places have the covariance
    # rows p (1 - p) n / (n - 1) (I - 1 / n), p = k / n, and those of the words that stand there the variance of the hypergeometric
    # distribution, which in the mean over all rows is 1 - p of the multinomial one. Random words are drawn with replacement.
    n = LENGTH - 2
    share = slots / n
    for counts, expected, factor in (
        (places[1:-1], np.full(n, chosen / n), (1 - share) * n / (n - 1)),
        (drawn[5:], np.full(WORDS, kinds[1] / WORDS), 1.0),
        (hidden[5:], seen[5:] * (chosen / seen.sum()), 1 - share),
    ):
        freedom = len(counts) - 1
        assert abs(((counts - expected) ** 2 / expected).sum() / factor - freedom) < 3 * np.sqrt(2 * freedom)
    assert places[0] == places[-1] == 0 and drawn[:5].sum() == 0
    # neighbours no more often than by chance: k less the number of runs, which is hypergeometric (Wald and Wolfowitz 1940)
    k = slots
    deviation = np.sqrt(k * (k - 1) * (n - k + 1) * (n - k) / (n**2 * (n - 1)))
    assert abs(neighbours / ROWS - k * (k - 1) / n) < 3 * deviation / np.sqrt(ROWS)


PIECES = 100
"""Entries that begin a word, and as many ## pieces that continue it."""


@pytest.fixture(scope="module")
def pieces() -> Any:
    from transformers import BertTokenizer

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(PIECES)), *(f"##w{i}" for i in range(PIECES))]
    return BertTokenizer(vocab={name: number for number, name in enumerate(names)})


def rows_of_words(generator: np.random.Generator, count: int) -> np.ndarray:
    """Rows in which each piece goes on with the word before it with probability 0.3."""
    going = generator.random((count, LENGTH)) < 0.3
    going[:, 1] = False
    rows = 5 + generator.integers(0, PIECES, (count, LENGTH)) + PIECES * going
    rows[:, 0], rows[:, -1] = CLS, SEP
    return rows


def spans_by_hand(row: np.ndarray, budget: int, longest: int, generator: np.random.Generator) -> np.ndarray:
    """Which tokens SpanBERT's rule chooses, with what the module says of where a span is cut: bool, the shape of `row`."""
    heads = [place for place in range(1, LENGTH - 1) if row[place] < 5 + PIECES]
    ends = [*heads[1:], LENGTH - 1]
    chosen = np.zeros(len(row), bool)
    for _ in range(4 + 2 * round(0.15 * (LENGTH - 2))):
        size, first = min(int(generator.geometric(0.2)), longest), int(generator.integers(len(heads)))
        for word in range(first, min(first + size, len(heads))):
            own = slice(heads[word], ends[word])
            if chosen[own].any() or chosen.sum() + (ends[word] - heads[word]) > budget:
                break
            chosen[own] = True
        if chosen.sum() == budget:
            break
    return chosen


def runs_in(chosen: np.ndarray, longest: int) -> np.ndarray:
    """How many runs of each length every row has, longer ones counted as `longest`: int [rows, longest]."""
    edges = np.diff(np.pad(chosen, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    (rows, starts), (_, ends) = np.nonzero(edges == 1), np.nonzero(edges == -1)
    counts = np.zeros((len(chosen), longest), np.int64)
    np.add.at(counts, (rows, np.minimum(ends - starts, longest) - 1), 1)
    return counts


@pytest.mark.parametrize("settings", [{"whole_word": True}, {"span": 10}], ids=["whole words", "spans"])
def test_ten_million_tokens_by_words(pieces: Any, settings: dict[str, Any]) -> None:
    masker, generator = Masker(pieces, **settings), np.random.default_rng(1)
    slots, span = masker.slots(LENGTH), "span" in settings
    fates, used, runs = np.zeros(3), 0, []
    for first in range(0, ROWS, 4000):
        rows = rows_of_words(generator, 4000)
        masked, positions, targets = masker(rows, hash_keys(9, np.arange(first, first + 4000)))
        chosen = np.zeros(rows.shape, bool)
        there = targets >= 0
        chosen[np.nonzero(there)[0], positions[there]] = True
        # words are chosen whole: a piece that goes on is chosen if and only if the one before it is
        goes_on = rows[:, 1:] >= 5 + PIECES
        assert (chosen[:, 1:] == chosen[:, :-1])[goes_on].all() and not chosen[:, [0, -1]].any()
        assert (masked == rows)[~chosen].all() and (rows[chosen] == targets[there]).all()
        # of a span one token tells the fate of all, so that one of each run of tokens is an independent draw: those of one word
        starts = chosen & ~np.pad(chosen, ((0, 0), (1, 0)))[:, :-1]
        now = masked[starts] if span else masked[chosen]
        was = rows[starts] if span else rows[chosen]
        fates += [(now == MASK).sum(), ((now != MASK) & (now != was)).sum(), (now == was).sum()]
        used += int(there.sum())
        if first < ROWS // 4 and span:
            runs.append(runs_in(chosen, 12))
    # there are words of one piece in every row, so that every row comes to its number; spans may run out of turns
    assert used == ROWS * slots if not span else 0.999 * ROWS * slots < used <= ROWS * slots
    trials, ordinary = fates.sum(), 2 * PIECES
    for count, probability in zip(fates, (0.8, 0.1 * (1 - 1 / ordinary), 0.1 * (1 + 1 / ordinary)), strict=True):
        assert abs(count - trials * probability) < 3 * np.sqrt(trials * probability * (1 - probability))
    if span:
        # the lengths of runs against the rule followed by hand, token by token, with draws of its own
        mine, theirs = np.concatenate(runs), rows_of_words(generator, 6000)
        other = runs_in(np.array([spans_by_hand(row, slots, 10, generator) for row in theirs]), 12)
        error = np.sqrt(mine.var(axis=0) / len(mine) + other.var(axis=0) / len(other))
        # all twelve within three standard deviations together: each within 4, as 1 - (1 - 2 Q(4))^12 is below 2 Q(3)
        assert (np.abs(mine.mean(axis=0) - other.mean(axis=0)) < 4 * error).all()
