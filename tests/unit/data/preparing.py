"""What tests of prepared corpora share: a tokenizer of whole words, documents made of them, and both written out."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from wtn_pretrain.data.prepare.corpus import Preparation, prepare_corpus
from wtn_pretrain.data.token_files import open_token_file

WORDS = [f"word{number}" for number in range(300)]
FIRST = 5 + 2  # ids of WORDS begin here, behind the special tokens, "." and ","


def save_words(folder: Path) -> str:
    """Saves a tokenizer that knows WORDS, the full stop and the comma."""
    from transformers import BertTokenizer

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", *WORDS]
    BertTokenizer(vocab={name: number for number, name in enumerate(names)}).save_pretrained(str(folder))
    return str(folder)


def documents_of(count: int, seed: int = 0, most: int = 9) -> list[list[list[int]]]:
    """Documents of 1 to `most` sentences of 2 to 12 numbers of WORDS."""
    generator = np.random.default_rng(seed)
    return [
        [generator.integers(0, 300, generator.integers(2, 13)).tolist() for _ in range(generator.integers(1, most + 1))]
        for _ in range(count)
    ]


def text_of(document: list[list[int]]) -> str:
    """Sentences that begin with a capital and end with a full stop."""
    return " ".join(" ".join(WORDS[number] for number in sentence).capitalize() + "." for sentence in document)


def ids_of(document: list[list[int]]) -> list[int]:
    """What the tokenizer makes of `text_of`."""
    return [token for sentence in document for token in (*(FIRST + number for number in sentence), 5)]


def write_lines(path: Path, texts: list[str]) -> Path:
    """JSON lines with the texts under "text"."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def prepared(tmp_path: Path, tokenizer: str, paths: tuple[Path | str, ...], name: str = "corpus", **settings: Any) -> Path:
    """A corpus of these paths, in this process."""
    out = tmp_path / name
    prepare_corpus(Preparation(tuple(map(str, paths)), out, tokenizer, **{"workers": 0, **settings}))
    return out


def held(prefix: Path) -> list[list[int]]:
    """The ids of each document of a token file."""
    file = open_token_file(prefix)
    file.check()
    bounds = file.sequence_bounds()[file.document_sequences()]
    return [file.tokens[first:last].tolist() for first, last in pairwise(bounds)]
