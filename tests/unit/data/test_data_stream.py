import numpy as np
import pytest
import torch

from wtn_pretrain.data.hashing import hash_keys, permutation, splitmix64, uniforms
from wtn_pretrain.data.images import ImageData, open_images
from wtn_pretrain.data.stream import BatchStream, batches
from wtn_pretrain.errors import UserError


class Numbers:
    """Samples that show which index and seed they were fetched with."""

    def __init__(self, size: int, broken: int | None = None) -> None:
        self.size, self.broken = size, broken

    def __len__(self) -> int:
        return self.size

    def fetch(self, indices: np.ndarray, seeds: np.ndarray | None) -> dict[str, torch.Tensor]:
        if self.broken is not None and self.broken in indices:
            raise UserError(f"sample {self.broken} is corrupt; remove it")
        assert indices.dtype == np.int64 and (seeds is None or seeds.dtype == np.uint64)
        noise = np.zeros(len(indices)) if seeds is None else uniforms(seeds, 9, 1)[:, 0]
        return {"index": torch.from_numpy(indices), "noise": torch.from_numpy(noise)}


def global_batches(steps: int, world_size: int, micro: int | None, size: int = 50, batch: int = 16) -> list[dict[str, torch.Tensor]]:
    """The global batches put together from what all ranks see."""
    ranks = [BatchStream(Numbers(size), batch, seed=5, micro_batch_size=micro, rank=r, world_size=world_size) for r in range(world_size)]
    result = []
    for step in range(steps):
        parts = [stream.micro_batch(step, k) for k in range(ranks[0].accumulation) for stream in ranks]
        result.append({key: torch.cat([part[key] for part in parts]) for key in parts[0]})
    return result


def test_splitmix64_gives_the_published_sequence() -> None:
    golden = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + i * golden) % 2**64 for i in range(3)], np.uint64)
    assert splitmix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro", [None, 1, 2, 4])
def test_order_does_not_depend_on_ranks_or_accumulation(world_size: int, micro: int | None) -> None:
    for one, other in zip(global_batches(8, 1, 16), global_batches(8, world_size, micro), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("size", "batch"), [(50, 16), (48, 16), (7, 16), (1, 4)])
def test_every_sample_comes_once_an_epoch(size: int, batch: int) -> None:
    stream = BatchStream(Numbers(size), batch, seed=3)
    epochs = 5
    steps = -(-epochs * size // batch)
    seen = np.concatenate([stream.sample_ids(step)[0] for step in range(steps)])[: epochs * size].reshape(epochs, size)
    assert (np.sort(seen, axis=1) == np.arange(size)).all()
    if size > 10:
        assert not (seen[0] == seen[1]).all()


def test_seeds_are_new_each_epoch_and_steps_can_be_asked_in_any_order() -> None:
    stream, again = BatchStream(Numbers(16), 16, seed=3), BatchStream(Numbers(16), 16, seed=3)
    drawn = [stream.sample_ids(step) for step in range(6)]
    assert len(np.unique(np.concatenate([seeds for _, seeds in drawn]))) == 6 * 16
    for step in (4, 0, 5, 2):
        indices, seeds = again.sample_ids(step)
        assert (indices == drawn[step][0]).all() and (seeds == drawn[step][1]).all()
    assert not (BatchStream(Numbers(16), 16, seed=4).sample_ids(0)[1] == drawn[0][1]).any()


def test_without_shuffle_the_order_is_the_sets_own() -> None:
    stream = BatchStream(Numbers(10), 4, seed=0, shuffle=False)
    assert [stream.sample_ids(step)[0].tolist() for step in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]


def test_workers_change_nothing() -> None:
    config = ImageData(shift=2, flip=True, size=12)
    dataset = open_images(config).train
    plain = BatchStream(dataset, 64, seed=1, micro_batch_size=16, rank=1, world_size=2)
    worked = BatchStream(dataset, 64, seed=1, micro_batch_size=16, rank=1, world_size=2, workers=2)
    steps = 0
    state = torch.get_rng_state()
    for one, other in zip(plain.iterate(20, 27), worked.iterate(20, 27), strict=True):
        assert len(one) == len(other) == plain.accumulation == 2
        assert all(torch.equal(a[key], b[key]) for a, b in zip(one, other, strict=True) for key in a)
        steps += 1
    assert steps == 7
    assert torch.equal(torch.get_rng_state(), state)  # dropout must not depend on the workers


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_stays_one_line(workers: int) -> None:
    with pytest.raises(UserError, match=r"^sample 3 is corrupt; remove it$"):
        list(BatchStream(Numbers(8, broken=3), 4, seed=0, workers=workers).iterate(0, 2))


def test_evaluation_is_in_order_short_at_the_end_and_the_same_each_time() -> None:
    first, second = list(batches(Numbers(10), 4)), list(batches(Numbers(10), 3))
    assert [len(batch["index"]) for batch in first] == [4, 4, 2]
    assert torch.cat([batch["index"] for batch in first]).tolist() == list(range(10))
    assert torch.equal(torch.cat([batch["noise"] for batch in first]), torch.cat([batch["noise"] for batch in second]))


@pytest.mark.parametrize(
    ("batch", "micro", "world_size", "message"),
    [
        (30, 8, 2, r"batch_size 30 is not a multiple of 16 \(micro_batch_size 8 x world_size 2\).*such as 16 or 32"),
        (3, None, 2, r"batch_size 3 is not a multiple of 2 \(world_size 2\)"),
        (2, 4, 1, "batch_size 2 is not a multiple of 4.*such as 4$"),
        (0, None, 1, "batch_size 0, .* at least 1"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(batch: int, micro: int | None, world_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        BatchStream(Numbers(8), batch, seed=0, micro_batch_size=micro, world_size=world_size)


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(UserError, match="holds no samples"):
        BatchStream(Numbers(0), 4, seed=0)


def test_hashes_are_uniform_and_purposes_independent() -> None:
    seeds = hash_keys(0, np.arange(20_000))
    one, two = uniforms(seeds, 1, 2), uniforms(seeds, 2, 2)
    for drawn in (one, two):
        counts = np.bincount((drawn * 20).astype(int).ravel(), minlength=20)
        assert ((counts - 2000) ** 2 / 2000).sum() < 43.8  # chi-square, 19 degrees of freedom, 0.1%
    assert abs(np.corrcoef(np.c_[one, two].T) - np.eye(4)).max() < 4 / np.sqrt(20_000)
    assert sorted(permutation(0, 0, 1000)) == list(range(1000))
