"""Losses that jump are told from those that wander, fall, or jump together."""

import random

import pytest

from wtn_pretrain.training.spikes import ENOUGH, NORMAL, WINDOW, Spikes


def falling(count: int, seed: int = 0) -> list[float]:
    """Losses of a training that goes well: they fall, with noise of 2%."""
    choose = random.Random(seed)
    return [(1 + 5 / (1 + 0.05 * step)) * (1 + choose.gauss(0, 0.02)) for step in range(count)]


def test_a_training_that_goes_well_has_no_spikes() -> None:
    for seed in range(20):
        spikes = Spikes(8)
        assert not any(spikes.take(loss) for loss in falling(400, seed))


def test_a_jump_is_told_once_and_by_how_much() -> None:
    spikes = Spikes(8)
    losses = [1.0, 1.05, 1.1] * 15
    assert not any(spikes.take(loss) for loss in losses)
    jump = spikes.take(3.0)
    assert jump is not None and (jump.loss, jump.median) == (3.0, pytest.approx(1.05))
    # of three values as far apart, the median absolute deviation is their distance
    assert jump.deviations == pytest.approx((3.0 - 1.05) / (NORMAL * 0.05))
    assert spikes.take(3.2) is None
    assert spikes.take(1.0) is None
    # it has come back, so the next one is another
    assert spikes.take(2.9) is not None


def test_a_new_level_is_learned() -> None:
    spikes = Spikes(8)
    for loss in falling(200):
        spikes.take(loss)
    told = [step for step in range(3 * WINDOW) if spikes.take(30 + 0.1 * (step % 3))]
    assert told == [0]
    assert not spikes.within


def test_nothing_is_said_of_the_first_losses_and_of_falls() -> None:
    spikes = Spikes(3)
    assert not any(spikes.take(loss) for loss in [1.0] * (ENOUGH - 1))
    assert spikes.take(100.0) is None
    assert spikes.take(0.0) is None
    # losses that hardly differ: a rise by less than 0.5% of them a deviation is none
    flat = Spikes(10)
    for _ in range(30):
        flat.take(2.0)
    assert flat.take(2.09) is None
    assert flat.take(2.11) is not None


def test_off_it_says_nothing_and_restored_it_goes_on() -> None:
    off = Spikes(0)
    assert not any(off.take(loss) for loss in [1.0] * 50 + [1e9])
    whole, first, second = Spikes(8), Spikes(8), Spikes(8)
    losses = [*falling(100), 50.0, *falling(30), 60.0]
    expected = [whole.take(loss) for loss in losses]
    found = [first.take(loss) for loss in losses[:101]]
    second.restore(list(first.losses), first.within)
    found += [second.take(loss) for loss in losses[101:]]
    assert found == expected and sum(jump is not None for jump in found) == 2
