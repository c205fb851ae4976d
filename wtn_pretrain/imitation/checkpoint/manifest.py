"""A checkpoint of stage 2 on disk: `phaseP-stepN/` with safetensors parts, one of each rank, and a manifest that vouches for them."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from wtn_pretrain.checkpoint.files import DamagedError, Part, Parts, Record, check_files, dtype_name, folders_in, read_sealed
from wtn_pretrain.imitation.checkpoint.nested import restore
from wtn_pretrain.imitation.imitator import Work

FORMAT = 1
LATEST = "latest.json"
"""Beside the checkpoints: where the newest stands. For people: a start looks at the checkpoints themselves."""
_NAME = re.compile(r"phase(\d+)-step(\d+)")
_PART = re.compile(r"part-\d+\.safetensors")


class Position(NamedTuple):
    """Where a checkpoint stands."""

    phase: int
    step: int
    """Steps done in the phase."""
    plan: str
    zero: int

    @property
    def name(self) -> str:
        return f"phase{self.phase}-step{self.step}"


class Kept(Record):
    """A tensor, contiguous in its part."""

    part: str
    shape: tuple[int, ...]
    dtype: str
    order: tuple[int, ...]
    """Its axes from the slowest to the fastest as it lay in memory: kernels that step a weight go through its state in the same order."""

    @classmethod
    def of(cls, part: str, value: Tensor) -> "Kept":
        return cls(part=part, shape=tuple(value.shape), dtype=dtype_name(value.dtype), order=tuple(value.dim_order()))


class Spent(Record):
    """What imitation has cost so far."""

    seconds: float
    teacher_flops: int
    student_flops: int
    skipped: int = 0
    """Steps that units have left out."""


class Manifest(Record):
    """What a checkpoint holds."""

    format: int
    identity: dict[str, int | str]
    """What a run must have in common with the one that wrote the checkpoint, to continue it."""
    phase: int
    step: int
    done: int
    """Steps over all phases."""
    plan: str
    zero: int
    versions: dict[str, str]
    spent: Spent
    """Of one rank; of a whole checkpoint: FLOPs and steps left out of all, seconds of the slowest."""
    tensors: dict[str, Kept]
    optimizers: dict[str, Any]
    """Their states as `nested.flatten` makes them."""
    parts: dict[str, Part]

    @property
    def position(self) -> Position:
        return Position(self.phase, self.step, self.plan, self.zero)


def unit_key(index: int) -> str:
    """Under which the tensors of a unit lie, `/NAME` each."""
    return f"unit-{index:04d}"


def optimizer_key(unit: int, replica: int | None) -> str:
    """Under which an optimizer lies, by the first of its units; `replica`: whose part of it where ZeRO divides it."""
    return f"optimizer-{unit:04d}" + ("" if replica is None else f".replica-{replica}")


def order_of(name: str) -> tuple[int, int] | None:
    """Phase and step of the checkpoint in a folder of this name; None: it is none."""
    match = _NAME.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def checkpoints_in(folder: Path) -> list[tuple[tuple[int, int], Path]]:
    """The checkpoints in `folder` by phase and step, newest first, damaged or not.

    Raises:
        UserError: it cannot be read.
    """
    found = [(order, path) for path in folders_in(folder) if (order := order_of(path.name))]
    return sorted(found, reverse=True)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint; its parts are not looked at.

    Raises:
        DamagedError: it is missing, or any byte of it is not as it was written, or it is of another format or another checkpoint.
    """
    manifest = read_sealed(folder, Manifest, FORMAT)
    used = {kept.part for kept in manifest.tensors.values()}
    wrong = next((name for name in sorted(used | manifest.parts.keys()) if not _PART.fullmatch(name) or name not in manifest.parts), None)
    if wrong is not None:
        raise DamagedError(f"{folder}: names a part {wrong!r}")
    if manifest.position.name != folder.name:
        raise DamagedError(f"{folder}: is the checkpoint {manifest.position.name}")
    return manifest


def joined(shares: list[Manifest]) -> Manifest:
    """What all ranks have written of a checkpoint."""
    spent = [share.spent for share in shares]
    return shares[0].model_copy(
        update={
            "spent": Spent(
                seconds=max(one.seconds for one in spent),
                teacher_flops=sum(one.teacher_flops for one in spent),
                student_flops=sum(one.student_flops for one in spent),
                skipped=sum(one.skipped for one in spent),
            ),
            **{
                name: {key: value for share in shares for key, value in getattr(share, name).items()}
                for name in ("tensors", "optimizers", "parts")
            },
        }
    )


class Stored:
    """A checkpoint whose manifest is whole, read where it is asked; every reading method may raise DamagedError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._parts = Parts(folder)

    def check(self, names: Iterable[str] | None = None) -> None:
        """Reads parts whole, all if none are named, and compares them with what the manifest says."""
        names = sorted(self.manifest.parts) if names is None else list(names)
        check_files(self.folder, self.manifest.parts, names)
        for name in names:
            told = {key for key, kept in self.manifest.tensors.items() if kept.part == name}
            if self._parts.keys(name) != told:
                raise DamagedError(f"{self.folder / name}: holds other tensors than its manifest says")

    def unit(self, index: int) -> dict[str, Tensor]:
        """The state of one unit, on the CPU."""
        prefix = unit_key(index) + "/"
        found = {key.removeprefix(prefix): self._read(key) for key in self.manifest.tensors if key.startswith(prefix)}
        if not found:
            raise DamagedError(f"{self.folder}: holds no unit {index}")
        return found

    def optimizer(self, key: str) -> dict[str, Any]:
        """The state of an optimizer, on the CPU, as torch's `load_state_dict` takes it."""
        if key not in self.manifest.optimizers:
            raise DamagedError(f"{self.folder}: holds no {key}")
        return restore(self.manifest.optimizers[key], self._read)

    @property
    def spent(self) -> Work:
        """What all ranks have spent."""
        return Work(**self.manifest.spent.model_dump())

    def _read(self, key: str) -> Tensor:
        if key not in self.manifest.tensors:
            raise DamagedError(f"{self.folder}: holds no {key}")
        kept = self.manifest.tensors[key]
        value = self._parts.read(kept.part, key)
        back = [kept.order.index(axis) for axis in range(len(kept.order))]
        return value.permute(kept.order).contiguous().permute(back)
