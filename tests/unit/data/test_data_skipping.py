"""`data.faults`: what cannot be read ends a start with a line, or is left out, counted and noted; what is left gives the same batches."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from wtn_pretrain.config import validate
from wtn_pretrain.data.images import ImageData, open_images
from wtn_pretrain.data.stream import BatchStream
from wtn_pretrain.data.text import TextData, open_text
from wtn_pretrain.errors import UserError

WriteIdx = Callable[[Path, np.ndarray], Path]


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 12, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def folder(root: Path, broken: bool) -> dict[str, Any]:
    for number in range(24):
        place = root / ("train" if number < 18 else "valid") / ("cat", "dog")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:02}.png").write_bytes(png(number))
    if broken:
        (root / "train" / "cat" / "01.png").write_bytes(png(3)[:-60])
        (root / "valid" / "dog" / "00.png").write_bytes(b"no image")
        (root / "valid" / "bat").mkdir()
        for name in ("0.png", "1.png"):
            (root / "valid" / "bat" / name).write_bytes(png(1))
    return {"source": "folder", "path": str(root), "channels": 3}


def parquet(root: Path, broken: bool) -> dict[str, Any]:
    for part, numbers in (("train", range(18)), ("validation", range(18, 24))):
        images: list[bytes] = [png(number) for number in numbers]
        labels: list[str | None] = [("cat", "dog")[number % 2] for number in numbers]
        if broken:
            images[2:2] = [png(9)[:-60]]
            labels[2:2] = ["dog"]
            images.append(png(0))
            labels.append(None if part == "train" else "bat")
        root.mkdir(exist_ok=True)
        cells = pyarrow.array([{"bytes": image, "path": None} for image in images])
        pyarrow.parquet.write_table(pyarrow.table({"image": cells, "label": pyarrow.array(labels)}), root / f"{part}.parquet")
    return {"source": "datasets", "path": str(root), "channels": 3}


SOURCES = [
    (folder, {"undecodable image": 2, "unknown label": 2}, r"valid/bat: class bat is not among the 2"),
    (parquet, {"undecodable image": 2, "unknown label": 2}, r"split train: label None at row 19 is neither"),
]


@pytest.mark.parametrize(("make", "counts", "message"), SOURCES, ids=["folder", "datasets"])
@pytest.mark.parametrize("size", [None, 8])
def test_images_that_cannot_be_read_are_left_out_before_training(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path, bool], dict[str, Any]],
    counts: dict[str, int],
    message: str,
    size: int | None,
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "table-cache")
    whole = open_images(validate(ImageData, {**make(tmp_path / "whole", False), "size": size}))
    broken = {**make(tmp_path / "broken", True), "size": size}
    with pytest.raises(UserError, match=message + r".*data\.faults: skip"):
        open_images(validate(ImageData, broken))
    splits = open_images(validate(ImageData, {**broken, "faults": "skip"}), tmp_path / "data")
    said = capsys.readouterr().err
    for kind, count in counts.items():
        assert f"skipped: {kind}, {count} times, such as " in said
    cards = [json.loads((tmp_path / "data" / "images" / part / "card.json").read_text()) for part in ("train", "valid")]
    assert [card["skipped"]["counts"] for card in cards] == [{"undecodable image": 1}] * 2 and cards[0]["images"] == 18
    # what is left is what there would be without the broken ones: the same batches, step by step
    for part in ("train", "valid"):
        one, other = (BatchStream(getattr(found, part), 4, seed=1) for found in (whole, splits))
        for step in range(7):
            mine, theirs = one.micro_batch(step, 0), other.micro_batch(step, 0)
            assert all((mine[name] == theirs[name]).all() for name in ("pixels", "labels"))
    # and a later start reads the card instead of every image
    monkeypatch.setattr("wtn_pretrain.data.image_scan._scan", None)
    again = open_images(validate(ImageData, {**broken, "faults": "skip"}), tmp_path / "data")
    assert len(again.train) == 18 and f"undecodable image, {counts['undecodable image']} times" in capsys.readouterr().err


def test_labels_of_arrays_are_left_out(tmp_path: Path, write_idx: WriteIdx, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 4, 4), np.uint8)
    write_idx(tmp_path / "train-images-idx3-ubyte", pixels)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.array([0, 1, 2, 0, 1, 2, 7, 0, 1]))
    write_idx(tmp_path / "t10k-images-idx3-ubyte", pixels[:3])
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.array([2, 9, 0]))
    splits = open_images(ImageData(source="idx", path=str(tmp_path), classes=3, faults="skip"))
    assert splits.train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1] and splits.valid.labels.tolist() == [2, 0]
    assert (splits.train.pixels.pixels[:, 0] == np.delete(pixels, 6, axis=0)).all()  # type: ignore[attr-defined]
    assert "skipped: unknown label, 2 times, such as " in capsys.readouterr().err
    rows = np.random.default_rng(0).integers(0, 256, (6, 3073), np.uint8)
    rows[:, 0] = [0, 1, 11, 2, 3, 4]
    (tmp_path / "cifar").mkdir()
    rows.tofile(tmp_path / "cifar" / "data_batch_1.bin")
    rows[3:].tofile(tmp_path / "cifar" / "test_batch.bin")
    splits = open_images(ImageData(source="cifar", path=str(tmp_path / "cifar"), faults="skip"))
    assert splits.train.labels.tolist() == [0, 1, 2, 3, 4]


def test_text_that_cannot_be_read_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "table-cache")
    good = [f"Line number {number} of a text about rivers and bread." for number in range(600)]
    (tmp_path / "good.txt").write_text("\n\n".join(good))
    wrong = [line.encode() for line in good]
    wrong[300:300] = [b"caf\xe9 is no UTF-8", b"\x00 nor is this"]
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "good.txt").write_bytes(b"\n\n".join(wrong))
    (tmp_path / "wrong" / "empty.txt").write_bytes(b"\n")
    common = {"source": "files", "vocab_size": 256, "sequence_length": 16}
    one = open_text(validate(TextData, {**common, "paths": [str(tmp_path / "good.txt")]}), tmp_path / "one")
    with pytest.raises(UserError, match=r"empty\.txt: holds no text; remove it .*data\.faults: skip"):
        open_text(validate(TextData, {**common, "paths": [str(tmp_path / "wrong")]}), tmp_path / "two")
    other = open_text(validate(TextData, {**common, "paths": [str(tmp_path / "wrong")], "faults": "skip"}), tmp_path / "two")
    assert all((getattr(one, part).tokens == getattr(other, part).tokens).all() for part in ("train", "valid"))
    assert len(one.train) > 100
    # read three times and more, counted once
    counts = json.loads((tmp_path / "two" / "tokens.json").read_text())["skipped"]["train"]["counts"]
    assert counts == {"NUL byte": 1, "empty file": 1, "invalid UTF-8": 1}
    assert "data: training text: skipped: invalid UTF-8, 1 times, such as " in capsys.readouterr().err
    rows: list[str | None] = [" ".join(good[first : first + 5]) for first in range(0, 600, 5)]
    rows.insert(7, None)
    (tmp_path / "rows").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "rows" / "train.parquet")
    table = {**common, "source": "datasets", "paths": [str(tmp_path / "rows")]}
    with pytest.raises(UserError, match="row 7 of column text holds NoneType, not text; set data.column"):
        open_text(validate(TextData, table), tmp_path / "three")
    open_text(validate(TextData, {**table, "faults": "skip"}), tmp_path / "three")
    assert json.loads((tmp_path / "three" / "tokens.json").read_text())["skipped"]["train"]["counts"] == {"no text": 1}
    with pytest.raises(UserError, match="faults goes with source files or datasets, not pydoc"):
        validate(TextData, {"faults": "skip"})
