"""RandAugment against Pillow, random erasing, and what of them depends on what."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from wtn_pretrain.data.augment import erase
from wtn_pretrain.data.hashing import hash_keys, uniforms
from wtn_pretrain.data.images import ImageData, open_images
from wtn_pretrain.data.rand_augment import MAPS, OPERATIONS, apply, rand_augment

FILL = np.array([124, 117, 104], np.uint8)
SEEDS = hash_keys(0, np.arange(20_000))


def picture(height: int = 40, width: int = 31, channels: int = 3) -> np.ndarray:
    """uint8 [height, width, channels]: smooth colours with noise on them, which leave the ends of the range unused."""
    down, across = np.mgrid[0:height, 0:width]
    waves = [128 + 85 * np.sin(down / (5 + channel)) * np.cos(across / 7 + channel) for channel in range(channels)]
    noise = np.random.default_rng(0).integers(-20, 20, (height, width, channels))
    return np.clip(np.stack(waves, -1) + noise, 0, 255).astype(np.uint8)


def pillow(name: str, image: Image.Image, strength: float) -> Image.Image:
    """The same operation by Pillow."""
    width, height = image.size
    fill = tuple(FILL.tolist()) if image.mode == "RGB" else int(FILL[0])

    def affine(*matrix: float) -> Image.Image:
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=fill)

    if name in ("brightness", "contrast", "color", "sharpness"):
        return getattr(ImageEnhance, name.capitalize())(image).enhance(1 + 0.9 * strength)
    shear, shift = 0.3 * strength, 0.45 * strength
    made = {
        "identity": lambda: image,
        "auto_contrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "solarize": lambda: ImageOps.solarize(image, 256 * (1 - abs(strength))),
        "posterize": lambda: ImageOps.posterize(image, 8 - round(4 * abs(strength))),
        "rotate": lambda: image.rotate(30 * strength, Image.Resampling.NEAREST, fillcolor=fill),
        "shear_x": lambda: affine(1, shear, -shear * height / 2, 0, 1, 0),
        "shear_y": lambda: affine(1, 0, 0, shear, 1, -shear * width / 2),
        "translate_x": lambda: affine(1, 0, shift * width, 0, 1, 0),
        "translate_y": lambda: affine(1, 0, 0, 0, 1, shift * height),
    }
    return made[name]()


@pytest.mark.parametrize("name", OPERATIONS[1:])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("strength", [-0.9, -0.31, 0.53, 1.0])
def test_every_operation_is_that_of_pillow(name: str, channels: int, strength: float) -> None:
    image = picture(channels=channels)
    expected = np.asarray(pillow(name, Image.fromarray(image.squeeze()), strength)).reshape(image.shape)
    made = apply(name, image.transpose(2, 0, 1)[None], strength, FILL[:channels])[0].transpose(1, 2, 0)
    if name in MAPS:
        # Pillow adds up the coordinates in fixed point: where one falls near the border of two pixels it may take the other
        assert (made == expected).all(-1).mean() > 0.99
    else:
        assert np.array_equal(made, expected)
    if not (name == "color" and channels == 1):
        assert not np.array_equal(made, image)


def test_pillow_smooths_as_sharpening_assumes() -> None:
    image = Image.fromarray(picture())
    smooth = np.asarray(image.filter(ImageFilter.SMOOTH)).transpose(2, 0, 1)
    # strength of -1 / 0.9: a factor of 0, which leaves the smoothed image alone
    assert np.array_equal(apply("sharpness", picture().transpose(2, 0, 1)[None], -1 / 0.9, FILL)[0], smooth)


def test_flat_and_tiny_images_pass_through_everything() -> None:
    for shape in ((2, 3, 4, 4), (2, 1, 1, 1), (2, 3, 2, 5)):
        flat = np.full(shape, 77, np.uint8)
        for name in ("auto_contrast", "equalize", "color", "sharpness", "contrast"):
            assert np.array_equal(apply(name, flat, 0.7, FILL), flat), name
        assert rand_augment(flat, SEEDS[:2], 3, 9.0, FILL).shape == shape


def test_an_image_depends_on_its_seed_alone() -> None:
    images = np.repeat(picture(24, 24).transpose(2, 0, 1)[None], 200, 0)
    made = rand_augment(images, SEEDS[:200], 2, 9.0, FILL)
    assert np.array_equal(images, np.repeat(images[:1], 200, 0)), "the input is left alone"
    some = np.array([7, 3, 190])
    assert np.array_equal(rand_augment(images[some], SEEDS[some], 2, 9.0, FILL), made[some])
    assert len(np.unique(made.reshape(200, -1), axis=0)) > 120
    unchanged = rand_augment(images, SEEDS[:200], 1, 0.0, FILL) == images
    # at magnitude 0 all but auto-contrast and equalisation are the identity: 2 of 14
    assert 0.05 < 1 - unchanged.all((1, 2, 3)).mean() < 0.25


def test_operations_and_directions_are_drawn_evenly() -> None:
    draws = uniforms(SEEDS, 5, 4)
    counts = np.bincount(np.floor(draws[:, ::2] * len(OPERATIONS)).astype(int).ravel(), minlength=len(OPERATIONS))
    expected = 2 * len(SEEDS) / len(OPERATIONS)
    assert ((counts - expected) ** 2 / expected).sum() < 34.5  # chi-square, 13 degrees of freedom, 0.1%
    # that the function draws so: a bright corner moves left and right equally often under translation
    image = np.zeros((1, 1, 9, 9), np.uint8)
    image[0, 0, 4, 4] = 255
    made = rand_augment(np.repeat(image, 4000, 0), SEEDS[:4000], 1, 10.0, np.zeros(1, np.uint8))
    bright = made[:, 0, 4] == 255
    bright = bright[bright.sum(1) == 1]  # solarising inverts the whole row
    left, right = bright[:, :4].any(1).sum(), bright[:, 5:].any(1).sum()
    assert 80 < left < 240 and 80 < right < 240  # each of 4000 / 14 / 2 = 143 translations


def test_erasing_blanks_a_rectangle_of_the_promised_area() -> None:
    pixels = np.ones((4000, 32, 32, 3), np.float32)
    erase(pixels, SEEDS[:4000], 0.25)
    blank = pixels[..., 0] == 0
    assert np.array_equal(blank, (pixels == 0).all(-1))
    changed = blank.any((1, 2))
    assert abs(changed.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 4000)
    areas = blank[changed].mean((1, 2))
    # 2 to 33%, rounded to whole pixels
    assert areas.min() > 0.01 and areas.max() < 0.36 and abs(areas.mean() - 0.175) < 0.015
    for image in blank[changed][:100]:
        rows, columns = image.any(1), image.any(0)
        assert image.sum() == rows.sum() * columns.sum(), "a rectangle"


def test_training_images_are_augmented_and_validation_is_not() -> None:
    plain, made = open_images(ImageData(size=16)), open_images(ImageData(size=16, rand_augment=2, random_erasing=0.5))
    indices, seeds = np.arange(64), SEEDS[:64]
    assert torch.equal(plain.valid.fetch(indices, seeds)["pixels"], made.valid.fetch(indices, seeds)["pixels"])
    assert torch.equal(plain.train.fetch(indices, None)["pixels"], made.train.fetch(indices, None)["pixels"])
    one, other = plain.train.fetch(indices, seeds)["pixels"], made.train.fetch(indices, seeds)["pixels"]
    assert (one != other).flatten(1).any(1).float().mean() > 0.8
    # the fill is the mean: normalised it is 0 but for its rounding
    assert other.isfinite().all() and (other.abs() < 1 / (255 * plain.std[0])).float().mean() > 0.02


def test_batches_are_channels_last_as_they_come(tmp_path) -> None:
    for split in ("train", "valid"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(3):
                Image.fromarray(picture(24, 24)).save(tmp_path / split / name / f"{index}.png")
    splits = open_images(ImageData(source="folder", path=str(tmp_path), rand_augment=1, mixup=0.2))
    for seeds in (None, SEEDS[:4]):
        pixels = splits.train.fetch(np.arange(4), seeds)["pixels"]
        assert pixels.shape == (4, 3, 24, 24) and pixels.is_contiguous(memory_format=torch.channels_last)


def test_a_crop_of_a_large_jpeg_is_decoded_smaller(tmp_path) -> None:
    height, width = 600, 800
    down, across = np.mgrid[0:height, 0:width]
    smooth = np.stack([127 + 100 * np.sin(down / 60 + channel) * np.cos(across / 90) for channel in range(3)], -1).astype(np.uint8)
    for split in ("train", "valid"):
        (tmp_path / split / "cat").mkdir(parents=True)
        for name, options in (("a.jpg", {"quality": 95}), ("b.png", {})):
            Image.fromarray(smooth).save(tmp_path / split / "cat" / name, **options)
    train = open_images(ImageData(source="folder", path=str(tmp_path), size=32, random_resized_crop=True)).train
    seeds = np.repeat(SEEDS[:1], 2)
    jpeg, png = train.fetch(np.arange(2), seeds)["pixels"]
    # the same view of the same picture: from fewer pixels, within a few grey levels of it (one is 0.017)
    assert (jpeg - png).abs().mean() < 0.05 and (jpeg - png).abs().max() < 0.25
    opened = Image.open(io.BytesIO((tmp_path / "train" / "cat" / "a.jpg").read_bytes()))
    train.pixels._view(opened, np.full(22, 0.99))  # nearly the whole image
    assert opened.size == (100, 75)
    opened = Image.open(io.BytesIO((tmp_path / "train" / "cat" / "a.jpg").read_bytes()))
    train.pixels._view(opened, None)
    assert opened.size == (width, height), "validation sees every pixel"
