"""Which parts of which layers lie in the tensors that an optimizer steps.

LAMB and LARS scale an update by the norm of a whole layer. ZeRO hands an optimizer flat partitions instead, in which layers follow one
another and are cut where a rank's share ends; taken for layers, they give other numbers without a word. So the norms are those of the
parts, squared, summed over the ranks that share a layer.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wtn_pretrain.device import device
from wtn_pretrain.training.partitions import Spot, spots_of


class Part(NamedTuple):
    """A run of elements of a flat partition that belong to one layer."""

    layer: int
    start: int
    length: int


class Partition(NamedTuple):
    """What one flat partition holds."""

    tensor: Tensor
    layers: int
    """Layers of the whole from which all ranks hold parts, the same number everywhere."""
    parts: tuple[Part, ...]
    """This rank's."""
    divided: tuple[int, ...]
    """Layers that are themselves parts of larger ones, held by a tensor-parallel group."""


class Layers:
    """Norms of layers, and updates scaled layer by layer. As made here, every tensor is a layer, whole or a tensor-parallel part of one.

    A tensor-parallel part carries the attribute `tensor_parallel_group`: the ranks over which its squares are summed too.
    """

    def __init__(
        self,
        partitions: Sequence[Partition] | None = None,
        data_group: dist.ProcessGroup | None = None,
        tensor_group: dist.ProcessGroup | None = None,
    ) -> None:
        """`partitions`: what the optimizer steps instead of layers, shared out over `data_group`."""
        self._partitions = None if partitions is None else {id(partition.tensor): partition for partition in partitions}
        self._data_group, self._tensor_group = data_group, tensor_group

    def norms(self, tensors: Sequence[Tensor], values: Sequence[Sequence[Tensor]]) -> Tensor:
        """The norms [len(values), layers] of all layers behind `tensors`; every sequence of `values` is shaped like `tensors`.

        Layers are in the order of `tensors`. Every rank of the groups must call it with what it holds of the same layers.
        """
        count, places, divided, group = self._plan(tensors)
        squares = torch.zeros(len(values), count, dtype=tensors[0].dtype, device=tensors[0].device)
        numbers = [layer for _, layer, _, _ in places]
        for row, value in zip(squares, values, strict=True):
            if numbers:
                found = torch.stack(torch._foreach_norm(_pieces(value, places))).square_()
                row[slice(None) if len(numbers) == count else numbers] = found
        if self._partitions is not None:
            squares = _summed(squares, self._data_group)
        if divided and group is not None:
            squares[:, divided] = _summed(squares[:, divided], group)
        return squares.sqrt_()

    def scale(self, tensors: Sequence[Tensor], values: Sequence[Tensor], factors: Tensor) -> None:
        """Multiplies `values`, shaped like `tensors`, in place, each layer by its own of `factors` [layers]."""
        _, places, _, _ = self._plan(tensors)
        if places:
            each = factors.unbind()
            torch._foreach_mul_(_pieces(values, places), [each[layer] for _, layer, _, _ in places])

    def _plan(self, tensors: Sequence[Tensor]) -> tuple[int, list[tuple[int, int, int, int]], list[int], dist.ProcessGroup | None]:
        """How many layers there are, where their parts lie (tensor, layer, start, length), which are divided over which group."""
        if self._partitions is None:
            groups = [getattr(tensor, "tensor_parallel_group", None) for tensor in tensors]
            whole = [(place, place, 0, tensor.numel()) for place, tensor in enumerate(tensors)]
            divided = [place for place, group in enumerate(groups) if group is not None]
            return len(tensors), whole, divided, groups[divided[0]] if divided else None
        first, places, divided = 0, [], []
        for place, tensor in enumerate(tensors):
            partition = self._partitions.get(id(tensor))
            if partition is None:
                raise RuntimeError("the optimizer steps a tensor whose layers are not known")
            places += [(place, first + part.layer, part.start, part.length) for part in partition.parts]
            divided += [first + layer for layer in partition.divided]
            first += partition.layers
        return first, places, divided, self._tensor_group


def layers_of(engine: Any) -> Layers:
    """The layers behind what the optimizer of a DeepSpeed engine steps, at any ZeRO stage.

    Raises:
        RuntimeError: DeepSpeed wraps the optimizer in a way that is not known here.
    """
    wrapped = engine.optimizer
    if isinstance(wrapped, torch.optim.Optimizer):
        return Layers()
    held: dict[int, list[tuple[nn.Parameter, Spot]]] = {}
    for parameter, spot in spots_of(engine).items():
        held.setdefault(spot.number, []).append((parameter, spot))
    partitions, groups = [], []
    for members in held.values():
        parts = tuple(Part(layer, spot.start, spot.length) for layer, (_, spot) in enumerate(members) if spot.length)
        owners = [getattr(parameter, "tensor_parallel_group", None) for parameter, _ in members]
        divided = tuple(layer for layer, group in enumerate(owners) if group is not None)
        partitions.append(Partition(members[0][1].stepped, len(members), parts, divided))
        groups += [group for group in owners if group is not None]
    return Layers(partitions, wrapped.dp_process_group, groups[0] if groups else None)


def _pieces(values: Sequence[Tensor], places: Sequence[tuple[int, int, int, int]]) -> list[Tensor]:
    return [
        values[place] if length == values[place].numel() else values[place].narrow(0, start, length) for place, _, start, length in places
    ]


def _summed(squares: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if dist.get_world_size(group) == 1:
        return squares
    # what is offloaded lies in host memory, where a GPU's communication does not reach
    shared = squares.to(device())
    dist.all_reduce(shared, group=group)
    return shared.to(squares.device)
