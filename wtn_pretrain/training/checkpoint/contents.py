"""What is in a checkpoint, once all of it has been read and found as it was written."""

from pathlib import Path
from typing import NamedTuple

import torch

from wtn_pretrain.errors import UserError
from wtn_pretrain.training.checkpoint.manifest import (
    MANIFEST,
    DamagedError,
    Manifest,
    Parts,
    check_parts,
    checkpoints_in,
    dtype_of,
    read_manifest,
)


class Kind(NamedTuple):
    """Tensors of one kind: weights, a state of the optimizer, buffers."""

    name: str
    tensors: int
    elements: int
    bytes: int
    not_finite: int
    """Elements that are infinite or no number."""


def find_checkpoints(path: Path) -> list[Path]:
    """The checkpoint at `path`, or those in the folders below it, the newest of a folder first.

    Raises:
        UserError: there is none.
    """
    if (path / MANIFEST).exists() or (path.is_dir() and path in (found for _, found in checkpoints_in(path.parent))):
        return [path]
    folders = sorted({path, *(found.parent for found in path.rglob("step*") if found.is_dir())})
    found = [one for folder in folders for _, one in checkpoints_in(folder)]
    if not found:
        raise UserError(f"{path}: holds no checkpoint of a training stage; give a folder stepN, or one above such folders")
    return found


def contents(folder: Path) -> tuple[Manifest, list[Kind]]:
    """Reads a checkpoint whole.

    Raises:
        DamagedError: something in it is not as it was written.
    """
    manifest = read_manifest(folder)
    check_parts(folder, manifest, sorted(manifest.parts))
    parts = Parts(folder)
    wanted = {
        key: (parameter.part, parameter.shape, torch.float32)
        for name, parameter in manifest.parameters.items()
        for key in parameter.keys(name)
    }
    wanted |= {key: (other.part, other.shape, dtype_of(other.dtype)) for key, other in manifest.others.items()}
    kinds: dict[str, Kind] = {}
    for key, (part, shape, dtype) in wanted.items():
        value = parts.read(part, key)
        if value.shape != shape or value.dtype != dtype:
            raise DamagedError(f"{folder / part}: {key} is {list(value.shape)} {value.dtype}, not {list(shape)} {dtype}")
        name = key.partition("/")[0]
        known = kinds.get(name, Kind(name, 0, 0, 0, 0))
        odd = int((~value.isfinite()).sum())
        kinds[name] = Kind(name, known.tensors + 1, known.elements + value.numel(), known.bytes + value.nbytes, known.not_finite + odd)
    return manifest, list(kinds.values())


def shown(folder: Path, manifest: Manifest, kinds: list[Kind]) -> str:
    """A table for people."""
    layout = manifest.layout
    updates = sorted({parameter.updates for parameter in manifest.parameters.values() if parameter.updates is not None})
    facts = {
        "run": ", ".join(f"{name} {value}" for name, value in manifest.identity.items()),
        "step": f"{manifest.step}, after {manifest.seconds:.1f} s",
        "written by": f"{layout.ranks} ranks, tensor parallel {layout.tensor}, ZeRO {layout.zero}, weights {layout.weights}",
        "versions": ", ".join(f"{name} {value}" for name, value in manifest.versions.items()),
        "updates": ", ".join(map(str, updates)) or "not counted",
        "counters": ", ".join(f"{name} {value:g}" for name, value in manifest.counters.items()),
        "files": f"{len(manifest.parts)} parts, {sum(part.bytes for part in manifest.parts.values()):,} bytes",
    }
    rows = [["kind", "tensors", "elements", "bytes", "not finite"]]
    rows += [[kind.name, *(f"{count:,}" for count in kind[1:])] for kind in kinds]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]) for row in rows
    ]
    return "\n".join([f"{folder}: whole", *(f"  {name:<11}{value}" for name, value in facts.items()), *(f"  {line}" for line in table)])
