"""Activations that are a function of where they stand, and a cache of them, for the tests of the cache."""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from wtn_pretrain.errors import UserError
from wtn_pretrain.imitation.cache import ActivationCache
from wtn_pretrain.imitation.cache_key import Key
from wtn_pretrain.imitation.cache_layout import CacheLayout, Field
from wtn_pretrain.models.base import Carry

KEY = Key(
    data={"data": {"source": "digits", "shift": 1}, "samples": 1797, "contents": "1f" * 16},
    seed=3,
    teacher={"weights": "ab" * 16, "shape": "cd" * 16},
    units=(0, 1, 2),
    precision="fp32",
)
MAPS = Field((8, 4, 4), (1, 2, 0), "float32", "float32")
MASK = Field((1, 1, 6), (0, 1, 2), "bool", "bool")
LAYOUT = CacheLayout(4, 5, {0: MAPS, 1: MAPS, 2: Field((16, 2, 2), (1, 2, 0), "float32", "float32")}, (MASK,))
NAMES = list(LAYOUT.fields())
SHORT = CacheLayout(2, 2, {0: MAPS, 1: MAPS}, (MASK,))
# so slow to fill that a kill comes in the middle: 150 batches of 1 ms and more
LONG = CacheLayout(150, 4, {boundary: Field((32, 16), (0, 1), "float32", "float32") for boundary in range(3)}, (MASK,))

fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload(["wtn_pretrain.imitation.cache", "pytest", "hypothesis"])


def tensor(field: Field, rows: int, *seeds: int) -> Tensor:
    """Values that are a function of `seeds`, in the layout that a network would compute them in."""
    generator = torch.Generator().manual_seed(hash(seeds))
    values = torch.randn(rows, *field.shape, generator=generator, dtype=torch.float64) * 8
    values = values > 0 if field.computed == "bool" else values.to(getattr(torch, field.computed))
    return values.permute(0, *(1 + axis for axis in field.order)).contiguous().permute(0, *(1 + np.argsort(field.order).astype(int)))


def carry(layout: CacheLayout, boundary: int, batch: int, seed: int = 0) -> Carry:
    """The whole batch at one boundary; the context is that of the batch."""
    context = tuple(tensor(field, layout.rows, seed, batch, -1 - number) for number, field in enumerate(layout.context))
    return Carry(tensor(layout.hidden[boundary], layout.rows, seed, batch, boundary), context)


def part(whole: Carry, first: int, last: int) -> Carry:
    return Carry(whole.hidden[first:last], tuple(value[first:last] for value in whole.context))


def write_all(cache: ActivationCache, first: int = 0, pause: float = 0) -> None:
    with cache.writer() as writer:
        for batch in range(first, cache.layout.batches):
            for boundary in cache.layout.hidden:
                writer.write(boundary, batch, 0, carry(cache.layout, boundary, batch))
            time.sleep(pause)


def fill(folder: Path, key: Key = KEY, layout: CacheLayout = LAYOUT) -> ActivationCache:
    cache = ActivationCache(folder, key, layout)
    assert cache.prepare() == 0
    write_all(cache)
    cache.finish()
    return cache


def read_all(cache: ActivationCache, first: int = 0, rows: int | None = None) -> list[dict[int, Carry]]:
    return list(cache.reader().stream(list(cache.layout.hidden), range(cache.layout.batches), first, rows))


def same(one: Carry, other: Carry) -> bool:
    pairs = [(one.hidden, other.hidden), *zip(one.context, other.context, strict=True)]
    return all(torch.equal(left, right) and left.dtype == right.dtype for left, right in pairs)


def check_all(cache: ActivationCache) -> None:
    for batch, read in enumerate(read_all(cache)):
        assert all(same(read[boundary], carry(cache.layout, boundary, batch)) for boundary in cache.layout.hidden)


def refusal(call: Callable[[], Any]) -> str:
    """The one line with which `call` refuses."""
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400 and "; " in text
    assert text.startswith("narrow.cache: ") or "cannot be written" in text
    return text


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def fill_slowly(folder: Path, pause: float, told: Any) -> None:
    cache = ActivationCache(folder, KEY, LONG)
    try:
        kept = cache.prepare()
        told.send("began")
        write_all(cache, kept, pause)
        cache.finish()
        told.send("finished")
    except UserError as error:
        told.send(str(error))
