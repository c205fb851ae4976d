"""Activations of a fixed sequence of batches on disk, mapped into memory: written once in order, read in any order."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from wtn_pretrain.errors import UserError
from wtn_pretrain.files import write_text
from wtn_pretrain.models.base import Carry

_REFILLING = "refilling"


class Layout(TypedDict):
    """One tensor of a carry on disk."""

    shape: list[int]
    order: list[int]
    """Axes from the slowest to the fastest in memory: channels-last maps come back as such, and run as fast."""
    dtype: str


class ActivationStore:
    """Carries of `batches` batches at one boundary. The place is taken when the first one is written."""

    def __init__(self, folder: Path, batches: int) -> None:
        self.folder, self.batches = folder, batches
        self._files: list[Tensor] = []
        if (folder / _REFILLING).exists():
            # of a start that ended meanwhile: what is there has holes
            self.remove()
        if (folder / "layout.json").exists():
            self._open(json.loads((folder / "layout.json").read_text(encoding="utf-8")))

    @property
    def complete(self) -> bool:
        return (self.folder / "complete").exists()

    @property
    def begun(self) -> bool:
        """Whether the batches up to the one that is to be written next are there."""
        return bool(self._files)

    def write(self, index: int, carry: Carry) -> None:
        """Stores the carry of batch `index`."""
        tensors = (carry.hidden, *carry.context)
        if not self._files:
            self._reserve(tensors)
        for file, tensor in zip(self._files, tensors, strict=True):
            file[index].copy_(tensor)

    def read(self, index: int) -> Carry:
        """The carry of batch `index`, on the CPU; do not write into it."""
        hidden, *context = (file[index] for file in self._files)
        return Carry(hidden, tuple(context))

    def refill(self, batches: int, make: Callable[[int], Carry]) -> None:
        """Writes the first `batches` anew, which `make` gives by index, into a store that is not begun."""
        write_text(self.folder / _REFILLING, "")
        for index in range(batches):
            self.write(index, make(index))
        (self.folder / _REFILLING).unlink()

    def finish(self) -> None:
        """Marks every batch as written."""
        write_text(self.folder / "complete", "")

    def remove(self) -> None:
        self._files = []
        # first what says that there is something: a start that ends meanwhile must not leave a part that seems whole
        for mark in ("complete", "layout.json"):
            (self.folder / mark).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _reserve(self, tensors: tuple[Tensor, ...]) -> None:
        size = self.batches * sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if size > 0.95 * free:
            raise UserError(
                f"{self.folder}: the activations of {self.batches} batches take {size / 2**30:.1f} GiB and "
                f"{free / 2**30:.1f} GiB are free; set narrow.cache_batches lower, "
                "use narrow.schedule=hybrid, which stores none, or free the disk"
            )
        layout: list[Layout] = [
            {"shape": list(tensor.shape), "order": list(tensor.dim_order()), "dtype": str(tensor.dtype).removeprefix("torch.")}
            for tensor in tensors
        ]
        self._open(layout)
        write_text(self.folder / "layout.json", json.dumps(layout))

    def _open(self, layout: list[Layout]) -> None:
        self._files = []
        for number, field in enumerate(layout):
            shape, order = field["shape"], field["order"]
            size = self.batches * math.prod(shape)
            file = torch.from_file(str(self.folder / f"{number}.bin"), shared=True, size=size, dtype=getattr(torch, field["dtype"]))
            stored = file.view(self.batches, *(shape[axis] for axis in order))
            self._files.append(stored.permute(0, *(1 + order.index(axis) for axis in range(len(order)))))
