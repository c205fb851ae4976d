"""The memory that a unit's work takes, found by following every storage that operators make: on a device, or on tensors without data."""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wtn_pretrain.imitation.units import Flow, Unit
from wtn_pretrain.models.base import Carry, Taps


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of the storages that operators make while it is active, until they are freed; `peak` is the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._followed: dict[int, weakref.finalize[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # a storage that came in and is not followed was there before: a view of it, or a write into it, makes nothing
        entered = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key = id(storage)
                if key not in entered and key not in self._followed:
                    size = storage.nbytes()
                    self.live += size
                    self._followed[key] = weakref.finalize(storage, self._freed, key, size)
        self.peak = max(self.peak, self.live)
        return result

    def _freed(self, key: int, size: int) -> None:
        self.live -= size
        del self._followed[key]


class FusedAttention(TorchFunctionMode):
    """Attention by the fused operator that devices use; tensors without data would take the plain one, which keeps all scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            output, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3], attn_mask=kwargs.get("attn_mask"))
            return output
        return func(*args, **kwargs)


def teaching_peak(unit: Unit, flow: Flow, autocast: Callable[[], torch.autocast]) -> tuple[int, Carry, Taps]:
    """The most bytes that a teacher's forward makes at once, its output included, and what it gives."""
    with LiveStorages() as made, autocast():
        target, taps = unit.teach(flow)
    return made.peak, target, taps


class Training(NamedTuple):
    """Bytes that a student makes; none is left behind."""

    peak: int
    """The most at once in forward, loss and backward, gradients included."""
    held: int
    """From the loss until the backward pass: its graph, the loss's with it."""
    graph: int
    """Of these, what is there without a loss."""


def training_peak(
    unit: Unit, teacher: Flow, student: Flow, fed: str, target: Carry, taps: Taps, autocast: Callable[[], torch.autocast]
) -> Training:
    """What a student's forward, loss and backward make."""
    with LiveStorages() as made:
        with autocast():
            output, own = unit.answer(unit.enter(teacher, student, fed, local=True))
            graph = made.live
            share = _share(unit, output, own, target, taps)
        held = made.live
        share.backward()
    unit.zero_grad(set_to_none=True)
    return Training(made.peak, held, graph)


def train(
    unit: Unit,
    teacher: Flow,
    student: Flow,
    fed: str,
    target: Carry,
    taps: Taps,
    autocast: Callable[[], torch.autocast],
    backward: Callable[[Tensor], None] = Tensor.backward,
) -> None:
    """A student's forward, loss and backward, as the engine runs them on one rank."""
    with autocast():
        output, own = unit.answer(unit.enter(teacher, student, fed, local=True))
        share = _share(unit, output, own, target, taps)
    backward(share)


def _share(unit: Unit, output: Carry, own: Taps, target: Carry, taps: Taps) -> Tensor:
    loss = unit.loss(output, own, target, taps)
    return loss.top / loss.bottom.detach()
