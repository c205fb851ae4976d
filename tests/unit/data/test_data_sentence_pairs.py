"""Pairs cut between sentences, against the sentences themselves; and masking by words and spans on rows of every kind."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.data.preparing import documents_of, ids_of, prepared, save_words, text_of, write_lines
from wtn_pretrain.data.hashing import hash_keys
from wtn_pretrain.data.masking import MaskedText, Masker
from wtn_pretrain.data.sentence_pairs import SentencePairs, runs_of
from wtn_pretrain.data.text import TextData, open_text
from wtn_pretrain.data.work import mean_work
from wtn_pretrain.errors import UserError

PAD, UNK, CLS, SEP, MASK = range(5)


def made(documents: list[list[list[int]]], length: int, pair: Any) -> tuple[SentencePairs, list[int]]:
    """Pairs of documents of sentences of ids, and all ids."""
    flat = [token for document in documents for sentence in document for token in sentence]
    sizes = [len(sentence) for document in documents for sentence in document]
    sentences = np.concatenate([[0], np.cumsum(sizes)])
    bounds = np.concatenate([[0], np.cumsum([len(document) for document in documents])])
    return SentencePairs(np.array(flat), runs_of(sentences, bounds, length), length, CLS, SEP, PAD, pair), flat


def numbered(documents: int, seed: int) -> list[list[list[int]]]:
    """Documents of sentences of ids that are all different."""
    generator, count, made = np.random.default_rng(seed), 10, []
    for _ in range(documents):
        sentences = []
        for _ in range(generator.integers(1, 12)):
            size = int(generator.integers(1, 14))
            sentences.append(list(range(count, count + size)))
            count += size
        made.append(sentences)
    return made


def halves(row: list[int], types: list[int], mask: list[int]) -> tuple[list[int], list[int]]:
    first = row.index(SEP)
    end = row.index(SEP, first + 1)
    assert row[0] == CLS and set(row[end + 1 :]) <= {PAD}
    assert types == [0] * (first + 1) + [1] * (end - first) + [0] * (len(row) - end - 1)
    assert mask == [1] * (end + 1) + [0] * (len(row) - end - 1)
    return row[1:first], row[first + 1 : end]


def test_runs_hold_every_sentence_of_documents_that_have_two() -> None:
    documents = numbered(60, 0)
    pairs, flat = made(documents, 32, "sop")
    runs = pairs.runs
    assert (runs.words() <= 29).all() and (runs.last - runs.first >= 2).all()
    held = {flat[i] for first, last in zip(runs.first, runs.last, strict=True) for i in range(runs.bounds[first], runs.bounds[last])}
    assert held == {token for document in documents if len(document) > 1 for sentence in document for token in sentence}
    # a run is as long as it can be
    starts = set(zip(runs.first.tolist(), runs.document.tolist(), strict=True))
    for first, last, document in zip(runs.first, runs.last, runs.document, strict=True):
        if (last, document) in starts:
            assert runs.bounds[last + 1] - runs.bounds[first] > 29
    assert 0 < sum(runs.words()) - len(held) < 0.3 * len(held)


def test_sentences_in_order_or_swapped() -> None:
    documents = numbered(40, 1)
    ends = {sentence[-1] for document in documents for sentence in document}
    pairs, _ = made(documents, 48, "sop")
    indices = np.tile(np.arange(len(pairs)), 20)
    batch = pairs.fetch(indices, hash_keys(1, np.arange(len(indices))))
    for row, types, mask, label in zip(
        *(batch[n].tolist() for n in ("input_ids", "token_type_ids", "attention_mask", "pair_label")), strict=True
    ):
        a, b = halves(row, types, mask)
        first, second = (b, a) if label else (a, b)
        assert first + second == list(range(first[0], second[-1] + 1)) and first[-1] in ends and second[-1] in ends
    assert abs(int(batch["pair_label"].sum()) - len(indices) / 2) < 3 * np.sqrt(len(indices) / 4)
    plain = pairs.fetch(np.arange(3), None)
    assert plain["pair_label"].tolist() == [0, 0, 0]


def test_next_sentences_or_those_of_another_document() -> None:
    documents = numbered(40, 2)
    owner = {token: number for number, document in enumerate(documents) for sentence in document for token in sentence}
    pairs, _ = made(documents, 48, "nsp")
    indices = np.tile(np.arange(len(pairs)), 30)
    batch = pairs.fetch(indices, hash_keys(2, np.arange(len(indices))))
    sizes: dict[int, list[int]] = {0: [], 1: []}
    others = set()
    for row, types, mask, label in zip(
        *(batch[n].tolist() for n in ("input_ids", "token_type_ids", "attention_mask", "pair_label")), strict=True
    ):
        a, b = halves(row, types, mask)
        assert b == list(range(b[0], b[0] + len(b)))
        assert (owner[b[0]] != owner[a[0]]) if label else (b[0] == a[-1] + 1)
        sizes[label].append(len(b))
        others |= {owner[b[0]]} if label else set()
    assert len(others) == len(set(pairs.runs.document.tolist()))
    assert abs(len(sizes[1]) - len(indices) / 2) < 3 * np.sqrt(len(indices) / 4)
    # lengths tell little: short runs alone are shorter than what they replace
    assert np.mean(sizes[0]) - 3 < np.mean(sizes[1]) <= np.mean(sizes[0]) + 1
    with pytest.raises(UserError, match="two documents or more"):
        made([[[10, 11], [12]]], 16, "nsp")[0].fetch(np.zeros(1, np.int64), hash_keys(0, np.arange(1)))


def test_a_corpus_with_sentences_gives_pairs_between_them(tmp_path: Path) -> None:
    tokenizer = save_words(tmp_path / "tok")
    documents = documents_of(150, seed=4)
    source = write_lines(tmp_path / "a.jsonl", [text_of(document) for document in documents])
    out = prepared(tmp_path, tokenizer, (source,), sentences=True, valid_fraction=0.2)
    splits = open_text(TextData(source="corpus", paths=(str(out),), sequence_length=40), tmp_path / "cache")
    pairs = splits.train.with_pairs("sop")
    batch = pairs.fetch(np.arange(len(pairs)), hash_keys(0, np.arange(len(pairs))))
    texts = {tuple(ids_of(document)[:3]) for document in documents}
    begun = 0
    for row, label in zip(batch["input_ids"].tolist(), batch["pair_label"].tolist(), strict=True):
        first = row.index(SEP)
        assert row[first - 1] == 5  # a full stop before each [SEP]
        begun += not label and tuple(row[1:4]) in texts
    assert begun > 20
    masked = MaskedText(pairs, Masker(splits.tokenizer))
    hidden = masked.fetch(np.arange(50), hash_keys(0, np.arange(50)))
    words = hidden["attention_mask"].sum(1) - 3
    assert ((hidden["targets"] >= 0).sum(1) == (0.15 * words).round().clamp_min(1)).all()
    work = mean_work(pairs, 40, masked.masker.budgets)
    assert work is not None and work.tokens == pytest.approx(float(batch["attention_mask"].sum(1).double().mean()))
    # without sentences, pairs are cut anywhere
    plain = prepared(tmp_path, tokenizer, (source,), "plain")
    found = open_text(TextData(source="corpus", paths=(str(plain),), sequence_length=40), tmp_path / "cache").train.with_pairs("sop")
    assert not isinstance(found, SentencePairs) and found.fetch(np.arange(3), None)["pair_label"].tolist() == [0, 0, 0]
    # in a blend its rows are full ones among padded ones, whichever come together
    paths = (str(out), str(plain))
    both = open_text(TextData(source="corpus", paths=paths, sequence_length=40), tmp_path / "cache").train.with_pairs("sop")
    blend, rows = MaskedText(both, masked.masker), np.array([0, len(pairs), 1, len(both) - 1])
    together = blend.fetch(rows, hash_keys(0, rows))
    assert together["attention_mask"][1::2].all() and not together["attention_mask"][::2].all()
    for number, row in enumerate(rows):
        alone = blend.fetch(rows[number : number + 1], hash_keys(0, rows[number : number + 1]))
        assert alone.keys() == together.keys() and all((together[name][number] == alone[name][0]).all() for name in alone), row


@pytest.fixture(scope="module")
def pieces() -> Any:
    from transformers import BertTokenizer

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(40)), *(f"##p{i}" for i in range(20))]
    return BertTokenizer(vocab={name: number for number, name in enumerate(names)})


def rows_of_words(count: int, length: int) -> np.ndarray:
    generator = np.random.default_rng(9)
    body = np.where(generator.random((count, length - 2)) < 0.3, generator.integers(45, 65, (count, length - 2)), 0)
    body = np.where(body, body, generator.integers(5, 45, body.shape))
    body[:, length // 2] = SEP
    return np.concatenate([np.full((count, 1), CLS), body, np.full((count, 1), SEP)], 1)


def test_spans_are_whole_words_of_the_said_lengths(pieces: Any) -> None:
    rows = rows_of_words(3000, 128)
    masker = Masker(pieces, span=10)
    masked, positions, targets = masker(rows, hash_keys(4, np.arange(len(rows))))
    slots = masker.slots(128)
    assert positions.shape == (3000, slots) and (targets >= 0).sum() > 0.97 * targets.size
    chosen = np.zeros(rows.shape, bool)
    for row, (where, target) in enumerate(zip(positions, targets, strict=True)):
        chosen[row, where[target >= 0]] = True
        assert (target[target >= 0] == rows[row, where[target >= 0]]).all()
    assert not (chosen & (rows < 5)).any()
    # no word is cut
    continues = rows >= 45
    inner = continues[:, 1:] & (rows[:, :-1] >= 5)
    assert (chosen[:, 1:] == chosen[:, :-1])[inner].all()
    # what becomes of one token of a span becomes of all: neighbours share it far more often than by chance (0.66)
    kind = np.where(masked == MASK, 0, np.where(masked != rows, 1, 2))
    both = chosen[:, 1:] & chosen[:, :-1]
    alike = (kind[:, 1:] == kind[:, :-1])[both].mean()
    assert alike > 0.9
    shares = [(kind[chosen] == value).mean() for value in range(3)]
    assert np.abs(np.array(shares) - [0.8, 0.1, 0.1]).max() < 0.02
    # a geometric length of mean 3.8 words (SpanBERT, section 3.1) against single words
    starts = (chosen & ~np.pad(chosen, ((0, 0), (1, 0)))[:, :-1]).sum()
    words = (chosen & ~continues).sum()
    assert 2.8 < words / starts < 4.2


def test_spans_do_not_depend_on_the_rows_beside_them(pieces: Any) -> None:
    rows, seeds = rows_of_words(40, 64), hash_keys(5, np.arange(40))
    masker = Masker(pieces, span=5)
    together = masker(rows, seeds)
    for row in (0, 17, 39):
        alone = masker(rows[row : row + 1], seeds[row : row + 1])
        assert all((one[row] == other[0]).all() for one, other in zip(together, alone, strict=True))
    # nor where those have more tokens to hide
    rows, seeds, budgets = rows_of_words(4000, 64), hash_keys(6, np.arange(4000)), np.where(np.arange(4000) % 2, 8, 62)
    together, alone = masker(rows, seeds, budgets), masker(rows[1::2], seeds[1::2], budgets[1::2])
    assert all((one[1::2] == other).all() for one, other in zip(together, alone, strict=True))
    short = np.array([[CLS, 7, SEP, PAD, PAD, PAD, PAD, PAD]])
    _, positions, targets = masker(short, seeds[:1], np.array([1]))
    assert targets[0].tolist() == [7] and positions[0].tolist() == [1]
    empty = np.array([[CLS, SEP, PAD, PAD]])
    assert (masker(empty, seeds[:1], np.array([0]))[2] == -100).all()
