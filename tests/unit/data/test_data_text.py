import gzip
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from wtn_pretrain.config import validate
from wtn_pretrain.data.corpus import PydocTopics, TextFiles, blocks, find_text_files, validation_threshold
from wtn_pretrain.data.hashing import hash_keys
from wtn_pretrain.data.text import TextData, TextSet, open_text
from wtn_pretrain.errors import UserError

CLS, SEP = 2, 3
LINES = [
    f"paragraph {i} tells of {['rivers', 'stars', 'bread', 'trains'][i % 4]} number {i * 7919 % 1000}, and of nothing else at all."
    for i in range(900)
]


@pytest.fixture
def novel(tmp_path: Path) -> Path:
    path = tmp_path / "novel.txt"
    path.write_text("\n\n".join(LINES), encoding="utf-8")
    return path


def refused(message: str, cache: Path, **settings: object) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_text(TextData(**settings), cache)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value) and ";" in str(caught.value)


def test_pydoc_needs_nothing(tmp_path: Path) -> None:
    splits = open_text(TextData(), tmp_path)
    assert len(splits.train) > 1500 and 50 < len(splits.valid) < 250 and len(splits.tokenizer) == 1024
    batch = splits.train.fetch(np.arange(len(splits.train)), None)["input_ids"]
    assert batch.shape == (len(splits.train), 64) and batch.dtype == torch.int64
    assert (batch[:, 0] == splits.tokenizer.cls_token_id).all() and (batch[:, -1] == splits.tokenizer.sep_token_id).all()
    assert batch[:, 1:-1].min() > 4 or (batch == splits.tokenizer.unk_token_id).float().mean() < 0.001


def test_rows_are_the_text_in_order(tmp_path: Path, novel: Path) -> None:
    splits = open_text(TextData(source="files", paths=(str(novel),), vocab_size=256, sequence_length=16), tmp_path / "cache")
    rows = splits.train.fetch(np.arange(len(splits.train)), None)["input_ids"][:, 1:-1].flatten().numpy()
    text = list(blocks(TextFiles((novel,))))
    threshold = validation_threshold(text, 0.05)
    from wtn_pretrain.data.corpus import block_hash

    expected = [i for block in text if block_hash(block) > threshold for i in splits.tokenizer(block, add_special_tokens=False).input_ids]
    assert rows.tolist() == expected[: len(rows)] and 0 <= len(expected) - len(rows) < 14


def test_split_keeps_its_share_and_does_not_overlap() -> None:
    text = list(blocks(PydocTopics()))
    from wtn_pretrain.data.corpus import block_hash

    for fraction in (0.05, 0.3):
        threshold = validation_threshold(text, fraction)
        held_out = {block for block in text if block_hash(block) <= threshold}
        assert fraction <= sum(map(len, held_out)) / sum(map(len, text)) < fraction + 0.02
        assert not held_out & {block for block in text if block_hash(block) > threshold}
    repeated = ["same"] * 10 + ["other"] * 10
    assert {block_hash(block) <= validation_threshold(repeated, 0.99) for block in repeated} == {True, False}


def test_doc_lines_bound_documents_and_disappear(tmp_path: Path) -> None:
    path = tmp_path / "wiki.txt.xz"
    path.write_bytes(lzma.compress(b'<doc id="1" title="A">\nA\nFirst line.\nSecond line.\n</doc>\n<doc id="2" title="B">\nB\n</doc>\n'))
    assert list(TextFiles((path,)).paragraphs()) == [None, "A", "First line.", "Second line.", None, None, "B", None, None]
    assert list(blocks(TextFiles((path,)))) == ["A\nFirst line.\nSecond line.", "B"]


def test_plain_and_compressed_files_are_the_same_text(tmp_path: Path, novel: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(novel.read_bytes()))
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(b"\xef\xbb\xbf" + novel.read_bytes()))
    expected = list(blocks(TextFiles((novel,))))
    assert all(list(blocks(TextFiles((tmp_path / name,)))) == expected for name in ("a.txt.gz", "b.txt.xz"))
    assert sum(len(block) for block in expected) == sum(len(line) for line in LINES) + len(LINES) - len(expected)
    assert 10_000 - 200 < sum(len(block) for block in blocks(TextFiles((novel,)), 10_000)) <= 10_000


def test_files_are_found_once_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt.gz", "sub/c.txt.xz", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [path.name for path in find_text_files((str(tmp_path / "notes.md"), str(tmp_path), str(tmp_path / "*.txt")))] == [
        "notes.md",
        "a.txt.gz",
        "b.txt",
        "c.txt.xz",
    ]


def test_tokens_are_kept_until_something_changes(tmp_path: Path, novel: Path) -> None:
    cache = tmp_path / "cache"
    config = TextData(source="files", paths=(str(novel),), vocab_size=256, sequence_length=16)

    def made() -> tuple[int, int]:
        return (cache / "train.npy").stat().st_ino, (cache / "train.npy").stat().st_mtime_ns

    open_text(config, cache)
    before = made()
    assert len(open_text(config.model_copy(update={"sequence_length": 32}), cache).train) < len(open_text(config, cache).train)
    assert made() == before  # one store serves every row length
    assert not [entry.name for entry in cache.iterdir() if "partial" in entry.name or entry.name.endswith(".part")]
    for change in ({"vocab_size": 300}, {"lowercase": False}, {"valid_fraction": 0.2}, {"limit_mb": 0.02}):
        open_text(config.model_copy(update=change), cache)
        assert made() != before, change
        before = made()
    (cache / "valid.npy").unlink()
    open_text(config, cache)
    before = made()
    os.utime(novel, ns=(1, 1))
    open_text(config, cache)
    assert made() != before


def test_own_validation_files_and_tokenizer(tmp_path: Path, novel: Path) -> None:
    held_out = tmp_path / "valid.txt"
    held_out.write_text("\n\n".join(f"held out {i} " * 12 for i in range(20)))
    base = open_text(TextData(source="files", paths=(str(novel),), vocab_size=256), tmp_path / "base")
    settings = {"paths": (str(tmp_path),), "valid_paths": (str(held_out),), "tokenizer": str(tmp_path / "base" / "tokenizer")}
    splits = open_text(TextData(source="files", sequence_length=16, **settings), tmp_path / "cache")  # type: ignore[arg-type]
    assert splits.tokenizer.get_vocab() == base.tokenizer.get_vocab()
    words = splits.tokenizer.decode(splits.valid.fetch(np.arange(3), None)["input_ids"].flatten())
    assert "held out" in words
    train = splits.tokenizer.decode(splits.train.fetch(np.arange(len(splits.train)), None)["input_ids"].flatten())
    assert "held out" not in train and "rivers" in train


def test_text_column_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "table-cache")
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"body": LINES[:400], "id": list(range(400))}), tmp_path / "data" / "train.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"body": LINES[400:480], "id": list(range(80))}), tmp_path / "data" / "validation.parquet")
    config = TextData(source="datasets", paths=(str(tmp_path / "data"),), column="body", vocab_size=256, sequence_length=16)
    splits = open_text(config, tmp_path / "cache")
    assert "paragraph 400" in splits.tokenizer.decode(splits.valid.fetch(np.arange(2), None)["input_ids"].flatten())
    refused("no column text, only body, id; set data.column", tmp_path / "x", source="datasets", paths=config.paths)
    refused("row 0 of column id holds int, not text; set data.column", tmp_path / "x", source="datasets", paths=config.paths, column="id")


def make_set(rows: int = 50, length: int = 16) -> TextSet:
    return TextSet(np.arange(10, 10 + rows * (length - 2) + 3).astype(np.uint16), length, CLS, SEP)


def test_pairs_in_order_or_swapped() -> None:
    text = make_set()
    batch = text.with_pairs("sop").fetch(np.tile(np.arange(50), 20), hash_keys(0, np.arange(1000)))
    cuts = set()
    for number, row, types, label in zip(
        np.tile(np.arange(50), 20), batch["input_ids"], batch["token_type_ids"], batch["pair_label"], strict=True
    ):
        first = row.tolist().index(SEP)
        a, b = row[1:first].tolist(), row[first + 1 : -1].tolist()
        assert row[0] == CLS and row[-1] == SEP and types.tolist() == [0] * (first + 1) + [1] * (15 - first)
        start = 10 + int(number) * 14
        assert (b + a if label else a + b) == list(range(start, start + 13))
        cuts.add(first)
    assert cuts == set(range(2, 14))
    assert abs(int(batch["pair_label"].sum()) - 500) < 3 * np.sqrt(250)
    plain = text.with_pairs("sop").fetch(np.arange(3), None)
    assert plain["pair_label"].tolist() == [0, 0, 0] and plain["input_ids"][0].tolist() == [2, *range(10, 16), 3, *range(16, 23), 3]


def test_pairs_with_the_next_or_a_random_row() -> None:
    numbers = np.tile(np.arange(50), 20)
    batch = make_set().with_pairs("nsp").fetch(numbers, hash_keys(0, np.arange(1000)))
    others = set()
    for number, row, label in zip(numbers, batch["input_ids"], batch["pair_label"], strict=True):
        first = row.tolist().index(SEP)
        a, b = row[1:first].tolist(), row[first + 1 : -1].tolist()
        start = 10 + int(number) * 14
        assert a == list(range(start, start + len(a))) and b == list(range(b[0], b[0] + 13 - len(a)))
        assert (b[0] == a[-1] + 1) == (label == 0)
        if label:
            others.add((b[0] - 10) // 14)
            assert (b[0] - 10) // 14 != number
    assert len(others) > 45 and abs(int(batch["pair_label"].sum()) - 500) < 3 * np.sqrt(250)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", r"empty\.txt: holds no text; remove it"),
        ("blank.txt", b" \n\n\t\n", r"blank\.txt: holds no text"),
        ("binary.txt", b"text\n\x00\x01\x02", r"binary\.txt: not a text file \(zero byte at position 5\)"),
        ("latin.txt", b"plain\ncaf\xe9\n", r"latin\.txt: not UTF-8 text \(byte at position 9\); convert it"),
        ("cut.txt.xz", lzma.compress(b"a long text " * 900)[:-20], r"cut\.txt\.xz: cannot be read"),
        ("cut.txt.gz", gzip.compress(b"a long text " * 900, mtime=0)[:-20], r"cut\.txt\.gz: cannot be read"),
        ("fake.txt.gz", b"no gzip", r"fake\.txt\.gz: cannot be read"),
        ("short.txt", b"one paragraph", "the text is too short to hold out validation text: 1 block"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    refused(message, tmp_path / "cache", source="files", paths=(str(tmp_path / name),))


def test_missing_paths_and_short_text(tmp_path: Path, novel: Path) -> None:
    cache = tmp_path / "cache"
    refused(r"absent: no such file or folder; set data\.paths", cache, source="files", paths=(str(tmp_path / "absent"),))
    (tmp_path / "hollow").mkdir()
    refused(r"hollow: no \.txt, .* files below it", cache, source="files", paths=(str(tmp_path / "hollow"),))
    refused(r"novel\.txt: every file is in data\.valid_paths", cache, source="files", paths=(str(novel),), valid_paths=(str(novel),))
    refused(
        "the validation text has .* fewer than a row of 4096",
        cache,
        source="files",
        paths=(str(novel),),
        sequence_length=4096,
        vocab_size=256,
    )
    refused("tokenizer .*absent: no such folder", cache, tokenizer=str(tmp_path / "absent"))
    for settings, message in (
        ({"source": "files"}, "paths is empty, which source files needs"),
        ({"source": "datasets", "paths": ["a", "b"]}, "paths names 2 places"),
        ({"valid_paths": ["a"]}, "valid_paths goes with source files"),
        ({"sequence_length": 4}, "sequence_length"),
    ):
        with pytest.raises(UserError, match=message):
            validate(TextData, settings)


def test_damaged_store_is_named(tmp_path: Path, novel: Path) -> None:
    config = TextData(source="files", paths=(str(novel),), vocab_size=256, sequence_length=16)
    open_text(config, tmp_path / "cache")
    np.save(tmp_path / "cache" / "train.npy", np.full(1000, 300, np.uint16))
    with pytest.raises(UserError, match=r"train\.npy: token ids beyond the vocabulary of 256; remove its folder"):
        open_text(config, tmp_path / "cache")
    (tmp_path / "cache" / "train.npy").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"train\.npy: cannot be read .*; remove its folder"):
        open_text(config, tmp_path / "cache")


RANK = """
import sys, numpy as np, torch
from pathlib import Path
from wtn_pretrain.data.text import TextData, open_text
from wtn_pretrain.errors import UserError
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
try:
    open_text(TextData(source="files", paths=(str(folder / "broken.txt"),)), folder / "cache")
except UserError as error:
    print("error", error)
splits = open_text(TextData(source="files", paths=(str(folder / "novel.txt"),), vocab_size=256), folder / "cache")
print("rows", len(splits.train), int(splits.train.fetch(np.arange(len(splits.train)), None)["input_ids"].sum()))
torch.distributed.destroy_process_group()
"""


def test_ranks_share_one_store_and_one_error(tmp_path: Path, novel: Path) -> None:
    (tmp_path / "broken.txt").write_bytes(b"\x00")
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), outputs
    lines = [[line for line in out.splitlines() if line.startswith(("error", "rows"))] for out, _ in outputs]
    assert lines[0] == lines[1] and "broken.txt: not a text file" in lines[0][0] and lines[0][1].startswith("rows")


def test_tiny_shakespeare(shared: Callable[[str], Path], tmp_path: Path) -> None:
    path = shared("tinyshakespeare") / "input.txt"
    splits = open_text(TextData(source="files", paths=(str(path),), lowercase=False, limit_mb=0.4, sequence_length=128), tmp_path)
    assert 700 < len(splits.train) < 1400 and 0.03 < len(splits.valid) / len(splits.train) < 0.08
    assert "First Citizen" in splits.tokenizer.decode(splits.train.fetch(np.arange(200), None)["input_ids"].flatten())
