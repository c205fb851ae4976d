"""Images in tar files, read where they lie: WebDataset's layout, or class folders in a tar.

A sample is the members whose names are alike up to the first dot of the last part: an image, whose suffix is all that follows, and its
label in `.cls` (a number or a name) or in `.json` under "label" or "cls". Further members, such as `000.mask.png` beside `000.png`, are
not looked at. Where no sample of the first shard has a label, each image is a sample and the folder that it lies in is its class.
"""

import io
import json
import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from wtn_pretrain.data.faults import Faults
from wtn_pretrain.data.image_files import SUFFIXES
from wtn_pretrain.errors import UserError

_HELD_OUT = re.compile(r"(valid|val|validation|test)(?=$|[\d._-])")
_LABELS = (".cls", ".json")
_LARGEST_LABEL = 1 << 20


@dataclass(frozen=True)
class TarImages:
    """Members of uncompressed tar files."""

    shards: tuple[Path, ...]
    shard: np.ndarray  # int32 [N]
    offsets: np.ndarray  # int64 [N]: first byte of each image in its shard
    sizes: np.ndarray  # int64 [N]
    names: np.ndarray  # bytes [N]

    def __len__(self) -> int:
        return len(self.names)

    def open(self, index: int) -> Image.Image:
        with self.shards[self.shard[index]].open("rb") as file:
            raw = os.pread(file.fileno(), int(self.sizes[index]), int(self.offsets[index]))
        return Image.open(io.BytesIO(raw))

    def name(self, index: int) -> str:
        return f"{self.shards[self.shard[index]]}, {os.fsdecode(self.names[index])}"


class _Sample(NamedTuple):
    shard: int
    name: str
    offset: int
    size: int
    label: Any  # int, str, or None where there is none


def read_shards(
    root: Path, classes: int | None, faults: Faults
) -> tuple[TarImages, np.ndarray, TarImages | None, np.ndarray | None, tuple[str, ...]]:
    """Training images and labels int64 [N] of the tar files below `root`, those of validation or None, and the class names in order.

    Validation shards are those whose names, or whose folders' names, are valid, val, validation or test up to a digit, -, _ or a dot;
    where there are both, those of test are left out. `root`/classes.txt, one name a line, says the classes; else they are the names in
    training, or where labels are numbers as many as `classes` or the largest say.
    """
    shards = sorted(root.rglob("*.tar"))
    if not shards:
        packed = next((path for path in sorted(root.rglob("*.tar.*")) if path.suffix in (".gz", ".xz", ".bz2", ".zst")), None)
        remedy = (
            f"{packed.name} must be unpacked to .tar, as images are read from the middle"
            if packed
            else "data.path takes the folder of the shards"
        )
        raise UserError(f"{root}: no .tar files below it; {remedy}")
    train, valid = _parted(shards, [next(filter(None, map(_held_out, shard.relative_to(root).parts)), None) for shard in shards])
    if not train:
        raise UserError(f"{root}: all of its shards are named as validation ones; name those to train on otherwise, such as train-000.tar")
    # shards may hold both, in folders of their own
    samples, others = _divided(_samples(train, faults)), _samples(valid, faults)
    if not samples[0]:
        raise UserError(f"{root}: its training shards hold no labelled images; give an image and a .cls or .json of the same name")
    names = _class_names(root, samples[0], classes)
    known = {name: number for number, name in enumerate(names)}
    found = _kept(tuple(train), samples[0], known, faults)
    held = _kept(tuple(valid), others, known, faults) if valid else _kept(tuple(train), samples[1], known, faults)
    return *found, *(held if len(held[0]) else (None, None)), names


class _Scan(NamedTuple):
    """What a shard holds that matters here, in its order."""

    images: list[tuple[str, int, int]]
    """Name, first byte and size of each image."""
    labels: dict[str, Any]
    """By sample."""


def _held_out(name: str) -> str | None:
    """Which split a name says that something belongs to: valid, test, or None for training."""
    found = _HELD_OUT.match(name)
    return None if found is None else "test" if found[1] == "test" else "valid"


def _parted(items: list[Any], splits: list[str | None]) -> tuple[list[Any], list[Any]]:
    """The items of training and those of validation; of test only where there are none of valid."""
    chosen = "valid" if "valid" in splits else "test"
    return tuple([item for item, split in zip(items, splits, strict=True) if split == wanted] for wanted in (None, chosen))  # type: ignore[return-value]


def _samples(shards: list[Path], faults: Faults) -> list[_Sample]:
    found: list[_Sample] = []
    by_folder: bool | None = None
    for number, shard in enumerate(shards):
        scan = _scan(shard, faults)
        if by_folder is None and scan.images:
            by_folder = not any(_key(name)[0] in scan.labels for name, _, _ in scan.images)
        here: dict[str, _Sample] = {}
        others: dict[str, str] = {}
        for name, offset, size in scan.images:
            key, suffix = _key(name)
            if by_folder:
                key = name
            elif suffix not in SUFFIXES:
                # 000.mask.png is something else of sample 000
                others.setdefault(key, name)
                continue
            label = PurePosixPath(name).parent.name or None if by_folder else scan.labels.get(key)
            if key in here:
                what = f"is a second image of one sample, beside {here[key].name}" if not by_folder else "is there twice"
                faults.report("second image of a sample", f"{shard}, {name}", what)
            elif label is None:
                faults.report("image without label", f"{shard}, {name}", "has no label (.cls or .json of the same name)")
            else:
                here[key] = _Sample(number, name, offset, size, label)
        for key, name in others.items():
            if key in scan.labels and key not in here:
                faults.report("label without image", f"{shard}, {name}", f"sample {key} has a label and no image of its own name")
        found += here.values()
    return found


def _key(name: str) -> tuple[str, str]:
    """The sample of a member, and what follows its first dot: lower case, with the dot."""
    path = PurePosixPath(name)
    stem, dot, rest = path.name.partition(".")
    return str(path.parent / stem), (dot + rest).lower()


def _scan(shard: Path, faults: Faults) -> _Scan:
    found = _Scan([], {})
    end = shard.stat().st_size
    position = 0
    try:
        with tarfile.open(shard, "r:") as archive, shard.open("rb") as file:
            for member in archive:
                position = member.offset
                where = f"{shard}, {member.name}"
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
                    faults.report("path outside the archive", where, "its path leads out of the archive")
                    continue
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    faults.report("no plain file", where, "is a link, a device or sparse, which shards do not hold")
                    continue
                if member.offset_data + member.size > end:
                    faults.report("truncated archive", f"{where}, byte {position}", "is cut off; the archive is truncated")
                    break
                if path.name.startswith("."):
                    continue  # what macOS and editors leave behind
                key, rest = _key(member.name)
                if path.suffix.lower() in SUFFIXES:
                    found.images.append((member.name, member.offset_data, member.size))
                elif rest in _LABELS:
                    label = _label(os.pread(file.fileno(), min(member.size, _LARGEST_LABEL), member.offset_data), rest)
                    if label is not None:
                        found.labels[key] = label
            else:
                # where members end, an archive that is whole has blocks of zeros
                if os.pread(file.fileno(), tarfile.BLOCKSIZE, archive.offset) != bytes(tarfile.BLOCKSIZE):
                    faults.report("truncated archive", f"{shard}, byte {archive.offset}", "has no end; the archive is truncated")
    except (tarfile.TarError, OSError, EOFError) as error:
        faults.report("truncated archive", f"{shard}, after byte {position}", f"cannot be read on ({error})")
    return found


def _label(raw: bytes, suffix: str) -> int | str | None:
    try:
        text = raw.decode().strip()
        if suffix == ".json":
            record = json.loads(text)
            found = record.get("label", record.get("cls")) if isinstance(record, dict) else record
            return found if isinstance(found, int | str) and not isinstance(found, bool) else None
    except (UnicodeDecodeError, ValueError):
        return None
    return int(text) if text.lstrip("-").isdecimal() else text or None


def _divided(samples: list[_Sample]) -> tuple[list[_Sample], list[_Sample]]:
    """Samples of training and of validation, by the first folder of their names."""
    train, valid = _parted(samples, [_held_out(PurePosixPath(sample.name).parts[0]) if "/" in sample.name else None for sample in samples])
    return (train, valid) if train else (samples, [])


def _class_names(root: Path, samples: list[_Sample], classes: int | None) -> tuple[str, ...]:
    listed = root / "classes.txt"
    if listed.is_file():
        names = tuple(line.strip() for line in listed.read_text(encoding="utf-8").splitlines() if line.strip())
        if len(set(names)) != len(names) or not names:
            raise UserError(f"{listed}: names no class, or one twice; give one name a line")
        return names
    if all(isinstance(sample.label, int) for sample in samples):
        return tuple(str(number) for number in range(classes or max(sample.label for sample in samples) + 1))
    return tuple(sorted({str(sample.label) for sample in samples}))


def _kept(shards: tuple[Path, ...], samples: list[_Sample], known: dict[str, int], faults: Faults) -> tuple[TarImages, np.ndarray]:
    labels: list[int] = []
    kept: list[_Sample] = []
    for sample in samples:
        label = sample.label if isinstance(sample.label, int) else known.get(sample.label, -1)
        if not 0 <= label < len(known):
            where = f"{shards[sample.shard]}, {sample.name}"
            faults.report("unknown label", where, f"label {sample.label!r} is not among the {len(known)} classes")
            continue
        kept.append(sample)
        labels.append(label)
    columns = ([sample[place] for sample in kept] for place in (0, 2, 3))
    shard, offsets, sizes = (np.array(values, np.int64) for values in columns)
    names = np.array([os.fsencode(sample.name) for sample in kept])
    return TarImages(shards, shard.astype(np.int32), offsets, sizes, names), np.array(labels, np.int64)
