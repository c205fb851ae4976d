"""Where a long text can be cut so that the ids of its pieces, one after the other, are those of the whole."""

import json
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

from wtn_pretrain.data.prepare.words import works_by_words

PIECE = 1 << 14
"""Characters that are tokenised together where the text can be cut: what a piece holds in memory is some hundred times as much."""
_NEAR = 1 << 10

_SPACES = re.compile(r"[ \n]")
# one space between two characters that neither normalisation nor white space can join to it; the piece behind begins with the space
_BETWEEN_WORDS = re.compile(r"(?<=[\w!-~]) (?=[\w!-~])")
# what changes characters in their place, or joins none over such a space
_LOCAL = frozenset(("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer", "Precompiled", "Strip", "Replace"))
_WORDWISE = frozenset(("BertPreTokenizer", "Whitespace", "WhitespaceSplit"))


def cuts_of(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """What a cut of a text stands before; None: for this tokenizer only whole texts are known to be right."""
    if works_by_words(tokenizer):
        return _SPACES
    tree = json.loads(tokenizer.to_str())
    if any(token["lstrip"] or token["rstrip"] or re.search(r"\s", token["content"]) for token in tree["added_tokens"]):
        return None
    normalizers, splitter = _flat(tree.get("normalizer")), tree.get("pre_tokenizer") or {}
    if any(step["type"] not in _LOCAL or (step["type"] == "Replace" and step.get("pattern") != {"Regex": " {2,}"}) for step in normalizers):
        return None
    # a space that is stripped from the beginning of a piece must come back
    stripped = any(step["type"] == "Strip" for step in normalizers)
    kind = splitter.get("type")
    if kind == "ByteLevel":
        safe = splitter.get("use_regex", True) and (splitter.get("add_prefix_space", False) or not stripped)
    elif kind == "Metaspace":
        safe = splitter.get("split", True) and (splitter.get("prepend_scheme") == "always" or not stripped)
    else:
        safe = kind in _WORDWISE
    return _BETWEEN_WORDS if safe else None


def pieces(text: str, cuts: re.Pattern[str] | None) -> Iterator[str]:
    """`text` in pieces of about `PIECE` characters, longer where it cannot be cut."""
    start = 0
    while cuts is not None and len(text) - start > PIECE:
        end = start + PIECE
        near = list(cuts.finditer(text, end - _NEAR, end))
        found = near[-1] if near else cuts.search(text, end)
        if found is None:
            break
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]


def _flat(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    if step is None:
        return []
    return [one for inner in step["normalizers"] for one in _flat(inner)] if step["type"] == "Sequence" else [step]
