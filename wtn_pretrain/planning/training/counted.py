"""What one pass of a rank makes, found by running it on tensors without data: memory, messages between tensor ranks, parameters."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from wtn_pretrain.kernels.live import using
from wtn_pretrain.models.base import BlockNetwork
from wtn_pretrain.parallel.tensor import Ranks
from wtn_pretrain.planning.footprint import LiveStorages
from wtn_pretrain.planning.training.work import Work
from wtn_pretrain.tasks.base import TaskModule
from wtn_pretrain.training.activations import checkpoint_blocks


class Counted(NamedTuple):
    """A forward and backward pass of one micro-batch on one rank of a tensor group."""

    parameters: int
    """Numbers that this rank holds and trains, tied ones once."""
    largest: int
    """Numbers of the largest parameter."""
    buffers: int
    """Bytes of statistics and the like."""
    kept: int
    """Bytes at most, gradients staying where they are made."""
    lean: int
    """Bytes at most where every gradient leaves as soon as it is whole."""
    messages: int
    """Messages to the other tensor ranks."""
    message_bytes: int
    """What they hold, all together; an all-reduce counts twice, as it scatters and gathers."""
    norms: int
    """Batch norms."""
    modules: int
    """Modules that have parameters of their own."""


class Absent(Ranks):
    """A tensor group of which this process plays one rank: what would be sent is counted, and nothing comes back."""

    def __init__(self, count: int, sequence: bool) -> None:
        self.group, self.sequence, self.count, self.index = None, sequence, count, 0  # type: ignore[assignment]
        self.messages = self.bytes = 0

    def all_reduce(self, x: Tensor, later: bool = False) -> None:
        self._send(2, x)

    def all_gather(self, parts: list[Tensor], x: Tensor, later: bool = False) -> None:
        self._send(self.count, x)

    def reduce_scatter(self, mine: Tensor, parts: list[Tensor], later: bool = False) -> None:
        self._send(self.count, mine)

    @contextmanager
    def own_randomness(self) -> Iterator[None]:
        # tensors without data draw nothing
        yield

    def _send(self, times: int, x: Tensor) -> None:
        self.messages += 1
        self.bytes += times * x.numel() * x.element_size()


class _Split(LiveStorages):
    """Counts with and without the gradients that parameters keep, and what of it falls to where the backward pass begins and ends."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.lean = self.early = self.final = self.gradients = 0
        self._blocks, self._reached = blocks, blocks
        self._have: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.lean = max(self.lean, self.live - self.gradients)
        if self._reached >= self._blocks - 1:
            self.early = max(self.early, self.live)
        # a block's own pass, when nothing of it has arrived yet, falls under the one above it
        if self._reached <= 1:
            self.final = max(self.final, self.live)
        return result

    def arrived(self, parameter: Tensor, block: int | None) -> None:
        """A gradient is whole. A tied one comes twice and stays in one place."""
        if block is not None:
            self._reached = min(self._reached, block)
        if id(parameter) not in self._have:
            self._have.add(id(parameter))
            self.gradients += parameter.numel() * parameter.element_size()


@contextmanager
def _attention(fused_dropout: bool) -> Iterator[None]:
    """Within, attention is computed as devices do it: fused, but for dropout on the CPU, which keeps all scores.

    In place of the function itself: a mode would not be there when a checkpointed block is computed anew.
    """
    plain = F.scaled_dot_product_attention

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("dropout_p") and not fused_dropout:
            return plain(*args, **kwargs)
        output, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3], attn_mask=kwargs.get("attn_mask"))
        return output

    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def count(
    work: Work, rows: int, tensor: int = 1, sequence: bool = False, checkpoint: int = 0, on: str = "gpu", exact: bool = True
) -> Counted:
    """Counts a pass of `rows` samples.

    Args:
        exact: count them as they are; else from 16 and 32 of them, since everything grows in step with the rows (the most that is held
            by the larger of two lines).
        on: the kind of device that it is for; counted with torch's own operations, fused kernels keep less.
    """
    if exact:
        return _once(work, rows, tensor, sequence, checkpoint, on).counted
    few, many = (_once(work, some, tensor, sequence, checkpoint, on) for some in (16, 32))
    return _line(few, many, (rows - 16) / 16)


class _Phases(NamedTuple):
    counted: Counted
    early: int
    """Bytes at most until the last block but one begins to give gradients."""
    final: int
    """Bytes at most from where the second block gives gradients."""


def _line(low: _Phases, high: _Phases, times: float) -> Counted:
    """`low` with `times` what `high` has more; the most is held where the backward pass begins, or where it ends."""

    def at(mine: int, theirs: int) -> int:
        return max(0, round(mine + times * (theirs - mine)))

    made = Counted(*(at(mine, theirs) for mine, theirs in zip(low.counted, high.counted, strict=True)))
    return made._replace(kept=max(made.kept, at(low.early, high.early), at(low.final, high.final)))


def _once(work: Work, rows: int, tensor: int, sequence: bool, checkpoint: int, on: str) -> _Phases:
    # what a shape costs does not depend on the rest of how it is trained
    rest = (work.section.precision, work.length, work.masked, rows, tensor, sequence, checkpoint, on)
    key = (work.config.model_dump_json(), *rest)
    if key not in _found:
        _found[key] = _deep(work, rows, tensor, sequence, checkpoint, on)
    return _found[key]


_found: dict[tuple[Any, ...], _Phases] = {}


def _deep(work: Work, *rest: Any) -> _Phases:
    """Networks of one shape of block are counted with three and four of them: what every further one adds is the same."""
    checkpoint = rest[3]
    if len(work.config.stages) > 1 or work.config.stages[0] <= 6 or checkpoint > 1:
        return _run(work, *rest)
    small, large = (_run(work._replace(config=work.config.widen(1.0, 1.0, (blocks,))), *rest) for blocks in (3, 4))
    more = work.config.stages[0] - 3
    early, final = (mine + more * (theirs - mine) for mine, theirs in zip(small[1:], large[1:], strict=True))
    made = _line(small, large, more)
    return _Phases(made._replace(largest=small.counted.largest), early, final)


def part_of(work: Work, ranks: Absent | None) -> BlockNetwork:
    """A rank's part of the network on torch's meta device."""
    with torch.device("meta"):
        network = work.config.build()
        if ranks is not None:
            network.divide(ranks, ranks.sequence)  # type: ignore[arg-type]
    return network


def allocate(network: nn.Module, device: torch.device | str, dtype: torch.dtype) -> None:
    """Gives a meta network memory on `device`, numbers in `dtype`, in place; what is tied stays so, its values are whatever was there."""
    made: dict[int, Any] = {}

    def new(tensor: Tensor) -> Tensor:
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=kind, device=device)

    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    # who it replaces must live on, lest another takes its number
                    made[id(parameter)] = parameter, nn.Parameter(new(parameter), parameter.requires_grad)
                module._parameters[name] = made[id(parameter)][1]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = new(buffer)


def _run(work: Work, rows: int, tensor: int, sequence: bool, checkpoint: int, on: str) -> _Phases:
    mode = FakeTensorMode()
    ranks = Absent(tensor, sequence) if tensor > 1 else None
    network = part_of(work, ranks)
    with mode:
        allocate(network, "cpu", work.dtype)
        if checkpoint:
            checkpoint_blocks(network, checkpoint)
        module = TaskModule(network, work.task()).train()
        batch = work.batch(rows, "cpu")
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        made = _Split(len(network.blocks))
        owner = {parameter: number for number, block in enumerate(network.blocks) for parameter in block.parameters()}
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(partial(made.arrived, block=owner.get(parameter)))
        with using(None), _attention(on != "cpu"), made:
            with work.cast("cpu") if work.section.precision == "bf16" else nullcontext():
                loss = module(batch)["loss"]
            loss.backward()
    sizes = [parameter.numel() for parameter in parameters]
    found = Counted(
        parameters=sum(sizes),
        largest=max(sizes),
        buffers=sum(buffer.numel() * buffer.element_size() for buffer in module.buffers()),
        kept=made.peak,
        lean=made.lean,
        messages=ranks.messages if ranks else 0,
        message_bytes=ranks.bytes if ranks else 0,
        norms=sum(isinstance(part, nn.BatchNorm2d) for part in network.modules()),
        modules=sum(1 for part in network.modules() if next(part.parameters(recurse=False), None) is not None),
    )
    return _Phases(found, made.early, made.final)
