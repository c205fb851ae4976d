"""The files of a checkpoint: a manifest of JSON that vouches for itself and for parts of safetensors. Nothing in them is ever executed."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wtn_pretrain.files import write_text

MANIFEST = "manifest.json"
_AT_ONCE = 16 << 20
"""Bytes that are gone through at a time."""


class DamagedError(Exception):
    """A checkpoint that is not as it was written, or not one that is wanted: where, and how."""


class Record(BaseModel):
    """What stands in a manifest: nothing more than it says, of exactly these types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Part(Record):
    """A safetensors file."""

    bytes: int
    xxh3_128: str


def part_of(path: Path) -> Part:
    """Size and checksum of a file."""
    hasher = xxhash.xxh3_128()
    size = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_AT_ONCE):
            hasher.update(block)
            size += len(block)
    return Part(bytes=size, xxh3_128=hasher.hexdigest())


def write_sealed(folder: Path, manifest: BaseModel) -> None:
    """Writes a manifest, with a checksum of itself.

    Raises:
        UserError: the place cannot be written.
    """
    write_text(folder / MANIFEST, sealed(manifest.model_dump(mode="json")))


M = TypeVar("M", bound=BaseModel)


def read_sealed(folder: Path, kind: type[M], version: int) -> M:
    """The manifest in a folder; the parts that it names are not looked at.

    Raises:
        DamagedError: it is missing, or any byte of it is not as it was written, or it is of another format than `version`.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        tree = json.loads(text)
        # rendering it again also finds what reading does not see, such as a changed space
        whole = sealed(tree["manifest"]).encode() == text
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise DamagedError(f"{path}: is not as it was written")
    found = tree["manifest"].get("format") if isinstance(tree["manifest"], dict) else None
    if found != version:
        raise DamagedError(f"{path}: has format {found}, this version reads {version}")
    try:
        return kind.model_validate_json(json.dumps(tree["manifest"]))
    except ValidationError as error:
        raise DamagedError(f"{path}: {error.errors()[0]['msg']}") from None


def sealed(body: Any) -> str:
    """`body` as JSON with a checksum of itself: the text of a manifest."""
    digest = xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
    return json.dumps({"manifest": body, "xxh3_128": digest}, indent=1, sort_keys=True) + "\n"


def check_files(folder: Path, parts: Mapping[str, Part], names: Iterable[str]) -> None:
    """Reads parts whole and compares them with what a manifest says.

    Raises:
        DamagedError: names the first that is not as it was written.
    """
    for name in names:
        path, expected = folder / name, parts[name]
        try:
            size = path.stat().st_size
            # cheap, and tells more than a checksum
            if size != expected.bytes:
                raise DamagedError(f"{path}: holds {size} bytes of {expected.bytes}")
            if part_of(path) != expected:
                raise DamagedError(f"{path}: is not as it was written")
        except OSError as error:
            raise DamagedError(f"{path}: cannot be read ({error.strerror})") from None


def require_same(folder: Path, then: Mapping[str, int | str], now: Mapping[str, int | str]) -> None:
    """Compares the run that wrote a checkpoint with the one that wants to continue it.

    Raises:
        DamagedError: names the first thing that differs.
    """
    for name in sorted(now.keys() | then.keys()):
        if then.get(name) != now.get(name):
            raise DamagedError(f"{folder}: belongs to another run ({name} {then.get(name)}, and here {now.get(name)})")


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
            return self._opened(part).get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise DamagedError(f"{self._folder / part}: {key} cannot be read ({error})") from None

    def keys(self, part: str) -> set[str]:
        """Of the tensors in a part.

        Raises:
            DamagedError: it is none.
        """
        try:
            return set(self._opened(part).keys())
        except (OSError, SafetensorError) as error:
            raise DamagedError(f"{self._folder / part}: cannot be read ({error})") from None

    def _opened(self, part: str) -> Any:
        if part not in self._open:
            self._open[part] = safe_open(self._folder / part, framework="pt")
        return self._open[part]


def on_host(value: Tensor) -> Tensor:
    """A contiguous copy in host memory."""
    return torch.empty(value.shape, dtype=value.dtype).copy_(value)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The data type that `dtype_name` calls so."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise DamagedError(f"{name!r} is no data type")
    return found


def versions() -> dict[str, str]:
    """Of what writes a checkpoint."""
    import deepspeed

    from wtn_pretrain.version import __version__

    return {"wtn_pretrain": __version__, "torch": str(torch.__version__), "deepspeed": deepspeed.__version__}
