"""The order of samples: none lost and none twice, for any number of ranks, after a kill at any step, resumed on any other number."""

import numpy as np
import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from wtn_pretrain.data import order
from wtn_pretrain.data.blend import Blend
from wtn_pretrain.data.lengths import LengthenedStream, begins
from wtn_pretrain.data.order import Blended, Epochs, permuted
from wtn_pretrain.data.stream import BatchStream
from wtn_pretrain.errors import UserError


class Numbers:
    """Samples that show their number and seed."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def fetch(self, indices: np.ndarray, seeds: np.ndarray | None) -> dict[str, torch.Tensor]:
        assert seeds is not None
        return {"index": torch.from_numpy(indices), "seed": torch.from_numpy(seeds.astype(np.int64))}


def run(data: object, batch: int, world: int, micro: int, first: int, last: int, seed: int = 1) -> list[list[tuple[int, int]]]:
    """What all ranks of a world see in the steps first .. last - 1: for each step its samples in order, index and seed."""
    ranks = [BatchStream(data, batch, seed=seed, micro_batch_size=micro, rank=rank, world_size=world) for rank in range(world)]  # type: ignore[arg-type]
    steps = []
    for together in zip(*(rank.iterate(first, last) for rank in ranks), strict=True):
        parts = [together[rank][k] for k in range(ranks[0].accumulation) for rank in range(world)]
        steps.append([pair for part in parts for pair in zip(part["index"].tolist(), part["seed"].tolist(), strict=True)])
    return steps


sizes = st.integers(1, 200)
worlds = st.sampled_from([1, 2, 4, 8])


@settings(max_examples=40, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    size=sizes, micro=st.integers(1, 3), times=st.integers(1, 2), before=worlds, after=worlds, cut=st.floats(0, 1), seed=st.integers(0, 99)
)
def test_three_epochs_with_a_kill_and_another_number_of_ranks(
    size: int, micro: int, times: int, before: int, after: int, cut: float, seed: int
) -> None:
    batch = 8 * micro * times
    steps = -(-3 * size // batch)
    killed = int(cut * steps)
    data = Numbers(size)
    seen = run(data, batch, before, micro, 0, killed, seed) + run(data, batch, after, micro, killed, steps, seed)
    assert seen == run(data, batch, 1, batch, 0, steps, seed)
    samples = np.array([index for step in seen for index, _ in step])[: 3 * size].reshape(3, size)
    assert (np.sort(samples, axis=1) == np.arange(size)).all()


@pytest.mark.parametrize("world", [2, 4, 8])
def test_a_blend_keeps_its_order_too(world: int) -> None:
    data = Blend((Numbers(30), Numbers(7), Numbers(100)), (0.5, 0.2, 0.3))
    assert run(data, 16, world, 1, 0, 20) == run(data, 16, 1, 16, 0, 20)


# sets of a few samples go through an epoch at every step, which takes its time
@example(parts=[(1, 0.03), (300, 1.0)], seed=0, first=70_000)
@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    parts=st.lists(st.tuples(st.integers(20, 5000), st.floats(0.01, 1)), min_size=1, max_size=5),
    seed=st.integers(0, 2**40),
    first=st.integers(0, 10**6),
)
def test_blends_take_each_set_by_weight_and_in_whole_epochs(parts: list[tuple[int, float]], seed: int, first: int) -> None:
    counts, weights = zip(*parts, strict=True)
    blended = Blended(seed, counts, weights)
    _, indices = blended.at(np.arange(70_000))
    shares = np.array(weights) / sum(weights)
    offset = 0
    for size, share in zip(counts, shares, strict=True):
        own = indices[(indices >= offset) & (indices < offset + size)] - offset
        # of 65,536 at a time the share is exact; the rest is at random
        assert abs(len(own) - 70_000 * share) < 2 + 5 * np.sqrt(4464 * share)
        whole = own[: len(own) // size * size].reshape(-1, size)
        assert (np.sort(whole, axis=1) == np.arange(size)).all()
        assert len(np.unique(own[:size])) == len(own[:size])
        offset += size
    # asked for from anywhere
    epochs, there = blended.at(np.arange(first, first + 64))
    for number in range(0, 64, 9):
        epoch, index = blended.at(np.array([first + number]))
        assert (epoch[0], index[0]) == (epochs[number], there[number])


def test_weights_that_do_not_suit_are_refused() -> None:
    for weights in ((1.0,), (1.0, -1.0), (0.0, 0.0)):
        with pytest.raises(UserError, match="do not suit 2 sets"):
            Blended(0, (3, 4), weights)


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**62), epoch=st.integers(0, 50))
def test_the_order_of_large_sets_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    assert (np.sort(permuted(seed, epoch, size, np.arange(size))) == np.arange(size)).all()


def test_the_order_of_large_sets_is_mixed_and_needs_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = permuted(3, 0, 10_000, np.arange(10_000))
    # neighbours do not stay together, and halves mix: both within 4 sigma of chance
    assert abs((np.abs(np.diff(drawn)) < 100).mean() - 0.0199) < 4 * np.sqrt(0.0199 / 10_000)
    assert abs((drawn[:5000] < 5000).sum() - 2500) < 4 * np.sqrt(10_000 / 16)
    monkeypatch.setattr(order, "SORTED_UP_TO", 100)
    assert run(Numbers(1000), 16, 4, 2, 0, 130) == run(Numbers(1000), 16, 1, 16, 0, 130)
    huge = Epochs(0, 10**12)
    _, indices = huge.at(np.arange(10**12 - 1000, 10**12))
    assert len(np.unique(indices)) == 1000 and indices.max() < 10**12 and huge._orders == {}


def test_longer_rows_begin_with_their_own_epoch() -> None:
    assert begins(((0.5, 16), (0.75, 32)), 64, 8) == [(0, 16), (4, 32), (6, 64)]
    assert begins((), 64, 8) == [(0, 64)]
    short, long = Numbers(40), Numbers(10)

    def streams(world: int) -> list[LengthenedStream]:
        sets = [(0, short), (5, long)]
        return [LengthenedStream(sets, 8, seed=2, micro_batch_size=2, rank=rank, world_size=world) for rank in range(world)]

    (alone,) = streams(1)
    for step in range(12):
        wanted = [index for k in range(alone.accumulation) for index in alone.micro_batch(step, k)["index"].tolist()]
        both = streams(2)
        assert wanted == [i for k in range(both[0].accumulation) for one in both for i in one.micro_batch(step, k)["index"].tolist()]
        assert wanted == alone.sample_ids(step)[0].tolist()
        plain = BatchStream(short if step < 5 else long, 8, seed=2)
        assert wanted == plain.sample_ids(step if step < 5 else step - 5)[0].tolist()
