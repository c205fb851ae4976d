"""Which images can be decoded: found by one pass before training, for an image that fails in the middle of it would stop it."""

import json
from pathlib import Path

import numpy as np
import xxhash

from wtn_pretrain.data.faults import Faults
from wtn_pretrain.data.image_cache import identify, in_order
from wtn_pretrain.data.image_files import Encoded, attempt
from wtn_pretrain.data.token_store import build_once
from wtn_pretrain.errors import UserError

_CARD = "card.json"
_FORMAT = 1


def readable(images: Encoded, folder: Path | None, faults: Faults) -> np.ndarray:
    """The images that can be decoded, int64 ascending; the others are reported to `faults`.

    The count, and which they are, stands in `folder`/card.json, and later starts read it there while the files are the same. Under
    torch.distributed every rank must call this, `folder` must be one that all share, and the first rank alone decodes. Without a folder
    every call decodes everything.
    """
    found = _scan(images, faults) if folder is None else _stored(images, folder, faults)
    kept = np.setdiff1d(np.arange(len(images)), found)
    if not len(kept):
        raise UserError(f"{images.name(0)} and others: none of {len(images)} images can be decoded; give images")
    return kept


def _stored(images: Encoded, folder: Path, faults: Faults) -> np.ndarray:
    digest = xxhash.xxh3_128(f"scan {_FORMAT} {len(images)} ".encode())
    identify(images, digest)

    def card() -> dict[str, object] | None:
        try:
            read = json.loads((folder / _CARD).read_text(encoding="utf-8"))
            return read if {"key", "left_out", "skipped"} <= read.keys() else None
        except (OSError, ValueError, AttributeError):
            return None

    def key() -> str | None:
        read = card()
        return None if read is None else str(read["key"])

    def write() -> dict[str, object]:
        own = Faults(faults.policy, faults.remedy)
        left_out = _scan(images, own)
        return {"images": len(images) - len(left_out), "left_out": left_out.tolist(), "skipped": own.state()}

    build_once(folder, digest.hexdigest(), write, name=_CARD, read=key)
    read = card()
    assert read is not None
    faults.join(read["skipped"])  # type: ignore[arg-type]
    return np.array(read["left_out"], np.int64)


def _scan(images: Encoded, faults: Faults) -> np.ndarray:
    def one(index: int) -> UserError | None:
        try:
            attempt(images, index, lambda image: image.load())
        except UserError as error:
            return error
        return None

    left_out = []
    for index, problem in enumerate(in_order(one, len(images))):
        if problem is not None:
            faults.report("undecodable image", images.name(index), str(problem).split(": ", 1)[-1].split("; ")[0])
            left_out.append(index)
    return np.array(left_out, np.int64)
