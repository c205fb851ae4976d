"""Tokenising with memory: a word that was met before is looked up instead of taken apart again.

Between white space, a BERT tokenizer (BertNormalizer, BertPreTokenizer, WordPiece) works on each word alone, and in running text most
words are ones that came before. So the ids of a text are those of its words, one after the other, and the tokenizer itself is only asked
for new ones: the same ids, several times faster.
"""

import json
import re
from collections.abc import Sequence
from itertools import chain

import numpy as np
from tokenizers import Tokenizer

_MOST_WORDS = 1 << 18
# white space to Python, but control characters, which BertNormalizer deletes
_DELETED = dict.fromkeys(map(ord, "\x0b\x0c\x1c\x1d\x1e\x1f\x85"))
_ANY_DELETED = re.compile("[\x0b\x0c\x1c-\x1f\x85]")


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
        self._tokenizer, self._dtype = tokenizer, dtype
        self._known: dict[str, list[int]] = {}

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts, one after the other, and how many each has: int64 [texts]."""
        self._forget()
        split = [(text.translate(_DELETED) if _ANY_DELETED.search(text) else text).split() for text in texts]
        self._learn(list(set(chain.from_iterable(split)).difference(self._known)))
        found = [np.fromiter(chain.from_iterable(map(self._known.__getitem__, words)), self._dtype) for words in split]
        return (np.concatenate(found) if found else np.zeros(0, self._dtype)), np.array([len(ids) for ids in found], np.int64)

    def _learn(self, new: list[str]) -> None:
        if new:
            encoded = self._tokenizer.encode_batch_fast(new, add_special_tokens=False)
            self._known.update(zip(new, (encoding.ids for encoding in encoded), strict=True))

    def _forget(self) -> None:
        """Bounds the memory between batches; the frequent words come back at once."""
        if len(self._known) > _MOST_WORDS:
            self._known = {}
