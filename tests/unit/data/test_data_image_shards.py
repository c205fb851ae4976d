"""Tar shards and the cache of decoded pixels: the same pixels as from folders, and everything that can be wrong with an archive."""

import io
import json
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wtn_pretrain.config import validate
from wtn_pretrain.data.images import ImageData, open_images
from wtn_pretrain.errors import UserError

CLASSES = ("cat", "dog", "owl")


def png(seed: int, side: int = 12) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def samples(numbers: range, label: Callable[[int], tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """An image and its label for each number."""
    members = []
    for number in numbers:
        suffix, content = label(number)
        members += [(f"{number:04}.png", png(number)), (f"{number:04}{suffix}", content)]
    return members


LABELS: dict[str, Callable[[int], tuple[str, bytes]]] = {
    "cls": lambda number: (".cls", f"{number % 3}\n".encode()),
    "names": lambda number: (".cls", CLASSES[number % 3].encode()),
    "json": lambda number: (".json", json.dumps({"label": number % 3, "more": 1}).encode()),
}


def settings(root: Path, **more: object) -> ImageData:
    return validate(ImageData, {"source": "tar", "path": str(root), **more})


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    root = tmp_path / "folders"
    for part, numbers in (("train", range(20)), ("valid", range(20, 26))):
        for number in numbers:
            place = root / part / CLASSES[number % 3]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:04}.png").write_bytes(png(number))
    return root


@pytest.mark.parametrize("kind", ["cls", "names", "json", "class folders"])
def test_the_same_as_from_folders(tmp_path: Path, folders: Path, kind: str) -> None:
    root = tmp_path / "shards"
    if kind == "class folders":
        files = sorted(folders.rglob("*.png"))
        shard(root / "all.tar", [(str(file.relative_to(folders)), file.read_bytes()) for file in files])
    else:
        shard(root / "train-0.tar", samples(range(9), LABELS[kind]))
        shard(root / "train-1.tar", samples(range(9, 20), LABELS[kind]))
        shard(root / "valid-0.tar", samples(range(20, 26), LABELS[kind]))
    ours, theirs = open_images(settings(root)), open_images(ImageData(source="folder", path=str(folders)))
    assert ours.classes == (CLASSES if kind in ("names", "class folders") else ("0", "1", "2")) and (ours.size, ours.channels) == (12, 3)
    for one, other in ((ours.train, theirs.train), (ours.valid, theirs.valid)):
        mine, yours = (part.fetch(np.arange(len(part)), None) for part in (one, other))
        # folders come class by class
        order = np.argsort(mine["labels"].numpy(), kind="stable")
        assert (mine["labels"][order] == yours["labels"]).all() and (mine["pixels"][order] == yours["pixels"]).all()
    assert "shards/" in ours.train.pixels.images.name(3) and ".png" in ours.train.pixels.images.name(3)  # type: ignore[attr-defined]


def test_real_jpegs_in_a_tar(shared: Callable[[str], Path], tmp_path: Path) -> None:
    packed = shared("cifar10-jpeg") / "cifar10-jpeg.tar.xz"
    with lzma.open(packed) as stream:
        head = stream.read(1_000_000)
    whole = (len(head) // 512 - 1) * 512
    (tmp_path / "cifar.tar").write_bytes(head[: whole + 100])  # the beginning of test/, cut off
    with pytest.raises(UserError, match=r"cifar\.tar, .*byte \d+: (is cut off|has no end|cannot be read on).*data\.faults: skip"):
        open_images(settings(tmp_path))
    splits = open_images(settings(tmp_path, faults="skip"))
    assert splits.size == 32 and len(splits.train) > 300
    pixels = splits.train.fetch(np.arange(0, len(splits.train), 20), None)["pixels"]
    assert pixels.std() > 0.3


def link(path: Path) -> None:
    with tarfile.open(path, "a") as archive:
        member = tarfile.TarInfo("link.png")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def bomb_png(side: int) -> bytes:
    """A PNG whose header says `side` x `side` pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    head = side.to_bytes(4, "big") * 2 + b"\x08\x00\x00\x00\x00"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


CASES = [
    ("path outside the archive", [("../../up.png", png(1)), ("../../up.cls", b"1")], None, r"\.\./\.\./up\.png: its path leads out"),
    ("path outside the archive", [("/abs.png", png(1))], None, r"/abs\.png: its path leads out of the archive"),
    ("no plain file", [], link, r"link\.png: is a link, a device or sparse"),
    ("truncated archive", [], cut, r"train\.tar, .*byte \d+: (is cut off|has no end|cannot be read on)"),
    ("image without label", [("lonely.png", png(1))], None, r"lonely\.png: has no label"),
    ("unknown label", [("x.png", png(1)), ("x.cls", b"7")], None, r"x\.png: label 7 is not among the 3 classes"),
    ("unknown label", [("x.png", png(1)), ("x.cls", b"bat")], None, r"x\.png: label 'bat' is not among the 3 classes"),
    ("image without label", [("x.png", png(1)), ("x.json", b"{broken")], None, r"x\.png: has no label"),
    ("second image of a sample", [("0003.jpg", png(1))], None, r"0003\.jpg: is a second image of one sample, beside 0003\.png"),
    ("label without image", [("x.mask.png", png(1)), ("x.cls", b"1")], None, r"x\.mask\.png: sample x has a label and no image"),
]


@pytest.mark.parametrize(("kind", "more", "change", "message"), CASES, ids=[f"{case[0]} {n}" for n, case in enumerate(CASES)])
def test_bad_archives_are_named_or_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, more: list[tuple[str, bytes]], change: Callable | None, message: str
) -> None:
    (tmp_path / "classes.txt").write_text("cat\ndog\nowl\n")
    path = shard(tmp_path / "train.tar", [*samples(range(12), LABELS["cls"]), *more])
    if change is not None:
        change(path)
    with pytest.raises(UserError, match=message) as caught:
        open_images(settings(tmp_path))
    assert "\n" not in str(caught.value) and "data.faults: skip" in str(caught.value)
    splits = open_images(settings(tmp_path, faults="skip"))
    assert (7 if change is cut else 12) <= len(splits.train) + len(splits.valid) <= 12 and splits.classes == CLASSES
    assert f"skipped: {kind}, " in capsys.readouterr().err


def test_dots_in_names(tmp_path: Path) -> None:
    """In class folders every image is one; beside labels only the image of the sample's own name."""
    shard(
        tmp_path / "folders" / "all.tar", [(f"{name}/photo.{number}.png", png(number)) for name in ("cat", "dog") for number in range(20)]
    )
    splits = open_images(settings(tmp_path / "folders"))
    assert len(splits.train) + len(splits.valid) == 40 and splits.classes == ("cat", "dog")
    plain = samples(range(12), LABELS["cls"])
    masks = [(f"{number:04}.mask.png", png(99)) for number in range(12)]
    shard(tmp_path / "plain" / "a.tar", plain)
    shard(tmp_path / "masked" / "a.tar", [*masks, *plain, *((f"._{name}", b"rubbish") for name, _ in plain)])
    one, other = (open_images(settings(tmp_path / name, channels=3)).train for name in ("plain", "masked"))
    every = np.arange(len(one))
    assert len(one) == len(other) and all(
        (one.fetch(every, None)[name] == other.fetch(every, None)[name]).all() for name in ("pixels", "labels")
    )


def test_what_validates_is_named_so(tmp_path: Path) -> None:
    for number, name in enumerate(("valley/a", "testimony-0", "train", "valid-0", "val.1", "test_0", "test1")):
        shard(tmp_path / f"{name}.tar", samples(range(10 * number, 10 * number + 1 + number), LABELS["cls"]))
    splits = open_images(settings(tmp_path))
    # those of test are neither
    assert (len(splits.train), len(splits.valid)) == (1 + 2 + 3, 4 + 5)
    for name in ("valid-0", "val.1"):
        (tmp_path / f"{name}.tar").unlink()
    splits = open_images(settings(tmp_path))
    assert (len(splits.train), len(splits.valid)) == (1 + 2 + 3, 6 + 7)


def test_what_is_no_shard_is_refused(tmp_path: Path) -> None:
    for make, message in (
        (lambda: None, r"no \.tar files below it; data\.path takes"),
        (lambda: (tmp_path / "x.tar.xz").write_bytes(b""), r"x\.tar\.xz must be unpacked"),
        (lambda: shard(tmp_path / "x.tar", [("notes.txt", b"")]), "hold no labelled images"),
        (
            lambda: (tmp_path / "classes.txt").write_text("a\na\n") and shard(tmp_path / "x.tar", samples(range(3), LABELS["cls"])),
            "one twice",
        ),
    ):
        make()
        with pytest.raises(UserError, match=message):
            open_images(settings(tmp_path))


def test_bombs_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    for side in (9_000, 60_000):
        shard(tmp_path / str(side) / "x.tar", [*samples(range(6), LABELS["cls"]), ("bomb.png", bomb_png(side)), ("bomb.cls", b"1")])
        splits = open_images(settings(tmp_path / str(side), size=8, channels=3))
        with pytest.raises(UserError, match=r"x\.tar, bomb\.png: cannot be decoded \(.*(bomb|limit)"):
            for part in (splits.train, splits.valid):
                part.fetch(np.arange(len(part)), None)


@pytest.mark.parametrize("source", ["folder", "tar"])
def test_decoded_once(tmp_path: Path, folders: Path, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = folders
    if source == "tar":
        root = tmp_path / "shards"
        shard(root / "train.tar", [*samples(range(20), LABELS["names"]), ("bad.png", b"no image"), ("bad.cls", b"cat")])
        shard(root / "valid.tar", samples(range(20, 26), LABELS["names"]))
    more = {"path": str(root), "source": source, "size": 8, "channels": 3, "flip": True, "shift": 1, "crop_fraction": 0.9}
    plain = open_images(validate(ImageData, more))
    caching = validate(ImageData, {**more, "cache": str(tmp_path / "cache"), "faults": "skip"})
    once = open_images(caching)
    assert len(once.train) == 20 and len(once.valid) == 6
    seeds = np.arange(20, dtype=np.uint64)
    indices = np.arange(20)
    assert all((once.train.fetch(indices, seeds)[name] == plain.train.fetch(indices, seeds)[name]).all() for name in ("pixels", "labels"))
    card = json.loads((tmp_path / "cache" / "train" / "card.json").read_text())
    assert card["images"] == 20
    if source == "tar":
        assert card["skipped"]["counts"] == {"undecodable image": 1} and "skipped: undecodable image, 1 times" in capsys.readouterr().err
        with pytest.raises(UserError, match=r"bad\.png: cannot be decoded .*data\.faults: skip"):
            open_images(validate(ImageData, {**more, "cache": str(tmp_path / "strict")}))
    inode = (tmp_path / "cache" / "train" / "pixels").stat().st_ino
    again = open_images(caching)
    assert (tmp_path / "cache" / "train" / "pixels").stat().st_ino == inode
    assert isinstance(again.train.pixels.pixels, np.memmap)  # type: ignore[attr-defined]
    other = open_images(caching.model_copy(update={"size": 6}))
    assert other.train.fetch(np.arange(2), None)["pixels"].shape == (2, 3, 6, 6)
    assert (tmp_path / "cache" / "train" / "pixels").stat().st_ino != inode
    with pytest.raises(UserError, match="random_resized_crop would cut parts"):
        validate(ImageData, {**more, "cache": "x", "random_resized_crop": True})
    with pytest.raises(UserError, match="cache needs size and source folder"):
        validate(ImageData, {"cache": "x"})
