"""What rows of a corpus hold is found once: the same rows from the files as from the index, and a later start reads no index."""

from pathlib import Path

import numpy as np
import pytest

from tests.unit.data.preparing import documents_of, prepared, save_words, text_of, write_lines
from wtn_pretrain.config import validate
from wtn_pretrain.data.masking import Masker
from wtn_pretrain.data.packing import PackedText, lay_out
from wtn_pretrain.data.sentence_pairs import SentencePairs, runs_of
from wtn_pretrain.data.stored_rows import stored_rows
from wtn_pretrain.data.text import TextData, open_text
from wtn_pretrain.data.token_files import TokenFile, open_token_file
from wtn_pretrain.data.work import mean_work


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("corpus")
    source = write_lines(made / "a.jsonl", [text_of(document) for document in documents_of(150, 1)])
    return prepared(made, save_words(made / "tok"), (source,), valid_fraction=0.2, sentences=True)


def data(corpus: Path, packing: str, length: int = 24) -> TextData:
    return validate(TextData, {"source": "corpus", "paths": [str(corpus)], "sequence_length": length, "packing": packing})


@pytest.mark.parametrize("packing", ["documents", "padded", "pairs"])
def test_found_once_and_the_same(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str) -> None:
    def opened(length: int = 24) -> PackedText | SentencePairs:
        text = open_text(data(corpus, "none" if packing == "pairs" else packing, length), tmp_path).train
        return text.with_pairs("sop") if packing == "pairs" else text  # type: ignore[union-attr]

    def budgets(words: np.ndarray) -> np.ndarray:
        return Masker(open_text(data(corpus, "none"), tmp_path).tokenizer).budgets(words)

    text, file = opened(), open_token_file(corpus / "train")
    if packing == "pairs":
        assert isinstance(text, SentencePairs)
        runs = runs_of(file.sequence_bounds(), file.document_sequences(), 24)
        assert all((getattr(text.runs, name) == getattr(runs, name)).all() for name in ("bounds", "first", "last", "document"))
        words = runs.words()
        expected = (words + 3).mean(), ((words + 3) ** 2).mean(), budgets(words).mean()
    else:
        assert isinstance(text, PackedText)
        layout = lay_out(file.document_bounds(), 24, packing)  # type: ignore[arg-type]
        assert all((one == other).all() for one, other in zip(text.layout, layout, strict=True))
        expected = layout.tokens().mean(), layout.pairs().mean(), budgets(layout.words()).mean()
        assert text.padding() == pytest.approx(1 - layout.tokens().sum() / (24 * len(text)))
    # sums of whole numbers: only the last division rounds
    assert mean_work(text, 24, budgets) == pytest.approx(expected, rel=1e-12)
    batch = text.fetch(np.arange(8), np.arange(8, dtype=np.uint64))

    def unread(self: TokenFile) -> np.ndarray:
        raise AssertionError("the index was read again")

    for name in ("sequence_bounds", "document_sequences", "document_bounds"):
        monkeypatch.setattr(TokenFile, name, unread)
    again = opened()
    assert all((again.fetch(np.arange(8), np.arange(8, dtype=np.uint64))[name] == values).all() for name, values in batch.items())
    assert mean_work(again, 24, budgets) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(AssertionError, match="read again"):
        opened(20)


def test_another_corpus_in_the_same_place_has_rows_of_its_own(tmp_path: Path) -> None:
    tokenizer = save_words(tmp_path / "tok")
    found = []
    for turn in range(2):
        texts = [text_of(document) for document in documents_of(80, 3)]
        source = write_lines(tmp_path / "a.jsonl", texts[::-1] if turn else texts)
        splits = open_text(data(prepared(tmp_path, tokenizer, (source,), f"corpus-{turn}"), "padded"), tmp_path / "cache")
        found.append((splits.identity, splits.train.layout.lengths.tolist()))  # type: ignore[union-attr]
    assert found[0][0] != found[1][0] and found[0][1] != found[1][1] and sorted(found[0][1]) == sorted(found[1][1])


def test_what_was_cut_short_is_made_anew(tmp_path: Path) -> None:
    calls = []

    def build() -> dict[str, np.ndarray]:
        calls.append(0)
        return {"a": np.arange(1000), "none": np.zeros(0, np.int64)}

    for _ in range(2):
        found = stored_rows(tmp_path, "key", build)
        assert (found["a"] == np.arange(1000)).all() and len(found["none"]) == 0
    assert len(calls) == 1
    (tmp_path / "rows" / "key" / "a.npy").write_bytes(b"")
    assert (stored_rows(tmp_path, "key", build)["a"] == np.arange(1000)).all() and len(calls) == 2
