"""How long a rank's passes take on the device at hand: stem, blocks and head one by one, each through a DeepSpeed engine of its own.

What ZeRO does around a pass (hooks, copies into buckets and partitions, weights that come and go) is in the figures, as far as one rank
alone does it; messages are not. Blocks of one shape are measured once. A network that does not fit on the device can be profiled so.
"""

import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn

from wtn_pretrain.device import device
from wtn_pretrain.models.base import BlockNetwork, Carry, channels_last
from wtn_pretrain.planning.training.counted import Absent, allocate, part_of
from wtn_pretrain.planning.training.layout import Layout
from wtn_pretrain.planning.training.pace import Passes
from wtn_pretrain.planning.training.work import Work
from wtn_pretrain.training.activations import checkpoint_blocks
from wtn_pretrain.training.engine import average_only_with_others, deepspeed_config
from wtn_pretrain.training.optimizers import decay_groups, follow_layers, make_optimizer


class _Given(torch.autograd.Function):
    """A loss of zero whose gradient is ones: what comes after a part costs nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.like = torch.ones_like(x)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return ctx.like


class _Part(nn.Module):
    """A part of a network under a loss of its own."""

    def __init__(self, part: nn.Module, loss: Callable[[], Tensor]) -> None:
        super().__init__()
        self.part, self._loss = part, loss

    def forward(self) -> Tensor:
        return self._loss()


class _Top:
    """A network of which only the head is there."""

    def __init__(self, head: nn.Module, carry: Carry) -> None:
        self.head, self._carry = head, carry

    def features(self, inputs: Any) -> Carry:
        return self._carry

    def __call__(self, inputs: Any, **head: Any) -> Any:
        return self.head(self._carry, **head)


def measured(work: Work, layout: Layout, repeats: int = 5) -> Passes:
    """Passes of one rank of a layout, medians of `repeats`; this process must be a group of one (`parallel.launch.start_ranks`)."""
    network = part_of(work, Absent(layout.tensor, layout.sequence) if layout.tensor > 1 else None).train()
    if layout.checkpoint:
        checkpoint_blocks(network, layout.checkpoint, reentrant=layout.zero == 3)
    batch = work.batch(layout.micro, device())
    # an engine's step has a cost of its own, which must not be counted for every part
    tiny = nn.Linear(1, 1, device=device(), dtype=work.dtype)
    alone = _timed(work, layout, tiny, lambda: tiny(torch.ones(1, 1, device=device(), dtype=work.dtype)).sum(), repeats)
    found: dict[str, tuple[float, float, Carry]] = {}
    parts: list[nn.Module] = [network.stem, *network.blocks]
    passes, step = alone
    carry: Carry | None = None
    for part in parts:
        key = f"{part} {carry and _shapes(carry)} {'forward' in vars(part)}"
        if key not in found:
            _fill(part, work)
            with torch.no_grad(), work.cast(device().type):
                above = part(batch if carry is None else carry)
            timed = _timed(work, layout, part, partial(_middle, part, batch, carry), repeats)
            found[key] = (timed[0] - alone[0], timed[1] - alone[1], above)
        one, two, carry = found[key]
        passes, step = passes + one, step + two
    assert carry is not None
    _fill(network.head, work)
    one, two = _timed(work, layout, network.head, partial(_last, work, network.head, batch, carry), repeats)
    return Passes(passes + one - alone[0], max(step + two - 2 * alone[1], 0.0), alone[1])


def _fill(part: nn.Module, work: Work) -> None:
    """Gives a part memory and draws its weights: what was in memory may be slow to compute with."""
    allocate(part, device(), work.dtype)
    for parameter in part.parameters():
        nn.init.normal_(parameter, std=0.02)
    for module in part.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()


def _middle(part: nn.Module, batch: dict[str, Tensor], carry: Carry | None) -> Tensor:
    entered = batch if carry is None else Carry(carry.hidden.detach().requires_grad_(), carry.context)
    return _Given.apply(part(entered).hidden)


def _last(work: Work, head: nn.Module, batch: dict[str, Tensor], carry: Carry) -> Tensor:
    entered = Carry(carry.hidden.detach().requires_grad_(), carry.context)
    return work.task().loss(cast(BlockNetwork, _Top(head, entered)), batch)["loss"]


def _timed(work: Work, layout: Layout, part: nn.Module, loss: Callable[[], Tensor], repeats: int) -> tuple[float, float]:
    """Seconds of forward and backward, and of the step."""
    import deepspeed

    single = work.section.model_copy(update={"batch_size": layout.micro, "micro_batch_size": layout.micro, "tensor_parallel": 1})
    config = deepspeed_config(single, "wide", 1, 1)
    optimizer = make_optimizer(single.optimizer, decay_groups(part.parameters(), single.optimizer.weight_decay), layout.offload != "none")
    engine, *_ = deepspeed.initialize(model=_Part(part, loss), optimizer=optimizer, config=config)
    if layout.zero == 0:
        # as in a run
        channels_last(part)
    average_only_with_others(engine, 1)
    follow_layers(engine, optimizer)
    rounds = []
    for _ in range(repeats + 1):
        marks = [_now()]
        engine.backward(engine())
        marks.append(_now())
        engine.step()
        marks.append(_now())
        rounds.append([after - before for before, after in pairwise(marks)])
    engine.destroy()
    passes, step = (median(column) for column in zip(*rounds[1:], strict=True))
    return passes, step


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _shapes(carry: Carry) -> list[tuple[Any, ...]]:
    return [(*tensor.shape, tensor.stride(), tensor.dtype) for tensor in (carry.hidden, *carry.context)]
