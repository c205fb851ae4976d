"""Files as streams of bytes, whatever they are compressed with, in bounded memory."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from wtn_pretrain.errors import UserError

COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
"""Suffixes of compressed files."""

UNREADABLE = (OSError, EOFError, lzma.LZMAError, zlib.error)
"""What reading a truncated or damaged file may raise."""

_BUFFER = 1 << 20
# what deflate makes of one repeated byte is 1,030 times smaller, text rarely ten
_EXPANSION = 200
_EXPANDED_AT_LEAST = 1 << 26


def expands_too_far(packed: int, size: int) -> bool:
    """Whether `packed` bytes that become `size` are a decompression bomb."""
    return size > max(_EXPANDED_AT_LEAST, _EXPANSION * packed)


class ExpansionError(OSError):
    """A compressed file holds suspiciously much: a decompression bomb."""


class Stream:
    """A file's bytes, decompressed, and where in it the reading stands."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        """Bytes read so far, decompressed."""
        self._size = max(1, path.stat().st_size)
        self._file: BinaryIO = path.open("rb")
        self._compressed = path.suffix in COMPRESSED
        self._stream: Any = _decompressed(self._file, path.suffix)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._file.close()

    def line(self, limit: int) -> bytes:
        """The next line with its end, or its first `limit` bytes; empty at the end of the file."""
        read: bytes = self._stream.readline(limit)
        self.position += len(read)
        if self._compressed and expands_too_far(self._size, self.position):
            raise ExpansionError(f"{self._size} bytes hold more than {_EXPANSION} times as many, as a decompression bomb does")
        return read

    def lines(self, limit: int) -> Iterator[tuple[int, bytes, bool]]:
        """Position, bytes and whether they are whole, of each line; of longer ones the first `limit` bytes, the rest left out."""
        while True:
            start = self.position
            line = self.line(limit)
            if not line:
                return
            whole = line.endswith(b"\n") or len(line) < limit
            rest = line
            while not rest.endswith(b"\n") and len(rest) == limit and (rest := self.line(limit)):
                whole = False
            yield start, line, whole

    def consumed(self) -> int:
        """Bytes of the file, as it lies on disk, that were read."""
        return self._file.tell() if not self._file.closed else self._size


def _decompressed(file: BinaryIO, suffix: str) -> Any:
    if suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=file), _BUFFER)  # type: ignore[arg-type]
    if suffix == ".xz":
        return io.BufferedReader(lzma.LZMAFile(file), _BUFFER)  # type: ignore[arg-type]
    if suffix == ".bz2":
        return io.BufferedReader(bz2.BZ2File(file), _BUFFER)  # type: ignore[arg-type]
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"), _BUFFER)
    return file


def open_stream(path: Path) -> Stream:
    """The bytes of `path`. Raises a UserError where it cannot be opened."""
    try:
        return Stream(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror or error}); check its name and permissions") from None
