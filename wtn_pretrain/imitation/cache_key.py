"""What stored activations depend on: the data, the teacher and how it was run."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from wtn_pretrain.config import Section
from wtn_pretrain.data.hashing import hash_keys
from wtn_pretrain.data.stream import Dataset
from wtn_pretrain.errors import UserError

_PROBES = 64
"""Samples that stand for the contents of a data set."""
# how batches are prepared and what the head's loss is: neither reaches the teacher's activations
_FREE = {"workers", "label_smoothing", "sizes", "lengths", "cache"}


class Key(NamedTuple):
    """The identity of activations; shapes, sizes and dtypes join it from the `CacheLayout`."""

    data: Mapping[str, Any]
    """Settings, length and contents of the data set, augmentation and tokenizer included: see `data_identity`."""
    seed: int
    """Seed of the stream of batches."""
    teacher: Mapping[str, str]
    """Weights and shape: see `network_identity`."""
    units: tuple[int, ...]
    """The teacher's blocks below each boundary (`Pairing.teacher`)."""
    precision: str
    """What the teacher computes in, such as fp32 or bf16."""


def data_identity(dataset: Dataset, **sections: Section) -> dict[str, Any]:
    """The settings that made `dataset`, its length, and a hash of samples spread over it, drawn as training draws them.

    The hash tells another corpus, tokenizer, masking or augmentation apart, whatever the settings say.
    """
    settings = {name: section.model_dump(mode="json", exclude=_FREE) for name, section in sections.items()}
    indices = np.unique(np.linspace(0, len(dataset) - 1, _PROBES).astype(np.int64))
    # an even number: images are mixed in pairs
    indices = indices[: max(1, len(indices) // 2 * 2)]
    batch = dataset.fetch(indices, hash_keys(0, indices))
    contents = xxhash.xxh3_128()
    for name in sorted(batch):
        contents.update(f"{name} {batch[name].dtype} {list(batch[name].shape)}".encode())
        contents.update(np.ascontiguousarray(batch[name].numpy()).data)
    return {**settings, "samples": len(dataset), "contents": contents.hexdigest()}


def network_identity(folder: Path) -> dict[str, str]:
    """Hashes of the weights and of the shape of the network in `folder`; the weights are streamed, at the speed of the disk.

    Raises:
        UserError: there is no finished network.
    """
    weights, shape = folder / "model.safetensors", folder / "model.json"
    try:
        tree = json.loads(shape.read_text(encoding="utf-8"))
        with weights.open("rb") as file:
            return {
                "weights": hashlib.file_digest(file, xxhash.xxh3_128).hexdigest(),  # type: ignore[arg-type]
                "shape": xxhash.xxh3_128_hexdigest(json.dumps(tree, sort_keys=True).encode()),
            }
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); run the stage that writes the network first") from None
    except ValueError:
        raise UserError(f"{shape}: not valid JSON; the file is damaged, run the stage again") from None


def render(parts: Mapping[str, Any]) -> str:
    """The key file: `parts` (plain JSON values) with their digest. The same parts give the same text."""
    return json.dumps({"digest": digest(parts), "parts": parts}, indent=1, sort_keys=True) + "\n"


def digest(parts: Mapping[str, Any]) -> str:
    """SHA-256 of `parts`, hexadecimal."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def parse(text: str) -> dict[str, Any] | None:
    """The parts in a key file, or None if it is damaged."""
    try:
        parts = json.loads(text)["parts"]
        return parts if render(parts) == text else None
    except (ValueError, KeyError, TypeError):
        return None


def differences(there: Any, here: Any, path: str = "") -> Iterator[str]:
    """Each part that differs, by name, with both values."""
    if isinstance(there, dict) and isinstance(here, dict):
        for name in sorted(there.keys() | here.keys()):
            yield from differences(there.get(name), here.get(name), f"{path}.{name}" if path else name)
    elif there != here:
        yield f"{path}: {_short(there)} there, {_short(here)} here"


def _short(value: Any) -> str:
    text = json.dumps(value)
    # the beginning of a hash tells it from another
    return text if len(text) <= 24 else f"{text[:12]}..."
