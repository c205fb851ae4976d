"""Image sets that fit into memory: scikit-learn's digits, IDX files (MNIST and its kin), CIFAR-10's binary version."""

import gzip
import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wtn_pretrain.data.augment import Augment
from wtn_pretrain.data.faults import Faults
from wtn_pretrain.data.prepare.streams import expands_too_far
from wtn_pretrain.errors import UserError

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR_ROW = 1 + 3 * 32 * 32
_IDX_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Arrays:
    """Images and labels of one split as read."""

    pixels: np.ndarray  # uint8 [N, C, H, W]
    labels: np.ndarray  # int64 [N]
    origin: str  # what an error message calls the labels' source


@dataclass(frozen=True)
class ArrayPixels:
    """Pixels in memory, read in the wanted channels and size."""

    pixels: np.ndarray  # uint8 [N, C, H, W]
    channels: int
    size: int

    def resized(self, size: int) -> "ArrayPixels":
        """The same pixels, read at another side."""
        return replace(self, size=size)

    def read(self, indices: np.ndarray, seeds: np.ndarray | None, augment: Augment | None) -> np.ndarray:
        """uint8 [B, channels, size, size]."""
        chosen = with_channels(self.pixels[indices], self.channels)
        if chosen.shape[2:] == (self.size, self.size):
            return chosen
        scaled = torch.nn.functional.interpolate(
            torch.from_numpy(chosen).float(), size=(self.size, self.size), mode="bilinear", antialias=True, align_corners=False
        )
        return scaled.round_().clamp_(0, 255).to(torch.uint8).numpy()


def with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """`pixels` uint8 [B, 1 or 3, H, W] as grey (1) or RGB (3)."""
    if channels < pixels.shape[1]:
        # ITU-R 601 luma, as Pillow converts to grey
        return np.rint(np.tensordot(pixels, [0.299, 0.587, 0.114], axes=(1, 0)))[:, None].astype(np.uint8)
    return np.repeat(pixels, channels, axis=1) if channels > pixels.shape[1] else pixels


def read_digits() -> Arrays:
    """scikit-learn's 1,797 digits of 8 x 8 grey pixels, 0..16 scaled to 0..255; they come with the library."""
    from sklearn.datasets import load_digits  # takes a second to import

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    return Arrays(pixels, digits.target.astype(np.int64), "scikit-learn's digits")


def read_idx(folder: Path) -> tuple[Arrays, Arrays | None]:
    """Training and, where there are any, test images of a folder of IDX files, plain or .gz, named as MNIST names them."""
    train = _read_idx_split(folder, ("train",))
    if train is None:
        raise UserError(f"{folder}: no train-images-idx3-ubyte[.gz]; data.path takes the folder that holds the IDX files")
    valid = _read_idx_split(folder, ("t10k", "test", "valid"))
    if valid is not None and valid.pixels.shape[1:] != train.pixels.shape[1:]:
        raise UserError(
            f"{valid.origin}: images of {_extent(valid.pixels)} pixels, in training {_extent(train.pixels)}; give one data set's files"
        )
    return train, valid


def read_cifar(folder: Path, faults: Faults) -> tuple[Arrays, Arrays | None]:
    """Training and, where there is any, test images of CIFAR-10's binary version: rows of a label and 3,072 planar bytes."""
    folder = folder / "cifar-10-batches-bin" if (folder / "cifar-10-batches-bin").is_dir() else folder
    files = sorted(folder.glob("data_batch_*.bin"))
    if not files:
        raise UserError(f"{folder}: no data_batch_*.bin; data.path takes the folder of CIFAR-10's binary version")
    parts = [_read_cifar_file(file, faults) for file in files]
    train = Arrays(
        np.concatenate([part.pixels for part in parts]), np.concatenate([part.labels for part in parts]), str(folder / "data_batch_*.bin")
    )
    test = folder / "test_batch.bin"
    return train, _read_cifar_file(test, faults) if test.exists() else None


def _read_cifar_file(file: Path, faults: Faults) -> Arrays:
    content = np.fromfile(file, np.uint8)
    if len(content) == 0 or len(content) % _CIFAR_ROW:
        raise UserError(f"{file}: {len(content)} bytes are no whole number of {_CIFAR_ROW}-byte rows; fetch the file again")
    rows = content.reshape(-1, _CIFAR_ROW)
    labels = rows[:, 0].astype(np.int64)
    known = labels < len(CIFAR_CLASSES)
    for index in np.flatnonzero(~known):
        faults.report(
            "unknown label", str(file), f"label {labels[index]} at index {index} is outside 0..9", "give CIFAR-10's binary version"
        )
    return Arrays(rows[known, 1:].reshape(-1, 3, 32, 32), labels[known], str(file))


def _read_idx_split(folder: Path, names: tuple[str, ...]) -> Arrays | None:
    images, labels = _find_idx(folder, names, "images"), _find_idx(folder, names, "labels")
    if images is None and labels is None:
        return None
    if images is None or labels is None:
        present = images or labels
        raise UserError(f"{present}: its {'labels' if labels is None else 'images'} file is missing from {folder}; add it")
    pixels, targets = _read_idx_file(images), _read_idx_file(labels)
    if pixels.ndim != 3 or targets.ndim != 1:
        raise UserError(f"{images}: {pixels.ndim} dimensions and labels of {targets.ndim}; expected images [N, H, W] and labels [N]")
    if len(pixels) != len(targets):
        raise UserError(f"{labels}: {len(targets)} labels for the {len(pixels)} images of {images.name}; give files that belong together")
    if len(pixels) == 0:
        raise UserError(f"{images}: holds no images; give a file that does")
    return Arrays(pixels[:, None], targets.astype(np.int64), str(labels))


def _find_idx(folder: Path, names: tuple[str, ...], kind: str) -> Path | None:
    found = [
        path
        for name in names
        for path in sorted(folder.glob(f"{name}-{kind}*ubyte*"))
        if path.suffix in ("", ".gz") or "ubyte" in path.suffix
    ]
    return found[0] if found else None


def _read_idx_file(file: Path) -> np.ndarray:
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            return _idx_array(stream, file)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: cannot be read ({error}); fetch the file again") from None


def _idx_array(stream: Any, file: Path) -> np.ndarray:
    """Reads as much as the header promises, and a byte more, never what else a small archive may hold."""
    head = stream.read(4)
    if len(head) < 4 or head[:3] != b"\0\0\x08":
        raise UserError(f"{file}: not an IDX file of unsigned bytes (it starts with {head.hex(' ') or 'nothing'}); fetch the file again")
    sides = stream.read(4 * head[3])
    shape = np.frombuffer(sides.ljust(4 * head[3], b"\0"), ">u4").tolist()
    start, size = 4 + len(sides), math.prod(shape)
    packed = file.stat().st_size
    if file.suffix == ".gz" and expands_too_far(packed, size):
        raise UserError(
            f"{file}: {packed} bytes whose header (shape {shape}) promises {size}, as a decompression bomb does; fetch the file again"
        )
    content = bytearray()
    while len(content) <= size and (some := stream.read(min(_IDX_AT_ONCE, size + 1 - len(content)))):
        content += some
    if len(content) != size or len(sides) < 4 * head[3]:
        found = f"more than {start + size}" if len(content) > size else str(start + len(content))
        raise UserError(f"{file}: {found} bytes where its header (shape {shape}) promises {4 + 4 * head[3] + size}; fetch the file again")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _extent(pixels: np.ndarray) -> str:
    return " x ".join(str(side) for side in pixels.shape[-2:])
