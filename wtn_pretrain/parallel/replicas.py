"""The ranks that share a span: one group in which gradients, losses and batch statistics are summed."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor


def local_group(ranks: Sequence[int], backend: str | None = None) -> dist.ProcessGroup:
    """A process group for whose making only its members meet; `backend` None: the default one's.

    Torch names such a group by its ranks and by how many groups the process already has. So every rank must have made equally
    many: who is in none of a round makes one of its own.
    """
    return dist.new_group(list(ranks), backend=backend, use_local_synchronization=True)


Made = TypeVar("Made")
_kept: dict[Hashable, Any] = {}


def kept(key: Hashable, make: Callable[[], Made]) -> Made:
    """What `make` has made for `key` before, or makes now; for process groups, which are kept as long as the process lives.

    A group that is made after an equal one was destroyed has its name, and may meet the addresses that the old one has left.
    """
    if key not in _kept:
        _kept[key] = make()
    return _kept[key]


class Replicas:
    """The replicas of one span, in the form in which DeepSpeed takes its data-parallel group (its `mpu`)."""

    def __init__(self, ranks: Sequence[int], rank: int) -> None:
        self.ranks = list(ranks)
        self.count = len(self.ranks)
        self.index = self.ranks.index(rank)
        # two groups on every rank, see `local_group`
        self.group, self._alone = local_group(self.ranks), local_group([rank])

    @classmethod
    def alone(cls, rank: int) -> "Replicas":
        """Of a rank that shares its span with nobody; every rank must ask for its own at the same point."""
        return kept(("alone", rank), lambda: cls([rank], rank))

    def sum(self, value: Tensor) -> Tensor:
        """`value` summed over the replicas, in place."""
        if self.count > 1:
            dist.all_reduce(value, group=self.group)
        return value

    # what DeepSpeed asks of a model-parallel unit; spans share no gradients, so to it they are different models
    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return self.ranks

    def get_data_parallel_world_size(self) -> int:
        return self.count

    def get_data_parallel_rank(self) -> int:
        return self.index

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._alone

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0


def forget_replicas() -> None:
    """Makes DeepSpeed's data-parallel group all ranks again, for engines that are started after those of a span."""
    from deepspeed.utils import groups

    groups.mpu = None
