"""Token ids on disk for training at scale: `PREFIX.bin`, `PREFIX.idx` and the checksums in `PREFIX.sums`, all memory-mapped.

`.bin` and `.idx` are laid out as Megatron-LM's indexed datasets are, so its corpora are read as they are and it reads these. The
index holds, little-endian and without padding: the magic bytes, uint64 version 1, uint8 code of the ids' type, uint64 number of
sequences S and of document bounds D, then int32 [S] lengths in ids, int64 [S] first bytes in `.bin`, int64 [D] first sequence of each
document and the end. A sequence is a sentence where text was split into them, else a document. `.sums` holds the uint64 XXH3 of every
64 KiB of `.bin`, then of `.idx`; Megatron's own corpora come without it and are not checked.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from wtn_pretrain.errors import UserError

MAGIC = b"MMIDIDX\0\0"
CHUNK = 1 << 16
"""Bytes under one checksum; a multiple of every size of an id, so no id lies in two chunks."""

_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_AT_ONCE = 1 << 20


def id_dtype(vocab_size: int) -> np.dtype:
    """The type of ids of a vocabulary, as Megatron chooses it: uint16, or int32 from 65,500 entries on."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


def files_of(prefix: Path) -> tuple[Path, Path, Path]:
    """The .bin, .idx and .sums of a prefix."""
    bin_file, index, sums = (prefix.with_name(f"{prefix.name}.{suffix}") for suffix in ("bin", "idx", "sums"))
    return bin_file, index, sums


class Tokens:
    """The ids of a `.bin`, indexed like a 1-D array; each chunk is compared with its checksum the first time that it is read."""

    def __init__(self, path: Path, dtype: np.dtype, sums: np.ndarray | None) -> None:
        """`sums`: uint64, one a chunk; None: nothing is compared."""
        self.path, self.dtype = path, dtype
        size = path.stat().st_size
        self._ids: np.ndarray = np.memmap(path, dtype, mode="r") if size else np.zeros(0, dtype)
        self._sums = sums
        self._shift = (CHUNK // dtype.itemsize).bit_length() - 1
        self._checked = np.zeros(-(-size // CHUNK), bool)
        self._left = 0 if sums is None else len(self._checked)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Ids at a slice of step 1, or at an integer array of any shape. Raises a UserError that names damaged bytes."""
        if self._left:
            if isinstance(index, slice):
                start, stop, _ = index.indices(len(self._ids))
                self._check(np.arange(start >> self._shift, -(-stop >> self._shift) if stop > start else start >> self._shift))
            else:
                self._check(np.asarray(index).ravel() >> self._shift)
        return np.asarray(self._ids[index])

    def __reduce__(self) -> tuple[Any, ...]:
        # a memory map would be copied whole into another process
        return Tokens, (self.path, self.dtype, None if self._sums is None else np.asarray(self._sums))

    def _check(self, chunks: np.ndarray) -> None:
        assert self._sums is not None
        for chunk in np.unique(chunks[~self._checked[chunks]]):
            first = int(chunk) << self._shift
            raw = self._ids[first : first + (1 << self._shift)]
            if xxhash.xxh3_64_intdigest(np.ascontiguousarray(raw).data) != int(self._sums[chunk]):
                raise _damaged(self.path, int(chunk), self.path.stat().st_size)
            self._checked[chunk] = True
            self._left -= 1


@dataclass(frozen=True)
class TokenFile:
    """Ids with the bounds of sequences and documents in them."""

    prefix: Path
    tokens: Tokens
    sequences: int
    documents: int
    _sums: np.ndarray | None  # of the index

    def sequence_bounds(self) -> np.ndarray:
        """Where each sequence begins, and the end, in ids: int64 [sequences + 1]. Raises a UserError where the index is damaged."""
        index = files_of(self.prefix)[1]
        self._check_index(index)
        lengths = _mapped(index, "<i4", _HEADER.size, self.sequences)
        starts = _mapped(index, "<i8", _HEADER.size + 4 * self.sequences, self.sequences)
        bounds = np.zeros(self.sequences + 1, np.int64)
        np.cumsum(lengths, out=bounds[1:])
        wrong = np.flatnonzero((lengths < 0) | (starts != bounds[:-1] * self.tokens.dtype.itemsize))
        if len(wrong) or bounds[-1] != len(self.tokens):
            place = f"sequence {wrong[0]}" if len(wrong) else "its end"
            raise UserError(
                f"{index}: disagrees with {files_of(self.prefix)[0].name} at {place}; the two do not belong together, write both anew"
            )
        return bounds

    def document_sequences(self) -> np.ndarray:
        """The first sequence of each document, and the end: int64 [documents + 1], ascending."""
        index = files_of(self.prefix)[1]
        self._check_index(index)
        bounds = np.array(_mapped(index, "<i8", _HEADER.size + 12 * self.sequences, self.documents + 1))
        if bounds[0] != 0 or bounds[-1] != self.sequences or (np.diff(bounds) < 0).any():
            raise UserError(f"{index}: the bounds of its documents do not ascend from 0 to {self.sequences}; write the file anew")
        return bounds

    def document_bounds(self) -> np.ndarray:
        """Where each document that holds ids begins, and the end, in ids: int64, strictly ascending."""
        return np.unique(self.sequence_bounds()[self.document_sequences()])

    def identity(self) -> str:
        """What changes when the ids or their bounds do, wherever the files lie: a hash of the checksums, or where there are none of sizes
        and times of writing."""
        index = files_of(self.prefix)[1]
        digest = xxhash.xxh3_128(f"{len(self.tokens)} {self.sequences} {self.documents} ".encode())
        if self._sums is None:
            for file in (self.tokens.path, index):
                found = file.stat()
                digest.update(f"{found.st_size} {found.st_mtime_ns} ".encode())
        else:
            digest.update(files_of(self.prefix)[2].read_bytes())
        return digest.hexdigest()

    def check(self) -> None:
        """Reads everything. Raises a UserError that names what is damaged."""
        for first in range(0, len(self.tokens), _AT_ONCE):
            self.tokens[first : first + _AT_ONCE]
        self.sequence_bounds()
        self.document_sequences()

    def _check_index(self, index: Path) -> None:
        if self._sums is None:
            return
        for chunk, found in enumerate(_chunk_sums(index)):
            if found != int(self._sums[chunk]):
                raise _damaged(index, chunk, index.stat().st_size)


def open_token_file(prefix: str | Path) -> TokenFile:
    """The ids of `prefix`.bin. Takes as long and as much memory for a large file as for a small one: nothing but sizes is read.

    Raises:
        UserError: a file is missing, of another format, or does not fit the others.
    """
    prefix = Path(prefix)
    bin_file, index, sums_file = files_of(prefix)
    for file in (bin_file, index):
        if not file.is_file():
            raise UserError(f"{file}: no such file; give the path of a token file without .bin and .idx, as preprocess_corpus.py wrote it")
    sizes = bin_file.stat().st_size, index.stat().st_size
    with index.open("rb") as stream:
        head = stream.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(MAGIC):
        raise UserError(f"{index}: not an index of token ids (it starts with {head[:9]!r}); write the file anew")
    _, version, code, sequences, bounds = _HEADER.unpack(head)
    if version != 1 or code not in _DTYPES:
        raise UserError(f"{index}: version {version} with ids of type {code} is not known here; write it with 1 and integers")
    # corpora with several kinds of input have a byte for each sequence at the end
    expected = _HEADER.size + 12 * sequences + 8 * bounds
    if sizes[1] not in (expected, expected + sequences) or bounds < 1:
        raise UserError(f"{index}: {sizes[1]} bytes where its header promises {expected}; it is truncated, write it anew")
    dtype = np.dtype(_DTYPES[code])
    end = 0
    if sequences:
        length = int(_mapped(index, "<i4", _HEADER.size + 4 * (sequences - 1), 1)[0])
        end = int(_mapped(index, "<i8", _HEADER.size + 4 * sequences + 8 * (sequences - 1), 1)[0]) + length * dtype.itemsize
    if end != sizes[0]:
        raise UserError(f"{bin_file}: {sizes[0]} bytes where {index.name} ends at {end}; the two do not belong together, write both anew")
    sums: np.ndarray | None = None
    first = -(-sizes[0] // CHUNK)
    if sums_file.is_file():
        promised = 8 * (first - (-sizes[1] // CHUNK))
        if sums_file.stat().st_size != promised:
            raise UserError(f"{sums_file}: {sums_file.stat().st_size} bytes where {promised} were expected; write the token file anew")
        sums = np.memmap(sums_file, "<u8", mode="r") if promised else np.zeros(0, "<u8")
    tokens = Tokens(bin_file, dtype, None if sums is None else sums[:first])
    return TokenFile(prefix, tokens, sequences, bounds - 1, None if sums is None else sums[first:])


def write_index(stream: BinaryIO, dtype: np.dtype, lengths: np.ndarray, counts: np.ndarray) -> None:
    """Writes an index, a part at a time.

    Args:
        dtype: of the ids.
        lengths: int32 [S], ids in each sequence; may be memory-mapped.
        counts: int32 [D], sequences in each document; may be memory-mapped.
    """
    code = next(code for code, name in _DTYPES.items() if np.dtype(name) == dtype)
    stream.write(_HEADER.pack(MAGIC, 1, code, len(lengths), len(counts) + 1))
    for first in range(0, len(lengths), _AT_ONCE):
        stream.write(np.asarray(lengths[first : first + _AT_ONCE], "<i4").tobytes())
    for starts in _running(lengths, dtype.itemsize):
        stream.write(starts[:-1].tobytes())
    stream.write(bytes(8))
    for starts in _running(counts, 1):
        stream.write(starts[1:].tobytes())


def write_sums(prefix: Path) -> None:
    """Writes the checksums of the .bin and .idx of `prefix`."""
    bin_file, index, sums = files_of(prefix)
    with sums.open("wb") as stream:
        for file in (bin_file, index):
            stream.write(np.fromiter(_chunk_sums(file), "<u8").tobytes())
        stream.flush()
        os.fsync(stream.fileno())


def _running(counts: np.ndarray, factor: int) -> Iterator[np.ndarray]:
    """Running sums times `factor`, from 0, in parts of int64 [n + 1]; each part begins with the end of the one before."""
    total = 0
    for first in range(0, len(counts), _AT_ONCE):
        part = np.asarray(counts[first : first + _AT_ONCE], "<i8")
        sums = np.concatenate([[total], total + np.cumsum(part) * factor]).astype("<i8")
        total = int(sums[-1])
        yield sums


def _chunk_sums(file: Path) -> Iterator[int]:
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            yield xxhash.xxh3_64_intdigest(chunk)


def _mapped(path: Path, dtype: str, offset: int, count: int) -> np.ndarray:
    return np.memmap(path, dtype, mode="r", offset=offset, shape=(count,)) if count else np.zeros(0, dtype)


def _damaged(path: Path, chunk: int, size: int) -> UserError:
    first, last = chunk * CHUNK, min((chunk + 1) * CHUNK, size) - 1
    return UserError(f"{path}: bytes {first} to {last} do not have the checksum that was written with them; fetch or write the file again")
