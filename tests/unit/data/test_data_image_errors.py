import gzip
import io
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from wtn_pretrain.config import validate
from wtn_pretrain.data.images import ImageData, open_images
from wtn_pretrain.errors import UserError

WriteIdx = Callable[[Path, np.ndarray], Path]


def refused(message: str, **settings: object) -> None:
    """Opens and reads everything; the error must be one line that matches `message`."""
    with pytest.raises(UserError, match=message) as caught:
        splits = open_images(ImageData(**settings))  # type: ignore[arg-type]
        for part in (splits.train, splits.valid):
            part.fetch(np.arange(len(part)), None)
    assert "\n" not in str(caught.value) and ";" in str(caught.value)


def png(size: tuple[int, int] = (8, 8)) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for place in ("train/cat", "train/dog", "valid/cat", "valid/dog"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "0.png").write_bytes(png())
    return tmp_path


@pytest.fixture
def idx(tmp_path: Path, write_idx: WriteIdx) -> Path:
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((6, 4, 4)))
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.array([0, 1, 2, 0, 1, 2]))
    write_idx(tmp_path / "t10k-images-idx3-ubyte", np.zeros((2, 4, 4)))
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.array([0, 1]))
    return tmp_path


@pytest.mark.parametrize("source", ["folder", "idx", "cifar"])
def test_missing_or_empty_path(tmp_path: Path, source: str) -> None:
    refused(r"absent: no such folder; set data\.path", source=source, path=str(tmp_path / "absent"))
    refused(f"{tmp_path}: no .*data.path", source=source, path=str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "idx"}, "path is missing, which source idx needs"),
        ({"random_resized_crop": True, "size": 8}, "random_resized_crop needs size and source folder, datasets or tar"),
        ({"source": "folder", "path": "x", "crop_fraction": 0.875}, "crop_fraction needs size"),
        ({"channels": 2}, "channels"),
        ({"shfit": 2}, "did you mean shift"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(ImageData, settings)


def test_shift_beyond_the_image() -> None:
    refused(r"data\.shift 8 can push an image of 8 x 8 pixels out of sight; lower it", shift=8)


def test_classes_that_contradict_the_source() -> None:
    refused(r"data\.classes 12: the source has 10 named classes", classes=12)


@pytest.mark.parametrize("content", [b"", b"no image at all", png()[:90], png()[:-30]])
def test_corrupt_image_is_named(folder: Path, content: bytes) -> None:
    (folder / "train" / "dog" / "1.png").write_bytes(content)
    refused(r"train/dog/1\.png: cannot be decoded \(.+\); repair or remove it", source="folder", path=str(folder), size=8)
    if len(content) < 90:
        refused(r"train/dog/1\.png: cannot be decoded", source="folder", path=str(folder))


def test_unequal_sizes_without_size(folder: Path) -> None:
    (folder / "train" / "dog" / "1.png").write_bytes(png((8, 9)))
    refused(r"dog/1\.png: 9 x 8 pixels where 8 x 8 was expected; set data\.size", source="folder", path=str(folder))
    (folder / "train" / "dog" / "1.png").unlink()
    (folder / "valid" / "cat" / "0.png").write_bytes(png((9, 9)))
    (folder / "valid" / "dog" / "0.png").write_bytes(png((9, 9)))
    refused(r"valid/cat/0\.png: images of another size than the 8 x 8 of training", source="folder", path=str(folder))


def test_class_folders_that_do_not_fit(folder: Path) -> None:
    (folder / "valid" / "bird").mkdir()
    (folder / "valid" / "bird" / "0.png").write_bytes(png())
    refused(r"valid/bird: class bird is not among the 2 of .*train", source="folder", path=str(folder))
    (folder / "train" / "bird").mkdir()
    refused(r"train/bird: no images .*; fill the class folder or remove it", source="folder", path=str(folder))


def test_one_image_cannot_be_split(tmp_path: Path) -> None:
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "0.png").write_bytes(png())
    refused("1 images leave none to train on", source="folder", path=str(tmp_path))


def test_damaged_idx(idx: Path, write_idx: WriteIdx) -> None:
    images = idx / "train-images-idx3-ubyte"
    whole = images.read_bytes()
    for content, message in (
        (whole[:-3], r"109 bytes where its header \(shape \[6, 4, 4\]\) promises 112"),
        (b"\x89PNG" + whole[4:], "not an IDX file of unsigned bytes"),
        (whole[:7], "7 bytes where its header"),
        (b"", "not an IDX file"),
    ):
        images.write_bytes(content)
        refused(f"train-images-idx3-ubyte: {message}", source="idx", path=str(idx))
    images.unlink()
    refused(r"train-labels-idx1-ubyte: its images file is missing", source="idx", path=str(idx))
    write_idx(idx / "train-images-idx3-ubyte.gz", np.zeros((6, 4, 4)))
    packed = idx / "train-images-idx3-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:-12])
    refused(r"train-images-idx3-ubyte\.gz: cannot be read", source="idx", path=str(idx))


def test_idx_bombs_are_not_unpacked(idx: Path) -> None:
    """A header is believed up to a point, and nothing behind what it promises is read."""
    images = idx / "train-images-idx3-ubyte"
    whole = images.read_bytes()
    images.unlink()
    packed = idx / "train-images-idx3-ubyte.gz"
    packed.write_bytes(gzip.compress(whole + bytes(100_000_000)))
    tracemalloc.start()
    refused(r"more than 112 bytes where its header \(shape \[6, 4, 4\]\) promises 112", source="idx", path=str(idx))
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    packed.write_bytes(gzip.compress(whole[:4] + (6).to_bytes(4, "big") + (1 << 20).to_bytes(4, "big") * 2 + bytes(1000)))
    refused(r"bytes whose header .* promises 6597069766656, as a decompression bomb does", source="idx", path=str(idx))


def test_idx_labels_that_do_not_fit(idx: Path, write_idx: WriteIdx) -> None:
    write_idx(idx / "t10k-labels-idx1-ubyte", np.array([0, 7]))
    refused(r"t10k-labels-idx1-ubyte: label 7 at index 1 is outside 0\.\.2", source="idx", path=str(idx))
    write_idx(idx / "t10k-labels-idx1-ubyte", np.array([0, 1, 1]))
    refused(r"t10k-labels-idx1-ubyte: 3 labels for the 2 images", source="idx", path=str(idx))
    write_idx(idx / "t10k-labels-idx1-ubyte", np.array([0, 1]))
    refused(r"train-labels-idx1-ubyte: label 2 at index 2 is outside 0\.\.1", source="idx", path=str(idx), classes=2)


def test_damaged_cifar(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(3073 * 2 - 1))
    refused(r"data_batch_1\.bin: 6145 bytes are no whole number of 3073-byte rows", source="cifar", path=str(tmp_path))
    rows = np.zeros((3, 3073), np.uint8)
    rows[1, 0] = 11
    rows.tofile(tmp_path / "data_batch_1.bin")
    refused(r"data_batch_1\.bin: label 11 at index 1 is outside 0\.\.9", source="cifar", path=str(tmp_path))


def test_tables_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "table-cache")
    refused(r"absent: `datasets` cannot open it \(.+\); give a folder", source="datasets", path=str(tmp_path / "absent"))

    def table(name: str, images: list[bytes], labels: list[object]) -> str:
        (tmp_path / name).mkdir()
        cells = pyarrow.array([{"bytes": image, "path": None} for image in images])
        pyarrow.parquet.write_table(pyarrow.table({"image": cells, "label": pyarrow.array(labels)}), tmp_path / name / "train.parquet")
        return str(tmp_path / name)

    good = table("good", [png()] * 3, [0, 1, 0])
    refused(r"no column picture, only image, label; set data\.image_column", source="datasets", path=good, image_column="picture")
    refused(r"column label holds no images .*; set data\.image_column", source="datasets", path=good, image_column="label")
    refused(r"label -1 at index 1 is outside 0\.\.0", source="datasets", path=table("negative", [png()] * 3, [0, -1, 0]))
    refused(r"label 0\.0 at row 0 is neither", source="datasets", path=table("real", [png()] * 3, [0.0, 0.5, 1.0]), label_column="label")
    refused(r"split train, row 2: cannot be decoded", source="datasets", path=table("corrupt", [png(), png(), b"x"], [0, 1, 0]), size=8)
