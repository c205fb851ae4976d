"""Micro-batches as a pure function of (seed, step)."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader

from wtn_pretrain.data.hashing import hash_keys
from wtn_pretrain.data.order import order_of
from wtn_pretrain.errors import UserError
from wtn_pretrain.parallel.preemption import heed_parent_alone

Batch = dict[str, torch.Tensor]


class Dataset(Protocol):
    """A set of samples that are fetched by index, many at a time."""

    def __len__(self) -> int: ...

    def fetch(self, indices: np.ndarray, seeds: np.ndarray | None) -> Batch:
        """Samples `indices` (int64 [B]) as tensors of leading dimension B. `seeds` (uint64 [B]) drive what is random in each
        sample (augmentation, masking); None leaves it out."""
        ...


class BatchStream:
    """The training batches of a dataset.

    Sample number n = step * batch_size + j stands in epoch n // N at position n % N of that epoch's permutation (sets that are blended
    by weight: see `wtn_pretrain.data.order`), and its seed is a hash of (seed, epoch, index). Neither depends on rank count,
    accumulation or workers. The global batch is cut into `accumulation` runs of micro_batch_size * world_size samples; of each, rank r
    takes the r-th micro-batch.
    """

    accumulation: int

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        seed: int,
        micro_batch_size: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        part: tuple[int, int] | None = None,
        shuffle: bool = True,
        workers: int = 0,
    ) -> None:
        """`micro_batch_size` None: the global batch is split over the ranks and not accumulated. `part`: only rows `part[0]` to
        `part[0] + part[1]` of each micro-batch are fetched. Raises UserError where the sizes do not divide or the dataset is empty."""
        if batch_size < 1 or (micro_batch_size is not None and micro_batch_size < 1):
            raise UserError(f"batch_size {batch_size}, micro_batch_size {micro_batch_size}: both must be at least 1")
        if len(dataset) == 0:
            raise UserError("the data set holds no samples; give one that does")
        per_pass = world_size if micro_batch_size is None else micro_batch_size * world_size
        if batch_size % per_pass:
            sizes = (
                f"world_size {world_size}" if micro_batch_size is None else f"micro_batch_size {micro_batch_size} x world_size {world_size}"
            )
            raise UserError(
                f"batch_size {batch_size} is not a multiple of {per_pass} ({sizes}); choose one that is, {_multiples(batch_size, per_pass)}"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size or batch_size // world_size
        self.accumulation = batch_size // (self.micro_batch_size * world_size)
        self.seed, self.shuffle, self.workers = seed, shuffle, workers
        self.rank, self.world_size = rank, world_size
        self.part = part or (0, self.micro_batch_size)
        self._order = order_of(dataset, len(dataset), seed, shuffle)

    def sample_ids(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The global batch of `step`: indices int64 [batch_size] and seeds uint64 [batch_size]."""
        return self._ids(step * self.batch_size, self.batch_size)

    def micro_batch(self, step: int, k: int) -> Batch:
        """This rank's k-th micro-batch of `step`, tensors of leading dimension micro_batch_size (of `part`, its rows)."""
        if not 0 <= k < self.accumulation:
            raise IndexError(f"micro-batch {k} of {self.accumulation}")
        first = step * self.batch_size + (k * self.world_size + self.rank) * self.micro_batch_size
        offset, count = self.part
        return self.dataset.fetch(*self._ids(first + offset, count))

    def iterate(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """The micro-batches of the steps start .. stop - 1, a list of `accumulation` for each step."""
        return self.iterate_steps(range(start, stop))

    def iterate_steps(self, steps: Sequence[int]) -> Iterator[list[Batch]]:
        """Like `iterate`, for any steps in any order."""
        if not self.workers:
            for step in steps:
                yield [self.micro_batch(step, k) for k in range(self.accumulation)]
            return
        fetching = DataLoader(
            _Steps(self),
            batch_size=None,
            sampler=steps,
            num_workers=self.workers,
            collate_fn=_as_is,
            worker_init_fn=heed_parent_alone,
            generator=torch.Generator(),  # else it draws from the global one, and dropout would depend on `workers`
        )
        for fetched in fetching:
            if isinstance(fetched, UserError):
                raise fetched
            yield fetched

    def _ids(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        epochs, indices = self._order.at(np.arange(first, first + count, dtype=np.int64))
        return indices, hash_keys(self.seed, epochs, indices)


def batches(dataset: Dataset, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """The dataset in order for evaluation, the last batch short; of several ranks, each fetches every n-th batch.

    A sample's seed depends on its index only, so masks are the same each time; augmentation is a property of the set and off in a
    validation set.
    """
    for first in range(rank * batch_size, len(dataset), batch_size * world_size):
        indices = np.arange(first, min(first + batch_size, len(dataset)), dtype=np.int64)
        yield dataset.fetch(indices, hash_keys(0, indices))


class _Steps(torch.utils.data.Dataset):
    """Steps as the items of a DataLoader."""

    def __init__(self, stream: BatchStream) -> None:
        self.stream = stream

    def __getitem__(self, step: int) -> list[Batch] | UserError:
        try:
            return [self.stream.micro_batch(step, k) for k in range(self.stream.accumulation)]
        except UserError as error:  # raised by a worker it would reach the user as a traceback
            return error


def _as_is(fetched: list[Batch] | UserError) -> list[Batch] | UserError:
    return fetched


def _multiples(value: int, base: int) -> str:
    below = value // base * base
    return f"such as {below} or {below + base}" if below else f"such as {base}"
