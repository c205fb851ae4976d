"""Rows of bytes in a file, each with a checksum, and a marker that says that all of them are there."""

import ctypes
import errno
import hashlib
import json
import os
from io import FileIO
from pathlib import Path

import numpy as np
import xxhash

from wtn_pretrain.errors import UserError
from wtn_pretrain.files import write_text

_CHECKSUM = np.dtype("<u8")
_AT_ONCE = 16 << 20
"""Bytes that are gone through at a time where everything is."""


class RowFile:
    """`rows` rows of `row_bytes` bytes: NAME.data, the checksums NAME.sums (uint64) and, once all are written, NAME.json.

    Several processes may write different rows. A checksum is XXH3 under a seed that is the row's own: of this cache, this file and
    this place, so that what is whole but stands elsewhere is found out too. 0 stands for a row that was not written.
    """

    def __init__(self, folder: Path, name: str, rows: int, row_bytes: int, per_batch: int, key: str) -> None:
        """`key` is the digest of what the rows depend on; `per_batch` rows make a batch, which messages name."""
        self.name, self.rows, self.row_bytes, self.per_batch, self._key = name, rows, row_bytes, per_batch, key
        self.data, self.sums, self.marker = (folder / f"{name}.{suffix}" for suffix in ("data", "sums", "json"))
        self._seed = int.from_bytes(hashlib.sha256(f"{key} {name}".encode()).digest()[:8], "little")
        self._open: dict[tuple[Path, str], FileIO] = {}
        self._checksums: np.ndarray | None = None

    @property
    def sizes(self) -> dict[Path, int]:
        """Bytes of each file once all is written."""
        return {
            self.data: self.rows * self.row_bytes,
            self.sums: self.rows * _CHECKSUM.itemsize,
            self.marker: len(self._marker_text(xxhash.xxh3_128_hexdigest(b""))),
        }

    # writing

    def reserve(self) -> None:
        """Takes the whole place on disk, so that a full one is found out now; what is there in full size stays.

        Raises:
            OSError: there is no room, or no right to it.
        """
        for path in (self.data, self.sums):
            size = self.sizes[path]
            if not path.exists() or path.stat().st_size != size:
                with path.open("wb", buffering=0) as file:
                    allocate(file.fileno(), size)

    def write(self, row: int, data: np.ndarray) -> None:
        """Writes uint8 [r, row_bytes] from `row` on, then the checksums.

        Raises:
            UserError: the disk refuses.
        """
        assert data.shape[1] == self.row_bytes
        assert row + len(data) <= self.rows
        self._put(self.data, data, row * self.row_bytes)
        self._put(self.sums, self._checksum(row, data.reshape(-1)), row * _CHECKSUM.itemsize)

    def flush(self) -> None:
        """Makes durable what was written, and closes the files."""
        for (path, mode), file in self._open.items():
            try:
                if mode != "rb":
                    os.fsync(file.fileno())
            except OSError as error:
                raise cannot_write(path, error) from None
        self.close()

    def intact(self, limit: int) -> int:
        """How many rows from the first on, `limit` at most, were written and are as they were written."""
        sums = np.fromfile(self.sums, _CHECKSUM)
        missing = np.flatnonzero(sums[:limit] == 0)
        limit = int(missing[0]) if len(missing) else limit
        step = max(1, _AT_ONCE // self.row_bytes)
        for row in range(0, limit, step):
            data = np.empty(min(step, limit - row) * self.row_bytes, np.uint8)
            self._get(row, data)
            wrong = np.flatnonzero(self._checksum(row, data) != sums[row : row + step][: limit - row])
            if len(wrong):
                return row + int(wrong[0])
        return limit

    def forget(self, row: int) -> None:
        """Marks the rows from `row` on as not written."""
        self.marker.unlink(missing_ok=True)
        zeros = np.zeros(self.rows - row, _CHECKSUM)
        if len(zeros):
            self._put(self.sums, zeros, row * _CHECKSUM.itemsize)

    def seal(self) -> None:
        """Writes the marker, once everything that it vouches for is durable.

        Raises:
            UserError: a row has not been written, or the disk refuses.
        """
        sums = self._stored_sums()
        missing = np.flatnonzero(sums == 0)
        if len(missing):
            raise UserError(
                f"narrow.cache: {self.data} lacks rows of batch {missing[0] // self.per_batch}, which a rank has not written; "
                "nothing of an unfinished cache is used, start again"
            )
        for path in (self.data, self.sums):
            self._opened(path, "r+b")
        self.flush()
        write_text(self.marker, self._marker_text(xxhash.xxh3_128_hexdigest(sums.data)))

    # reading

    def check(self) -> np.ndarray:
        """The checksums, once marker, sizes and checksum file are found to be as they were sealed: uint64 [rows].

        Raises:
            UserError: one of them is not.
        """
        for path, size in self.sizes.items():
            try:
                found = path.stat().st_size
            except OSError as error:
                raise damaged(path, f"cannot be read ({error.strerror})") from None
            if found != size:
                raise damaged(path, f"holds {found} bytes of {size}")
        sums = self._stored_sums()
        try:
            said = self.marker.read_bytes()
        except OSError as error:
            raise damaged(self.marker, f"cannot be read ({error.strerror})") from None
        if said != self._marker_text(xxhash.xxh3_128_hexdigest(sums.data)).encode():
            raise damaged(self.marker, f"does not belong to {self.sums.name}")
        return sums

    def read(self, row: int, data: np.ndarray) -> None:
        """Fills uint8 [r * row_bytes] with the rows from `row` on, checked.

        Raises:
            UserError: the file is not as it was written.
        """
        if self._checksums is None:
            self._checksums = self.check()
        count = len(data) // self.row_bytes
        where = f"batch {row // self.per_batch}"
        try:
            whole = self._get(row, data)
        except OSError as error:
            raise damaged(self.data, f"cannot be read at {where} ({error.strerror})") from None
        if not whole:
            raise damaged(self.data, f"ends within {where}")
        if not np.array_equal(self._checksum(row, data), self._checksums[row : row + count]):
            raise damaged(self.data, f"{where} is not as it was written")

    def close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _checksum(self, row: int, data: np.ndarray) -> np.ndarray:
        """uint64 [r] of the rows in uint8 [r * row_bytes], the first of which is number `row`."""
        view, size = data.data, self.row_bytes
        sums = [
            xxhash.xxh3_64_intdigest(view[start : start + size], (self._seed + row + number) % 2**64) or 1
            for number, start in enumerate(range(0, len(data), size))
        ]
        return np.array(sums, _CHECKSUM)

    def _put(self, path: Path, data: np.ndarray, offset: int) -> None:
        rest = data.view(np.uint8).reshape(-1).data
        try:
            file = self._opened(path, "r+b")
            while rest:
                done = os.pwrite(file.fileno(), rest, offset)
                rest, offset = rest[done:], offset + done
        except OSError as error:
            raise cannot_write(path, error) from None

    def _get(self, row: int, data: np.ndarray) -> bool:
        """Fills `data` from `row` on; whether the file was long enough."""
        file = self._opened(self.data, "rb")
        rest, offset = data.data, row * self.row_bytes
        while rest:
            done = os.preadv(file.fileno(), [rest], offset)
            if not done:
                return False
            rest, offset = rest[done:], offset + done
        return True

    def _opened(self, path: Path, mode: str) -> FileIO:
        file = self._open.get((path, mode))
        if file is None:
            file = self._open[path, mode] = FileIO(path, mode)
            if mode == "rb" and hasattr(os, "posix_fadvise"):  # the kernel reads twice as far ahead
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return file

    def _stored_sums(self) -> np.ndarray:
        try:
            return np.fromfile(self.sums, _CHECKSUM)
        except OSError as error:
            raise damaged(self.sums, f"cannot be read ({error.strerror})") from None

    def _marker_text(self, sums: str) -> str:
        return json.dumps({"rows": self.rows, "row_bytes": self.row_bytes, "sums": sums, "name": self.name, "key": self._key}) + "\n"


def allocate(file: int, size: int) -> None:
    """Gives an open file `size` bytes of disk.

    Where the file system cannot, only its length is set: the caller has looked at the free space.
    """
    # posix_fallocate would write into every page there, which takes hours on a network's file system
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    problem = errno.EINTR if fallocate is not None else 0
    while fallocate is not None and problem == errno.EINTR:
        problem = ctypes.get_errno() if fallocate(file, 0, ctypes.c_int64(0), ctypes.c_int64(size)) else 0
    if problem not in (0, errno.EOPNOTSUPP, errno.ENOSYS):
        raise OSError(problem, os.strerror(problem))
    os.ftruncate(file, size)


def damaged(path: Path, how: str) -> UserError:
    """The refusal of a file that is not as it was written."""
    return UserError(f"narrow.cache: {path} {how}; the cache is damaged, remove {path.parent} to have it filled again")


def cannot_write(path: Path, error: OSError) -> UserError:
    """The refusal of a place that does not take what is written."""
    return UserError(
        f"narrow.cache: {path} cannot be written ({error.strerror}); nothing of an unfinished cache is used: "
        "free the place or choose another folder, and start again"
    )
