"""A long document has the ids that the tokenizer gives it as a whole, whatever it is cut into; and workers keep to one thread each."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from wtn_pretrain.data.corpus import PydocTopics, blocks
from wtn_pretrain.data.prepare.pieces import PIECE, cuts_of, pieces
from wtn_pretrain.data.prepare.sentencepiece_model import read_sentencepiece
from wtn_pretrain.data.prepare.vocabulary import train_tokenizer
from wtn_pretrain.data.prepare.worker import Preparer, Work, begin, prepare

TEXT = "\n\n".join(blocks(PydocTopics(), 120_000))
ODD = (
    TEXT[:40_000].replace("\n", " ")
    + "  two  spaces \u00a0 no break\u200b zero width\t\ttabs\r\n don't we'll "
    + "e\u0301 \u0308lone marks caf\u00e9 \u4e2d\u6587 [MASK] word [SEP]"
    + TEXT[40_000:].replace(" the ", "\u00a0the  ")
)


@pytest.mark.parametrize("algorithm", ["wordpiece", "bpe", "unigram"])
@pytest.mark.parametrize("lowercase", [True, False])
def test_long_documents_have_the_same_ids(algorithm: str, lowercase: bool) -> None:
    lines = TEXT.splitlines()[:800]
    tokenizer = train_tokenizer(algorithm, lines, 500, lowercase=lowercase).backend_tokenizer  # type: ignore[arg-type]
    cuts = cuts_of(tokenizer)
    assert cuts is not None
    preparer = Preparer(Work(tokenizer.to_str(), "<u2", False, None))
    for text in (TEXT, ODD):
        cut = list(pieces(text, cuts))
        assert len(cut) > 5 and "".join(cut) == text and max(map(len, cut)) < 2 * PIECE
        assert preparer([text]).ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids


def test_models_made_elsewhere_have_the_same_ids(shared: Callable[[str], Path]) -> None:
    folder = shared("fixtures/sentencepiece")
    text = (folder / "botchan.txt").read_text(encoding="utf-8")[:60_000]
    for name in ("t5_tokenizer_base", "test_model", "en.wiki.bpe.vs10000"):
        tokenizer = read_sentencepiece(folder / f"{name}.model").backend_tokenizer
        found = Preparer(Work(tokenizer.to_str(), "<u2", False, None))([text])
        assert found.ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids, name


def test_what_is_not_known_to_be_right_is_not_cut() -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    def bpe(splitter: pre_tokenizers.PreTokenizer, *steps: normalizers.Normalizer) -> Tokenizer:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.normalizer, made.decoder = splitter, normalizers.Sequence(list(steps)), decoders.ByteLevel()
        return made

    assert cuts_of(bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))) is not None
    assert cuts_of(bpe(pre_tokenizers.ByteLevel(use_regex=False))) is None
    assert cuts_of(bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.Strip())) is None
    assert cuts_of(bpe(pre_tokenizers.ByteLevel(), normalizers.Prepend("x"))) is None
    assert cuts_of(bpe(pre_tokenizers.Metaspace(split=False))) is None
    assert cuts_of(bpe(pre_tokenizers.Metaspace(prepend_scheme="never"), normalizers.Strip())) is None
    over = bpe(pre_tokenizers.ByteLevel())
    over.add_tokens([AddedToken("two words")])
    assert cuts_of(over) is None
    text = "word " * PIECE
    assert list(pieces(text, None)) == [text]
    # without a place to cut a piece grows
    assert [len(piece) for piece in pieces("x" * 3 * PIECE + " y", cuts_of(bpe(pre_tokenizers.ByteLevel())))] == [3 * PIECE, 2]


def threads() -> int:
    """Of this process."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("Threads:"))


def test_workers_start_no_threads() -> None:
    tokenizer = train_tokenizer("bpe", TEXT.splitlines()[:300], 300).backend_tokenizer
    work = Work(tokenizer.to_str(), "<u2", False, None)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), begin, (work,)) as pool:
        before = pool.submit(threads).result()
        assert len(pool.submit(prepare, [TEXT] * 3).result().ids) > 3 * 10_000
        assert pool.submit(threads).result() == before
