"""The ranks as a grid, data x tensor: which ranks hold parts of the same layers, and which hold the same parts for other samples."""

from collections.abc import Sequence

import torch.distributed as dist

from wtn_pretrain.errors import UserError
from wtn_pretrain.parallel.launch import Place


class Grid:
    """Ranks 0 .. N-1 as rows of `tensor` neighbours, in the form in which DeepSpeed takes it (its `mpu`).

    Neighbours, which exchange activations in every layer, have consecutive numbers and so stand on one node as far as they fit.

    Raises:
        UserError: the ranks cannot be divided so.
    """

    def __init__(self, place: Place, tensor: int = 1, key: str = "tensor_parallel") -> None:
        if place.world_size % tensor:
            raise UserError(
                f"{key}: {tensor} does not divide the {place.world_size} ranks of this run; give a divisor of them or other ranks"
            )
        self.place = place
        self.tensor_count, self.data_count = tensor, place.world_size // tensor
        self.data_index, self.tensor_index = divmod(place.rank, tensor)
        self.tensor_ranks = list(range(place.rank - self.tensor_index, place.rank - self.tensor_index + tensor))
        self.data_ranks = list(range(self.tensor_index, place.world_size, tensor))
        if tensor == 1:
            self.tensor_group: dist.ProcessGroup | None = None
            self.data_group: dist.ProcessGroup | None = dist.group.WORLD
        else:
            self.tensor_group = _own(place, [list(range(first, first + tensor)) for first in range(0, place.world_size, tensor)])
            self.data_group = _own(place, [list(range(first, place.world_size, tensor)) for first in range(tensor)])

    # what DeepSpeed asks of a model-parallel unit

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self.data_group

    def get_data_parallel_world_size(self) -> int:
        return self.data_count

    def get_data_parallel_rank(self) -> int:
        return self.data_index

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self.tensor_group

    def get_model_parallel_world_size(self) -> int:
        return self.tensor_count

    def get_model_parallel_rank(self) -> int:
        return self.tensor_index


def _own(place: Place, groups: Sequence[list[int]]) -> dist.ProcessGroup | None:
    """The group of this rank among `groups`; every rank makes all of them, in order."""
    made = [dist.new_group(ranks) for ranks in groups]
    return next(group for group, ranks in zip(made, groups, strict=True) if place.rank in ranks)
