"""Prepared corpora in training: the same rows as the text itself, blends, Megatron's files, and what does not fit together."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.unit.data.preparing import FIRST, documents_of, ids_of, prepared, save_words, text_of, write_lines
from wtn_pretrain.config import validate
from wtn_pretrain.data.masking import MaskedText, Masker
from wtn_pretrain.data.packing import PackedText
from wtn_pretrain.data.stream import BatchStream
from wtn_pretrain.data.text import TextData, open_text
from wtn_pretrain.data.token_files import files_of, write_index
from wtn_pretrain.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two corpora, one and two, of different documents."""
    made = tmp_path_factory.mktemp("corpora")
    tokenizer = save_words(made / "tok")
    for name, count, seed in (("one", 150, 1), ("two", 60, 2)):
        source = write_lines(made / f"{name}.jsonl", [text_of(document) for document in documents_of(count, seed)])
        prepared(made, tokenizer, (source,), name, valid_fraction=0.2)
    return made


def corpus(*paths: Path, **settings: object) -> TextData:
    return validate(TextData, {"source": "corpus", "paths": [str(path) for path in paths], "sequence_length": 24, **settings})


def refused(message: str, cache: Path, *paths: Path, **settings: object) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_text(corpus(*paths, **settings), cache)
    assert "\n" not in str(caught.value) and ";" in str(caught.value)


def test_rows_are_the_documents_in_order(folder: Path, tmp_path: Path) -> None:
    splits = open_text(corpus(folder / "one"), tmp_path)
    rows = splits.train.fetch(np.arange(len(splits.train)), None)["input_ids"][:, 1:-1].flatten().tolist()
    valid = splits.valid.fetch(np.arange(len(splits.valid)), None)["input_ids"][:, 1:-1].flatten().tolist()
    every = [ids_of(document) for document in documents_of(150, 1)]
    text = [token for document in every for token in document]
    assert len(rows) + len(valid) > len(text) - 2 * 22 and splits.tokenizer.vocab_size == 307
    # the documents that are not held out, one after the other
    place = 0
    kept = 0
    for document in every:
        if rows[place : place + len(document)] == document:
            place += len(document)
            kept += 1
    assert place >= len(rows) - max(map(len, every)) and 100 < kept < 140
    packed = open_text(corpus(folder / "one", packing="documents"), tmp_path).train
    assert isinstance(packed, PackedText) and packed.padding() < 0.1
    batch = packed.fetch(np.arange(len(packed)), None)
    assert sum(int(segments.max()) for segments in batch["segments"]) == len(packed.layout.starts) >= kept


def test_blends_mix_by_weight_and_every_row_comes(folder: Path, tmp_path: Path) -> None:
    splits = open_text(corpus(folder / "one", folder / "two", weights=[1, 3]), tmp_path)
    (one, two), _ = splits.train.shares
    masked = MaskedText(splits.train, Masker(splits.tokenizer))
    stream = BatchStream(masked, 16, seed=0)
    seen = np.concatenate([stream.sample_ids(step)[0] for step in range(-(-4 * two // 12))])
    assert abs((seen >= one).mean() - 0.75) < 4 * np.sqrt(0.1875 / len(seen))
    first = seen[seen >= one][:two] - one
    assert sorted(first) == list(range(two))
    indices = np.array([0, one, one - 1, one + two - 1, 5])
    rows = splits.train.fetch(indices, None)["input_ids"]
    alone = [open_text(corpus(folder / name), tmp_path).train for name in ("one", "two")]
    for row, index in zip(rows, indices, strict=True):
        part, place = (alone[0], index) if index < one else (alone[1], index - one)
        assert (row == part.fetch(np.array([place]), None)["input_ids"][0]).all()
    assert BatchStream(masked, 8, seed=1).micro_batch(0, 0)["targets"].shape == (8, 3)
    by_size = open_text(corpus(folder / "one", folder / "two"), tmp_path).train
    assert by_size.weights == (float(one), float(two))
    packed = open_text(corpus(folder / "one", folder / "two", packing="padded", weights=[1, 1]), tmp_path).train
    assert packed.fetch(np.array([0, len(packed) - 1]), None)["attention_mask"].shape == (2, 24)


def test_megatrons_files_are_read_as_they_are(folder: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(FIRST, 300, 4000).astype("<i4")
    bin_file, index, _ = files_of(tmp_path / "meg")
    ids.tofile(bin_file)
    with index.open("wb") as stream:
        write_index(stream, np.dtype("<i4"), np.full(40, 100, np.int32), np.full(20, 2, np.int32))
    settings = {"tokenizer": str(folder / "tok"), "valid_paths": [str(folder / "two")]}
    for name in ("meg", "meg.bin"):
        train = open_text(corpus(tmp_path / name, **settings), tmp_path).train
        assert train.fetch(np.arange(2), None)["input_ids"][:, 1:-1].flatten().tolist() == ids[:44].tolist()
    refused("does not say which tokenizer made it; set data.tokenizer", tmp_path, tmp_path / "meg")
    refused("nothing is held out for validation in it; set data.valid_paths", tmp_path, tmp_path / "meg", tokenizer=str(folder / "tok"))


def test_what_does_not_fit_together_is_refused(folder: Path, tmp_path: Path) -> None:
    from transformers import BertTokenizer

    BertTokenizer(vocab={name: n for n, name in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"])}).save_pretrained(
        tmp_path / "other"
    )
    refused(
        r"one: made with tokenizer [0-9a-f]{32}, and .*other is [0-9a-f]{32}", tmp_path, folder / "one", tokenizer=str(tmp_path / "other")
    )
    refused("2 paths; give one for each, or none", tmp_path, folder / "one", folder / "two", weights=[1.0])
    refused("absent: no such corpus; name a folder", tmp_path, tmp_path / "absent")
    (tmp_path / "hollow").mkdir()
    refused(r"hollow/card\.json: cannot be read", tmp_path, tmp_path / "hollow")
    (tmp_path / "hollow" / "card.json").write_text("[]")
    refused(r"hollow/card\.json: not the card of a corpus", tmp_path, tmp_path / "hollow")
    refused("one: its text is shorter than a row of 90000; lower data.sequence_length", tmp_path, folder / "one", sequence_length=90_000)
    for settings, message in (
        ({"source": "files", "weights": [1.0]}, "weights goes with source corpus"),
        ({"vocab_size": 512}, "vocab_size was decided when the corpus was made, so source corpus takes none"),
        ({"limit_mb": 3}, "limit_mb was decided when the corpus was made"),
        ({"lowercase": False}, "lowercase was decided when the corpus was made"),
        ({"lengths": [[0.9, 64]]}, "each must be from 8 to sequence_length 24"),
        ({"lengths": [[0.9, 12], [0.5, 16]]}, "they must rise"),
    ):
        with pytest.raises(UserError, match=message):
            corpus(folder / "one", **settings)


def test_damage_is_found_while_training_reads(folder: Path, tmp_path: Path) -> None:
    card = json.loads((folder / "two" / "card.json").read_text())
    copy = tmp_path / "two"
    copy.mkdir()
    for file in (folder / "two").iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    raw = bytearray((copy / "train.bin").read_bytes())
    raw[2 * card["parts"]["train"]["tokens"] // 2] ^= 1
    (copy / "train.bin").write_bytes(raw)
    train = open_text(corpus(copy, tokenizer=str(folder / "tok")), tmp_path).train
    with pytest.raises(UserError, match=r"train\.bin: bytes 0 to \d+ do not have the checksum"):
        list(BatchStream(train, 8, seed=0, workers=1).iterate(0, 1))
