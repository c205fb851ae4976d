"""A checkpoint on disk: `stepN/` with safetensors parts and a manifest that vouches for them. Needs neither ranks nor an engine.

Nothing in it is ever executed: the manifest is JSON, the tensors are safetensors.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wtn_pretrain.files import write_text

FORMAT = 1
MANIFEST = "manifest.json"
LATEST = "latest"
"""Beside the checkpoints: the name of the newest. For people: a start looks at the checkpoints themselves."""

WEIGHTS, BUFFERS = "weights", "buffers"
_STEP = re.compile(r"step(\d+)")
_PART = re.compile(r"part-\d+\.safetensors")
_AT_ONCE = 16 << 20
"""Bytes that are gone through at a time."""


class DamagedError(Exception):
    """A checkpoint that is not as it was written: where, and how."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Part(_Record):
    """A safetensors file."""

    bytes: int
    xxh3_128: str


class Parameter(_Record):
    """A parameter: the part that holds `weights/NAME` and `STATE/NAME` for each of its optimizer's states, fp32 and of its whole shape."""

    part: str
    shape: tuple[int, ...]
    states: tuple[str, ...]
    updates: int | None
    """How often the optimizer has stepped it, where the optimizer counts."""

    def keys(self, name: str) -> list[str]:
        """Its tensors in the part."""
        return [f"{kind}/{name}" for kind in (WEIGHTS, *self.states)]


class Other(_Record):
    """A tensor that no optimizer steps: a buffer, a running average."""

    part: str
    shape: tuple[int, ...]
    dtype: str


class Layout(_Record):
    """How the run was spread that wrote the checkpoint; another one may continue."""

    ranks: int
    tensor: int
    zero: int
    weights: str
    """Data type of the weights that the network computes with."""


class Manifest(_Record):
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


def checkpoints_in(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints in `folder`, newest first, damaged or not."""
    found = [(int(match[1]), path) for path in folder.glob("step*") if (match := _STEP.fullmatch(path.name)) and path.is_dir()]
    return sorted(found, reverse=True)


def part_of(path: Path) -> Part:
    """Size and checksum of a file."""
    hasher = xxhash.xxh3_128()
    size = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_AT_ONCE):
            hasher.update(block)
            size += len(block)
    return Part(bytes=size, xxh3_128=hasher.hexdigest())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest, with a checksum of itself.

    Raises:
        UserError: the place cannot be written.
    """
    write_text(folder / MANIFEST, _render(manifest.model_dump(mode="json")))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint; its parts are not looked at.

    Raises:
        DamagedError: it is missing, or any byte of it is not as it was written, or it is of another format.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        tree = json.loads(text)
        # rendering it again also finds what reading does not see, such as a changed space
        whole = _render(tree["manifest"]).encode() == text
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise DamagedError(f"{path}: is not as it was written")
    if tree["manifest"].get("format") != FORMAT:
        raise DamagedError(f"{path}: has format {tree['manifest'].get('format')}, this version reads {FORMAT}")
    try:
        manifest = Manifest.model_validate_json(json.dumps(tree["manifest"]))
    except ValidationError as error:
        raise DamagedError(f"{path}: {error.errors()[0]['msg']}") from None
    used = {held.part for held in manifest.parameters.values()} | {other.part for other in manifest.others.values()}
    wrong = next((name for name in sorted(used | manifest.parts.keys()) if not _PART.fullmatch(name) or name not in manifest.parts), None)
    if wrong is not None:
        raise DamagedError(f"{path}: names a part {wrong!r}")
    return manifest


def check_parts(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Reads parts whole and compares them with what the manifest says.

    Raises:
        DamagedError: names the first that is not as it was written.
    """
    for name in names:
        path, expected = folder / name, manifest.parts[name]
        try:
            size = path.stat().st_size
            # cheap, and tells more than a checksum
            if size != expected.bytes:
                raise DamagedError(f"{path}: holds {size} bytes of {expected.bytes}")
            if part_of(path) != expected:
                raise DamagedError(f"{path}: is not as it was written")
        except OSError as error:
            raise DamagedError(f"{path}: cannot be read ({error.strerror})") from None


class Parts:
    """The tensors of a checkpoint's parts, read where they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, Any] = {}

    def read(self, part: str, key: str) -> Tensor:
        """A tensor, on the CPU.

        Raises:
            DamagedError: it is not there.
        """
        try:
            if part not in self._open:
                self._open[part] = safe_open(self._folder / part, framework="pt")
            return self._open[part].get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise DamagedError(f"{self._folder / part}: {key} cannot be read ({error})") from None


def dtype_of(name: str) -> torch.dtype:
    """The data type that `str` of it names, without `torch.`."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise DamagedError(f"{name!r} is no data type")
    return found


def _render(body: Any) -> str:
    digest = xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
    return json.dumps({"manifest": body, "xxh3_128": digest}, indent=1, sort_keys=True) + "\n"
