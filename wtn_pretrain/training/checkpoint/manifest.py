"""A checkpoint on disk: `stepN/` with safetensors parts and a manifest that vouches for them. Needs neither ranks nor an engine.

Nothing in it is ever executed: the manifest is JSON, the tensors are safetensors.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from wtn_pretrain.checkpoint.files import (
    MANIFEST,
    DamagedError,
    Part,
    Parts,
    Record,
    check_files,
    dtype_of,
    part_of,
    read_sealed,
)

__all__ = ["MANIFEST", "DamagedError", "Part", "Parts", "dtype_of", "part_of"]

FORMAT = 1
LATEST = "latest"
"""Beside the checkpoints: the name of the newest. For people: a start looks at the checkpoints themselves."""

WEIGHTS, BUFFERS = "weights", "buffers"
_STEP = re.compile(r"step(\d+)")
_PART = re.compile(r"part-\d+\.safetensors")


class Parameter(Record):
    """A parameter: the part that holds `weights/NAME` and `STATE/NAME` for each of its optimizer's states, fp32 and of its whole shape."""

    part: str
    shape: tuple[int, ...]
    states: tuple[str, ...]
    updates: int | None
    """How often the optimizer has stepped it, where the optimizer counts."""

    def keys(self, name: str) -> list[str]:
        """Its tensors in the part."""
        return [f"{kind}/{name}" for kind in (WEIGHTS, *self.states)]


class Other(Record):
    """A tensor that no optimizer steps: a buffer, a running average."""

    part: str
    shape: tuple[int, ...]
    dtype: str


class Layout(Record):
    """How the run was spread that wrote the checkpoint; another one may continue."""

    ranks: int
    tensor: int
    zero: int
    weights: str
    """Data type of the weights that the network computes with."""


class Manifest(Record):
    """What a checkpoint holds."""

    format: int
    identity: dict[str, int | str]
    """What a run must have in common with the one that wrote the checkpoint, to continue it."""
    step: int
    seconds: float
    layout: Layout
    versions: dict[str, str]
    counters: dict[str, int | float]
    """Of the engine: loss scaler, skipped steps."""
    parameters: dict[str, Parameter]
    others: dict[str, Other]
    parts: dict[str, Part]


def step_of(name: str) -> int | None:
    """The step of the checkpoint in a folder of this name; None: it is none."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def checkpoints_in(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints in `folder`, newest first, damaged or not."""
    found = [(step, path) for path in folder.glob("step*") if (step := step_of(path.name)) is not None and path.is_dir()]
    return sorted(found, reverse=True)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint; its parts are not looked at.

    Raises:
        DamagedError: it is missing, or any byte of it is not as it was written, or it is of another format.
    """
    manifest = read_sealed(folder, Manifest, FORMAT)
    used = {held.part for held in manifest.parameters.values()} | {other.part for other in manifest.others.values()}
    wrong = next((name for name in sorted(used | manifest.parts.keys()) if not _PART.fullmatch(name) or name not in manifest.parts), None)
    if wrong is not None:
        raise DamagedError(f"{folder / MANIFEST}: names a part {wrong!r}")
    return manifest


def check_parts(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Reads parts whole and compares them with what the manifest says.

    Raises:
        DamagedError: names the first that is not as it was written.
    """
    check_files(folder, manifest.parts, names)
