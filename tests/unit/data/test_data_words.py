"""Tokenising by known words gives what the tokenizer gives, for any text whatever."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from wtn_pretrain.data.prepare.words import Words, works_by_words
from wtn_pretrain.data.tokenizer import SPECIAL_TOKENS

LETTERS = "abcdefgh12.,-é中"


def bert(lowercase: bool) -> Tokenizer:
    from transformers import BertTokenizer

    names = [*SPECIAL_TOKENS, *LETTERS, *(f"##{letter}" for letter in LETTERS), "abc", "##de", "e"]
    vocab = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return BertTokenizer(vocab=vocab, do_lower_case=lowercase).backend_tokenizer


TOKENIZERS = {lowercase: bert(lowercase) for lowercase in (True, False)}
# runs of what is in the vocabulary, of the special tokens, and of anything else
TEXTS = st.lists(
    st.one_of(
        st.text(LETTERS + " ", max_size=12),
        st.text(max_size=6),
        st.text("ab!#'/:@[]_`{~^\u0301\u0338\u2014", max_size=8),
        st.text("\t\n\x0b\x0c\r\x1c\x1f \x85\xa0\xad\u1680\u200a\u200b\u200d\u2028\u202f\u3000\ufeff\u0301\u0130", max_size=4),
        st.sampled_from(["[MASK]", "[UNK]x", "[SEP] ", "x" * 150]),
    ),
    max_size=6,
).map("".join)


@settings(max_examples=400, deadline=None)
@given(texts=st.lists(TEXTS, max_size=4), lowercase=st.booleans())
def test_any_text_has_the_same_ids(texts: list[str], lowercase: bool) -> None:
    tokenizer = TOKENIZERS[lowercase]
    ids, sizes = Words(tokenizer, "<u2").encode(texts)
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert sizes.tolist() == [len(own) for own in expected] and ids.tolist() == [number for own in expected for number in own]


def test_an_added_word_with_punctuation_stays_whole() -> None:
    for normalized in (False, True):
        tokenizer = bert(True)
        tokenizer.add_tokens([AddedToken("a-b", normalized=normalized)])
        texts = ["c a-b d, A-B a - b", "no such, word."]
        ids, _ = Words(tokenizer, "<u2").encode(texts)
        expected = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        assert "a-b" in expected[0].tokens and ids.tolist() == [number for own in expected for number in own.ids]


def test_memory_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wtn_pretrain.data.prepare.words._MOST_WORDS", 5)
    words, plain = Words(TOKENIZERS[True], "<u2"), TOKENIZERS[True]
    for number in range(30):
        text = f"abc a{number} b{number} c{number}"
        assert words.encode([text, text])[0].tolist() == 2 * plain.encode(text, add_special_tokens=False).ids
        assert len(words._known) <= 5 + 7


def test_only_what_works_by_words_does() -> None:
    from tokenizers import models, normalizers, pre_tokenizers

    assert works_by_words(TOKENIZERS[True])
    other: Any = Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    other.normalizer, other.pre_tokenizer = normalizers.BertNormalizer(clean_text=False), pre_tokenizers.BertPreTokenizer()
    assert not works_by_words(other)
    other.normalizer = normalizers.BertNormalizer()
    assert works_by_words(other)
    other.add_tokens(["two words"])
    assert not works_by_words(other)
    assert not works_by_words(Tokenizer(models.BPE()))


def test_real_text_with_berts_own_vocabulary(shared: Callable[[str], Path]) -> None:
    from wtn_pretrain.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(shared("fixtures/bert-vocab") / "bert_base_cased_vocab.txt").backend_tokenizer
    lines = (shared("tinyshakespeare") / "input.txt").read_text(encoding="utf-8")[:200_000].split("\n\n")
    ids, sizes = Words(tokenizer, "<u2").encode(lines)
    expected = [encoding.ids for encoding in tokenizer.encode_batch_fast(lines, add_special_tokens=False)]
    assert sizes.tolist() == list(map(len, expected)) and (ids == np.concatenate([np.array(own) for own in expected])).all()
