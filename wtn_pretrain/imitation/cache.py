"""The activation cache: a teacher's outputs at every boundary for a fixed sequence of micro-batches, on disk, shared by students and runs.

FOLDER/ key.json  lock  boundary-000.{data,sums,json} ...  context-0.{data,sums,json} ...

Filled once, by the ranks of one run together:

    rank 0   cache.prepare()                          takes the lock and the whole place on disk
    all      writer = cache.writer()                  after a barrier
             writer.write(boundary, batch, row, carry) ... writer.close()
    rank 0   cache.finish()                           after a barrier

It counts as there when every row of every boundary is written, durable and marked; what a crash left behind is continued by the
next `prepare`, never read. Whatever is read is checked first.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from wtn_pretrain.errors import UserError
from wtn_pretrain.files import write_text
from wtn_pretrain.imitation.cache_file import RowFile, cannot_write, damaged
from wtn_pretrain.imitation.cache_key import Key, differences, digest, parse, render
from wtn_pretrain.imitation.cache_layout import CacheLayout, Field
from wtn_pretrain.imitation.read_ahead import Buffers, ahead
from wtn_pretrain.models.base import Carry

_FORMAT = 1  # raise when the same key and layout come to lie on disk in another way
_DEPTH = 3
"""Batches that a stream reads ahead."""


class ActivationCache:
    """The activations of `key` in `folder`, as `layout` says; there, begun or still to be filled."""

    def __init__(self, folder: Path, key: Key, layout: CacheLayout) -> None:
        self.folder, self.layout = folder, layout
        # as JSON gives it back, so that it compares with what was read
        self._parts: dict[str, Any] = json.loads(json.dumps({**key._asdict(), "layout": _plain(layout), "format": _FORMAT}))
        self._fields = layout.fields()
        self._files = self._row_files()
        self._lock: FileIO | None = None

    @property
    def size(self) -> int:
        """Bytes of all files, known before one is written."""
        return len(render(self._parts)) + sum(sum(file.sizes.values()) for file in self._files.values())

    def complete(self) -> bool:
        """Whether the cache is there, to the last checksum.

        Raises:
            UserError: the folder holds the activations of another key, or a finished cache that is damaged.
        """
        if not self._ours() or not all(file.marker.exists() for file in self._files.values()):
            return False
        for file in self._files.values():
            file.check()
        return True

    def prepare(self) -> int:
        """Makes the cache ready for writers; how many of its first batches need no writing (all, if it is complete).

        The first of the three calls; on one rank. Until `finish` or `release` no other run may prepare the same folder.

        Raises:
            UserError: the activations of another key are there, another run is writing, the cache is damaged or the disk too small;
                a cache that was not there before is not there after.
        """
        if self.complete():
            return self.layout.batches
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked(fcntl.LOCK_EX)
            if self.complete():  # made so by another run, meanwhile
                self.release()
                return self.layout.batches
            kept = self._continue() if self._ours() else self._begin()
            # the writers share it from here on, and as long as one of them lives no other run gets it
            fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return kept
        except BaseException as error:
            self.release()
            if isinstance(error, OSError):
                raise cannot_write(self.folder, error) from None
            raise

    def writer(self) -> "CacheWriter":
        """A writer for this process; after `prepare`, on any rank."""
        lock = self._locked(fcntl.LOCK_SH)
        if not self._ours():
            raise UserError(f"narrow.cache: {self.folder} is not the folder that rank 0 prepared; choose one that all nodes share")
        return CacheWriter(self.layout, self._row_files(), self._fields, lock)

    def finish(self) -> None:
        """Marks the cache as complete; on the rank that prepared it, once every writer is closed.

        Raises:
            UserError: rows are missing, or the disk refuses; the cache is as incomplete as before.
        """
        if self._lock is None:
            raise RuntimeError("finish() without prepare()")
        try:
            # not granted while a writer is open: what it wrote may not be durable yet
            self._locked(fcntl.LOCK_EX, self._lock)
            # the names of the files first: a marker may not outlive what it vouches for
            _sync_folder(self.folder)
            for file in self._files.values():
                file.seal()
            _sync_folder(self.folder)
        except OSError as error:
            raise cannot_write(self.folder, error) from None
        finally:
            self.release()

    def release(self) -> None:
        """Gives the folder free, finished or not."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def reader(self) -> "CacheReader":
        """A reader for this process.

        Raises:
            UserError: the cache is not complete.
        """
        if not self._ours() or not all(file.marker.exists() for file in self._files.values()):
            raise UserError(f"narrow.cache: {self.folder} is not complete; start the run that fills it again, or remove the folder")
        return CacheReader(self.layout, self._row_files(), self._fields)

    def _row_files(self) -> dict[str, RowFile]:
        layout, key = self.layout, digest(self._parts)
        return {
            name: RowFile(self.folder, name, layout.batches * layout.rows, field.row_bytes, layout.rows, key)
            for name, field in self._fields.items()
        }

    def _ours(self) -> bool:
        """Whether the key in the folder is this one; False where there is none."""
        path = self.folder / "key.json"
        try:
            text = path.read_bytes().decode("utf-8", "replace")
        except FileNotFoundError:
            return False
        except OSError as error:
            raise UserError(f"narrow.cache: {path} cannot be read ({error.strerror}); choose another folder") from None
        if text == render(self._parts):
            return True
        there = parse(text)
        if there is None:
            raise damaged(path, "is not as it was written")
        first = next(differences(there, self._parts))
        raise UserError(f"narrow.cache: {self.folder} holds other activations ({first}); choose another folder or remove it")

    def _begin(self) -> int:
        """Under the lock: key and place on disk, or nothing of either."""
        strangers = [path.name for path in self.folder.iterdir() if path.name != "lock" and not path.name.startswith(".")]
        if strangers:
            raise UserError(f"narrow.cache: {self.folder} holds other files ({min(strangers)}); choose an empty folder")
        try:
            self._take_place()
        except BaseException:
            # not the lock, which another run may have opened
            for path in [self.folder / "key.json", *self._paths()]:
                path.unlink(missing_ok=True)
            raise
        return 0

    def _continue(self) -> int:
        """Under the lock: the whole batches, from the first on, that an interrupted fill left intact; the others are forgotten."""
        self._take_place()
        kept = self.layout.batches
        for file in self._files.values():
            kept = file.intact(kept * self.layout.rows) // self.layout.rows
        for file in self._files.values():
            file.forget(kept * self.layout.rows)
            file.flush()
        return kept

    def _take_place(self) -> None:
        for path in self.folder.glob(".*.part"):  # of a process that was killed
            path.unlink()
        self._require_room(sum(path.stat().st_blocks * 512 for path in self._paths() if path.exists()))
        write_text(self.folder / "key.json", render(self._parts))
        for file in self._files.values():
            file.reserve()

    def _paths(self) -> list[Path]:
        return [path for file in self._files.values() for path in file.sizes]

    def _require_room(self, taken: int) -> None:
        disk = shutil.disk_usage(self.folder)
        # file systems in memory may have no size of their own; elsewhere the run's checkpoints need room too
        if disk.total and self.size - taken > 0.95 * disk.free:
            raise UserError(
                f"narrow.cache: the activations of {self.layout.batches} batches at {len(self.layout.hidden)} boundaries take "
                f"{self.size / 2**30:.1f} GiB in {self.folder} and {disk.free / 2**30:.1f} GiB are free; "
                "set narrow.cache_batches lower, store bf16, choose a larger disk, or free this one"
            )

    def _locked(self, kind: int, lock: FileIO | None = None) -> FileIO:
        """The lock file, locked; the lock is gone when the file is closed, or its process dead."""
        path = self.folder / "lock"
        try:
            lock = lock or FileIO(path, "a+")
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"narrow.cache: {self.folder} is being filled by another run; wait until it has finished, or choose another folder"
            ) from None
        except OSError as error:
            raise UserError(f"narrow.cache: {path} cannot be locked ({error.strerror}); choose a folder on another file system") from None
        return lock


class CacheWriter:
    """Writes rows of batches, in any order; of several processes, each its own rows."""

    def __init__(self, layout: CacheLayout, files: dict[str, RowFile], fields: dict[str, Field], lock: FileIO) -> None:
        self._layout, self._files, self._fields, self._lock = layout, files, fields, lock

    def write(self, boundary: int, batch: int, first_row: int, carry: Carry) -> None:
        """Stores rows `first_row`... of batch `batch`; the context with the lowest boundary.

        Raises:
            UserError: the disk refuses.
        """
        layout = self._layout
        first = layout.place(batch, first_row, len(carry.hidden))
        named: dict[str, Tensor] = {f"boundary-{boundary:03d}": carry.hidden}
        if boundary == min(layout.hidden):
            named |= {f"context-{number}": tensor for number, tensor in enumerate(carry.context)}
            if len(carry.context) != len(layout.context):
                raise ValueError(f"a context of {len(carry.context)} tensors for one of {len(layout.context)}")
        for name, tensor in named.items():
            self._files[name].write(first, self._fields[name].pack(tensor).numpy())

    def close(self) -> None:
        """Makes everything durable.

        Raises:
            UserError: the disk refuses.
        """
        try:
            for file in self._files.values():
                file.flush()
        finally:
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class CacheReader:
    """Reads batches of a complete cache. Tensors are on the CPU (pinned where there is an accelerator), and nobody may write into them."""

    def __init__(self, layout: CacheLayout, files: dict[str, RowFile], fields: dict[str, Field]) -> None:
        self._layout, self._files, self._fields = layout, files, fields
        self._buffers = Buffers()

    def read(self, boundaries: Sequence[int], batch: int, first_row: int = 0, rows: int | None = None) -> dict[int, Carry]:
        """Rows `first_row` ... `first_row + rows` of batch `batch` (None: to its end) at each of the boundaries, in the stored dtype.

        Raises:
            UserError: what is on disk is not what was written.
        """
        rows = self._layout.rows - first_row if rows is None else rows
        first = self._layout.place(batch, first_row, rows)
        context = tuple(self._tensor(f"context-{number}", first, rows) for number in range(len(self._layout.context)))
        return {boundary: Carry(self._tensor(f"boundary-{boundary:03d}", first, rows), context) for boundary in boundaries}

    def stream(
        self, boundaries: Sequence[int], batches: Iterable[int], first_row: int = 0, rows: int | None = None
    ) -> Iterator[dict[int, Carry]]:
        """`read` of one batch after the other, by a thread that is a few batches ahead."""
        return ahead(lambda batch: self.read(boundaries, batch, first_row, rows), batches, _DEPTH)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _tensor(self, name: str, first: int, rows: int) -> Tensor:
        data = self._buffers.take(rows * self._fields[name].row_bytes)
        self._files[name].read(first, data.numpy())
        return self._fields[name].unpack(data)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that does not know of it
            raise
    finally:
        os.close(descriptor)


def _plain(layout: CacheLayout) -> dict[str, Any]:
    fields = {name: field._asdict() for name, field in layout.fields().items()}
    return {"batches": layout.batches, "rows": layout.rows, **fields}
