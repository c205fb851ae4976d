"""Tokenising with memory: a word that was met before is looked up instead of taken apart again.

A BERT tokenizer (BertNormalizer, BertPreTokenizer, WordPiece) works on each word alone, and in running text most words are ones that came
before. So the ids of a text are those of its words, one after the other, and the tokenizer itself is only asked for new ones: the same
ids, several times faster.
"""

import json
import re
from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
from tokenizers import Tokenizer

_MOST_WORDS = 1 << 18
# white space to Python, but control characters, which BertNormalizer deletes
_DELETED = dict.fromkeys(map(ord, "\x0b\x0c\x1c\x1d\x1e\x1f\x85"))
_ANY_DELETED = re.compile("[\x0b\x0c\x1c-\x1f\x85]")
# BertPreTokenizer cuts at white space and on both sides of punctuation, to which it counts all ASCII symbols
_WORD = re.compile(r"[!-/:-@\[-`{-~]|[^\s!-/:-@\[-`{-~]+")


def works_by_words(tokenizer: Tokenizer) -> bool:
    """Whether the ids of a text are those of its words between white space, whatever the text is."""
    tree = json.loads(tokenizer.to_str())
    normalizer, splitter = tree.get("normalizer") or {}, tree.get("pre_tokenizer") or {}
    return (
        tree["model"].get("type") == "WordPiece"
        and splitter.get("type") == "BertPreTokenizer"
        and normalizer.get("type") == "BertNormalizer"
        and normalizer.get("clean_text", False)
        and not any(character.isspace() for token in tree["added_tokens"] for character in token["content"])
    )


class Words:
    """The ids of words, as far as they are known."""

    def __init__(self, tokenizer: Tokenizer, dtype: str) -> None:
        self._tokenizer, self._dtype = tokenizer, np.dtype(dtype)
        self._known: dict[str, bytes] = {}
        added: list[dict[str, Any]] = json.loads(tokenizer.to_str())["added_tokens"]
        # taken out of the text before it is cut, of the raw text alone if they are not normalised
        self._whole = [token["content"] for token in added]
        self._cuts_punctuation = not any(token["normalized"] for token in added)

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts, one after the other, and how many each has: int64 [texts]."""
        if len(self._known) > _MOST_WORDS:
            # bounds the memory; the frequent words come back at once
            self._known = {}
        split = [self._words(text) for text in texts]
        self._learn(list(set(chain.from_iterable(split)).difference(self._known)))
        found = [b"".join(map(self._known.__getitem__, words)) for words in split]
        sizes = np.array([len(ids) // self._dtype.itemsize for ids in found], np.int64)
        return np.frombuffer(b"".join(found), self._dtype), sizes

    def _words(self, text: str) -> list[str]:
        if _ANY_DELETED.search(text):
            text = text.translate(_DELETED)
        if self._cuts_punctuation and not any(token in text for token in self._whole):
            return _WORD.findall(text)
        return text.split()

    def _learn(self, new: list[str]) -> None:
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(new, add_special_tokens=False)] if new else []
        joined = np.fromiter(chain.from_iterable(ids), self._dtype).tobytes()
        ends = accumulate((self._dtype.itemsize * len(own) for own in ids), initial=0)
        self._known.update(zip(new, (joined[first:end] for first, end in pairwise(ends)), strict=True))
