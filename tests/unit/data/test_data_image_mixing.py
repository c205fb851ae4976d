"""mixup and CutMix: exactness, distribution, and what they depend on."""

import numpy as np
import pytest
import torch
from scipy import stats

from wtn_pretrain.config import validate
from wtn_pretrain.data.hashing import hash_keys
from wtn_pretrain.data.images import ImageData, open_images
from wtn_pretrain.data.mixing import mix, partners
from wtn_pretrain.data.stream import BatchStream
from wtn_pretrain.errors import UserError

SEEDS = hash_keys(1, np.arange(8000))
RANDOM = np.random.default_rng(0)


def test_mixup_is_the_convex_sum_of_partners() -> None:
    pixels = RANDOM.standard_normal((10, 5, 4, 3)).astype(np.float32)
    made = pixels.copy()
    own = mix(made, SEEDS[:10], 0.4, 0.0)
    assert own.dtype == np.float32 and np.array_equal(own[::2], own[1::2])
    partner = pixels.reshape(5, 2, 5, 4, 3)[:, ::-1].reshape(pixels.shape)
    share = own[:, None, None, None]
    # one rounding of fp32 more or less
    np.testing.assert_allclose(made, share * pixels + (1 - share) * partner, atol=1e-6)
    assert partners(np.arange(6)).tolist() == [1, 0, 3, 2, 5, 4]


def test_cutmix_exchanges_a_box_and_counts_its_pixels() -> None:
    # every image is its own number
    pixels = np.tile(np.arange(4000, dtype=np.float32)[:, None, None, None], (1, 12, 9, 1))
    made = pixels.copy()
    own = mix(made, SEEDS[:4000], 0.0, 1.0)
    mine, theirs = made == pixels, made == pixels.reshape(2000, 2, 12, 9, 1)[:, ::-1].reshape(pixels.shape)
    assert (mine ^ theirs).all(), "each pixel comes from one of the two"
    np.testing.assert_allclose(own, mine.mean((1, 2, 3)), atol=1e-6)
    for box in theirs[:200, ..., 0]:
        assert box.sum() == box.any(1).sum() * box.any(0).sum(), "a rectangle"
    # where the centre lies is uniform, and the box is cut at the edges: every part of the image is exchanged, the middle most
    covered = theirs[..., 0].mean(0)
    assert covered.min() > 0.08 and covered[6, 4] > covered[0, 0]


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_shares_are_beta_distributed(alpha: float) -> None:
    own = mix(np.zeros((8000, 1, 1, 1), np.float32), SEEDS, alpha, 0.0)[::2]
    assert stats.kstest(own, stats.beta(alpha, alpha).cdf).pvalue > 0.001


def test_with_both_each_pair_draws_one() -> None:
    pixels = np.tile(np.arange(4000, dtype=np.float32)[:, None, None, None] * 10, (1, 8, 8, 1))
    made = pixels.copy()
    mix(made, SEEDS[:4000], 1.0, 1.0)
    flat = (made == made[:, :1, :1]).all((1, 2, 3))[::2]  # mixup leaves an even image; so does a box over nothing or all
    assert 0.45 < flat.mean() < 0.65


def test_odd_batches_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"^data\.mixup, data\.cutmix: mix pairs .* takes 3 samples at once; choose batch_size"):
        mix(np.zeros((3, 1, 1, 1), np.float32), SEEDS[:3], 1.0, 0.0)
    train = open_images(ImageData(mixup=0.2)).train
    with pytest.raises(UserError, match="even number"):
        BatchStream(train, 6, seed=0, world_size=2).micro_batch(0, 0)


@pytest.mark.parametrize(
    "settings", [{"mixup": 0.2}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0, "rand_augment": 2, "random_erasing": 0.3}]
)
def test_mixing_depends_neither_on_ranks_nor_accumulation_nor_workers(settings: dict[str, float]) -> None:
    train = open_images(ImageData(shift=1, flip=True, size=12, **settings)).train
    whole = BatchStream(train, 16, seed=4)
    for world_size, micro in ((2, None), (4, 2), (1, 4), (8, None)):
        ranks = [BatchStream(train, 16, seed=4, rank=rank, world_size=world_size, micro_batch_size=micro) for rank in range(world_size)]
        for step in (0, 70, 89):  # an epoch has 89.9 steps: the last one straddles two
            parts = [stream.micro_batch(step, k) for k in range(ranks[0].accumulation) for stream in ranks]
            expected = whole.micro_batch(step, 0)
            assert expected.keys() == {"pixels", "labels", "own_share", "partner_labels"}
            assert all(torch.equal(torch.cat([part[name] for part in parts]), expected[name]) for name in expected)
    worked = BatchStream(train, 16, seed=4, workers=2)
    for (one,), (other,) in zip(whole.iterate(5, 9), worked.iterate(5, 9), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    first, again = whole.micro_batch(0, 0), BatchStream(train, 16, seed=5).micro_batch(0, 0)
    assert not torch.equal(first["own_share"], again["own_share"])


def test_validation_is_not_mixed() -> None:
    splits = open_images(ImageData(mixup=0.2, cutmix=1.0))
    assert splits.valid.fetch(np.arange(3), SEEDS[:3]).keys() == {"pixels", "labels"}
    assert splits.train.fetch(np.arange(3), None).keys() == {"pixels", "labels"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixup": -1}, "mixup"),
        ({"magnitude": 5}, "magnitude is that of rand_augment, which is off"),
        ({"rand_augment": 2, "magnitude": 11}, "magnitude"),
        ({"random_erasing": 1.5}, "random_erasing"),
        ({"sizes": [[0.5, 12], [0.4, 16]]}, r"sizes has the shares \[0\.5, 0\.4\]; they must rise"),
        ({"sizes": [[1.0, 12]]}, "each between 0 and 1"),
        ({"sizes": [[0.5, 0]]}, "each must be at least 1 pixel"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(ImageData, settings)
