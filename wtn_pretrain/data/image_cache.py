"""Small sets decoded once: pixels as bytes in a memory-mapped file, so that later epochs and runs decode nothing."""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import xxhash

from wtn_pretrain.data.faults import Faults
from wtn_pretrain.data.image_arrays import ArrayPixels
from wtn_pretrain.data.image_files import DecodedPixels, Encoded, FileImages, Subset, TableImages
from wtn_pretrain.data.image_shards import TarImages
from wtn_pretrain.data.token_store import build_once
from wtn_pretrain.errors import UserError
from wtn_pretrain.files import draft_of, write_beside

_FORMAT = 1
_CARD = "card.json"
_Found = TypeVar("_Found")


def cached(pixels: DecodedPixels, labels: np.ndarray, folder: Path, faults: Faults) -> tuple[ArrayPixels, np.ndarray]:
    """The images at the side and in the channels of `pixels`, and the labels of those that can be decoded.

    They are decoded into `folder` where it does not hold them yet; under torch.distributed by rank 0, and every rank must call this.
    What cannot be decoded is reported to `faults`, and its count stands in `folder`/card.json.
    """
    key = _key(pixels, labels)

    def whole() -> str | None:
        try:
            card = json.loads((folder / _CARD).read_text(encoding="utf-8"))
            shape = (card["images"], pixels.channels, pixels.size, pixels.size)
            fits = (folder / "pixels").stat().st_size == np.prod(shape) and (folder / "labels.npy").is_file()
            return card["key"] if fits else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    build_once(folder, key, lambda: _decode(pixels, labels, folder, faults), name=_CARD, read=whole)
    kept = np.load(folder / "labels.npy")
    shape = (len(kept), pixels.channels, pixels.size, pixels.size)
    return ArrayPixels(np.memmap(folder / "pixels", np.uint8, mode="r", shape=shape), pixels.channels, pixels.size), kept


def _decode(pixels: DecodedPixels, labels: np.ndarray, folder: Path, faults: Faults) -> dict[str, object]:
    def one(index: int) -> np.ndarray | UserError:
        try:
            return pixels.read(np.array([index]), None, None)[0]
        except UserError as error:
            return error

    kept: list[int] = []
    place = draft_of(folder / "pixels")
    try:
        with place.open("wb") as file:
            for index, found in enumerate(in_order(one, len(labels))):
                if isinstance(found, UserError):
                    faults.report("undecodable image", pixels.images.name(index), str(found).split(": ", 1)[-1].split("; ")[0])
                    continue
                np.ascontiguousarray(found).tofile(file)
                kept.append(index)
        if not kept:
            raise UserError(f"{folder}: none of {len(labels)} images can be decoded; give images")
        os.replace(place, folder / "pixels")
    finally:
        place.unlink(missing_ok=True)
    write_beside(folder / "labels.npy", lambda path: _save(path, labels[kept]))
    return {"images": len(kept), "skipped": faults.state()}


def _save(path: Path, values: np.ndarray) -> None:
    with path.open("wb") as file:  # np.save would give the name a suffix
        np.save(file, values)


def in_order(one: Callable[[int], _Found], count: int) -> Iterator[_Found]:
    """What `one` gives for 0 .. count - 1, found by threads on all cores."""
    # decoders release the interpreter's lock; a few hundred images at a time bound the memory
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
        for first in range(0, count, 256):
            yield from pool.map(one, range(first, min(first + 256, count)))


def _key(pixels: DecodedPixels, labels: np.ndarray) -> str:
    digest = xxhash.xxh3_128(f"{_FORMAT} {pixels.channels} {pixels.size} {pixels.crop_fraction} ".encode())
    digest.update(labels.tobytes())
    identify(pixels.images, digest)
    return digest.hexdigest()


def identify(images: Encoded, digest: xxhash.xxh3_128) -> None:
    """Adds to `digest` what changes when the images do: names, sizes and times of writing."""
    if isinstance(images, Subset):
        digest.update(np.ascontiguousarray(images.indices).tobytes())
        identify(images.images, digest)
    elif isinstance(images, FileImages):
        digest.update(images.names.tobytes())
        for index in range(len(images)):
            found = os.stat(images.name(index))
            digest.update(f"{found.st_size} {found.st_mtime_ns} ".encode())
    elif isinstance(images, TarImages):
        for shard in images.shards:
            found = shard.stat()
            digest.update(f"{shard.name} {found.st_size} {found.st_mtime_ns} ".encode())
        digest.update(images.shard.tobytes() + images.offsets.tobytes())
    else:
        assert isinstance(images, TableImages)
        digest.update(f"{images.table._fingerprint} {images.column}".encode())
