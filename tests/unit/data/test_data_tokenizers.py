"""Trained tokenizers: saved, loaded by AutoTokenizer, the same ids for the same text, padded; and SentencePiece models made elsewhere."""

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.running import environment
from wtn_pretrain.data.corpus import PydocTopics, blocks
from wtn_pretrain.data.faults import Faults
from wtn_pretrain.data.masking import Masker
from wtn_pretrain.data.prepare.command import train_tokenizer_command
from wtn_pretrain.data.prepare.sentencepiece_model import read_sentencepiece
from wtn_pretrain.data.prepare.sources import Reading, find_sources
from wtn_pretrain.data.prepare.vocabulary import SourceText, train_tokenizer
from wtn_pretrain.data.tokenizer import SPECIAL_TOKENS, continuations, load_tokenizer, tokenizer_hash, unused_ids
from wtn_pretrain.errors import UserError

ROOT = Path(__file__).parents[3]
TEXT = [line for block in blocks(PydocTopics(), 60_000) for line in block.splitlines()]


@pytest.mark.parametrize("algorithm", ["wordpiece", "bpe", "unigram"])
def test_trained_saved_loaded_and_the_same_again(tmp_path: Path, algorithm: str) -> None:
    from transformers import AutoTokenizer

    made = train_tokenizer(algorithm, TEXT, 500, lowercase=False)  # type: ignore[arg-type]
    made.save_pretrained(str(tmp_path))
    loaded, auto = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(str(tmp_path))
    assert len(made) == len(loaded) == len(auto) == 512
    lines = [*TEXT[:200], "Ünïcode, snow ☃ and 3.5%"]
    for line in lines:
        assert made(line).input_ids == loaded(line).input_ids == auto(line).input_ids
    # pairs as BERT has them
    pair = auto("one", "two")
    assert pair.token_type_ids == sorted(pair.token_type_ids) and auto.convert_ids_to_tokens(pair.input_ids).count("[SEP]") == 2
    assert loaded.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    plain = [line for line in TEXT[:200] if line.isascii() and "  " not in line and "`" not in line]
    back = sum(loaded.decode(loaded(line).input_ids, skip_special_tokens=True) == line for line in plain)
    # a WordPiece text comes back with other spaces around its punctuation
    assert len(plain) > 80 and (back == len(plain) or algorithm == "wordpiece")
    if algorithm == "wordpiece":
        bare = ["".join(loaded.decode(loaded(line).input_ids, skip_special_tokens=True).split()) for line in plain]
        assert bare == ["".join(line.split()) for line in plain]
    assert tokenizer_hash(made) == tokenizer_hash(loaded)
    again = train_tokenizer(algorithm, TEXT, 500, lowercase=False)  # type: ignore[arg-type]
    assert again.get_vocab() == made.get_vocab()
    other = train_tokenizer(algorithm, TEXT, 500, lowercase=True)  # type: ignore[arg-type]
    assert tokenizer_hash(other) != tokenizer_hash(made)
    assert other("PYTHON").input_ids == other("python").input_ids and made("PYTHON").input_ids != made("python").input_ids


@pytest.mark.parametrize("algorithm", ["wordpiece", "bpe", "unigram"])
def test_words_and_padding_are_known(algorithm: str) -> None:
    made = train_tokenizer(algorithm, TEXT[:40], 1600, multiple=100)  # type: ignore[arg-type]
    filled = unused_ids(made)
    assert len(made) % 100 == 0 and len(made) < 1600 and 0 < len(filled) < 100 and filled[-1] == len(made) - 1
    assert not np.isin(made(" ".join([*TEXT[:40], "[unused0] [unused1] [unused 0] [unused 7]"])).input_ids, filled).any()
    ids = made("understandings of interpreters", add_special_tokens=False).input_ids
    begins = ~continuations(made)[ids]
    assert begins[0] and begins.sum() == 3 and len(ids) > 3
    masker = Masker(made)
    rows = np.full((300, 64), ids[0])
    rows[:, 0], rows[:, -1] = 2, 3
    masked, _, _ = masker(rows, np.arange(300, dtype=np.uint64))
    assert not np.isin(masked, filled).any() and len(np.unique(masked)) > 50


def test_an_empty_text_and_impossible_sizes_are_refused() -> None:
    for algorithm in ("wordpiece", "bpe", "unigram"):
        with pytest.raises(UserError, match="the training text of the tokenizer is empty"):
            train_tokenizer(algorithm, ["", " "], 600)
    with pytest.raises(UserError, match="byte-level BPE needs 261 entries"):
        train_tokenizer("bpe", TEXT, 128)
    with pytest.raises(UserError, match=r"--vocab-size 64: SentencePiece cannot train .*; give more text or another size"):
        train_tokenizer("unigram", TEXT, 64)
    with pytest.raises(UserError, match=r"--multiple 0: is not at least 1"):
        train_tokenizer("bpe", TEXT, 600, multiple=0)


@pytest.mark.parametrize("name", ["t5_tokenizer_base", "test_model", "en.wiki.bpe.vs10000"])
def test_sentencepiece_models_made_elsewhere_give_the_same_ids(shared: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    import sentencepiece

    folder = shared("fixtures/sentencepiece")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{name}.model"))
    read_sentencepiece(folder / f"{name}.model").save_pretrained(str(tmp_path))
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) % 64 == 0 and len(tokenizer) > reference.vocab_size()
    lines = (folder / "botchan.txt").read_text(encoding="utf-8").splitlines()[:500]
    for line in [*lines, "  two  spaces ", "日本語 text", "emoji 😀 x\ty", ""]:
        assert tokenizer(line, add_special_tokens=False).input_ids == reference.encode(line), line


def test_the_commands(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(TEXT))
    command = [sys.executable, "tools/train_tokenizer.py", "--out", str(tmp_path / "tok"), "--vocab-size", "300", str(tmp_path / "a.txt")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tokenizer = load_tokenizer(tmp_path / "tok")
    assert done.stdout.strip() == f"{tmp_path / 'tok'}: 320 entries, hash {tokenizer_hash(tokenizer)}"
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    arguments = ["--out", str(tmp_path / "tok"), "--vocab-size", "300", str(tmp_path / "bad.txt"), str(tmp_path / "a.txt")]
    with pytest.raises(UserError, match=r"bad\.txt, byte 3: not UTF-8 text; repair it"):
        train_tokenizer_command(arguments)
    said = train_tokenizer_command([*arguments, "--faults", "skip"])
    assert "skipped: invalid UTF-8, 1 times" in said and tokenizer_hash(load_tokenizer(tmp_path / "tok")) in said
    with pytest.raises(UserError, match=r"holds a\.txt, which is no tokenizer and would be lost"):
        train_tokenizer_command(["--out", str(tmp_path), str(tmp_path / "a.txt")])
    # an exported model has a tokenizer beside its weights
    weights = tmp_path / "tok" / "model.safetensors"
    weights.write_bytes(b"weights")
    with pytest.raises(UserError, match=r"holds model\.safetensors, which is no tokenizer and would be lost; choose another --out"):
        train_tokenizer_command([*arguments, "--faults", "skip"])
    assert weights.read_bytes() == b"weights"
    for content, message in ((b"no model", "not a SentencePiece model"), (b"", "not a SentencePiece model")):
        (tmp_path / "x.model").write_bytes(content)
        with pytest.raises(UserError, match=message):
            train_tokenizer_command(["--out", str(tmp_path / "y"), "--from-sentencepiece", str(tmp_path / "x.model")])


def test_what_would_be_ignored_is_refused(tmp_path: Path) -> None:
    common = ["--out", str(tmp_path / "y"), "--from-sentencepiece", str(tmp_path / "x.model")]
    for more, name in ((["a.txt"], "PATH"), (["--algorithm", "bpe"], "--algorithm"), (["--vocab-size", "900"], "--vocab-size")):
        with pytest.raises(UserError, match=f"^{name}: says how to train, and --from-sentencepiece converts"):
            train_tokenizer_command([*common, *more])


def test_progress_and_what_an_interrupt_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("\n".join(TEXT))
    told: list[tuple[int, int]] = []
    sources = find_sources([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")])
    text = SourceText(tuple(sources), Reading(boundary="line"), Faults(), None, lambda *at: told.append(at))
    train_tokenizer("wordpiece", text, 300)
    size = sources[0].size
    # twice from the beginning to the end
    assert {total for _, total in told} == {2 * size} and len(told) % 2 == 0
    consumed = [at for at, _ in told]
    assert consumed[: len(told) // 2] == consumed[len(told) // 2 :] == sorted(consumed[: len(told) // 2]) and consumed[-1] == 2 * size

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("wtn_pretrain.data.prepare.vocabulary.train_tokenizer", interrupted)
    monkeypatch.setattr(sys, "argv", ["train_tokenizer.py", "--out", str(tmp_path / "tok"), str(tmp_path / "a.txt")])
    with pytest.raises(SystemExit, match="130"):
        runpy.run_path(str(ROOT / "tools" / "train_tokenizer.py"), run_name="__main__")
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; nothing was written" and not (tmp_path / "tok").exists()


def test_unigram_takes_a_part_of_large_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wtn_pretrain.data.prepare.command._UNIGRAM_MB", 0.03)
    (tmp_path / "a.txt").write_text("\n".join(TEXT))
    arguments = ["--algorithm", "unigram", "--vocab-size", "300", "--quiet", str(tmp_path / "a.txt")]
    said = train_tokenizer_command([*arguments, "--out", str(tmp_path / "part")])
    assert "trained on 0.03 million characters spread over the files; --limit-mb takes more" in said
    asked = train_tokenizer_command([*arguments, "--out", str(tmp_path / "same"), "--limit-mb", "0.03"])
    assert said.split("hash ")[1].split()[0] == asked.split("hash ")[1].split()[0] and "trained on" not in asked
    assert "trained on" not in train_tokenizer_command([*arguments, "--out", str(tmp_path / "all"), "--limit-mb", "9"])
