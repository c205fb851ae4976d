"""Text for pretraining: its settings, the cached token ids and the rows packed from them."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from wtn_pretrain.config import Section
from wtn_pretrain.data.blend import Blend
from wtn_pretrain.data.corpus import (
    Corpus,
    PydocTopics,
    TextFiles,
    block_hash,
    blocks,
    find_text_files,
    open_text_tables,
    text_faults,
    validation_threshold,
)
from wtn_pretrain.data.documents import kept_runs, numbered_blocks
from wtn_pretrain.data.faults import Policy, tell_skipped
from wtn_pretrain.data.packing import PackedText, Packing, lay_out
from wtn_pretrain.data.sentence_pairs import SentencePairs
from wtn_pretrain.data.text_set import TextSet
from wtn_pretrain.data.token_corpus import open_corpora
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

_FORMAT = 2  # raise when the same settings and text come to give other tokens


class TextData(Section):
    """Running text for masked language modelling."""

    kind: Literal["text"] = "text"
    """Text."""
    source: Literal["pydoc", "files", "datasets", "corpus"] = "pydoc"
    """Where the text comes from: the language reference inside Python itself (needs no file), text files, the datasets library, or token
    files that tools/preprocess_corpus.py or Megatron-LM wrote."""
    paths: tuple[str, ...] = ()
    """Files, folders or glob patterns of .txt, .txt.xz and .txt.gz in UTF-8 (Wikipedia's <doc> lines are understood); for datasets one hub
    name or one folder of Parquet or arrow files; for corpus folders of prepared corpora, or token files without .bin and .idx."""
    weights: tuple[float, ...] = ()
    """How often training takes rows of each of paths, in proportion; empty: as their sizes are. Source corpus."""
    valid_paths: tuple[str, ...] = ()
    """Files, or corpora, to validate on, left out of the training text; empty holds out valid_fraction, or what a corpus holds out."""
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
    lengths: tuple[tuple[float, int], ...] = ()
    """Warm-up with shorter rows: pairs (share of the steps, tokens), each used until that share of the steps is done, then
    sequence_length; [[0.9, 128]] for BERT's. Imitation and validation always take sequence_length."""
    packing: Packing = "none"
    """What a row holds. none: the running text, over the ends of documents; documents: whole documents, or pieces of longer ones, without
    attention from one to the other; padded: one of them and padding, as others train."""
    valid_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Part of the text held out for validation where the source has none of its own."""
    limit_mb: float | None = Field(default=None, gt=0)
    """Use only the first so many megabytes (10^6 bytes) of the text; null takes all."""
    faults: Policy = "stop"
    """What to do about text that cannot be read, sources files and datasets: stop, or leave out the line, row or rest of the file and count
    it (the count is printed and stands in tokens.json in the run's folder)."""
    workers: int = Field(default=0, ge=0)
    """Processes that prepare batches beside the training; 0 prepares them in its own."""

    @model_validator(mode="after")
    def _fits_together(self) -> "TextData":
        if self.source != "pydoc" and not self.paths:
            raise UserError(f"paths is empty, which source {self.source} needs")
        if self.source == "datasets" and len(self.paths) > 1:
            raise UserError(f"paths names {len(self.paths)} places, source datasets takes one")
        if self.valid_paths and self.source not in ("files", "corpus"):
            raise UserError(f"valid_paths goes with source files or corpus, not {self.source}; leave it out")
        if self.weights and self.source != "corpus":
            raise UserError(f"weights goes with source corpus, not {self.source}; leave it out")
        if self.faults != "stop" and self.source not in ("files", "datasets"):
            raise UserError(f"faults goes with source files or datasets, not {self.source}; leave it out")
        if self.source == "corpus":
            for name in ("column", "vocab_size", "lowercase", "valid_fraction", "limit_mb"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise UserError(f"{name} was decided when the corpus was made, so source corpus takes none; leave it out")
        shares, lengths = [share for share, _ in self.lengths], [length for _, length in self.lengths]
        if any(not 0 < share < 1 for share in shares) or shares != sorted(set(shares)):
            raise UserError(f"lengths has the shares {shares}; they must rise, each between 0 and 1")
        if any(not 8 <= length <= self.sequence_length for length in lengths):
            raise UserError(f"lengths has {lengths}; each must be from 8 to sequence_length {self.sequence_length}")
        return self


Text = TextSet | PackedText | SentencePairs | Blend
"""Any set of rows of text."""


@dataclass(frozen=True)
class TextSplits:
    """A training and a validation set with the tokenizer that made them."""

    train: Text
    valid: Text
    tokenizer: "PreTrainedTokenizerBase"
    identity: str = ""
    """Hash of what training reads, where it may change in its place and `data` stay as it is: prepared corpora; else empty."""


def open_text(config: TextData, cache: Path) -> TextSplits:
    """The splits that `config` describes. Tokens and tokenizer are kept in `cache` and used again while settings, text and tokenizer
    are the same. Under torch.distributed every rank must call it, and `cache` must be a folder that all share.

    Raises a UserError for what is missing, no text, too short or does not fit together.
    """
    if config.source == "corpus":
        return TextSplits(
            *open_corpora(
                config.paths,
                weights=config.weights,
                valid_paths=config.valid_paths,
                tokenizer=config.tokenizer,
                sequence_length=config.sequence_length,
                packing=config.packing,
                cache=Path(cache),
            )
        )
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
        return open_text_tables(config.paths[0], config.column, config.faults)
    held_out = find_text_files(config.valid_paths)
    files = find_text_files(config.paths, exclude=held_out)
    if not files:
        raise UserError(f"{', '.join(config.paths)}: every file is in data.valid_paths; leave some to train on")
    return TextFiles(files, text_faults(config.faults)), TextFiles(held_out, text_faults(config.faults)) if held_out else None


def _key(config: TextData, train: Corpus, valid: Corpus | None, given: "PreTrainedTokenizerBase | None") -> str:
    facts: dict[str, object] = {"format": _FORMAT, "train": train.fingerprint(), "limit_mb": config.limit_mb}
    facts["valid"] = config.valid_fraction if valid is None else valid.fingerprint()
    facts["tokenizer"] = (
        [config.vocab_size, config.lowercase] if given is None else [given.backend_tokenizer.to_str(), str(given.special_tokens_map)]
    )
    if config.faults != "stop":
        facts["faults"] = config.faults
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _build(config: TextData, cache: Path, train: Corpus, valid: Corpus | None, given: "PreTrainedTokenizerBase | None") -> dict[str, Any]:
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
    note: dict[str, Any] = {}
    for part, texts, source in (("train", training(), train), ("valid", validating(), valid)):
        note[part] = write_part(cache, part, texts, given)
        faults = getattr(source, "faults", None)
        if faults is not None and faults.counts:
            note.setdefault("skipped", {})[part] = faults.state()
            tell_skipped(faults, "training text" if part == "train" else "validation text")
    return note


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
