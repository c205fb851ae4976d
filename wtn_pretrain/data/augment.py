"""Random views of images, drawn from one seed a sample for the whole batch at once."""

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from wtn_pretrain.data.hashing import uniforms

_SHIFT, _FLIP, _CROP, _ERASE = 1, 2, 3, 4
_CROP_ATTEMPTS = 10


@dataclass(frozen=True)
class Augment:
    """What is random in a training image."""

    shift: int = 0
    """Largest shift in pixels along each axis; what comes into view is black (the pad-and-crop of CIFAR)."""
    flip: bool = False
    """Mirror left to right with probability one half."""
    random_resized_crop: bool = False
    """A crop of 8 to 100% of the area and aspect 3/4 to 4/3, resized (ImageNet)."""
    operations: int = 0
    """Operations of RandAugment on each image."""
    magnitude: float = 9.0
    """Their strength, of 10."""
    erase: float = 0.0
    """Probability that a rectangle is blanked."""
    mixup: float = 0.0
    """Alpha of mixup; 0: off."""
    cutmix: float = 0.0
    """Alpha of CutMix; 0: off."""

    def __bool__(self) -> bool:
        return bool(self.shift or self.flip or self.random_resized_crop or self.operations or self.erase or self.mixes)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others."""
        return bool(self.mixup or self.cutmix)


def shift_and_flip(pixels: np.ndarray, seeds: np.ndarray, augment: Augment) -> np.ndarray:
    """`pixels` uint8 [B, C, H, W] shifted and mirrored as each of the `seeds` [B] says; same shape and dtype."""
    if not augment.shift and not augment.flip:
        return pixels
    mirrored = uniforms(seeds, _FLIP, 1)[:, 0] < 0.5 if augment.flip else np.zeros(len(seeds), bool)
    if not augment.shift:
        # in the layout that the pixels have: large images are decoded channels last
        turned = pixels.copy(order="K")
        turned[mirrored] = pixels[mirrored, :, :, ::-1]
        return turned
    count, channels, height, width = pixels.shape
    pad = augment.shift
    down, across = np.floor(uniforms(seeds, _SHIFT, 2) * (2 * pad + 1)).astype(np.int64).T
    padded = np.zeros((count, channels, height + 2 * pad, width + 2 * pad), np.uint8)
    padded[:, :, pad : pad + height, pad : pad + width] = pixels
    padded[mirrored] = padded[mirrored, :, :, ::-1]
    # one copy of windows; torch's gather is no faster and stalls where its threads share cores with others
    windows = sliding_window_view(padded, (height, width), axis=(2, 3))
    return windows[np.arange(count), :, down, across]


def erase(pixels: np.ndarray, seeds: np.ndarray, probability: float) -> None:
    """Random erasing (Zhong et al. 2020): with `probability` a rectangle of each image becomes the mean colour, in place.

    It covers 2 to 33% of the image at a log-uniform aspect of 0.3 to 3.3, as far as that fits. `pixels` float32 [B, H, W, C],
    normalised, so that the mean is 0; `seeds` uint64 [B].
    """
    height, width = pixels.shape[1:3]
    chance, area, aspect, down, across = uniforms(seeds, _ERASE, 5).T
    covered = height * width * (0.02 + 0.31 * area)
    aspect = np.exp(np.log(0.3) + (np.log(3.3) - np.log(0.3)) * aspect)
    tall = np.clip(np.rint(np.sqrt(covered * aspect)), 1, height).astype(np.int64)
    wide = np.clip(np.rint(np.sqrt(covered / aspect)), 1, width).astype(np.int64)
    top = np.floor(down * (height - tall + 1)).astype(np.int64)
    left = np.floor(across * (width - wide + 1)).astype(np.int64)
    for row in np.flatnonzero(chance < probability):
        pixels[row, top[row] : top[row] + tall[row], left[row] : left[row] + wide[row]] = 0


def centre_box(width: int, height: int, fraction: float) -> tuple[float, float, float, float]:
    """The centred square (left, top, right, bottom) over `fraction` of the shorter side, in pixels."""
    side = min(width, height) * fraction
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def crop_draws(seeds: np.ndarray) -> np.ndarray:
    """What `random_box` needs for each of the seeds [B]: float64 [B, draws] in [0, 1)."""
    return uniforms(seeds, _CROP, 2 * _CROP_ATTEMPTS + 2)


def random_box(width: int, height: int, draws: np.ndarray) -> tuple[float, float, float, float]:
    """A box (left, top, right, bottom) of 8 to 100% of the area and log-uniform aspect 3/4 to 4/3; where none of the attempts
    fits, the largest centred box within these aspects."""
    areas = width * height * (0.08 + 0.92 * draws[:_CROP_ATTEMPTS])
    aspects = np.exp(np.log(3 / 4) + (np.log(4 / 3) - np.log(3 / 4)) * draws[_CROP_ATTEMPTS : 2 * _CROP_ATTEMPTS])
    widths, heights = np.maximum(1, np.rint(np.sqrt(areas * aspects))), np.maximum(1, np.rint(np.sqrt(areas / aspects)))
    fitting = np.flatnonzero((widths <= width) & (heights <= height))
    if len(fitting):
        across, down = float(widths[fitting[0]]), float(heights[fitting[0]])
        left = np.floor(draws[-2] * (width - across + 1))
        top = np.floor(draws[-1] * (height - down + 1))
    else:
        across, down = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - across) // 2, (height - down) // 2
    return float(left), float(top), float(left + across), float(top + down)
