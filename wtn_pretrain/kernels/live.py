"""Which implementation of each operation is live in this process."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

OPERATIONS = (
    "linear",
    "bias_gelu",
    "dropout",
    "dropout_add_norm",
    "attention",
    "documents",
    "linear_cross_entropy",
    "bridge_energy",
    "convolution",
)
"""`documents` is attention within the documents of packed rows."""
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Implementation(NamedTuple):
    """What computes an operation."""

    name: str
    why: str


@dataclass(frozen=True)
class Choice:
    """An implementation for every operation."""

    kernels: str
    device: str
    """The type of device that it was made for; tensors elsewhere get torch's."""
    operations: Mapping[str, Implementation]
    notes: tuple[str, ...] = field(default=())
    """What a user should know beside it."""

    def describe(self) -> str:
        """One line for the screen: what is live."""
        parts = ", ".join(f"{operation} {self.operations[operation].name}" for operation in OPERATIONS)
        return "; ".join([f"kernels {self.kernels} on {self.device}: {parts}", *self.notes])

    def explain(self) -> str:
        """A line for each operation: what is live, and why."""
        width = max(map(len, OPERATIONS))
        lines = (f"{operation:{width}}  {self.operations[operation].name}: {self.operations[operation].why}" for operation in OPERATIONS)
        return "\n".join([*lines, *self.notes])


_active: Choice | None = None


def use(choice: Choice | None) -> None:
    """Makes `choice` that of this process; None: plain torch."""
    global _active
    _active = choice


def active() -> Choice | None:
    """The choice of this process; None until one is made: plain torch."""
    return _active


@contextmanager
def using(choice: Choice | None) -> Iterator[None]:
    """`choice` within, what was active before afterwards."""
    before = _active
    use(choice)
    try:
        yield
    finally:
        use(before)


def live(operation: str, tensor: Tensor) -> str:
    """The name of what computes `operation` on `tensor`; `torch` for its plain form.

    Tensors of another device than the choice's (those without data, for one) and of fp64 get the plain form, and so does what
    torch.compile traces: it fuses plain operations itself.
    """
    if _active is None or tensor.device.type != _active.device or tensor.dtype not in _KERNEL_DTYPES or torch.compiler.is_compiling():
        return "torch"
    return _active.operations[operation].name
