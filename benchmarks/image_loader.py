"""Where the time of the image loader goes: decoding, cropping, augmenting, normalising, mixing.

    python benchmarks/image_loader.py [--path FOLDER] [--size PIXELS] [--batch N] [--batches N] [--repeats N] [--workers N]
                                      [--preset ci|full] [--json FILE]

Training batches from class folders of JPEG, as the trainer reads them, in one process of one thread, with one thing more in every row:
  whole decode     every JPEG decoded at its full size, the crop cut out and resized; normalised, channels last;
  crop             the same where JPEGs are decoded at a half, a quarter or an eighth when the crop leaves pixels enough: what is done;
  flip, RandAugment (2 operations of magnitude 9), random erasing (probability 1/4), mixup and CutMix.
The last row has all of it in `--workers` processes. Rates are medians over repeats; rows of a repeat run one after the other, and
all read the same files, which are in the page cache after the first pass.

`--path` takes a folder with train/CLASS/*.jpg. Without it 64 JPEGs of 500 x 375 pixels (an ImageNet photograph's usual size, smooth
patterns with noise, quality 90) are written to a temporary folder.

JSON keys: `images_per_second` (all of it in one process), `with_workers` and `rows`. What to make of them: a rank needs about its
training rate over `images_per_second` as `data.workers`.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import parser, positive, run, table
from PIL import Image

from wtn_pretrain.data.images import ImageData, open_images
from wtn_pretrain.data.stream import BatchStream

ROWS: dict[str, dict[str, Any]] = {
    "whole decode": {},
    "crop": {},
    "+ flip": {"flip": True},
    "+ RandAugment": {"rand_augment": 2},
    "+ random erasing": {"random_erasing": 0.25},
    "+ mixup and CutMix": {"mixup": 0.2, "cutmix": 1.0},
}


@contextmanager
def folder(path: str | None) -> Iterator[str]:
    """A folder of class folders: the given one, or one of made-up photographs for as long as the context lasts."""
    if path:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="images-") as made:
        generator = np.random.default_rng(0)
        down, across = np.mgrid[0:375, 0:500]
        for number in range(64):
            place = Path(made, "train", f"class-{number % 4}")
            place.mkdir(parents=True, exist_ok=True)
            waves = [128 + 70 * np.sin(down / (9 + number) + channel) * np.cos(across / (30 - channel)) for channel in range(3)]
            pixels = np.clip(np.stack(waves, -1) + generator.normal(0, 8, (375, 500, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{number}.jpg", quality=90)
        yield made


@contextmanager
def whole_decode(wanted: bool) -> Iterator[None]:
    """Pillow's reduced decoding switched off, if wanted."""
    from PIL.JpegImagePlugin import JpegImageFile

    draft = JpegImageFile.draft
    try:
        if wanted:
            JpegImageFile.draft = lambda *_: None  # type: ignore[method-assign, assignment]
        yield
    finally:
        JpegImageFile.draft = draft  # type: ignore[method-assign]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of the benchmark."""
    ci = options.preset == "ci"
    size, batch = options.size or (32 if ci else 224), options.batch or (8 if ci else 64)
    count, repeats = options.batches or (1 if ci else 4), options.repeats or (1 if ci else 5)
    rates: dict[str, list[float]] = {}
    with folder(options.path) as path:
        streams: dict[str, BatchStream] = {}
        settings: dict[str, Any] = {"source": "folder", "path": path, "size": size, "channels": 3, "random_resized_crop": True}
        for name, more in ROWS.items():
            settings |= more
            streams[name] = BatchStream(open_images(ImageData(**settings)).train, batch, seed=0)
        all_of_it = f"all, {options.workers} workers"
        streams[all_of_it] = BatchStream(open_images(ImageData(**settings)).train, batch, seed=0, workers=options.workers)
        for repeat in range(repeats + 1):
            for name, stream in streams.items():
                with whole_decode(name == "whole decode"):
                    rate = _rate(stream, batch, count * (options.workers if stream.workers else 1))
                if repeat or ci:  # the first pass warms the page cache
                    rates.setdefault(name, []).append(rate)
    medians = {name: median(values) for name, values in rates.items()}
    return {
        "size": size,
        "batch": batch,
        "repeats": repeats,
        "images_per_second": medians["+ mixup and CutMix"],
        "with_workers": medians[all_of_it],
        "workers": options.workers,
        "rows": {name: {"images_per_second": medians[name], "all_images_per_second": rates[name]} for name in streams},
    }


def _rate(stream: BatchStream, batch: int, count: int) -> float:
    """Images a second over `count` batches; the start of worker processes, which a run pays for once, is left out."""
    batches = stream.iterate(0, count + (stream.workers or 0))
    for _ in range(stream.workers):
        next(batches)
    began = time.perf_counter()
    for _ in batches:
        pass
    return count * batch / (time.perf_counter() - began)


def show(figures: dict[str, Any]) -> str:
    """The table."""
    rows, before = [], 0.0
    for name, row in figures["rows"].items():
        taken = 1e3 / row["images_per_second"]
        alone = name.startswith("+")
        rows.append([name, f"{row['images_per_second']:.1f}", f"{taken:.2f}", f"{taken - before:+.2f}" if alone else ""])
        before = taken
    what = "{size} pixels, batches of {batch}, median of {repeats}".format(**figures)
    return "\n".join([what, "", table(["", "images/s", "ms an image", "of it this"], rows)])


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--path", metavar="FOLDER", help="class folders under FOLDER/train (default: made-up photographs)")
    arguments.add_argument("--size", type=positive, metavar="PIXELS", help="side of the crops (default 224; ci 32)")
    arguments.add_argument("--batch", type=positive, metavar="N", help="images of a batch, an even number (default 64; ci 8)")
    arguments.add_argument("--batches", type=positive, metavar="N", help="batches of a row in a repeat (default 4; ci 1)")
    arguments.add_argument("--repeats", type=positive, metavar="N", help="runs of every row (default 5; ci 1)")
    arguments.add_argument("--workers", type=positive, default=2, metavar="N", help="processes of the last row (default 2)")
    return run(measure, arguments, show)


if __name__ == "__main__":
    sys.exit(main())
