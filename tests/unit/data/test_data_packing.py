"""Rows of whole documents: nothing lost or cut without need, one packing for one corpus, little padding."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wtn_pretrain.data.corpus import blocks
from wtn_pretrain.data.documents import kept_runs, numbered_blocks
from wtn_pretrain.data.hashing import hash_keys
from wtn_pretrain.data.packing import PackedText, best_fit, lay_out
from wtn_pretrain.data.stream import BatchStream
from wtn_pretrain.data.text import TextData, TextSet, open_text
from wtn_pretrain.errors import UserError

PAD, CLS, SEP = 0, 2, 3
LENGTH = 16


class Corpus:
    """Documents of paragraphs."""

    def __init__(self, *documents: tuple[str, ...]) -> None:
        self.documents = documents

    def paragraphs(self):
        for document in self.documents:
            yield from document
            yield None

    def fingerprint(self) -> list[str]:
        return []


def text_of(lengths: list[int], packing: str, length: int = LENGTH) -> PackedText:
    """Documents of so many tokens, which count on from 10."""
    bounds = np.concatenate([[0], np.cumsum(np.array(lengths, np.int64))]).astype(np.int64)
    tokens = np.arange(10, 10 + bounds[-1]).astype(np.uint16)
    return PackedText(tokens, lay_out(bounds, length, packing), length, CLS, SEP, PAD, packing)  # type: ignore[arg-type]


def fullest(sizes: list[int], capacity: int) -> list[int]:
    """What best fit by decreasing size leaves free, item by item."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fits = [number for number, room in enumerate(rooms) if room >= size]
        if not fits:
            fits = [len(rooms)]
            rooms.append(capacity)
        rooms[min(fits, key=rooms.__getitem__)] -= size
    return sorted(rooms)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40).flatmap(lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity), max_size=60))))
def test_best_fit_is_that_of_item_by_item(case: tuple[int, list[int]]) -> None:
    capacity, sizes = case
    row = best_fit(np.array(sizes, np.int64), capacity)
    assert sorted(capacity - int(used) for used in np.bincount(row, sizes)) == fullest(sizes, capacity)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.sampled_from(["documents", "padded"]))
def test_rows_hold_every_document_once(lengths: list[int], packing: str) -> None:
    text = text_of(lengths, packing)
    batch = text.fetch(np.arange(len(text)), None)
    ids, segments = batch["input_ids"], batch["segments" if packing == "documents" else "attention_mask"]
    assert ids.shape == segments.shape == (len(text), LENGTH) and {ids.dtype, segments.dtype} == {torch.int64}
    found = []
    for row, kinds in zip(ids.tolist(), segments.tolist(), strict=True):
        kept = sum(kind > 0 for kind in kinds)
        assert kinds[kept:] == [0] * (LENGTH - kept) and row[kept:] == [PAD] * (LENGTH - kept)
        assert kinds[:1] == [1] and all(after - before in (0, 1) for before, after in pairwise(kinds[:kept]))
        if packing == "padded":
            assert max(kinds) == 1
        for number in range(1, max(kinds) + 1):
            piece = [token for token, kind in zip(row, kinds, strict=True) if kind == number]
            assert piece[0] == CLS and piece[-1] == SEP and len(piece) > 2
            found.append(piece[1:-1])
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    expected = [
        list(range(10 + begin, 10 + min(begin + LENGTH - 2, last)))
        for first, last in pairwise(bounds.tolist())
        for begin in range(first, last, LENGTH - 2)
    ]
    assert sorted(found) == expected
    firsts = [row[1] for row in ids.tolist()]
    assert firsts == sorted(firsts), "rows stand in the order of the text"
    assert text.padding() == pytest.approx(float((segments == 0).float().mean()))


def test_real_lengths_leave_little_padding() -> None:
    """Log-normal lengths, as documents have them; the rests of long ones fit together."""
    lengths = np.random.default_rng(0).lognormal(5.0, 1.0, 5000).astype(int) + 1
    for length in (128, 512):
        packed, padded = (text_of(lengths.tolist(), packing, length).padding() for packing in ("documents", "padded"))
        print(f"rows of {length}: {packed:.2%} padding packed, {padded:.1%} padded")
        assert packed < 0.01 < 0.2 < padded


def test_batches_do_not_depend_on_the_batch() -> None:
    text = text_of([5, 40, 1, 9, 9, 3, 28, 2, 2, 7] * 8, "documents")
    whole = text.fetch(np.arange(len(text)), None)
    picked = np.array([7, 0, 3, 3, len(text) - 1])
    some = text.fetch(picked, hash_keys(1, picked))
    assert all(torch.equal(some[name], whole[name][picked]) for name in whole)
    again = text_of([5, 40, 1, 9, 9, 3, 28, 2, 2, 7] * 8, "documents")
    assert all(np.array_equal(one, other) for one, other in zip(text.layout, again.layout, strict=True))
    ranks = [BatchStream(text, 6, seed=4, rank=rank, world_size=3).micro_batch(2, 0)["segments"] for rank in range(3)]
    assert torch.equal(torch.cat(ranks), BatchStream(text, 6, seed=4).micro_batch(2, 0)["segments"])


def test_blocks_know_their_documents() -> None:
    long = "x" * 4000
    corpus = Corpus((long, long, "tail"), ("short",), (), (long, long))
    found = list(numbered_blocks(corpus))
    assert [block for _, block in found] == list(blocks(corpus))
    assert [number for number, _ in found] == [0, 0, 1, 3]
    # with the second block held out, what follows begins anew
    assert list(kept_runs([(0, "a"), (0, "b"), (0, "c"), (1, "d")], lambda block: block != "b")) == [(True, "a"), (True, "c"), (True, "d")]
    assert [begins for begins, _ in kept_runs([(0, "a"), (0, "b"), (2, "c")], lambda block: True)] == [True, False, True]


def test_documents_of_a_store(tmp_path: Path) -> None:
    """The same ids as running text, cut where documents end, out of one store."""
    articles = [f"article {number} on {'rivers and bread ' * (number % 17)} and its end" for number in range(120)]
    path = tmp_path / "wiki.txt"
    path.write_text("".join(f"<doc {number}>\n{article}\n</doc>\n" for number, article in enumerate(articles)))
    config = TextData(source="files", paths=(str(path),), vocab_size=256, sequence_length=16, valid_fraction=0.2)
    plain = open_text(config, tmp_path / "cache")
    made = (tmp_path / "cache" / "train.npy").stat().st_mtime_ns
    assert isinstance(plain.train, TextSet)
    packed = open_text(config.model_copy(update={"packing": "documents"}), tmp_path / "cache")
    padded = open_text(config.model_copy(update={"packing": "padded"}), tmp_path / "cache")
    assert (tmp_path / "cache" / "train.npy").stat().st_mtime_ns == made, "one store serves every packing"
    encode = packed.tokenizer
    known = {article: encode(article, add_special_tokens=False).input_ids for article in articles}
    for part in ("train", "valid"):
        one, other = getattr(packed, part), getattr(padded, part)
        assert np.array_equal(np.sort(one.layout.starts), other.layout.starts)
        documents = np.load(tmp_path / "cache" / f"{part}.documents.npy")
        held = [one.tokens[first:last].tolist() for first, last in pairwise(documents)]
        assert held and all(document in known.values() for document in held)
        assert len(one) < len(other)
    both = [len(np.load(tmp_path / "cache" / f"{part}.documents.npy")) - 1 for part in ("train", "valid")]
    assert sum(both) == len(articles)


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    config = TextData(vocab_size=256, sequence_length=16, limit_mb=0.05, packing="documents")
    open_text(config, tmp_path)
    index = tmp_path / "train.documents.npy"
    good = np.load(index)
    for wrong in (good[:-1], good + 1, good[::-1], np.repeat(good, 2), good.astype(np.float64), good[:0], good[None]):
        np.save(index, wrong)
        with pytest.raises(UserError, match=r"train\.documents\.npy: does not fit the \d+ token ids beside it; remove its folder"):
            open_text(config, tmp_path)
    index.write_bytes(b"broken")
    with pytest.raises(UserError, match=r"train\.documents\.npy: cannot be read"):
        open_text(config, tmp_path)
    index.unlink()
    assert len(open_text(config, tmp_path).train) > 10, "made again where it is missing"
    assert np.array_equal(np.load(index), good)
