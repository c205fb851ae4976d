"""Images decoded when they are asked for: class folders and `datasets` (Parquet, arrow, hub names)."""

import io
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from wtn_pretrain.data.augment import Augment, centre_box, crop_draws, random_box
from wtn_pretrain.data.faults import Faults
from wtn_pretrain.errors import UserError

_MOST_PIXELS = 1 << 26
"""Of an image; its header says how many there are before any is decoded."""
SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))


class Encoded(Protocol):
    """Image files of one split, wherever they lie."""

    def __len__(self) -> int: ...

    def open(self, index: int) -> Image.Image:
        """The image, not decoded yet."""
        ...

    def name(self, index: int) -> str:
        """What an error message calls the image."""
        ...


@dataclass(frozen=True)
class FileImages:
    """Files below a folder."""

    root: Path
    names: np.ndarray  # bytes [N], relative to root: far smaller than a list of str, and forked workers share it

    def __len__(self) -> int:
        return len(self.names)

    def open(self, index: int) -> Image.Image:
        return Image.open(self.name(index))

    def name(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[index]))


@dataclass(frozen=True)
class TableImages:
    """The image column of a `datasets` table, as {"bytes", "path"}."""

    table: Any  # datasets.Dataset
    column: str
    origin: str

    def __len__(self) -> int:
        return len(self.table)

    def open(self, index: int) -> Image.Image:
        cell = self.table[int(index)][self.column]
        if cell is None:
            raise ValueError("the cell is empty")
        return Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"])

    def name(self, index: int) -> str:
        return f"{self.origin}, row {index}"


@dataclass(frozen=True)
class Subset:
    """Some of the images of a split."""

    images: Encoded
    indices: np.ndarray  # int64 [N]

    def __len__(self) -> int:
        return len(self.indices)

    def open(self, index: int) -> Image.Image:
        return self.images.open(self.indices[index])

    def name(self, index: int) -> str:
        return self.images.name(self.indices[index])


@dataclass(frozen=True)
class DecodedPixels:
    """Images cropped and resized while they are decoded."""

    images: Encoded
    channels: int
    size: int
    crop_fraction: float

    def resized(self, size: int) -> "DecodedPixels":
        """The same images, read at another side."""
        return replace(self, size=size)

    def read(self, indices: np.ndarray, seeds: np.ndarray | None, augment: Augment | None) -> np.ndarray:
        """uint8 [B, channels, size, size], channels last in memory, as they are decoded."""
        draws = crop_draws(seeds) if seeds is not None and augment is not None and augment.random_resized_crop else None
        out = np.empty((len(indices), self.size, self.size, self.channels), np.uint8)
        for row, index in enumerate(indices):
            view = partial(self._view, draws=None if draws is None else draws[row])
            out[row] = attempt(self.images, index, view)
        return out.transpose(0, 3, 1, 2)

    def _view(self, image: Image.Image, draws: np.ndarray | None) -> np.ndarray:
        """uint8 [size, size, channels]: the centre of an image that is not decoded yet, or the part that the draws say."""
        mode, wanted = "L" if self.channels == 1 else "RGB", (self.size, self.size)
        full = image.size
        box = centre_box(*full, self.crop_fraction) if draws is None else random_box(*full, draws)
        if draws is not None and image.format == "JPEG":
            # a JPEG decodes several times faster at a half, a quarter or an eighth, wherever that leaves pixels enough
            across, down = box[2] - box[0], box[3] - box[1]
            image.draft(None, (math.ceil(full[0] * self.size / across), math.ceil(full[1] * self.size / down)))
            scale = image.size[0] / full[0], image.size[1] / full[1]
            box = box[0] * scale[0], box[1] * scale[1], box[2] * scale[0], box[3] * scale[1]
        image = _converted(image, mode)
        if image.size != wanted or box != (0, 0, *wanted):
            image = image.resize(wanted, Image.Resampling.BILINEAR, box=box)
        return np.asarray(image).reshape(*wanted, self.channels)


def _converted(image: Image.Image, mode: str) -> Image.Image:
    """The image decoded, in mode "L" or "RGB"."""
    if image.mode.startswith("I;16"):  # convert() would clip 16-bit values instead of scaling them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == mode:  # convert() would copy it
        image.load()
        return image
    return image.convert(mode)


def native_size(images: Encoded) -> int:
    """The side in pixels that all images share; a UserError names the first that is not square or of another size."""
    side: int | None = None
    for index in range(len(images)):
        width, height = attempt(images, index, lambda image: image.size)
        side = side or width
        if (width, height) != (side, side):
            raise UserError(
                f"{images.name(index)}: {width} x {height} pixels where {side} x {side} was expected; set data.size to crop and resize"
            )
    assert side is not None
    return side


def native_channels(images: Encoded, skip: bool = False) -> int:
    """1 where a sample of up to 64 images is grey throughout, else 3; with `skip` those that cannot be read have no say."""
    sample = np.unique(np.linspace(0, len(images) - 1, 64).astype(np.int64))
    for index in sample:
        try:
            if not attempt(images, int(index), lambda image: image.mode in ("1", "L", "LA") or image.mode.startswith("I")):
                return 3
        except UserError:
            if not skip:
                raise
    return 1


def read_folder(root: Path, faults: Faults) -> tuple[FileImages, np.ndarray, FileImages | None, np.ndarray | None, tuple[str, ...]]:
    """Class folders under root/train and root/valid (or val, validation, test): training images and labels int64 [N], those of
    validation or None, and the class names in order."""
    if not (root / "train").is_dir():
        raise UserError(f"{root}: no folder train with a folder for each class; data.path takes the folder that holds train/ and valid/")
    classes = _class_folders(root / "train")
    if not classes:
        raise UserError(f"{root / 'train'}: no class folders; put the images of each class into a folder of their own")
    train, labels = _list_images(root / "train", classes)
    held_out = next((root / name for name in ("valid", "val", "validation", "test") if (root / name).is_dir()), None)
    if held_out is None:
        return train, labels, None, None, classes
    there = _class_folders(held_out)
    for name in (name for name in there if name not in classes):
        what = f"class {name} is not among the {len(classes)} of {root / 'train'}"
        # each of its images counts
        for _ in _names_below(held_out, name) or [b""]:
            faults.report("unknown label", str(held_out / name), what, "remove or rename the folder")
    valid, valid_labels = _list_images(held_out, tuple(name for name in there if name in classes), classes)
    if not len(valid):
        raise UserError(f"{held_out}: no images; fill it or remove it (data.valid_fraction then splits train)")
    return train, labels, valid, valid_labels, classes


def _class_folders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")))


def _list_images(root: Path, folders: tuple[str, ...], classes: tuple[str, ...] | None = None) -> tuple[FileImages, np.ndarray]:
    classes = classes or folders
    names: list[bytes] = []
    labels: list[int] = []
    for folder in folders:
        found = _names_below(root, folder)
        if not found:
            raise UserError(f"{root / folder}: no images ({', '.join(sorted(SUFFIXES))}); fill the class folder or remove it")
        names += found
        labels += [classes.index(folder)] * len(found)
    return FileImages(root, np.array(names)), np.array(labels, np.int64)


def _names_below(root: Path, folder: str) -> list[bytes]:
    return sorted(
        os.fsencode(os.path.relpath(os.path.join(place, file), root))
        for place, _, files in os.walk(root / folder)
        for file in files
        if os.path.splitext(file)[1].lower() in SUFFIXES and not file.startswith(".")
    )


def attempt(images: Encoded, index: int, use: Callable[[Image.Image], Any]) -> Any:
    """What `use` makes of an image that is not decoded yet. Raises a UserError that names the image if it cannot."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # a refusal follows
            image = images.open(index)
        with image:
            if image.width * image.height > _MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are a decompression bomb")
            return use(image)
    except Exception as error:  # Pillow's decoders raise all sorts on corrupt files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "cannot identify image file" in reason:
            reason = "not an image in a known format"
        raise UserError(f"{images.name(index)}: cannot be decoded ({reason}); repair or remove it") from None
