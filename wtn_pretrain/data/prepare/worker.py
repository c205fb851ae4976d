"""What a worker process does with a batch of documents: cut, tokenise, hash. It imports no more than that needs."""

import os
import signal
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from wtn_pretrain.data.prepare.duplicates import MinHash, text_hash
from wtn_pretrain.data.prepare.pieces import cuts_of, pieces
from wtn_pretrain.data.prepare.sentences import split_sentences
from wtn_pretrain.data.prepare.words import Words, works_by_words

_TOGETHER = 1 << 19
"""Characters of the pieces that one call tokenises."""


class Work(NamedTuple):
    """How documents are prepared."""

    tokenizer: str
    """The backend of a fast tokenizer as JSON."""
    dtype: str
    """Of the ids."""
    sentences: bool
    near: float | None
    """Jaccard similarity from which on documents count as near duplicates; None: they are not looked for."""


class Prepared(NamedTuple):
    """A batch of documents, those without a single token left out."""

    ids: np.ndarray
    lengths: np.ndarray
    """int32 [S]: ids in each sequence."""
    counts: np.ndarray
    """int32 [D]: sequences in each document."""
    hashes: np.ndarray
    """uint64 [D]: of the text."""
    bands: np.ndarray
    """uint64 [D, bands] of MinHash; [D, 0] where near duplicates are not looked for."""
    characters: int
    peak: int
    """Most memory that the process had, in bytes."""


class Preparer:
    """Prepares batches as a `Work` says."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._tokenizer: Tokenizer = Tokenizer.from_str(work.tokenizer)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._words = Words(self._tokenizer, work.dtype) if works_by_words(self._tokenizer) else None
        self._cuts = cuts_of(self._tokenizer)
        self._near = MinHash(work.near) if work.near is not None else None

    def __call__(self, texts: list[str]) -> Prepared:
        cut: list[str] = []
        sequence: list[int] = []  # of each piece
        document: list[int] = []  # of each sequence
        for number, text in enumerate(texts):
            for part in split_sentences(text) if self._work.sentences else [text]:
                for piece in pieces(part, self._cuts):
                    cut.append(piece)
                    sequence.append(len(document))
                document.append(number)
        ids, sizes = self._encode(cut)
        lengths = np.bincount(np.array(sequence, np.int64), weights=sizes, minlength=len(document)).astype(np.int32)
        full = lengths > 0
        counts = np.bincount(np.array(document, np.int64)[full], minlength=len(texts)).astype(np.int32)
        kept = np.flatnonzero(counts)
        hashes = np.array([text_hash(texts[number]) for number in kept], np.uint64)
        bands = np.zeros((len(kept), 0), np.uint64)
        if self._near is not None and len(kept):
            bands = np.stack([self._near.band_hashes(texts[number]) for number in kept])
        return Prepared(ids, lengths[full], counts[kept], hashes, bands, sum(map(len, texts)), peak_memory())

    def _encode(self, pieces: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all pieces, one after the other, and how many each has: int64 [pieces]."""
        if self._words is not None:
            return self._words.encode(pieces)
        found: list[np.ndarray] = []
        sizes = np.zeros(len(pieces), np.int64)
        first = size = 0
        for number, piece in enumerate(pieces):
            size += len(piece)
            if size >= _TOGETHER or number == len(pieces) - 1:
                encoded = self._tokenizer.encode_batch_fast(pieces[first : number + 1], add_special_tokens=False)
                lists = [encoding.ids for encoding in encoded]
                sizes[first : number + 1] = [len(ids) for ids in lists]
                found.append(np.concatenate([np.array(ids, self._work.dtype) for ids in lists]))
                first, size = number + 1, 0
        return (np.concatenate(found) if found else np.zeros(0, self._work.dtype)), sizes


def peak_memory() -> int:
    """The most memory that this process has had, in bytes; 0 where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    # unlike ru_maxrss this is not handed down by the parent
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)


_PREPARER: Preparer | None = None


def begin(work: Work) -> None:
    """Readies a worker process."""
    global _PREPARER
    # an interrupt from the keyboard reaches the whole group, and the parent says what is to be said
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # the processes are the cores: threads of each would outnumber them
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _PREPARER = Preparer(work)


def prepare(texts: list[str]) -> Prepared:
    """Prepares a batch in a worker process."""
    assert _PREPARER is not None
    return _PREPARER(texts)
