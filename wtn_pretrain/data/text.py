"""Text for pretraining: its settings, the cached token ids and the rows packed from them."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from wtn_pretrain.config import Section
from wtn_pretrain.data.corpus import (
    Corpus,
    PydocTopics,
    TextFiles,
    block_hash,
    blocks,
    find_text_files,
    open_text_tables,
    validation_threshold,
)
from wtn_pretrain.data.documents import kept_runs, numbered_blocks
from wtn_pretrain.data.hashing import uniforms
from wtn_pretrain.data.packing import PackedText, Packing, lay_out
from wtn_pretrain.data.token_store import (
    build_once,
    documents_file,
    open_documents,
    open_tokens,
    save_tokenizer,
    tokens_file,
    write_part,
)
from wtn_pretrain.data.tokenizer import load_tokenizer, train_wordpiece
from wtn_pretrain.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pair = Literal["sop", "nsp"]

_FORMAT = 2  # raise when the same settings and text come to give other tokens
_CUT, _ORDER, _OTHER = 11, 12, 13


class TextData(Section):
    """Running text for masked language modelling."""

    kind: Literal["text"] = "text"
    """Text."""
    source: Literal["pydoc", "files", "datasets"] = "pydoc"
    """Where the text comes from: the language reference inside Python itself (needs no file), text files, or the datasets library."""
    paths: tuple[str, ...] = ()
    """Files, folders or glob patterns of .txt, .txt.xz and .txt.gz in UTF-8 (Wikipedia's <doc> lines are understood); for datasets one hub
    name or one folder of Parquet or arrow files."""
    valid_paths: tuple[str, ...] = ()
    """Files to validate on, left out of the training text; empty holds out valid_fraction. Source files."""
    column: str = "text"
    """Column of the text, source datasets."""
    tokenizer: str | None = None
    """Folder of a saved tokenizer, or a BERT vocab.txt; null trains a WordPiece tokenizer on the training text."""
    vocab_size: int = Field(default=1024, ge=128)
    """Most entries that a trained vocabulary may have."""
    lowercase: bool = True
    """Whether a trained tokenizer lowers case and strips accents."""
    sequence_length: int = Field(default=64, ge=8)
    """Tokens in a row, [CLS] and [SEP] included."""
    packing: Packing = "none"
    """What a row holds. none: the running text, over the ends of documents; documents: whole documents, or pieces of longer ones, without
    attention from one to the other; padded: one of them and padding, as others train."""
    valid_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Part of the text held out for validation where the source has none of its own."""
    limit_mb: float | None = Field(default=None, gt=0)
    """Use only the first so many megabytes (10^6 bytes) of the text; null takes all."""
    workers: int = Field(default=0, ge=0)
    """Processes that prepare batches beside the training; 0 prepares them in its own."""

    @model_validator(mode="after")
    def _fits_together(self) -> "TextData":
        if self.source != "pydoc" and not self.paths:
            raise UserError(f"paths is empty, which source {self.source} needs")
        if self.source == "datasets" and len(self.paths) > 1:
            raise UserError(f"paths names {len(self.paths)} places, source datasets takes one")
        if self.valid_paths and self.source != "files":
            raise UserError(f"valid_paths goes with source files, not {self.source}; leave it out")
        return self


@dataclass(frozen=True)
class TextSet:
    """A Dataset of full rows packed from running text: {"input_ids": int64 [B, S]} = [CLS] tokens [SEP].

    With `pair` a row is [CLS] a [SEP] b [SEP], and "token_type_ids" int64 [B, S] (0 up to the first [SEP], 1 after) and "pair_label"
    int64 [B] join it: "sop" swaps a and b in half of the rows (label 1), "nsp" takes b from another row in half of them (label 1).
    Rows follow each other in the text and may run over the end of a document; the last, short one is dropped.
    """

    tokens: np.ndarray  # 1-D, memory-mapped
    sequence_length: int
    cls_id: int
    sep_id: int
    pair: Pair | None = None

    def __len__(self) -> int:
        return len(self.tokens) // (self.sequence_length - 2)

    def with_pairs(self, pair: Pair | None) -> "TextSet":
        """The same text in rows of sentence pairs."""
        return replace(self, pair=pair)

    def fetch(self, indices: np.ndarray, seeds: np.ndarray | None) -> dict[str, torch.Tensor]:
        """See `wtn_pretrain.data.stream.Dataset`. Without seeds pairs are cut in the middle and in order."""
        starts = indices * (self.sequence_length - 2)
        if self.pair is not None:
            return self._pairs(indices, starts, seeds)
        rows = np.empty((len(indices), self.sequence_length), np.int64)
        rows[:, 0], rows[:, -1] = self.cls_id, self.sep_id
        rows[:, 1:-1] = self.tokens[starts[:, None] + np.arange(self.sequence_length - 2)]
        return {"input_ids": torch.from_numpy(rows)}

    def _pairs(self, indices: np.ndarray, starts: np.ndarray, seeds: np.ndarray | None) -> dict[str, torch.Tensor]:
        count, length = len(indices), self.sequence_length - 3
        cuts, changed = np.full(count, length // 2), np.zeros(count, bool)
        if seeds is not None:
            cuts = 1 + np.floor(uniforms(seeds, _CUT, 1)[:, 0] * (length - 1)).astype(np.int64)
            changed = uniforms(seeds, _ORDER, 1)[:, 0] < 0.5
        first, a_starts, b_starts = cuts, starts, starts + cuts
        if self.pair == "sop":
            first = np.where(changed, length - cuts, cuts)
            a_starts, b_starts = np.where(changed, b_starts, a_starts), np.where(changed, a_starts, b_starts)
        elif seeds is not None:
            if len(self) < 2:
                raise UserError("pairs of kind nsp need two rows of text or more; give more text or a shorter data.sequence_length")
            other = (indices + 1 + np.floor(uniforms(seeds, _OTHER, 1)[:, 0] * (len(self) - 1)).astype(np.int64)) % len(self)
            b_starts = np.where(changed, other * (self.sequence_length - 2) + cuts, b_starts)
        # position p of a row holds token p - 1 of a, or p - first - 2 of b
        position = np.arange(self.sequence_length)[None, :]
        in_b = position > first[:, None] + 1
        source = np.where(in_b, b_starts[:, None] + position - first[:, None] - 2, a_starts[:, None] + position - 1)
        separator = (position == first[:, None] + 1) | (position == self.sequence_length - 1)
        special = separator | (position == 0)
        rows = self.tokens[np.where(special, 0, source)].astype(np.int64)
        rows[separator] = self.sep_id
        rows[:, 0] = self.cls_id
        return {
            "input_ids": torch.from_numpy(rows),
            "token_type_ids": torch.from_numpy(in_b.astype(np.int64)),
            "pair_label": torch.from_numpy(changed.astype(np.int64)),
        }


@dataclass(frozen=True)
class TextSplits:
    """A training and a validation set with the tokenizer that made them."""

    train: TextSet | PackedText
    valid: TextSet | PackedText
    tokenizer: "PreTrainedTokenizerBase"


def open_text(config: TextData, cache: Path) -> TextSplits:
    """The splits that `config` describes. Tokens and tokenizer are kept in `cache` and used again while settings, text and tokenizer
    are the same. Under torch.distributed every rank must call it, and `cache` must be a folder that all share.

    Raises a UserError for what is missing, no text, too short or does not fit together.
    """
    cache = Path(cache)
    given = None if config.tokenizer is None else load_tokenizer(config.tokenizer)
    train, valid = _open_corpora(config)
    key = _key(config, train, valid, given)
    build_once(cache, key, lambda: _build(config, cache, train, valid, given))
    tokenizer = load_tokenizer(cache / "tokenizer")
    return TextSplits(_open_set(config, cache, "train", tokenizer), _open_set(config, cache, "valid", tokenizer), tokenizer)


def _open_corpora(config: TextData) -> tuple[Corpus, Corpus | None]:
    if config.source == "pydoc":
        return PydocTopics(), None
    if config.source == "datasets":
        return open_text_tables(config.paths[0], config.column)
    held_out = find_text_files(config.valid_paths)
    files = find_text_files(config.paths, exclude=held_out)
    if not files:
        raise UserError(f"{', '.join(config.paths)}: every file is in data.valid_paths; leave some to train on")
    return TextFiles(files), TextFiles(held_out) if held_out else None


def _key(config: TextData, train: Corpus, valid: Corpus | None, given: "PreTrainedTokenizerBase | None") -> str:
    facts: dict[str, object] = {"format": _FORMAT, "train": train.fingerprint(), "limit_mb": config.limit_mb}
    facts["valid"] = config.valid_fraction if valid is None else valid.fingerprint()
    facts["tokenizer"] = (
        [config.vocab_size, config.lowercase] if given is None else [given.backend_tokenizer.to_str(), str(given.special_tokens_map)]
    )
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _build(config: TextData, cache: Path, train: Corpus, valid: Corpus | None, given: "PreTrainedTokenizerBase | None") -> dict[str, int]:
    limit = None if config.limit_mb is None else int(config.limit_mb * 1e6)
    threshold = validation_threshold(blocks(train, limit), config.valid_fraction) if valid is None else -1

    def training() -> Iterator[tuple[bool, str]]:
        return kept_runs(numbered_blocks(train, limit), lambda block: threshold < 0 or block_hash(block) > threshold)

    def validating() -> Iterator[tuple[bool, str]]:
        if valid is not None:
            return kept_runs(numbered_blocks(valid), lambda block: True)
        return kept_runs(numbered_blocks(train, limit), lambda block: block_hash(block) <= threshold)

    if given is None:
        given = train_wordpiece(_Again(lambda: (text for _, text in training())), config.vocab_size, config.lowercase)
    save_tokenizer(given, cache / "tokenizer")
    return {"train": write_part(cache, "train", training(), given), "valid": write_part(cache, "valid", validating(), given)}


@dataclass(frozen=True)
class _Again:
    """An iterable that starts anew each time."""

    start: Callable[[], Iterator[str]]

    def __iter__(self) -> Iterator[str]:
        return self.start()


def _open_set(config: TextData, cache: Path, part: str, tokenizer: "PreTrainedTokenizerBase") -> TextSet | PackedText:
    tokens = open_tokens(tokens_file(cache, part), len(tokenizer))
    found: TextSet | PackedText
    if config.packing == "none":
        found = TextSet(tokens, config.sequence_length, tokenizer.cls_token_id, tokenizer.sep_token_id)
    else:
        layout = lay_out(open_documents(documents_file(cache, part), len(tokens)), config.sequence_length, config.packing)
        special = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
        found = PackedText(tokens, layout, config.sequence_length, *special, config.packing)
    if not len(found):
        name = "training" if part == "train" else "validation"
        remedy = "give more text or lower data.sequence_length" + ("" if part == "train" else " or raise data.valid_fraction")
        raise UserError(f"the {name} text has {len(tokens)} tokens, fewer than a row of {config.sequence_length} needs; {remedy}")
    return found
