import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from wtn_pretrain.data.augment import Augment, random_box, shift_and_flip
from wtn_pretrain.data.hashing import hash_keys
from wtn_pretrain.data.image_arrays import ArrayPixels
from wtn_pretrain.data.images import ImageData, ImageSet, open_images
from wtn_pretrain.data.stream import BatchStream, batches
from wtn_pretrain.errors import UserError

WriteIdx = Callable[[Path, np.ndarray], Path]
RANDOM = np.random.default_rng(0)


def everything(dataset: ImageSet) -> dict[str, torch.Tensor]:
    return next(batches(dataset, len(dataset)))


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def make_folder(root: Path, splits: dict[str, int], size: tuple[int, int] = (12, 12), classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    for split, count in splits.items():
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = RANDOM.integers(0, 256, (*size, 3), np.uint8)
                pixels[..., number] = 255
                (root / split / name / f"{index}.png").write_bytes(png(pixels))
    return root


def write_parquet(path: Path, images: list[bytes], labels: list[object], struct: bool = True) -> None:
    cells = [{"bytes": image, "path": None} for image in images] if struct else images
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]) if struct else pyarrow.binary()
    pyarrow.parquet.write_table(pyarrow.table({"image": pyarrow.array(cells, kind), "label": pyarrow.array(labels)}), path)


@pytest.fixture
def table_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "table-cache")


def test_digits_are_normalised_and_split_without_overlap() -> None:
    splits = open_images(ImageData())
    assert (len(splits.train), len(splits.valid), splits.channels, splits.size, len(splits.classes)) == (1438, 359, 1, 8, 10)
    batch = everything(splits.train)
    assert batch["pixels"].shape == (1438, 1, 8, 8) and batch["pixels"].dtype == torch.float32 and batch["labels"].dtype == torch.int64
    assert abs(batch["pixels"].mean()) < 1e-5 and abs(batch["pixels"].std() - 1) < 1e-3
    again = open_images(ImageData())
    assert torch.equal(everything(again.valid)["pixels"], everything(splits.valid)["pixels"])
    restored = everything(splits.valid)["pixels"] * splits.std[0] + splits.mean[0]
    from sklearn.datasets import load_digits

    assert {tuple(image) for image in (restored.flatten(1) * 16).round().int().tolist()} <= {
        tuple(row) for row in load_digits().data.astype(int)
    }


def test_limit_takes_a_fixed_part_and_keeps_the_normalisation() -> None:
    whole, part, less = (open_images(ImageData(limit=limit)) for limit in (None, 100, 50))
    assert (len(part.train), len(part.valid), part.mean) == (100, len(whole.valid), whole.mean)
    large, small = ({tuple(row.tolist()) for row in everything(splits.train)["pixels"].flatten(1)} for splits in (part, less))
    assert small <= large


def test_idx_plain_and_compressed(tmp_path: Path, write_idx: WriteIdx) -> None:
    images, labels = RANDOM.integers(0, 256, (9, 6, 6), np.uint8), np.array([0, 1, 2] * 3)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte", labels)
    write_idx(tmp_path / "t10k-images.idx3-ubyte", images[:4])
    write_idx(tmp_path / "t10k-labels.idx1-ubyte", labels[:4])
    splits = open_images(ImageData(source="idx", path=str(tmp_path)))
    batch = everything(splits.valid)
    assert batch["labels"].tolist() == [0, 1, 2, 0] and splits.classes == ("0", "1", "2") and len(splits.train) == 9
    assert np.allclose((batch["pixels"][:, 0] * splits.std[0] + splits.mean[0]) * 255, images[:4], atol=1e-3)
    assert np.allclose([splits.mean[0], splits.std[0]], [images.mean() / 255, images.std() / 255])


def test_cifar_rows_are_planar_rgb(tmp_path: Path) -> None:
    rows = RANDOM.integers(0, 256, (20, 3073), np.uint8)
    rows[:, 0] %= 10
    rows[:12].tofile(tmp_path / "data_batch_1.bin")
    rows[12:16].tofile(tmp_path / "data_batch_2.bin")
    rows[16:].tofile(tmp_path / "test_batch.bin")
    splits = open_images(ImageData(source="cifar", path=str(tmp_path)))
    batch = everything(splits.train)
    assert len(splits.valid) == 4 and splits.classes[3] == "cat" and batch["labels"].tolist() == rows[:16, 0].tolist()
    pixels = batch["pixels"] * torch.tensor(splits.std).view(3, 1, 1) + torch.tensor(splits.mean).view(3, 1, 1)
    assert np.allclose(pixels * 255, rows[:16, 1:].reshape(16, 3, 32, 32), atol=1e-3)


def test_channels_and_size_can_be_changed(tmp_path: Path, write_idx: WriteIdx) -> None:
    splits = open_images(ImageData(size=16, channels=3))
    pixels = everything(splits.valid)["pixels"]
    assert pixels.shape == (359, 3, 16, 16) and torch.equal(pixels[:, 0], pixels[:, 2]) and splits.channels == 3
    colour = RANDOM.integers(0, 256, (5, 3, 8, 8), np.uint8)
    grey = ArrayPixels(colour, 1, 8).read(np.arange(5), None, None)
    expected = [np.asarray(Image.fromarray(image.transpose(1, 2, 0)).convert("L")) for image in colour]
    assert np.abs(grey[:, 0].astype(int) - np.array(expected)).max() <= 1


def test_oblong_images_are_made_square(tmp_path: Path, write_idx: WriteIdx) -> None:
    write_idx(tmp_path / "train-images-idx3-ubyte", np.repeat(RANDOM.integers(0, 256, (9, 6, 1), np.uint8), 4, axis=2))
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(9))
    for size in (4, 6):
        assert everything(open_images(ImageData(source="idx", path=str(tmp_path), size=size)).train)["pixels"].shape[2:] == (size, size)
    with pytest.raises(UserError, match=r"images of 6 x 4 pixels are not square; set data\.size"):
        open_images(ImageData(source="idx", path=str(tmp_path)))


def test_folder_decodes_in_order_with_imagenet_constants(tmp_path: Path) -> None:
    make_folder(tmp_path, {"train": 4, "valid": 2})
    splits = open_images(ImageData(source="folder", path=str(tmp_path)))
    assert splits.classes == ("cat", "dog") and (splits.channels, splits.size) == (3, 12) and splits.mean[0] == 0.485
    batch = everything(splits.valid)
    assert batch["labels"].tolist() == [0, 0, 1, 1]
    stored = np.asarray(Image.open(tmp_path / "valid" / "dog" / "0.png")).transpose(2, 0, 1)
    pixels = batch["pixels"][2] * torch.tensor(splits.std).view(3, 1, 1) + torch.tensor(splits.mean).view(3, 1, 1)
    assert np.allclose(pixels * 255, stored, atol=1e-3)


def test_folder_without_validation_is_split(tmp_path: Path) -> None:
    make_folder(tmp_path, {"train": 5})
    splits = open_images(ImageData(source="folder", path=str(tmp_path), valid_fraction=0.3))
    assert (len(splits.train), len(splits.valid)) == (7, 3)
    rows = torch.cat([everything(part)["pixels"].flatten(1) for part in (splits.train, splits.valid)])
    assert len(torch.unique(rows, dim=0)) == 10


def test_grey_and_16_bit_files(tmp_path: Path) -> None:
    images: list[np.ndarray] = [np.full((4, 4), 200, np.uint8), np.full((4, 4), 200 * 257, np.uint16)]
    for index, pixels in enumerate(images):
        (tmp_path / "train" / str(index)).mkdir(parents=True)
        (tmp_path / "train" / str(index) / "a.png").write_bytes(png(pixels))
    splits = open_images(ImageData(source="folder", path=str(tmp_path), valid_fraction=0.5))
    both = torch.cat([everything(part)["pixels"] for part in (splits.train, splits.valid)])
    assert splits.channels == 1 and np.allclose((both * splits.std[0] + splits.mean[0]) * 255, 200, atol=1e-3)


@pytest.mark.parametrize("struct", [True, False])
def test_parquet_through_datasets(tmp_path: Path, table_cache: None, struct: bool) -> None:
    images = [png(RANDOM.integers(0, 256, (6, 6, 3), np.uint8)) for _ in range(8)]
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data" / "train.parquet", images[:6], [0, 1, 2, 0, 1, 2], struct)
    write_parquet(tmp_path / "data" / "test.parquet", images[6:], [2, 0], struct)
    splits = open_images(ImageData(source="datasets", path=str(tmp_path / "data")))
    batch = everything(splits.valid)
    assert len(splits.train) == 6 and batch["labels"].tolist() == [2, 0] and splits.classes == ("0", "1", "2") and splits.size == 6
    pixels = batch["pixels"][0] * torch.tensor(splits.std).view(3, 1, 1) + torch.tensor(splits.mean).view(3, 1, 1)
    assert np.allclose(pixels * 255, np.asarray(Image.open(io.BytesIO(images[6]))).transpose(2, 0, 1), atol=1e-3)


def test_arrow_folder_with_named_classes(tmp_path: Path, table_cache: None) -> None:
    import datasets

    images = [Image.fromarray(RANDOM.integers(0, 256, (6, 6), np.uint8)) for _ in range(5)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    datasets.Dataset.from_dict({"image": images, "label": [0, 1, 0, 1, 1]}, features=features).save_to_disk(str(tmp_path / "saved"))
    splits = open_images(ImageData(source="datasets", path=str(tmp_path / "saved"), valid_fraction=0.4))
    assert splits.classes == ("cat", "dog") and (len(splits.train), len(splits.valid), splits.channels) == (3, 2, 1)


def test_string_labels_become_classes(tmp_path: Path, table_cache: None) -> None:
    (tmp_path / "data").mkdir()
    images = [png(np.full((4, 4, 3), value, np.uint8)) for value in range(4)]
    write_parquet(tmp_path / "data" / "train.parquet", images, ["dog", "cat", "dog", "cat"])
    splits = open_images(ImageData(source="datasets", path=str(tmp_path / "data"), valid_fraction=0.25))
    assert splits.classes == ("cat", "dog") and len(splits.train) == 3


def test_shift_and_flip_match_a_loop() -> None:
    pixels = RANDOM.integers(1, 256, (200, 3, 6, 7), np.uint8)
    moved = shift_and_flip(pixels, hash_keys(1, np.arange(200)), Augment(shift=2, flip=True))
    seen = set()
    for before, after in zip(pixels, moved, strict=True):
        padded = np.pad(before, ((0, 0), (2, 2), (2, 2)))
        views = {
            (dy, dx, flipped): padded[:, dy : dy + 6, dx : dx + 7][..., :: -1 if flipped else 1]
            for dy in range(5)
            for dx in range(5)
            for flipped in (0, 1)
        }
        seen.add(next(key for key, view in views.items() if (view == after).all()))
    assert len(seen) > 40  # of 50 views


def test_augmentation_follows_the_seed_and_not_the_batch() -> None:
    splits = open_images(ImageData(shift=2, flip=True))
    indices, seeds = np.arange(50), hash_keys(7, np.arange(50))
    together = splits.train.fetch(indices, seeds)["pixels"]
    alone = torch.cat([splits.train.fetch(indices[i : i + 1], seeds[i : i + 1])["pixels"] for i in range(50)])
    assert torch.equal(together, alone)
    assert together.is_contiguous() and not torch.equal(together, splits.train.fetch(indices, None)["pixels"])
    assert splits.valid.augment is None
    assert torch.equal(splits.valid.fetch(indices, seeds)["pixels"], splits.valid.fetch(indices, None)["pixels"])


def test_random_boxes_keep_area_and_aspect() -> None:
    for draws in np.random.default_rng(1).random((300, 22)):
        left, top, right, bottom = random_box(100, 60, draws)
        area, aspect = (right - left) * (bottom - top), (right - left) / (bottom - top)
        assert 0 <= left < right <= 100 and 0 <= top < bottom <= 60
        assert 0.07 < area / 6000 <= 1 and 0.7 < aspect < 1.4
    left, top, right, bottom = random_box(1000, 10, np.full(22, 0.5))
    assert (right - left, bottom - top) == (13, 10)


def test_random_resized_crop_of_real_photographs(shared: Callable[[str], Path], tmp_path: Path) -> None:
    for file in sorted(shared("imagenet-sample-20").glob("*.JPEG"))[:6]:
        for split in ("train", "valid"):
            (tmp_path / split / file.name.partition("_")[0]).mkdir(parents=True)
            (tmp_path / split / file.name.partition("_")[0] / file.name).symlink_to(file)
    config = ImageData(source="folder", path=str(tmp_path), size=48, random_resized_crop=True, crop_fraction=0.875, flip=True)
    splits = open_images(config)
    assert len(splits.classes) == 6 and splits.channels == 3
    stream, worked = BatchStream(splits.train, 6, seed=0), BatchStream(splits.train, 6, seed=0, workers=1)
    for one, other in zip(stream.iterate(0, 2), worked.iterate(0, 2), strict=True):
        assert torch.equal(one[0]["pixels"], other[0]["pixels"])
    first, second = (stream.micro_batch(step, 0) for step in (0, 1))
    assert not torch.equal(first["pixels"][first["labels"].argsort()], second["pixels"][second["labels"].argsort()])
    pixels = everything(splits.valid)["pixels"]
    assert pixels.shape == (6, 3, 48, 48) and 0.5 < pixels.std() < 2


def test_fashion_mnist_has_its_published_statistics(shared: Callable[[str], Path]) -> None:
    splits = open_images(ImageData(source="idx", path=str(shared("fashion-mnist")), shift=2, flip=True))
    assert (len(splits.train), len(splits.valid), len(splits.classes), splits.size) == (60_000, 10_000, 10, 28)
    assert round(splits.mean[0], 4) == 0.2860 and round(splits.std[0], 4) == 0.3530
    assert np.bincount(splits.valid.labels).tolist() == [1000] * 10
