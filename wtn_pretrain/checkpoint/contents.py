"""The tensors of a checkpoint, counted by kind, as a table for people."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from wtn_pretrain.checkpoint.files import DamagedError, Parts


class Kind(NamedTuple):
    """Tensors of one kind: weights, a state of the optimizer, buffers, a unit."""

    name: str
    tensors: int
    elements: int
    bytes: int
    not_finite: int
    """Elements that are infinite or no number."""


class Wanted(NamedTuple):
    """A tensor as a manifest has it: the part that holds it, and the kind under which it is counted."""

    part: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str


def tallied(folder: Path, wanted: Mapping[str, Wanted]) -> list[Kind]:
    """Reads every tensor of a checkpoint, by its key.

    Raises:
        DamagedError: one is missing, or is not what the manifest says.
    """
    parts = Parts(folder)

    def found() -> Iterable[tuple[str, Tensor]]:
        for key, (part, shape, dtype, kind) in wanted.items():
            value = parts.read(part, key)
            if value.shape != shape or value.dtype != dtype:
                raise DamagedError(f"{folder / part}: {key} is {list(value.shape)} {value.dtype}, not {list(shape)} {dtype}")
            yield kind, value

    return tally(found())


def tally(tensors: Iterable[tuple[str, Tensor]]) -> list[Kind]:
    """Counts tensors that come with their kind, one at a time."""
    kinds: dict[str, Kind] = {}
    for name, value in tensors:
        known = kinds.get(name, Kind(name, 0, 0, 0, 0))
        odd = int((~value.isfinite()).sum())
        kinds[name] = Kind(name, known.tensors + 1, known.elements + value.numel(), known.bytes + value.nbytes, known.not_finite + odd)
    return list(kinds.values())


def described(folder: Path, facts: Mapping[str, str], kinds: Sequence[Kind]) -> str:
    """What is known of a folder that was found whole, and a table of its tensors."""
    rows = [["kind", "tensors", "elements", "bytes", "not finite"]]
    rows += [[kind.name, *(f"{count:,}" for count in kind[1:])] for kind in kinds]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]) for row in rows
    ]
    return "\n".join([f"{folder}: whole", *(f"  {name:<11}{value}" for name, value in facts.items()), *(f"  {line}" for line in table)])
