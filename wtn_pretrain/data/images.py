"""Image classification sets: their settings, their splits and the normalised batches."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field, model_validator

from wtn_pretrain.config import Section
from wtn_pretrain.data import image_files
from wtn_pretrain.data.augment import Augment, erase, shift_and_flip
from wtn_pretrain.data.faults import Faults, Policy, tell_skipped
from wtn_pretrain.data.hashing import permutation
from wtn_pretrain.data.image_arrays import CIFAR_CLASSES, ArrayPixels, Arrays, read_cifar, read_digits, read_idx, with_channels
from wtn_pretrain.data.image_cache import cached
from wtn_pretrain.data.image_files import DecodedPixels, Encoded, Subset, TableImages
from wtn_pretrain.data.image_scan import readable
from wtn_pretrain.data.image_shards import read_shards
from wtn_pretrain.data.mixing import mix, partners
from wtn_pretrain.data.rand_augment import rand_augment
from wtn_pretrain.data.tables import check_column, open_tables, training_table, validation_table
from wtn_pretrain.errors import UserError

# The usual constants for networks trained on ImageNet, and their like for grey images.
_DECODED_MEAN = {1: (0.449,), 3: (0.485, 0.456, 0.406)}
_DECODED_STD = {1: (0.226,), 3: (0.229, 0.224, 0.225)}
_SPLIT_SEED, _LIMIT_SEED = 1, 2


class ImageData(Section):
    """Labelled images for classification."""

    kind: Literal["images"] = "images"
    """Images."""
    source: Literal["digits", "folder", "idx", "cifar", "datasets", "tar"] = "digits"
    """Where the images come from: scikit-learn's digits (need no file), class folders, IDX files (MNIST), CIFAR-10's binary version,
    tables read through the datasets library, or tar files (WebDataset's shards, or class folders in a tar)."""
    path: str | None = None
    """Folder with train/ and valid/ (or test/) class folders, folder of IDX files or of data_batch_*.bin, or for datasets a hub name
    or a folder of Parquet or arrow files, or folder of .tar files, those of validation named valid* or test*; digits need none."""
    cache: str | None = None
    """Folder to keep decoded pixels in, for sets that fit on the disk at `size`: later epochs and runs decode nothing; sources folder,
    datasets and tar, with size. Null decodes anew each time."""
    faults: Policy = "stop"
    """What to do about images that cannot be decoded, labels outside the classes and what cannot be read in tar files: stop, or skip and
    count them. Skipping decodes every image once before the first start, into `cache` or, without one, to see which can be; the count is
    printed and stands in card.json there or in the run's folder."""
    size: int | None = Field(default=None, ge=1)
    """Side in pixels to crop and resize to; null keeps the native size, which all images must then share."""
    channels: Literal[1, 3] | None = None
    """Colour channels to convert to: 1 (grey) or 3 (RGB); null keeps what the images have."""
    classes: int | None = Field(default=None, ge=1)
    """Number of classes that labels must stay below; null takes what the training labels show."""
    shift: int = Field(default=0, ge=0)
    """Largest random shift of a training image in pixels along each axis (4 is the usual pad-and-crop of CIFAR)."""
    flip: bool = False
    """Mirror training images left to right at random."""
    random_resized_crop: bool = False
    """Cut training images at random from 8 to 100% of the area, as for ImageNet; sources folder and datasets, with size."""
    crop_fraction: float = Field(default=1.0, gt=0, le=1)
    """Part of the shorter side that the centre crop keeps (0.875 is usual for ImageNet); sources folder and datasets, with size."""
    rand_augment: int = Field(default=0, ge=0)
    """Operations of RandAugment on each training image (Cubuk et al. 2020; 2 is usual); 0: off."""
    magnitude: float = Field(default=9.0, ge=0, le=10)
    """Strength of RandAugment's operations, of 10."""
    random_erasing: float = Field(default=0.0, ge=0, le=1)
    """Probability that a rectangle of a training image is blanked (Zhong et al. 2020)."""
    mixup: float = Field(default=0.0, ge=0)
    """Alpha of mixup on training images (Zhang et al. 2018; 0.2 is usual); 0: off."""
    cutmix: float = Field(default=0.0, ge=0)
    """Alpha of CutMix on training images (Yun et al. 2019; 1.0 is usual); 0: off. With mixup as well, each pair draws one of them."""
    sizes: tuple[tuple[float, int], ...] = ()
    """Progressive resizing of training on labels: pairs (share of the steps, side), each side used until that share of the steps is
    done, then `size`; [[0.4, 128], [0.8, 176]] for example. Imitation and validation always take `size`."""
    mean: tuple[float, ...] = ()
    """What is taken from pixel values in [0, 1], a number a channel, with `std`; a network from elsewhere wants the numbers that it was
    trained with. Empty: of the training images where they are in memory, else ImageNet's."""
    std: tuple[float, ...] = ()
    """What they are then divided by."""
    valid_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Part held out for validation where the source has no such split."""
    limit: int | None = Field(default=None, ge=1)
    """Train on the first so many samples of a fixed shuffle; null takes all."""
    workers: int = Field(default=0, ge=0)
    """Processes that prepare batches beside the training; 0 prepares them in its own."""
    image_column: str = "image"
    """Column of the images, source datasets."""
    label_column: str = "label"
    """Column of the labels, source datasets."""

    @model_validator(mode="after")
    def _fits_together(self) -> "ImageData":
        if self.source != "digits" and self.path is None:
            raise UserError(f"path is missing, which source {self.source} needs")
        if self.source not in ("folder", "datasets", "tar") or self.size is None:
            for name in ("random_resized_crop", "crop_fraction", "cache"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise UserError(f"{name} needs size and source folder, datasets or tar; leave it out")
        if self.cache is not None and self.random_resized_crop:
            raise UserError("cache keeps images at size, of which random_resized_crop would cut parts; leave one of them out")
        if not self.rand_augment and self.magnitude != type(self).model_fields["magnitude"].default:
            raise UserError("magnitude is that of rand_augment, which is off; set rand_augment to 2, or leave magnitude out")
        if len(self.mean) != len(self.std) or any(not value > 0 for value in self.std):
            raise UserError(f"mean {list(self.mean)} and std {list(self.std)} must have one number a channel each, std above 0")
        shares = [share for share, _ in self.sizes]
        if any(not 0 < share < 1 for share in shares) or shares != sorted(set(shares)):
            raise UserError(f"sizes has the shares {shares}; they must rise, each between 0 and 1")
        if any(side < 1 for _, side in self.sizes):
            raise UserError(f"sizes has the sides {[side for _, side in self.sizes]}; each must be at least 1 pixel")
        return self


_Found = tuple[Encoded, np.ndarray, Encoded | None, np.ndarray | None, tuple[str, ...]]
"""Images and labels of training, those of validation or None, and the names of the classes."""


class Pixels(Protocol):
    """Where a set's images are read from."""

    @property
    def size(self) -> int:
        """Side in pixels of what is read."""
        ...

    def resized(self, size: int) -> "Pixels":
        """The same images, read at another side."""
        ...

    def read(self, indices: np.ndarray, seeds: np.ndarray | None, augment: Augment | None) -> np.ndarray:
        """uint8 [B, C, size, size]; the source applies random_resized_crop itself, for it decodes."""
        ...


@dataclass(frozen=True)
class ImageSet:
    """A Dataset of {"pixels": float32 [B, C, size, size], normalised per channel, channels last in memory, "labels": int64 [B]}.

    Where images are mixed there are also "partner_labels" int64 [B] and "own_share" float32 [B]: the target of a sample is its own
    label with that probability, and its partner's with the rest.
    """

    pixels: Pixels
    labels: np.ndarray  # int64 [N]
    mean: tuple[float, ...]  # of pixel values in [0, 1], per channel
    std: tuple[float, ...]
    augment: Augment | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: np.ndarray, seeds: np.ndarray | None) -> dict[str, torch.Tensor]:
        """See `wtn_pretrain.data.stream.Dataset`."""
        pixels = self.pixels.read(indices, seeds, self.augment)
        augment = self.augment if seeds is not None else None
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        if augment is not None and seeds is not None:
            pixels = shift_and_flip(pixels, seeds, augment)
            if augment.operations:
                fill = np.rint(255 * mean).astype(np.uint8)
                pixels = rand_augment(pixels, seeds, augment.operations, augment.magnitude, fill)
        # one multiply and one add a pixel: x / (255 std) - mean / std; channels last, as convolutions want them, and made so once
        normalised = pixels.transpose(0, 2, 3, 1).astype(np.float32, order="C")
        normalised *= 1 / (255 * std)
        normalised -= mean / std
        batch = {"labels": torch.from_numpy(self.labels[indices])}
        if augment is not None and seeds is not None:
            if augment.erase:
                erase(normalised, seeds, augment.erase)
            if augment.mixes:
                batch["own_share"] = torch.from_numpy(mix(normalised, seeds, augment.mixup, augment.cutmix))
                batch["partner_labels"] = torch.from_numpy(partners(self.labels[indices]))
        return {"pixels": torch.from_numpy(normalised).permute(0, 3, 1, 2), **batch}

    def resized(self, size: int) -> "ImageSet":
        """The same images at another side."""
        return self if size == self.pixels.size else replace(self, pixels=self.pixels.resized(size))


@dataclass(frozen=True)
class ImageSplits:
    """A training and a validation set with what a model has to know about them."""

    train: ImageSet
    valid: ImageSet
    classes: tuple[str, ...]
    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def open_images(config: ImageData, cache: Path | None = None) -> ImageSplits:
    """The splits that `config` describes. Raises a UserError for what is missing, corrupt or does not fit together.

    Args:
        cache: folder that all ranks share, for the card that says which images were skipped; all ranks must then call this.
    """
    faults = Faults(config.faults, "data.faults: skip")
    splits = _open(config, cache, faults)
    tell_skipped(faults, config.path or config.source)
    if config.classes is not None and config.classes != len(splits.classes):
        raise UserError(f"data.classes {config.classes}: the source has {len(splits.classes)} named classes; leave the setting out")
    return splits


def _open(config: ImageData, cache: Path | None, faults: Faults) -> ImageSplits:
    if config.source == "digits":
        return _array_splits(config, read_digits(), None, tuple(str(digit) for digit in range(10)), faults)
    assert config.path is not None
    if config.source == "datasets":
        return _decoded_splits(config, *_table_splits(config, config.path, faults), cache, faults)
    root = Path(config.path)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; set data.path to the folder of the images")
    if config.source == "idx":
        return _array_splits(config, *read_idx(root), None, faults)
    if config.source == "cifar":
        return _array_splits(config, *read_cifar(root, faults), CIFAR_CLASSES, faults)
    found: _Found = read_shards(root, config.classes, faults) if config.source == "tar" else image_files.read_folder(root, faults)
    return _decoded_splits(config, *found, cache, faults)


def _array_splits(config: ImageData, train: Arrays, valid: Arrays | None, classes: tuple[str, ...] | None, faults: Faults) -> ImageSplits:
    count = len(classes) if classes else config.classes or int(train.labels.max()) + 1
    train = _with_known_labels(train, count, faults)
    valid = valid and _with_known_labels(valid, count, faults)
    native = train.pixels.shape[1:]
    if config.size is None and native[1] != native[2]:
        raise UserError(f"{train.origin}: images of {native[1]} x {native[2]} pixels are not square; set data.size")
    channels, size = config.channels or native[0], config.size or native[1]
    if valid is None:
        kept, rest = _split(len(train.labels), config, train.origin)
        valid = Arrays(train.pixels[rest], train.labels[rest], train.origin)
        train = Arrays(train.pixels[kept], train.labels[kept], train.origin)
    # of the whole training split: a network stays usable whatever data.limit another run has
    mean, std = _given(config, channels) or _statistics(train.pixels, channels)
    chosen = _limited(len(train.labels), config)
    training = ArrayPixels(train.pixels if config.limit is None else train.pixels[chosen], channels, size)
    return ImageSplits(
        ImageSet(training, train.labels[chosen], mean, std, _augment(config, size)),
        ImageSet(ArrayPixels(valid.pixels, channels, size), valid.labels, mean, std),
        classes or tuple(str(label) for label in range(count)),
        channels,
        size,
        mean,
        std,
    )


def _with_known_labels(part: Arrays, count: int, faults: Faults) -> Arrays:
    kept = _known_labels(part.labels, count, part.origin, faults)
    return part if len(kept) == len(part.labels) else replace(part, pixels=part.pixels[kept], labels=part.labels[kept])


def _table_splits(config: ImageData, path: str, faults: Faults) -> _Found:
    tables = open_tables(path)
    train_table, valid_table = training_table(tables, path), validation_table(tables)
    feature = train_table.features.get(config.label_column)
    names: tuple[str, ...] | None = tuple(feature.names) if getattr(feature, "names", None) else None
    train, labels, names = _table_split(config, train_table, names, f"{path}, split train", faults)
    if valid_table is None:
        return train, labels, None, None, names
    valid, valid_labels, _ = _table_split(config, valid_table, names, f"{path}, validation split", faults)
    return train, labels, valid, valid_labels, names


def _table_split(
    config: ImageData, table: Any, names: tuple[str, ...] | None, origin: str, faults: Faults
) -> tuple[Encoded, np.ndarray, tuple[str, ...]]:
    import datasets

    check_column(table, config.image_column, "data.image_column", origin)
    check_column(table, config.label_column, "data.label_column", origin)
    values = list(table[config.label_column])
    try:
        images = table.select_columns([config.image_column]).cast_column(config.image_column, datasets.Image(decode=False))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"{origin}: column {config.image_column} holds no images ({str(error).splitlines()[0]}); set data.image_column"
        ) from None
    kind = str if any(isinstance(value, str) for value in values) else int
    rows = [row for row, value in enumerate(values) if isinstance(value, kind)]
    for row in sorted(set(range(len(values))).difference(rows)):
        what = f"label {values[row]!r} at row {row} is neither an integer nor, in every row, a name"
        faults.report("unknown label", origin, what, "set data.label_column")
    if not rows:
        raise UserError(f"{origin}: column {config.label_column} holds no labels; set data.label_column")
    if kind is str:
        names = names or tuple(sorted({values[row] for row in rows}))
        places = {name: number for number, name in enumerate(names)}
        for row in (row for row in rows if values[row] not in places):
            what = f"label {values[row]!r} at row {row} is not among the {len(names)} of training"
            faults.report("unknown label", origin, what, "remove the row")
        rows = [row for row in rows if values[row] in places]
        labels = np.array([places[values[row]] for row in rows], np.int64)
    else:
        labels = np.array([values[row] for row in rows], np.int64)
        names = names or tuple(str(label) for label in range(config.classes or int(labels.max()) + 1))
        known = _known_labels(labels, len(names), origin, faults, np.array(rows))
        rows, labels = [rows[place] for place in known], labels[known]
    found = TableImages(images, config.image_column, origin)
    return found if len(rows) == len(values) else Subset(found, np.array(rows, np.int64)), labels, names


def _decoded_splits(
    config: ImageData,
    train: Encoded,
    labels: np.ndarray,
    valid: Encoded | None,
    valid_labels: np.ndarray | None,
    classes: tuple[str, ...],
    cache: Path | None,
    faults: Faults,
) -> ImageSplits:
    if config.faults == "skip" and config.cache is None:
        train, labels = _readable(train, labels, cache and cache / "images" / "train", faults)
        if valid is not None and valid_labels is not None:
            valid, valid_labels = _readable(valid, valid_labels, cache and cache / "images" / "valid", faults)
    channels = config.channels or image_files.native_channels(train, config.faults == "skip")
    size = config.size
    if size is None:
        size = image_files.native_size(train)
        if valid is not None and image_files.native_size(valid) != size:
            raise UserError(
                f"{valid.name(0)}: images of another size than the {size} x {size} of training; set data.size to crop and resize"
            )
    if valid is None or valid_labels is None:
        kept, rest = _split(len(labels), config, config.path or "")
        valid, valid_labels = Subset(train, rest), labels[rest]
        train, labels = Subset(train, kept), labels[kept]
    chosen = _limited(len(labels), config)
    labels = labels[chosen]
    mean, std = _given(config, channels) or (_DECODED_MEAN[channels], _DECODED_STD[channels])
    training: Pixels = DecodedPixels(Subset(train, chosen), channels, size, config.crop_fraction)
    held_out: Pixels = DecodedPixels(valid, channels, size, config.crop_fraction)
    if config.cache is not None:
        assert isinstance(training, DecodedPixels)
        assert isinstance(held_out, DecodedPixels)
        folder = Path(config.cache)
        training, labels = cached(training, labels, folder / "train", faults)
        held_out, valid_labels = cached(held_out, valid_labels, folder / "valid", faults)
    return ImageSplits(
        ImageSet(training, labels, mean, std, _augment(config, size)),
        ImageSet(held_out, valid_labels, mean, std),
        classes,
        channels,
        size,
        mean,
        std,
    )


def _readable(images: Encoded, labels: np.ndarray, folder: Path | None, faults: Faults) -> tuple[Encoded, np.ndarray]:
    kept = readable(images, folder, faults)
    return (images, labels) if len(kept) == len(images) else (Subset(images, kept), labels[kept])


def _given(config: ImageData, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """`data.mean` and `data.std`, if they are set."""
    if config.mean and len(config.mean) != channels:
        raise UserError(f"data.mean and data.std: have {len(config.mean)} numbers and the images {channels} channels; give one a channel")
    return (config.mean, config.std) if config.mean else None


def _augment(config: ImageData, size: int) -> Augment | None:
    least = min([size, *(side for _, side in config.sizes)])
    if config.shift >= least:
        raise UserError(f"data.shift {config.shift} can push an image of {least} x {least} pixels out of sight; lower it")
    made = Augment(
        shift=config.shift,
        flip=config.flip,
        random_resized_crop=config.random_resized_crop,
        operations=config.rand_augment,
        magnitude=config.magnitude,
        erase=config.random_erasing,
        mixup=config.mixup,
        cutmix=config.cutmix,
    )
    return made or None


def _statistics(pixels: np.ndarray, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixel values in [0, 1], per channel, of uint8 [N, C, H, W] as `channels` channels."""
    histogram = np.zeros((channels, 256), np.int64)
    for first in range(0, len(pixels), 4096):
        block = with_channels(pixels[first : first + 4096], channels)
        for channel in range(channels):
            histogram[channel] += np.bincount(block[:, channel].ravel(), minlength=256)
    values = np.arange(256) / 255
    mean = (histogram * values).sum(1) / histogram.sum(1)
    variance = (histogram * (values - mean[:, None]) ** 2).sum(1) / histogram.sum(1)
    # a constant channel would divide by zero
    return tuple(mean.tolist()), tuple(np.maximum(np.sqrt(variance), 1 / 255).tolist())


def _known_labels(labels: np.ndarray, count: int, origin: str, faults: Faults, places: np.ndarray | None = None) -> np.ndarray:
    """Which labels are below `count`: int64 indices. The others are reported, by their `places` in the source if those are other ones."""
    known = (labels >= 0) & (labels < count)
    for index in np.flatnonzero(~known):
        place = index if places is None else places[index]
        what = f"label {labels[index]} at index {place} is outside 0..{count - 1}, the classes of training"
        faults.report("unknown label", origin, what, "correct the label or set data.classes")
    if not known.any():
        raise UserError(f"{origin}: no label is within 0..{count - 1}; correct the labels or set data.classes")
    return np.flatnonzero(known)


def _split(count: int, config: ImageData, origin: str) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and the validation samples, each in order."""
    held_out = max(1, round(count * config.valid_fraction))
    if held_out >= count:
        raise UserError(
            f"{origin}: {count} images leave none to train on after data.valid_fraction {config.valid_fraction}; lower it or add images"
        )
    order = permutation(_SPLIT_SEED, 0, count)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def _limited(count: int, config: ImageData) -> np.ndarray:
    return np.arange(count) if config.limit is None else np.sort(permutation(_LIMIT_SEED, 0, count)[: config.limit])
