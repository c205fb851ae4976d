"""Progressive resizing: the side follows from the step, and nothing else changes."""

import numpy as np
import pytest
import torch

from wtn_pretrain.data.images import ImageData, open_images
from wtn_pretrain.data.resizing import ResizedStream, side_at, steps_at
from wtn_pretrain.data.stream import BatchStream
from wtn_pretrain.errors import UserError

SIZES = ((0.4, 8), (0.75, 12))


def test_sides_change_at_their_shares() -> None:
    assert [side_at(SIZES, 16, step, 20) for step in (0, 7, 8, 14, 15, 19)] == [8, 8, 12, 12, 16, 16]
    assert steps_at(SIZES, 16, 20) == {8: 8, 12: 7, 16: 5}
    assert steps_at((), 16, 20) == {16: 20}


def test_the_stream_resizes_and_keeps_order_seeds_and_labels() -> None:
    train = open_images(ImageData(size=16, sizes=SIZES, flip=True, mixup=0.2)).train
    stream = ResizedStream(train, 8, sizes=SIZES, steps=20, seed=2)
    plain = BatchStream(train, 8, seed=2)
    assert train.pixels.size == 16
    sides = []
    for step, ((resized,), (full,)) in enumerate(zip(stream.iterate(0, 20), plain.iterate(0, 20), strict=True)):
        sides.append(resized["pixels"].shape[-1])
        assert stream.side(step) == sides[-1]
        assert all(torch.equal(resized[name], full[name]) for name in ("labels", "own_share", "partner_labels"))
        assert torch.equal(resized["pixels"], full["pixels"]) == (sides[-1] == 16)
    assert sides == [8] * 8 + [12] * 7 + [16] * 5


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_and_other_ranks_see_the_same(workers: int) -> None:
    train = open_images(ImageData(size=16, sizes=SIZES, shift=1, rand_augment=1)).train
    whole = list(ResizedStream(train, 8, sizes=SIZES, steps=20, seed=2).iterate(0, 20))
    ranks = [
        ResizedStream(train, 8, sizes=SIZES, steps=20, seed=2, workers=workers, rank=rank, world_size=2).iterate(13, 20) for rank in (0, 1)
    ]
    for expected, *parts in zip(whole[13:], *ranks, strict=True):
        assert torch.equal(torch.cat([part[0]["pixels"] for part in parts]), expected[0]["pixels"])


def test_resized_images_are_of_their_own_set_alone() -> None:
    train = open_images(ImageData(size=16)).train
    small = train.resized(8)
    assert train.resized(16) is train and train.pixels.size == 16
    native = open_images(ImageData()).train
    # brought back to the 8 pixels that the digits have, they are the digits: normalisation does not depend on the side
    assert torch.equal(small.fetch(np.arange(5), None)["pixels"], native.fetch(np.arange(5), None)["pixels"])


def test_a_shift_must_fit_the_smallest_side() -> None:
    with pytest.raises(UserError, match=r"data\.shift 8 can push an image of 8 x 8 pixels out of sight"):
        open_images(ImageData(size=16, sizes=SIZES, shift=8))
