"""Prepared corpora as training and validation sets: what `data.source: corpus` reads."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from wtn_pretrain.data.blend import blended
from wtn_pretrain.data.packing import Layout, PackedText, Packing, Summary, lay_out, summarise
from wtn_pretrain.data.sentence_pairs import Runs, SentencePairs, runs_of, words_of
from wtn_pretrain.data.stored_rows import stored_rows
from wtn_pretrain.data.text_set import Pair, TextSet
from wtn_pretrain.data.token_files import TokenFile, files_of, open_token_file
from wtn_pretrain.data.tokenizer import load_tokenizer, tokenizer_hash
from wtn_pretrain.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CARD = "card.json"


@dataclass(frozen=True)
class CorpusText(TextSet):
    """The rows of a `TextSet`, of a token file; pairs are cut between its sentences where it keeps them."""

    file: TokenFile | None = None
    pad_id: int = 0
    cache: Path | None = None
    """Folder to keep the runs of sentences in."""

    def with_pairs(self, pair: Pair | None) -> Any:
        """See `TextSet.with_pairs`."""
        file = self.file
        if pair is None or file is None or file.sequences <= file.documents:
            return super().with_pairs(pair)

        def build() -> dict[str, np.ndarray]:
            runs = runs_of(file.sequence_bounds(), file.document_sequences(), self.sequence_length)
            return {**vars(runs), "words": words_of(runs, self.sequence_length)}

        found = build() if self.cache is None else stored_rows(self.cache, f"{file.identity()}-{self.sequence_length}-pairs", build)
        counts = found.pop("words")
        runs = Runs(**found)
        if not len(runs.first):
            raise UserError(f"{file.prefix}: no document has two sentences, which pairs need; set model.pair_head to none")
        return SentencePairs(file.tokens, runs, self.sequence_length, self.cls_id, self.sep_id, self.pad_id, pair, counts)


@dataclass(frozen=True)
class _Place:
    """What one of the paths names."""

    path: Path
    card: dict[str, Any] | None  # None: a token file alone, such as Megatron's

    def part(self, name: str) -> Path:
        return self.path if self.card is None else self.path / name


def read_card(folder: Path) -> dict[str, Any]:
    """The card of a prepared corpus. Raises a UserError where there is none."""
    try:
        card = json.loads((folder / _CARD).read_text(encoding="utf-8"))
        if not {"tokenizer", "parts"} <= card.keys():
            raise ValueError("it lacks what a card says")
    except OSError as error:
        raise UserError(
            f"{folder / _CARD}: cannot be read ({error.strerror}); name a folder that tools/preprocess_corpus.py wrote"
        ) from None
    except (ValueError, AttributeError) as error:
        raise UserError(f"{folder / _CARD}: not the card of a corpus ({error}); prepare the corpus anew") from None
    return card


def open_corpora(
    paths: tuple[str, ...],
    *,
    weights: tuple[float, ...],
    valid_paths: tuple[str, ...],
    tokenizer: str | None,
    sequence_length: int,
    packing: Packing,
    cache: Path,
) -> tuple[Any, Any, "PreTrainedTokenizerBase", str]:
    """Training set, validation set and tokenizer of corpora, and a hash of what training reads.

    Args:
        paths: folders that tools/preprocess_corpus.py wrote, or token files without .bin and .idx.
        weights: how often training takes each; empty: by size.
        valid_paths: corpora to validate on as a whole; empty: the held-out parts of `paths`.
        tokenizer: where it is read from; None: from the first corpus.
        cache: folder that all ranks share, for what rows hold where that takes a pass over the index to find; all ranks must call this.

    Raises:
        UserError: what is missing, damaged, or does not fit together.
    """
    if weights and len(weights) != len(paths):
        raise UserError(f"data.weights: {len(weights)} weights for {len(paths)} paths; give one for each, or none")
    places, held_out = [_place(path) for path in paths], [_place(path) for path in valid_paths]
    found = _tokenizer(places, held_out, tokenizer)

    def opened(prefix: Path) -> Any:
        return open_rows(open_token_file(prefix), found, sequence_length, packing, cache)

    if held_out:
        validating = [place.part("train") for place in held_out]
    else:
        validating = [place.part("valid") for place in places if place.card is not None and place.card["parts"]["valid"]["tokens"]]
        if not validating:
            raise UserError(f"{paths[0]}: nothing is held out for validation in it; set data.valid_paths")
    files = [open_token_file(place.part("train")) for place in places]
    train = [open_rows(file, found, sequence_length, packing, cache) for file in files]
    identity = xxhash.xxh3_128_hexdigest(" ".join([*(file.identity() for file in files), *map(str, weights)]).encode())
    valid = [some for some in map(opened, validating) if len(some)]
    for place, some in zip(places, train, strict=True):
        if not len(some):
            raise UserError(
                f"{place.path}: its text is shorter than a row of {sequence_length}; lower data.sequence_length or leave it out"
            )
    if not valid:
        raise UserError(
            f"{validating[0]}: its text is shorter than a row of {sequence_length}; lower data.sequence_length or set data.valid_paths"
        )
    return blended(train, weights), blended(valid, ()), found, identity


def _place(path: str) -> _Place:
    folder = Path(path)
    if folder.is_dir():
        return _Place(folder, read_card(folder))
    prefix = folder.with_suffix("") if folder.suffix in (".bin", ".idx") else folder
    if not files_of(prefix)[0].is_file():
        raise UserError(f"{path}: no such corpus; name a folder that tools/preprocess_corpus.py wrote, or a token file without .bin")
    return _Place(prefix, None)


def _tokenizer(places: list[_Place], held_out: list[_Place], given: str | None) -> "PreTrainedTokenizerBase":
    if given is None:
        own = next((place.path for place in places if place.card is not None), None)
        if own is None:
            raise UserError(f"{places[0].path}: a token file does not say which tokenizer made it; set data.tokenizer")
        given = str(own / "tokenizer")
    tokenizer = load_tokenizer(given)
    own_hash = tokenizer_hash(tokenizer)
    for place in (*places, *held_out):
        if place.card is not None and place.card["tokenizer"]["hash"] != own_hash:
            raise UserError(
                f"{place.path}: made with tokenizer {place.card['tokenizer']['hash']}, and {given} is {own_hash}; "
                "use corpora of one tokenizer, or leave data.tokenizer out"
            )
    return tokenizer


def open_rows(
    file: TokenFile, tokenizer: "PreTrainedTokenizerBase", sequence_length: int, packing: Packing, cache: Path
) -> CorpusText | PackedText:
    """The rows of a token file. Which documents a row holds is found once and then read from `cache`."""
    special = tokenizer.cls_token_id, tokenizer.sep_token_id
    if packing == "none":
        return CorpusText(file.tokens, sequence_length, *special, file=file, pad_id=tokenizer.pad_token_id, cache=cache)

    def build() -> dict[str, np.ndarray]:
        layout = lay_out(file.document_bounds(), sequence_length, packing)
        made = summarise(layout, sequence_length)
        return {**layout._asdict(), "words": made.words, "pairs": np.array(made.pairs)}

    found = stored_rows(cache, f"{file.identity()}-{sequence_length}-{packing}", build)
    counts, pairs = found.pop("words"), int(found.pop("pairs"))
    summary = Summary(counts, len(found["starts"]), pairs)
    return PackedText(file.tokens, Layout(**found), sequence_length, *special, tokenizer.pad_token_id, packing, summary)
