"""Bridges: the pair of bias-free linear maps at a boundary whose widths differ, expand E (d to D) and reduce R (D to d)."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from wtn_pretrain.errors import UserError
from wtn_pretrain.imitation.pairing import Pairing
from wtn_pretrain.models.base import BlockNetwork, Carry, Flow, boundary_shapes


def apply_map(matrix: Tensor, hidden: Tensor, channel_axis: int) -> Tensor:
    """`matrix` [out, in] applied along the carried width of `hidden`."""
    # the axis goes last and back: maps of images stay channels-last, in which the convolutions around are fastest
    return (hidden.movedim(channel_axis, -1) @ matrix.T).movedim(-1, channel_axis)


def left_inverse(expand: Tensor) -> Tensor:
    """pinv(E) [d, D] of a map E [D, d] of full column rank, from its QR factors: a fraction of the cost of singular values."""
    q, r = torch.linalg.qr(expand)
    return torch.linalg.solve_triangular(r, q.mT, upper=True)


class Bridge(nn.Module):
    """The maps at one boundary. A constrained bridge keeps R = pinv(E), so that R E = I and the thin network stands unchanged."""

    expand: nn.Parameter
    """E [D, d]."""
    free_reduce: nn.Parameter | None
    """R [d, D] of a free bridge."""

    def __init__(self, expand: Tensor, free: bool) -> None:
        super().__init__()
        self.expand = nn.Parameter(expand.clone(memory_format=torch.contiguous_format))
        self.free_reduce = nn.Parameter(left_inverse(expand).contiguous()) if free else None

    @property
    def free(self) -> bool:
        return self.free_reduce is not None

    def reduce(self, expand: Tensor | None = None) -> Tensor:
        """R [d, D]; of a constrained bridge that of `expand`, if another E than its own is given."""
        if self.free_reduce is None:
            return left_inverse(self.expand if expand is None else expand)
        return self.free_reduce

    def merged(self) -> Tensor:
        """A = R E [d, d], what the thin network carries through this boundary."""
        return self.reduce() @ self.expand


def bridge_kinds(thin: BlockNetwork, wide: BlockNetwork, pairing: Pairing, bridge: str) -> list[str | None]:
    """For every unit boundary (after the stem, then after each unit): None (same width), `free` or `constrained`.

    Raises:
        UserError: `bridge` is `free` and a boundary cannot be merged exactly; names the boundary and the ways out.
    """
    kinds: list[str | None] = []
    mine, theirs = thin.widths(), wide.widths()
    for student, teacher in zip(pairing.student, pairing.teacher, strict=True):
        if mine[student] == theirs[teacher]:
            kinds.append(None)
            continue
        reason = thin.why_not_foldable(student)
        if bridge == "free" and reason:
            where = "after the stem" if student == 0 else f"after block {student}"
            raise UserError(
                f"narrow.bridge: a free bridge {where} cannot be merged exactly: {reason}; "
                "use narrow.bridge=auto or constrained, narrow.unit=stage where every stage begins with a projection, or inner widening"
            )
        # the top has no block above it: the head starts from the wide head through E alone
        top = student == len(thin.blocks)
        kinds.append("constrained" if reason or top or bridge == "constrained" else "free")
    return kinds


@torch.no_grad()
def principal_map(activations: Tensor, width: int) -> Tensor:
    """A start for E [D, width] from teacher activations [n, D]: the best `width`-dimensional picture of them.

    Signed activations: leading principal directions, orthonormal (Eckart-Young: no linear pair loses less energy).
    Non-negative ones (after a ReLU) are answered by non-negative student outputs, so there E is the non-negative factor of
    Lee and Seung's multiplicative updates.
    """
    if bool((activations < 0).any()):
        _, vectors = torch.linalg.eigh(activations.T.double() @ activations.double())
        return vectors[:, -width:].flip(-1).to(activations.dtype).contiguous()
    generator = torch.Generator().manual_seed(0)
    rows, columns = activations.shape
    scale = (activations.mean() / width).sqrt().clamp_min(1e-6)
    codes = scale * (0.5 + torch.rand(rows, width, generator=generator)).to(activations)
    basis = scale * (0.5 + torch.rand(columns, width, generator=generator)).to(activations)
    for _ in range(200):
        basis *= (activations.T @ codes) / (basis @ (codes.T @ codes)).clamp_min(1e-12)
        codes *= (activations @ basis) / (codes @ (basis.T @ basis)).clamp_min(1e-12)
    # columns of one length, so that the student's channels are of one size
    length = basis.norm(dim=0).clamp_min(1e-6)
    return basis / length


ROWS = 8192
"""Activations of a boundary from which a bridge starts."""


@torch.no_grad()
def sample_teacher(
    modules: Callable[[int], Sequence[nn.Module]],
    channel_axis: int,
    units: range,
    flows: Iterable[Flow],
    send: Callable[[Carry], object] | None = None,
    rows: int = ROWS,
) -> dict[int, Tensor]:
    """Teacher activations [n, D] after each of `units`, from what enters the first of them; about `rows` a boundary.

    Args:
        modules: gives the teacher's modules of a unit, which are asked for once.
        send: takes what the units above need.
    """
    samples: dict[int, Tensor] = {}
    waiting = list(flows)
    for unit in units:
        taken = []
        teacher = nn.Sequential(*modules(unit))
        for number in range(len(waiting)):
            flow = teacher(waiting[number])
            assert isinstance(flow, Carry)
            flat = flow.hidden.movedim(channel_axis, -1).flatten(0, -2).float()
            taken.append(flat[:: max(1, len(flat) // _per_batch(rows))][: _per_batch(rows)])
            waiting[number] = flow
        samples[unit] = torch.cat(taken)
    if send is not None:
        for flow in waiting:
            assert isinstance(flow, Carry)
            send(flow)
    return samples


def enough(batches: Iterable[dict[str, Tensor]], wide: BlockNetwork, pairing: Pairing, rows: int = ROWS) -> Iterator[dict[str, Tensor]]:
    """As many of `batches` as give `rows` activations at every boundary."""
    shapes = [boundary_shapes(wide.config)[block] for block in pairing.teacher]
    # positions of a sample: all axes but the carried width, which is the last of a sequence [S, D] and the first of an image [C, Y, X]
    sizes = [math.prod(shape[:-1] if len(shape) == 2 else shape[1:]) for shape in shapes]
    for number, batch in enumerate(batches):
        longest = next(iter(batch.values()))
        least = len(longest) * min(sizes) * (longest.shape[1] / sizes[0] if len(shapes[0]) == 2 else 1)
        stride = max(1, int(least) // _per_batch(rows))
        taken = min(_per_batch(rows), math.ceil(least / stride))
        yield batch
        if (number + 1) * taken >= rows:
            return


def start_maps(thin: BlockNetwork, pairing: Pairing, kinds: list[str | None], samples: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """E [D, d] for every student boundary that needs a bridge, from the teacher's activations at each unit boundary.

    Boundaries joined by identity skips start from one map: what a skip carries unchanged must mean the same at both ends.
    """
    widths = thin.widths()
    maps: dict[int, Tensor] = {}
    for group in _joined(thin, pairing):
        different = [unit for unit in group if kinds[unit]]
        # the same weight for every boundary, whatever its scale
        pooled = [samples[unit] / samples[unit].square().mean().sqrt() for unit in different]
        if pooled:
            start = principal_map(torch.cat(pooled), widths[pairing.student[different[0]]])
            maps.update((pairing.student[unit], start) for unit in different)
    return maps


def place_bridges(maps: Mapping[int, Tensor], pairing: Pairing, kinds: list[str | None]) -> dict[int, Bridge]:
    """A bridge for each of `maps`, by student boundary."""
    return {boundary: Bridge(start, kinds[pairing.student.index(boundary)] == "free") for boundary, start in maps.items()}


def make_bridges(
    thin: BlockNetwork, wide: BlockNetwork, pairing: Pairing, bridge: str, batches: Iterable[dict[str, Tensor]], rows: int = ROWS
) -> dict[int, Bridge]:
    """A bridge for every student boundary whose width differs from the teacher's, started from the teacher's activations.

    Args:
        batches: inputs on the networks' device, from which about `rows` activations a boundary are taken.
    """
    kinds = bridge_kinds(thin, wide, pairing, bridge)
    if not any(kinds):
        return {}
    flows, units = enough(batches, wide, pairing, rows), range(pairing.units + 1)
    samples = sample_teacher(lambda unit: teacher_modules(wide, pairing, unit), wide.channel_axis, units, flows, rows=rows)
    return place_bridges(start_maps(thin, pairing, kinds, samples), pairing, kinds)


def teacher_modules(wide: BlockNetwork, pairing: Pairing, unit: int) -> list[nn.Module]:
    """The teacher's modules of a unit, the stem for unit 0."""
    return [wide.get_submodule(part) for part in pairing.teacher_parts(unit)]


def _per_batch(rows: int) -> int:
    return max(64, rows // 8)


def _joined(thin: BlockNetwork, pairing: Pairing) -> list[list[int]]:
    """Unit boundaries in runs of one width joined by identity skips."""
    groups, widths = [[0]], thin.widths()
    for unit in range(1, pairing.units + 1):
        below, above = pairing.student[unit - 1], pairing.student[unit]
        if thin.why_not_foldable(below) is None or widths[below] != widths[above]:
            groups.append([])
        groups[-1].append(unit)
    return groups
