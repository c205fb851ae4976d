"""Raw text to token files: every format, any number of workers, duplicates, broken off and taken up again, and all that can be wrong."""

import bz2
import gzip
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.running import environment
from tests.unit.data.preparing import WORDS, documents_of, held, ids_of, prepared, save_words, text_of, write_lines
from wtn_pretrain.data.faults import Faults
from wtn_pretrain.data.prepare.command import preprocess_command, train_tokenizer_command
from wtn_pretrain.data.prepare.corpus import Preparation, prepare_corpus
from wtn_pretrain.data.prepare.duplicates import MinHash, Seen, text_hash
from wtn_pretrain.data.prepare.sentences import split_sentences
from wtn_pretrain.data.prepare.sources import Reading, documents, find_sources
from wtn_pretrain.data.token_files import open_token_file
from wtn_pretrain.errors import UserError

ROOT = Path(__file__).parents[3]
DOCUMENTS = documents_of(200)
TEXTS = [text_of(document) for document in DOCUMENTS]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_words(tmp_path_factory.mktemp("tokenizer"))


def zstd(raw: bytes) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(raw)
    return sink.getvalue().to_pybytes()


def split_of(texts: list[str], fraction: float) -> tuple[list[int], list[int]]:
    out = np.array([text_hash(text) for text in texts], np.float64) / 2**64 < fraction
    return np.flatnonzero(~out).tolist(), np.flatnonzero(out).tolist()


def test_every_format_gives_the_same_tokens(tmp_path: Path, tokenizer: str) -> None:
    import pyarrow
    import pyarrow.parquet

    files = {
        "a.jsonl": write_lines(tmp_path / "plain", TEXTS).read_bytes(),
        "b.txt": "\n\n".join(TEXTS).encode(),
        "c.txt": "".join(f'<doc id="1">\n{text}\n</doc>\n' for text in TEXTS).encode(),
    }
    pack: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstd}
    places = []
    for (name, raw), (suffix, press) in zip(files.items(), list(pack.items())[:3], strict=True):
        for file, content in ((name, raw), (name + suffix, press(raw)), (name + ".zst", zstd(raw))):
            places.append(tmp_path / file)
            places[-1].write_bytes(content)
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "d.parquet")
    faults = Faults()
    for path in (*places, tmp_path / "d.parquet"):
        boundary = "blank" if path.name.startswith("b.") else "auto"
        found = [document.text for document in documents(find_sources([str(path)])[0], Reading(boundary=boundary), faults)]
        assert found == TEXTS, path
    expected = [[ids_of(DOCUMENTS[number]) for number in part] for part in split_of(TEXTS, 0.2)]
    out = prepared(tmp_path, tokenizer, (tmp_path / "a.jsonl.zst",), valid_fraction=0.2)
    assert [held(out / "train"), held(out / "valid")] == expected and 20 < len(expected[1]) < 60


def test_through_datasets_streaming(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set" / "train.jsonl", TEXTS[:30])
    out = prepared(tmp_path, tokenizer, (f"datasets:{tmp_path / 'set'}",), valid_fraction=0.0)
    assert held(out / "train") == [ids_of(document) for document in DOCUMENTS[:30]] and held(out / "valid") == []
    with pytest.raises(UserError, match=r"no column body, only text; set --column"):
        prepared(tmp_path, tokenizer, (f"datasets:{tmp_path / 'set'}",), name="other", reading=Reading(column="body"))
    with pytest.raises(UserError, match=r"datasets:.*absent: `datasets` cannot open it"):
        prepared(tmp_path, tokenizer, (f"datasets:{tmp_path / 'absent'}",), name="other")


def test_sentences_keep_their_bounds(tmp_path: Path, tokenizer: str) -> None:
    out = prepared(tmp_path, tokenizer, (write_lines(tmp_path / "a.jsonl", TEXTS),), sentences=True, valid_fraction=0.0)
    file = open_token_file(out / "train")
    sizes = [len(sentence) + 1 for document in DOCUMENTS for sentence in document]
    assert np.diff(file.sequence_bounds()).tolist() == sizes and np.diff(file.document_sequences()).tolist() == [*map(len, DOCUMENTS)]
    assert held(out / "train") == [ids_of(document) for document in DOCUMENTS]


def test_sentences_end_where_a_reader_would_say() -> None:
    text = 'Mr. J. Smith came at 3.5 p.m. He said "Stop!" Then he left... "Why?" (See fig. 3.) Nobody knows.\nA line\n\n東京。大阪。'
    assert split_sentences(text) == [
        *("Mr. J. Smith came at 3.5 p.m.", 'He said "Stop!"', "Then he left...", '"Why?"'),
        *("(See fig. 3.)", "Nobody knows.", "A line", "東京。", "大阪。"),
    ]


def test_documents_far_longer_than_a_piece_are_tokenised_whole(tmp_path: Path, tokenizer: str) -> None:
    numbers = np.random.default_rng(3).integers(0, 300, 40_000)
    lines = [" ".join(WORDS[number] for number in line) for line in numbers.reshape(-1, 50)]
    (tmp_path / "long.txt").write_text("\n".join(lines[:400]) + " " + " ".join(lines[400:]))
    out = prepared(tmp_path, tokenizer, (tmp_path / "long.txt",), valid_fraction=0.0)
    assert held(out / "train") == [(numbers + 7).tolist()]


def contents(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(out.iterdir()) if file.suffix in (".bin", ".idx", ".sums")}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three files with duplicates within and among them, and a broken line at the end of one."""
    folder = tmp_path_factory.mktemp("files")
    made = [write_lines(folder / f"{name}.jsonl", TEXTS[first : first + 80]) for name, first in (("a", 0), ("b", 60), ("c", 120))]
    made[1].write_text(made[1].read_text() + "{broken\n")
    return made


def test_workers_do_not_matter_and_duplicates_go(tmp_path: Path, tokenizer: str, files: list[Path], monkeypatch: Any) -> None:
    monkeypatch.setattr("wtn_pretrain.data.prepare.corpus._BATCH_DOCUMENTS", 7)
    paths, settings = tuple(files), {"exact": True, "near": 0.7, "faults": "skip", "sentences": True}
    alone = prepared(tmp_path, tokenizer, paths, "alone", **settings)
    worked = prepared(tmp_path, tokenizer, paths, "worked", workers=2, **settings)
    assert contents(alone) == contents(worked)
    ours = held(alone / "train") + held(alone / "valid")
    assert sorted(ours) == sorted(ids_of(document) for document in DOCUMENTS)
    cards = [json.loads((out / "card.json").read_text()) for out in (alone, worked)]
    for card in cards:
        assert card["documents_read"] == 240 and card["duplicates"] == {"exact": 40, "near": 0}
        assert card["skipped"]["counts"] == {"invalid JSON": 1} and card["peak_memory"] > 1e7
        assert "b.jsonl, line 81: not JSON" in card["skipped"]["examples"]["invalid JSON"][0]
        assert [source["documents"] for source in card["sources"]] == [80, 80, 80]
    assert preprocess_command(["--check", str(worked)]).endswith("all checksums agree")


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [1, 9, 20, 34])
def test_taken_up_where_it_was_broken_off(tmp_path: Path, tokenizer: str, files: list[Path], after: int, monkeypatch: Any) -> None:
    monkeypatch.setattr("wtn_pretrain.data.prepare.corpus._BATCH_DOCUMENTS", 7)
    settings: dict[str, Any] = {"exact": True, "near": 0.7, "faults": "skip", "workers": 0}
    paths = tuple(map(str, files))
    whole = prepared(tmp_path, tokenizer, paths, "whole", **settings)
    calls = 0

    def told(*_: int) -> None:
        nonlocal calls
        calls += 1
        if calls == after:
            raise Killed

    # a record after every third batch or so
    monkeypatch.setattr("wtn_pretrain.data.prepare.corpus.time.monotonic", iter(np.arange(1e6) / 3).__next__)
    plan = Preparation(paths, tmp_path / "broken", tokenizer, commit_seconds=1.0, **settings)
    with pytest.raises(Killed):
        prepare_corpus(plan, told)
    assert not plan.out.exists()
    card = prepare_corpus(plan)
    assert contents(plan.out) == contents(whole)
    expected = json.loads((whole / "card.json").read_text())
    for name in ("documents_read", "duplicates", "skipped", "parts", "sources", "characters"):
        assert card[name] == expected[name], name
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []
    inode = (plan.out / "train.bin").stat().st_ino
    assert prepare_corpus(plan) == card and (plan.out / "train.bin").stat().st_ino == inode  # nothing left to do


def test_a_killed_command_goes_on(tmp_path: Path, tokenizer: str) -> None:
    texts = [f"{text} {WORDS[number % 300]}" for number, text in enumerate(TEXTS * 40)]
    source = write_lines(tmp_path / "a.jsonl", texts)
    command = [
        sys.executable,
        "tools/preprocess_corpus.py",
        "--tokenizer",
        tokenizer,
        "--out",
        str(tmp_path / "out"),
        "--workers",
        "1",
        "--record-seconds",
        "0.01",
    ]
    started = subprocess.Popen([*command, "--quiet", str(source)], cwd=ROOT, env=environment(), start_new_session=True)
    record = tmp_path / ".out.part" / "journal.json"
    while started.poll() is None and not record.exists():
        time.sleep(0.01)
    assert started.poll() is None, "it was through before it could be killed"
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    assert 0 < json.loads(record.read_text())["read"][0] < 8000 and not (tmp_path / "out").exists()
    assert "8000 documents read" in preprocess_command([*command[2:], "--quiet", str(source)])
    whole = prepared(tmp_path, tokenizer, (source,), "whole")
    assert contents(tmp_path / "out") == contents(whole)


def test_two_processes_do_not_share_a_folder(tmp_path: Path, tokenizer: str) -> None:
    texts = [f"{text} {WORDS[number % 300]}" for number, text in enumerate(TEXTS * 40)]
    source, out = write_lines(tmp_path / "a.jsonl", texts), tmp_path / "out"
    arguments = ["--tokenizer", tokenizer, "--out", str(out), "--workers", "1", "--record-seconds", "0.01", "--quiet", str(source)]
    command = [sys.executable, "tools/preprocess_corpus.py", *arguments]
    first = subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True)
    while first.poll() is None and not (tmp_path / ".out.part" / "journal.json").exists():
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGSTOP)  # in the middle of it
    with pytest.raises(UserError, match=rf"\.out\.part: process {first.pid} on .* works here; wait for it"):
        preprocess_command(arguments)
    os.killpg(first.pid, signal.SIGCONT)
    assert first.wait() == 0
    assert contents(out) == contents(prepared(tmp_path, tokenizer, (source,), "whole"))
    assert not (out / ".lock").exists() and preprocess_command(["--check", str(out)]).endswith("all checksums agree")


def test_what_the_tools_wrote_is_no_source(tmp_path: Path, tokenizer: str) -> None:
    """A folder as source, with the corpus made inside it, and again when it is there."""
    write_lines(tmp_path / "a.jsonl", TEXTS[:100])
    (tmp_path / ".hidden").mkdir()
    write_lines(tmp_path / ".hidden" / "b.jsonl", TEXTS[100:])
    save_words(tmp_path / "tok")
    for _ in range(2):
        card = prepare_corpus(Preparation((str(tmp_path),), tmp_path / "corpus", tokenizer, workers=0))
        assert card["documents_read"] == 100 and [source["name"] for source in card["sources"]] == [str(tmp_path / "a.jsonl")]
    other = prepare_corpus(Preparation((str(tmp_path),), tmp_path / "other", tokenizer, workers=0))
    assert other["documents_read"] == 100
    globbed = [source.name for source in find_sources([str(tmp_path / "*")], without=tmp_path / "corpus")]
    assert globbed == [str(tmp_path / "a.jsonl")]


def test_a_licence_is_corrected_in_the_card(tmp_path: Path, tokenizer: str, files: list[Path]) -> None:
    common = ["--tokenizer", tokenizer, "--out", str(tmp_path / "out"), "--workers", "0", "--quiet", str(files[0])]
    for more, licence in (([], "unknown"), (["--licence", "CC0"], "CC0"), ([], "CC0"), (["--licence", "CC BY 4.0"], "CC BY 4.0")):
        preprocess_command([*common, *more])
        assert json.loads((tmp_path / "out" / "card.json").read_text())["licence"] == licence
    assert preprocess_command(["--check", str(tmp_path / "out")]).endswith("all checksums agree")


def test_a_file_of_one_document_is_pointed_at(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "plain.txt").write_text("\n\n".join(TEXTS))
    common = ["--tokenizer", tokenizer, "--workers", "0", "--quiet", str(tmp_path / "plain.txt")]
    said = preprocess_command([*common, "--out", str(tmp_path / "one")])
    assert (
        "valid: 0 documents" in said and "warning: no document is held out, as there are 1; where a file holds several, --boundary" in said
    )
    assert "warning" not in preprocess_command([*common, "--out", str(tmp_path / "two"), "--valid-fraction", "0"])
    assert "warning" not in preprocess_command([*common, "--out", str(tmp_path / "three"), "--boundary", "blank"])
    with pytest.raises(UserError, match=r"no documents to train on of the 1 read; .* --boundary blank or line"):
        preprocess_command([*common, "--out", str(tmp_path / "four"), "--valid-fraction", "0.9999"])
    with pytest.raises(UserError, match=r"plain\.txt, byte 0: a document of more than 1000 bytes \(--max-document; --boundary blank"):
        preprocess_command([*common, "--out", str(tmp_path / "five"), "--max-document", "0.001"])


@pytest.mark.parametrize("wrong", ["nan", "-0.1", "0", "inf", "x"])
@pytest.mark.parametrize(("command", "option"), [(preprocess_command, "--record-seconds"), (train_tokenizer_command, "--limit-mb")])
def test_numbers_are_numbers(command: Any, option: str, wrong: str) -> None:
    with pytest.raises(UserError) as refused:
        command(["--out", "x", f"{option}={wrong}", "a.txt"])
    assert str(refused.value) == f"argument {option}: '{wrong}' is not a number above 0; see --help"


def test_who_reads_may_leave(tmp_path: Path, tokenizer: str, files: list[Path]) -> None:
    done = prepared(tmp_path, tokenizer, (files[0],))
    call = f"{sys.executable} tools/preprocess_corpus.py --check {done} | true; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", call], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stderr == ""


def test_small_parquet_files_stay_small(tmp_path: Path) -> None:
    """Texts that lie there once and are named many times, and pages that unpack without end, in a process of little memory."""
    import pyarrow
    import pyarrow.parquet

    long = "word1 " * 1_200_000
    pyarrow.parquet.write_table(pyarrow.table({"text": [long] * 64 + ["word2"]}), tmp_path / "same.parquet", compression="zstd")
    plain = {"use_dictionary": False, "compression": "zstd"}
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"{number} {long}" for number in range(12)]}), tmp_path / "bomb.parquet", **plain)
    assert all((tmp_path / name).stat().st_size < 1 << 20 for name in ("same.parquet", "bomb.parquet"))
    code = (
        "import sys\n"
        "from wtn_pretrain.data.faults import Faults\n"
        "from wtn_pretrain.data.prepare.sources import Reading, documents, find_sources\n"
        "from wtn_pretrain.data.prepare.worker import peak_memory\n"
        "import pyarrow.parquet, pyarrow.compute\n"
        "before, faults = peak_memory(), Faults('skip')\n"
        "sizes = [len(one.text) for one in documents(find_sources(sys.argv[1:])[0], Reading(max_document=32_000_000), faults)]\n"
        "print(len(sizes), sum(sizes), dict(faults.counts), (peak_memory() - before) >> 20)"
    )

    def read(name: str) -> list[str]:
        call = [sys.executable, "-c", code, str(tmp_path / name)]
        return subprocess.run(call, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True).stdout.split()

    *told, grown = read("same.parquet")
    assert " ".join(told) == f"65 {64 * (len(long) - 1) + 5} {{}}"
    # a text of 7 MB in the page, the array and the string; as rows they would be 460 MB, twice over
    assert int(grown) < 150
    *told, grown = read("bomb.parquet")
    assert " ".join(told) == "0 0 {'decompression bomb': 1}" and int(grown) < 50


def test_stopped_at_a_fault_then_skipping_it(tmp_path: Path, tokenizer: str, files: list[Path]) -> None:
    paths = tuple(map(str, files))
    with pytest.raises(UserError, match=r"b\.jsonl, line 81: not JSON .*--faults skip"):
        prepare_corpus(Preparation(paths, tmp_path / "out", tokenizer, workers=0))
    journal = json.loads((tmp_path / ".out.part" / "journal.json").read_text())
    assert journal["read"] == [80, 0, 0]  # what came before is kept
    card = prepare_corpus(Preparation(paths, tmp_path / "out", tokenizer, workers=0, faults="skip"))
    assert card["documents_read"] == 240 and card["skipped"]["counts"] == {"invalid JSON": 1}


LONG = "word1 " * 700

FAULTS: list[tuple[str, bytes, str, str]] = [
    ("bad.txt", b"word1 word2\nword\xe9 word3\n", "invalid UTF-8", r"bad\.txt, byte 16: not UTF-8"),
    ("bad.jsonl", b'{"text": "word1"}\n{"text": "w\xe9"}\n', "invalid UTF-8", r"bad\.jsonl, byte 29: not UTF-8"),
    ("half.jsonl", b'{"text": "word1 \\ud800"}\n', "invalid UTF-8", r"half\.jsonl, line 1: half of a surrogate pair"),
    ("nul.txt", b"word1\x00word2", "NUL byte", r"nul\.txt, byte 5: a zero byte"),
    ("nul.jsonl", b'{"text": "a\\u0000b"}\n', "NUL byte", r"nul\.jsonl, line 1: a zero character"),
    ("empty.txt", b"", "empty file", r"empty\.txt: the file is empty"),
    ("blank.txt", b" \n\n", "empty file", r"blank\.txt: the file holds no text"),
    ("long.txt", LONG.encode(), "document too long", r"long\.txt, byte 0: a document of more than 4000 bytes"),
    ("lines.txt", LONG.replace(" ", "\n").encode(), "document too long", r"lines\.txt, byte 0: a document of more than 4000 bytes"),
    ("long.jsonl", json.dumps({"text": LONG}).encode(), "document too long", r"long\.jsonl, line 1: a document of more than 4000"),
    ("longer.jsonl", json.dumps({"text": LONG * 9}).encode(), "document too long", r"longer\.jsonl, line 1: a document"),
    ("cut.jsonl.gz", gzip.compress(os.urandom(9000))[:-20], "unreadable file", r"cut\.jsonl\.gz, byte \d+: cannot be read on"),
    ("cut.txt.xz", lzma.compress(os.urandom(9000))[:-20], "unreadable file", r"cut\.txt\.xz, byte \d+: cannot be read on"),
    ("fake.txt.bz2", b"no archive", "unreadable file", r"fake\.txt\.bz2, byte 0: cannot be read on"),
    ("fake.jsonl.zst", b"no archive", "unreadable file", r"fake\.jsonl\.zst, byte 0: cannot be read on"),
    ("fake.parquet", b"PAR1 and no more", "unreadable file", r"fake\.parquet, row 0: cannot be read on"),
    ("other.jsonl", b'{"body": "word1"}\n', "no text", r"other\.jsonl, line 1: text is missing"),
    ("number.jsonl", b'{"text": 7}\n', "no text", r"number\.jsonl, line 1: text holds int, not text"),
    ("broken.jsonl", b'{"text": "wo\n', "invalid JSON", r"broken\.jsonl, line 1: not JSON"),
    ("bomb.txt.gz", gzip.compress(b"word1 " * 12_000_000, 9), "decompression bomb", r"bomb\.txt\.gz, byte \d+: .* more than 200 times"),
]


@pytest.mark.parametrize(("name", "content", "kind", "message"), FAULTS, ids=[case[0] for case in FAULTS])
def test_what_is_wrong_is_named_and_counted(tmp_path: Path, name: str, content: bytes, kind: str, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    reading = Reading(max_document=4000, boundary="line" if name.startswith("bomb") else "auto")
    source = find_sources([str(tmp_path / name)])[0]
    with pytest.raises(UserError, match=message) as caught:
        list(documents(source, reading, Faults("stop")))
    assert "\n" not in str(caught.value) and "; " in str(caught.value)
    faults = Faults("skip")
    for _ in documents(source, reading, faults):
        pass
    assert faults.counts[kind] >= 1 and sum(faults.counts.values()) == (
        faults.counts.get(kind, 0) + faults.counts.get("NUL byte", 0) * (kind != "NUL byte")
    )


def test_what_follows_a_fault_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"<doc>\nword1\n</doc>\n<doc>\n" + b"x" * 9000 + b"\nmore\n</doc>\n<doc>\nw\xff\n</doc>\n<doc>\nword2\n</doc>\n")
    faults = Faults("skip")
    found = [document.text for document in documents(find_sources([str(path)])[0], Reading(max_document=4000), faults)]
    assert found == ["word1", "word2"] and faults.counts == {"document too long": 1, "invalid UTF-8": 1}


def test_mistakes_of_the_command_are_one_line(tmp_path: Path, tokenizer: str, files: list[Path]) -> None:
    done = prepared(tmp_path, tokenizer, (files[0],))
    with pytest.raises(UserError, match="holds something else, or a corpus made with other settings"):
        prepared(tmp_path, tokenizer, (files[0],), sentences=True)
    with pytest.raises(UserError, match=r"no such file or folder; datasets:NAME takes"):
        find_sources([str(tmp_path / "absent")])
    with pytest.raises(UserError, match="no paths of text were given"):
        find_sources([])
    with pytest.raises(UserError, match="a Jaccard similarity lies between 0 and 1"):
        MinHash(1.5)
    raw = bytearray((done / "train.bin").read_bytes())
    raw[3] ^= 1
    (done / "train.bin").write_bytes(raw)
    with pytest.raises(UserError, match=r"train\.bin: bytes 0 to \d+ do not have the checksum"):
        preprocess_command(["--check", str(done)])
    command = [
        sys.executable,
        "tools/preprocess_corpus.py",
        "--tokenizer",
        tokenizer,
        "--out",
        str(tmp_path / "x"),
        str(tmp_path / "absent"),
    ]
    failed = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in failed.stderr


def test_minhash_estimates_similarity() -> None:
    generator = np.random.default_rng(5)
    words = [f"w{number}" for number in generator.integers(0, 10**6, 400)]
    minhash = MinHash(0.8)
    base = minhash.signature(" ".join(words))
    for changed in (0, 8, 20, 60):
        other = list(words)
        for place in np.linspace(3, 390, changed).astype(int):
            other[place] = "new"
        one, two = ({tuple(text[first : first + 5]) for first in range(396)} for text in (words, other))
        exact = len(one & two) / len(one | two)
        estimate = (minhash.signature(" ".join(other)) == base).mean()
        assert abs(estimate - exact) < 4 * np.sqrt(max(exact * (1 - exact), 0.01) / len(base)), changed
    bands = minhash.bands, minhash.rows
    assert abs((1 / bands[0]) ** (1 / bands[1]) - 0.8) < 0.02


def test_near_duplicates_go_and_others_stay(tmp_path: Path, tokenizer: str) -> None:
    long = [" ".join(WORDS[number] for number in np.random.default_rng(seed).integers(0, 300, 200)) for seed in range(20)]
    near = [text.replace(text.split()[7], "word0", 1) for text in long[:5]]
    out = prepared(tmp_path, tokenizer, (write_lines(tmp_path / "a.jsonl", long + near),), near=0.7, valid_fraction=0.0)
    assert len(held(out / "train")) == 20 and json.loads((out / "card.json").read_text())["duplicates"] == {"exact": 0, "near": 5}


def test_a_set_of_hashes_grows() -> None:
    generator = np.random.default_rng(0)
    seen, reference = Seen(), set()
    for _ in range(60):
        hashes = generator.integers(0, 3000, (generator.integers(1, 40), 2)).astype(np.uint64)
        new = seen.first_seen(hashes)
        for row, is_new in zip(hashes.tolist(), new, strict=True):
            assert is_new == reference.isdisjoint(row)
            if is_new:
                reference.update(row)
    assert len(seen) == len(reference)
