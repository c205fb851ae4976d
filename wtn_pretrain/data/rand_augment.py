"""RandAugment (Cubuk et al. 2020) on whole batches of 8-bit images.

Its operations are those of Pillow, pixel for pixel but for ties of rounding in the geometric ones, and come in four kinds, each
done at once for all images that drew one of its kind: a table of 256 values, an affine map, and blends with grey and with a
smoothed image. Magnitudes grow from 0, no change (but for auto-contrast and equalisation, which have none), to 10.
"""

import numpy as np

from wtn_pretrain.data.hashing import uniforms

_RAND = 5

TABLES = ("auto_contrast", "equalize", "solarize", "posterize", "contrast", "brightness")
MAPS = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
OPERATIONS = ("identity", *TABLES, *MAPS, "color", "sharpness")

_MOST_DEGREES, _MOST_SHEAR, _MOST_TRANSLATION, _MOST_BLEND = 30.0, 0.3, 0.45, 0.9
_VALUES = np.arange(256)


def rand_augment(pixels: np.ndarray, seeds: np.ndarray, count: int, magnitude: float, fill: np.ndarray) -> np.ndarray:
    """`count` operations, drawn with replacement, one after the other on each image, each in the direction that its seed says.

    Args:
        pixels: uint8 [B, C, H, W], grey (1 channel) or RGB.
        seeds: uint64 [B].
        magnitude: 0 to 10.
        fill: uint8 [C], what comes into view beyond the edges.

    Returns:
        uint8 [B, C, H, W], a new array.
    """
    pixels = pixels.copy()
    draws = uniforms(seeds, _RAND, 2 * count)
    for drawn, direction in zip(draws[:, ::2].T, draws[:, 1::2].T, strict=True):
        operations = np.floor(drawn * len(OPERATIONS)).astype(np.int64)
        signs = np.where(direction < 0.5, -1.0, 1.0)
        for names, change in ((TABLES, _look_up), (MAPS, _move), (("color",), _saturate), (("sharpness",), _sharpen)):
            rows = np.flatnonzero(np.isin(operations, [OPERATIONS.index(name) for name in names]))
            if len(rows):
                chosen = [OPERATIONS[operation] for operation in operations[rows]]
                pixels[rows] = change(pixels[rows], chosen, signs[rows] * magnitude / 10, fill)
    return pixels


def apply(name: str, pixels: np.ndarray, strength: float, fill: np.ndarray) -> np.ndarray:
    """One operation on all of `pixels` uint8 [B, C, H, W]: `strength` from -1 to 1, a tenth of a magnitude with its direction."""
    change = _look_up if name in TABLES else _move if name in MAPS else {"color": _saturate, "sharpness": _sharpen}[name]
    return change(pixels, [name] * len(pixels), np.full(len(pixels), strength), fill)


def _look_up(pixels: np.ndarray, names: list[str], strengths: np.ndarray, fill: np.ndarray) -> np.ndarray:
    """Operations that replace each value by another, whatever stands beside it."""
    result = np.empty(pixels.shape, np.uint8)
    for image, name, strength, out in zip(pixels, names, strengths, result, strict=True):
        if name in ("auto_contrast", "equalize"):
            tables = [_table_of_counts(name, np.bincount(channel.ravel(), minlength=256)) for channel in image]
        else:
            tables = [_table(name, strength, image)] * len(image)
        for channel, table, place in zip(image, tables, out, strict=True):
            # translating bytes is several times faster than indexing
            place[:] = np.frombuffer(channel.tobytes().translate(table.tobytes()), np.uint8).reshape(place.shape)
    return result


def _table(name: str, strength: float, image: np.ndarray) -> np.ndarray:
    """uint8 [256] of an operation with a magnitude."""
    if name == "solarize":
        return np.where(256 * (1 - abs(strength)) > _VALUES, _VALUES, 255 - _VALUES).astype(np.uint8)
    if name == "posterize":
        bits = 8 - round(4 * abs(strength))
        return (_VALUES & (256 - (1 << (8 - bits)))).astype(np.uint8)
    level = 0 if name == "brightness" else int(_grey(image[None]).mean() + 0.5)
    return _blend(np.full(256, level), _VALUES, np.float32(1 + _MOST_BLEND * strength))


def _table_of_counts(name: str, counts: np.ndarray) -> np.ndarray:
    """uint8 [256] of an operation that depends on how often each value occurs, int64 [256]."""
    present = np.flatnonzero(counts)
    low, high = present[0], present[-1]
    if name == "auto_contrast":
        if low == high:
            return _VALUES.astype(np.uint8)
        scale = 255.0 / (high - low)
        return np.clip((_VALUES * scale - low * scale).astype(np.int64), 0, 255).astype(np.uint8)
    step = (counts.sum() - counts[high]) // 255
    if low == high or step == 0:
        return _VALUES.astype(np.uint8)
    below = np.cumsum(counts) - counts
    return np.clip((step // 2 + below) // step, 0, 255).astype(np.uint8)


def _move(pixels: np.ndarray, names: list[str], strengths: np.ndarray, fill: np.ndarray) -> np.ndarray:
    """Operations that take each pixel from another place: the nearest one, since that is exact on every machine and costs least."""
    count, channels, height, width = pixels.shape
    # where the centre of each pixel, seen from that of the image, comes from
    maps = np.tile(np.array([[1.0, 0, 0], [0, 1, 0]]), (count, 1, 1))
    for matrix, name, strength in zip(maps, names, strengths, strict=True):
        if name == "rotate":
            angle = np.deg2rad(_MOST_DEGREES * strength)
            matrix[:, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        elif name == "shear_x":
            matrix[0, 1] = _MOST_SHEAR * strength
        elif name == "shear_y":
            matrix[1, 0] = _MOST_SHEAR * strength
        elif name == "translate_x":
            matrix[0, 2] = _MOST_TRANSLATION * strength * width
        else:
            matrix[1, 2] = _MOST_TRANSLATION * strength * height
    across, down = np.arange(width) + 0.5 - width / 2, np.arange(height) + 0.5 - height / 2
    source = maps[:, :, 0, None, None] * across + maps[:, :, 1, None, None] * down[:, None] + maps[:, :, 2, None, None]
    x = np.floor(source[:, 0] + width / 2).astype(np.int32)
    y = np.floor(source[:, 1] + height / 2).astype(np.int32)
    outside = (x < 0) | (x >= width) | (y < 0) | (y >= height)
    place = np.where(outside, 0, y * width + x)
    result = np.empty(pixels.shape, np.uint8)
    for row in range(count):
        for channel in range(channels):
            np.take(pixels[row, channel].ravel(), place[row], out=result[row, channel], mode="clip")
            result[row, channel][outside[row]] = fill[channel]
    return result


def _saturate(pixels: np.ndarray, names: list[str], strengths: np.ndarray, fill: np.ndarray) -> np.ndarray:
    return _blend(_grey(pixels)[:, None], pixels, _factors(strengths))


def _sharpen(pixels: np.ndarray, names: list[str], strengths: np.ndarray, fill: np.ndarray) -> np.ndarray:
    smooth = pixels.copy()
    height, width = pixels.shape[2:]
    if min(height, width) > 2:
        wide = pixels.astype(np.int32)
        total = 4 * wide[:, :, 1:-1, 1:-1]
        for down in range(3):
            for across in range(3):
                total = total + wide[:, :, down : height - 2 + down, across : width - 2 + across]
        # the mean with the centre five-fold, rounded; edges stay, as in Pillow's SMOOTH
        smooth[:, :, 1:-1, 1:-1] = (2 * total + 13) // 26
    return _blend(smooth, pixels, _factors(strengths))


def _factors(strengths: np.ndarray) -> np.ndarray:
    return (1 + _MOST_BLEND * strengths).astype(np.float32)[:, None, None, None]


def _blend(plain: np.ndarray, pixels: np.ndarray, factor: np.ndarray | np.float32) -> np.ndarray:
    """uint8: `plain` at factor 0, `pixels` at 1, beyond them on the same line, in fp32 and cut off as Pillow does."""
    low, high = plain.astype(np.float32), pixels.astype(np.float32)
    return np.clip(low + factor * (high - low), 0, 255).astype(np.uint8)


def _grey(pixels: np.ndarray) -> np.ndarray:
    """[B, H, W] luma (ITU-R 601) of [B, 1 or 3, H, W], rounded as Pillow does."""
    if pixels.shape[1] == 1:
        return pixels[:, 0]
    red, green, blue = pixels.astype(np.int32).transpose(1, 0, 2, 3)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16
