"""How the carries of a sequence of micro-batches lie on disk, known before the first one is computed."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from wtn_pretrain.data.stream import Batch
from wtn_pretrain.device import device
from wtn_pretrain.models.base import BlockConfig, Carry


class Field(NamedTuple):
    """One tensor of a carry: what a sample (a row) of it takes on disk."""

    shape: tuple[int, ...]
    """Of one sample."""
    order: tuple[int, ...]
    """Axes of `shape` from the slowest to the fastest on disk: channels-last maps come back as such, and run as fast."""
    computed: str
    """Name of the dtype that the teacher computes."""
    stored: str
    """Name of the dtype on disk."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype on disk."""
        return getattr(torch, self.stored)

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def pack(self, tensor: Tensor) -> Tensor:
        """`tensor` [r, *shape] as bytes on the CPU: uint8 [r, row_bytes].

        Raises:
            ValueError: it is not what this field was laid out for; nothing is cast that was not asked for.
        """
        if tuple(tensor.shape[1:]) != self.shape or _name(tensor.dtype) != self.computed:
            raise ValueError(f"{_name(tensor.dtype)} {list(tensor.shape[1:])} for a field of {self.computed} {list(self.shape)}")
        rows = tensor.detach().permute(0, *(1 + axis for axis in self.order))
        # narrowed and turned where it was computed, then copied
        return rows.to(self.dtype).contiguous().cpu().view(len(tensor), math.prod(self.shape)).view(torch.uint8)

    def unpack(self, data: Tensor) -> Tensor:
        """The tensor [r, *shape] in bytes uint8 [r * row_bytes], without a copy."""
        stored = data.view(self.dtype).view(-1, *(self.shape[axis] for axis in self.order))
        return stored.permute(0, *(1 + self.order.index(axis) for axis in range(len(self.order))))


class CacheLayout(NamedTuple):
    """`batches` micro-batches of `rows` samples: a hidden state at every boundary, and the context, which all boundaries share, once."""

    batches: int
    rows: int
    hidden: Mapping[int, Field]
    """By boundary, in rising order: 0 = after the stem, k = after unit k."""
    context: tuple[Field, ...]

    def fields(self) -> dict[str, Field]:
        """Every field by the name of its file."""
        named = {f"boundary-{boundary:03d}": field for boundary, field in self.hidden.items()}
        return {**named, **{f"context-{number}": field for number, field in enumerate(self.context)}}

    def place(self, batch: int, first_row: int, rows: int) -> int:
        """The number of a row among all, once it is sure that the rows are there.

        Raises:
            IndexError: they are not.
        """
        if not (0 <= batch < self.batches and 0 <= first_row <= first_row + rows <= self.rows):
            raise IndexError(f"batch {batch}, rows {first_row} to {first_row + rows} of {self.batches} batches of {self.rows} rows")
        return batch * self.rows + first_row

    def restore(self, boundary: int, carry: Carry, to: torch.device) -> Carry:
        """A carry that was read, on `to` and in the dtype that the teacher computed: it travels as small as it was stored."""
        computed: torch.dtype = getattr(torch, self.hidden[boundary].computed)
        context = tuple(tensor.to(to, non_blocking=True) for tensor in carry.context)
        return Carry(carry.hidden.to(to, non_blocking=True).to(computed), context)


def lay_out(
    teacher: BlockConfig, boundaries: Sequence[int], inputs: Batch, batches: int, *, precision: str = "fp32", stored: str = "as computed"
) -> CacheLayout:
    """The layout for `batches` batches like `inputs`, found without computing anything or holding a weight.

    Args:
        boundaries: the teacher's blocks below each boundary (`Pairing.teacher`).
        precision: `fp32`, or `bf16` for a teacher under autocast.
        stored: `as computed`, or `bf16` to store the hidden states in bfloat16.
    """
    here = device()
    with torch.device("meta"):
        network = teacher.build().eval()
    hidden: dict[int, Field] = {}
    # fake tensors have the strides and dtypes of real ones, which meta tensors under autocast have not
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), torch.autocast(here.type, torch.bfloat16, precision == "bf16"):
        network = network.to_empty(device=here)
        carry = network.stem({name: torch.empty(value.shape, dtype=value.dtype, device=here) for name, value in inputs.items()})
        for boundary, (first, last) in enumerate(zip((0, *boundaries), boundaries, strict=False)):
            for block in network.blocks[first:last]:
                carry = block(carry)
            hidden[boundary] = field_of(carry.hidden, stored)
        context = tuple(field_of(tensor) for tensor in carry.context)
        rows = len(carry.hidden)
    return CacheLayout(batches, rows, hidden, context)


def field_of(tensor: Tensor, stored: str = "as computed") -> Field:
    """The field for tensors like `tensor` [rows, ...]; `stored` as in `lay_out`."""
    # samples come first on disk whatever the layout, so that replicas write and read rows of their own
    order = tuple(axis - 1 for axis in tensor.dim_order() if axis)
    computed = _name(tensor.dtype)
    return Field(tuple(tensor.shape[1:]), order, computed, "bfloat16" if stored == "bf16" else computed)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
