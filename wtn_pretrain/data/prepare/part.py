"""One part of a corpus while it is written: files that only grow, and that can be cut back to where they stood."""

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from wtn_pretrain.data.token_files import files_of, write_index, write_sums


class PartWriter:
    """Appends documents to `FOLDER/NAME.bin`, with the lengths that become its index beside it."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, sizes: list[int] | None = None) -> None:
        """`sizes`: what `sizes()` returned when the files stood where the writing goes on; None begins anew."""
        self.prefix, self.dtype = folder / name, dtype
        self._paths = [files_of(self.prefix)[0], folder / f"{name}.lengths", folder / f"{name}.counts"]
        self._files: list[BinaryIO] = []
        for path, size in zip(self._paths, sizes or [0, 0, 0], strict=True):
            path.touch()
            if path.stat().st_size < size:
                raise OSError(f"{path} is shorter than it was")
            os.truncate(path, size)
            self._files.append(path.open("ab"))

    def append(self, ids: np.ndarray, lengths: np.ndarray, counts: np.ndarray) -> None:
        """Documents of `counts` int32 [D] sequences of `lengths` int32 [S] ids."""
        for file, values in zip(self._files, (ids.astype(self.dtype, copy=False), lengths, counts), strict=True):
            values.tofile(file)

    def sizes(self) -> list[int]:
        """Makes what was appended durable; where the files end, in bytes."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        return [path.stat().st_size for path in self._paths]

    def finish(self) -> dict[str, int]:
        """Writes the index and the checksums; how many documents, sequences and tokens there are."""
        sizes = self.sizes()
        for file in self._files:
            file.close()
        lengths, counts = (
            np.memmap(path, "<i4", mode="r") if size else np.zeros(0, "<i4") for path, size in zip(self._paths[1:], sizes[1:], strict=True)
        )
        with files_of(self.prefix)[1].open("wb") as stream:
            write_index(stream, self.dtype, lengths, counts)
            stream.flush()
            os.fsync(stream.fileno())
        write_sums(self.prefix)
        found = {"documents": len(counts), "sequences": len(lengths), "tokens": sizes[0] // self.dtype.itemsize}
        del lengths, counts
        for path in self._paths[1:]:
            path.unlink()
        return found

    def close(self) -> None:
        """Lets the files go as they are."""
        for file in self._files:
            file.close()
