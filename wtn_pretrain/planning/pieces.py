"""Both networks as units without weights, with the shapes of what flows between them: what costs are counted and measured on."""

import copy
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from wtn_pretrain.imitation.bridges import Bridge, bridge_kinds
from wtn_pretrain.imitation.config import ImitateSection
from wtn_pretrain.imitation.pairing import Pairing
from wtn_pretrain.imitation.units import Flow, Unit, make_units
from wtn_pretrain.models.base import BlockConfig, Carry, Flops


class Piece(NamedTuple):
    """One unit on torch's meta device (no memory), and what enters and leaves it, one row of each, also there."""

    unit: Unit
    teacher_in: Flow
    student_in: Flow
    teacher_out: Carry
    student_out: Carry
    learns: bool
    """Whether the student takes part; a stem that is a copy of the teacher's does not."""
    key: str
    """Equal for units that cost the same."""


def cut(
    thin: BlockConfig, wide: BlockConfig, pairing: Pairing, counts: tuple[Flops, Flops], section: ImitateSection, length: int | None = None
) -> list[Piece]:
    """Every unit of a pair of networks, the stem first. `length` of sequences; None: the longest."""
    with torch.device("meta"):
        small, large = thin.build(), wide.build()
        kinds = bridge_kinds(small, large, pairing, section.bridge)
        mine, theirs = small.widths(), large.widths()
        bridges = {
            student: Bridge(torch.empty(theirs[teacher], mine[student]), kind == "free")
            for student, teacher, kind in zip(pairing.student, pairing.teacher, kinds, strict=True)
            if kind
        }
        units = make_units(small, large, pairing, bridges, section, counts)
    teacher: Flow = thin.example_inputs(1, "meta", length)
    student: Flow = teacher
    known: dict[str, tuple[Carry, Carry]] = {}
    pieces = []
    for unit in units:
        unit.learn(True)
        learns = unit.index > 0 or unit.exit is not None
        key = "\n".join(
            map(str, [*_modules(unit), *_maps(unit), *_shapes(teacher), *_shapes(student), unit.student_flops, unit.teacher_flops])
        )
        if key not in known:
            known[key] = _flow_through(unit, teacher, student, section)
        above = known[key]
        pieces.append(Piece(unit, teacher, student, *above, learns, key))
        teacher, student = above
    return pieces


def allocate(unit: Unit, device: torch.device | str) -> None:
    """Gives a meta unit memory on `device`, in place; its values are whatever was there."""
    for module in (unit, *unit.teacher):
        module._apply(lambda tensor: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device))


def materialise(unit: Unit, device: torch.device | str) -> Unit:
    """A copy of a meta unit on `device`: the weights of this unit alone, freshly drawn."""
    made = copy.deepcopy(unit)
    allocate(made, device)
    for module in (made, *made.teacher):
        for part in module.modules():
            reset = getattr(part, "reset_parameters", None)
            if reset is not None:
                reset()
    for bridge in (made.entry, made.exit):
        if bridge is not None:
            nn.init.eye_(bridge.expand)
            if bridge.free_reduce is not None:
                nn.init.eye_(bridge.free_reduce)
    return made


def batch(flow: Flow, rows: int, device: torch.device | str) -> Flow:
    """`rows` rows of the shape, type and memory layout of a one-row flow."""
    if isinstance(flow, Carry):
        return Carry(_rows(flow.hidden, rows, device), tuple(_rows(tensor, rows, device) for tensor in flow.context))
    return {name: _rows(tensor, rows, device) for name, tensor in flow.items()}


def autocast(section: ImitateSection, device: str) -> Callable[[], torch.autocast]:
    """The precision that the engine computes in."""
    return lambda: torch.autocast(device, dtype=torch.bfloat16, enabled=section.precision == "bf16")


def fewest_rows(piece: Piece, rows: int) -> int:
    """The fewest of `rows` rows that its student learns from alone: a batch norm needs two pixels. Replicas share theirs."""
    norms = any(isinstance(module, nn.BatchNorm2d) for module in piece.unit.student.modules())
    return min(rows, 2) if norms and piece.student_out.hidden[0, 0].numel() == 1 else 1


def row_bytes(flow: Flow | Tensor) -> int:
    """Bytes of one row."""
    if isinstance(flow, Tensor):
        return flow.numel() // len(flow) * flow.element_size()
    return sum(map(row_bytes, _tensors(flow)))


def _flow_through(unit: Unit, teacher: Flow, student: Flow, section: ImitateSection) -> tuple[Carry, Carry]:
    """What leaves the unit on both sides. Tensors without data, which unlike meta tensors know autocast."""
    made = copy.deepcopy(unit)
    # the variance of one row's one pixel would be refused
    made.learn(False)
    with FakeTensorMode(), torch.no_grad(), autocast(section, "cpu")():
        allocate(made, "cpu")
        target, _ = made.teach(batch(teacher, 1, "cpu"))
        own = batch(student, 1, "cpu")
        output, _ = made.answer(made.enter(own, own, "student", local=True))
    return _meta(target), _meta(output)


def _meta(carry: Carry) -> Carry:
    def plain(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    return Carry(plain(carry.hidden), tuple(map(plain, carry.context)))


def _rows(tensor: Tensor, rows: int, device: torch.device | str) -> Tensor:
    shape = (rows, *tensor.shape[1:])
    if not tensor.is_floating_point():
        return (
            torch.ones(shape, device=device).bool() if tensor.dtype is torch.bool else torch.zeros(shape, dtype=tensor.dtype, device=device)
        )
    made = torch.randn(shape, device=device).to(tensor.dtype)
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return made.contiguous(memory_format=torch.channels_last) if last else made


def _tensors(flow: Flow) -> list[Tensor]:
    return [flow.hidden, *flow.context] if isinstance(flow, Carry) else list(flow.values())


def _shapes(flow: Flow | Mapping[str, Tensor]) -> list[str]:
    return [f"{tuple(tensor.shape)} {tensor.stride()} {tensor.dtype}" for tensor in _tensors(flow)]


def _modules(unit: Unit) -> list[str]:
    return [repr(unit.student), *map(repr, unit.teacher)]


def _maps(unit: Unit) -> list[str]:
    return [str(bridge and (bridge.free, tuple(bridge.expand.shape))) for bridge in (unit.entry, unit.exit)]
