"""Token files: Megatron's layout byte for byte, and every kind of damage named with file and place."""

import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pytest

from wtn_pretrain.data.token_files import CHUNK, files_of, id_dtype, open_token_file, write_index, write_sums
from wtn_pretrain.errors import UserError

LENGTHS = np.array([3, 0, 40_000, 7, 50_000, 1], np.int32)
COUNTS = np.array([2, 1, 0, 3], np.int32)
IDS = np.random.default_rng(0).integers(0, 60_000, LENGTHS.sum())


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    made = tmp_path / "some.text"  # the name has a dot of its own
    bin_file, index, _ = files_of(made)
    IDS.astype("<u2").tofile(bin_file)
    with index.open("wb") as stream:
        write_index(stream, np.dtype("<u2"), LENGTHS, COUNTS)
    write_sums(made)
    return made


def test_the_index_is_laid_out_as_megatrons(prefix: Path) -> None:
    starts = 2 * np.concatenate([[0], np.cumsum(LENGTHS[:-1], dtype=np.int64)])
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 6, 5)
    expected += struct.pack("<6i", *LENGTHS) + struct.pack("<6q", *starts) + struct.pack("<5q", 0, 2, 3, 3, 6)
    assert files_of(prefix)[1].read_bytes() == expected
    assert [id_dtype(size).str for size in (30522, 65499, 65500, 250_000)] == ["<u2", "<u2", "<i4", "<i4"]


def test_what_was_written_is_read(prefix: Path) -> None:
    file = open_token_file(prefix)
    file.check()
    assert (file.tokens[0 : len(IDS)] == IDS).all() and len(file.tokens) == len(IDS) and (file.sequences, file.documents) == (6, 4)
    places = np.random.default_rng(1).integers(0, len(IDS), (50, 20))
    for tokens in (file.tokens, open_token_file(prefix).tokens, pickle.loads(pickle.dumps(file.tokens))):
        assert (tokens[places] == IDS[places]).all() and tokens[5:2].tolist() == []
    assert file.sequence_bounds().tolist() == [0, *np.cumsum(LENGTHS)]
    assert file.document_sequences().tolist() == [0, 2, 3, 3, 6]
    assert file.document_bounds().tolist() == [0, 3, 40_003, 90_011]  # the document without ids is none


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 4
    path.write_bytes(raw)


def test_a_flipped_byte_is_named_when_it_is_read(prefix: Path) -> None:
    bin_file, index, _ = files_of(prefix)
    flip(bin_file, CHUNK + 17)
    file = open_token_file(prefix)
    good = np.array([0, CHUNK // 2 - 1, CHUNK])
    assert (file.tokens[good] == IDS[good]).all()
    for place in (np.array([[3, CHUNK // 2]]), slice(10, CHUNK)):
        with pytest.raises(UserError, match=rf"some\.text\.bin: bytes {CHUNK} to {2 * CHUNK - 1} do not have the checksum .*; fetch"):
            file.tokens[place]
    flip(bin_file, CHUNK + 17)
    flip(index, 60)
    with pytest.raises(UserError, match=r"some\.text\.idx: bytes 0 to 145 do not have the checksum"):
        open_token_file(prefix).sequence_bounds()


def test_files_that_do_not_fit_are_refused(prefix: Path) -> None:
    bin_file, index, sums = files_of(prefix)
    whole = {file: file.read_bytes() for file in (bin_file, index, sums)}
    cases = [
        (bin_file, whole[bin_file][:-2], r"some\.text\.bin: 180020 bytes where some\.text\.idx ends at 180022; the two do not belong"),
        (index, whole[index][:-8], r"some\.text\.idx: 138 bytes where its header promises 146; it is truncated"),
        (index, b"", r"some\.text\.idx: not an index of token ids \(it starts with b''\)"),
        (index, b"PARQUET--" + whole[index][9:], r"not an index of token ids"),
        (index, whole[index][:9] + struct.pack("<QB", 1, 6) + whole[index][18:], "ids of type 6 is not known here"),
        (sums, whole[sums][:-8], r"some\.text\.sums: 24 bytes where 32 were expected"),
    ]
    for file, content, message in cases:
        file.write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            open_token_file(prefix)
        assert "\n" not in str(caught.value) and ";" in str(caught.value)
        file.write_bytes(whole[file])
    index.unlink()
    with pytest.raises(UserError, match=re.escape("some.text.idx: no such file; give the path of a token file")):
        open_token_file(prefix)


def test_without_checksums_lengths_that_disagree_are_still_found(prefix: Path) -> None:
    _, index, sums = files_of(prefix)
    sums.unlink()
    file = open_token_file(prefix)
    assert (file.tokens[0:9] == IDS[:9]).all()
    flip(index, 34)  # the first length
    with pytest.raises(UserError, match=r"some\.text\.idx: disagrees with some\.text\.bin at sequence 1"):
        open_token_file(prefix).sequence_bounds()
    flip(index, 34)
    flip(index, 146 - 4 * 8)  # the second document
    with pytest.raises(UserError, match="the bounds of its documents do not ascend"):
        open_token_file(prefix).document_sequences()
