"""Bridges: the pair of bias-free linear maps at a boundary whose widths differ, expand E (d to D) and reduce R (D to d)."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from wtn_pretrain.errors import UserError
from wtn_pretrain.imitation.pairing import Pairing
from wtn_pretrain.models.base import BlockNetwork


def apply_map(matrix: Tensor, hidden: Tensor, channel_axis: int) -> Tensor:
    """`matrix` [out, in] applied along the carried width of `hidden`."""
    if channel_axis == -1:
        return hidden @ matrix.T
    return torch.einsum("oc,bcyx->boyx", matrix, hidden)


class Bridge(nn.Module):
    """The maps at one boundary. A constrained bridge keeps R = pinv(E), so that R E = I and the thin network stands unchanged."""

    expand: nn.Parameter
    """E [D, d]."""
    free_reduce: nn.Parameter | None
    """R [d, D] of a free bridge."""

    def __init__(self, expand: Tensor, free: bool) -> None:
        super().__init__()
        self.expand = nn.Parameter(expand.clone())
        self.free_reduce = nn.Parameter(torch.linalg.pinv(expand)) if free else None

    @property
    def free(self) -> bool:
        return self.free_reduce is not None

    def reduce(self) -> Tensor:
        """R [d, D]."""
        return torch.linalg.pinv(self.expand) if self.free_reduce is None else self.free_reduce

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


@torch.no_grad()
def make_bridges(
    thin: BlockNetwork, wide: BlockNetwork, pairing: Pairing, bridge: str, batches: Iterable[Mapping[str, Tensor]], rows: int = 8192
) -> dict[int, Bridge]:
    """A bridge for every student boundary whose width differs from the teacher's, started from the teacher's activations.

    Boundaries joined by identity skips start from one map: what a skip carries unchanged must mean the same at both ends.

    Args:
        batches: inputs on the networks' device, from which about `rows` activations a boundary are taken.
    """
    kinds = bridge_kinds(thin, wide, pairing, bridge)
    if not any(kinds):
        return {}
    samples: list[list[Tensor]] = [[] for _ in kinds]
    for inputs in batches:
        carry = wide.stem(inputs)
        _sample(samples, 0, carry.hidden, wide.channel_axis, rows)
        for index, block in enumerate(wide.blocks):
            carry = block(carry)
            if index + 1 in pairing.teacher:
                _sample(samples, pairing.teacher.index(index + 1), carry.hidden, wide.channel_axis, rows)
        if all(sum(map(len, taken)) >= rows for taken in samples):
            break
    widths = thin.widths()
    bridges: dict[int, Bridge] = {}
    for group in _joined(thin, pairing):
        different = [unit for unit in group if kinds[unit]]
        # the same weight for every boundary, whatever its scale
        pooled = [torch.cat(samples[unit]) for unit in different]
        if pooled:
            start = principal_map(
                torch.cat([taken / taken.square().mean().sqrt() for taken in pooled]), widths[pairing.student[different[0]]]
            )
            for unit in different:
                bridges[pairing.student[unit]] = Bridge(start, kinds[unit] == "free")
    return bridges


def _sample(samples: list[list[Tensor]], unit: int, hidden: Tensor, channel_axis: int, rows: int) -> None:
    flat = hidden.movedim(channel_axis, -1).flatten(0, -2).float()
    per_batch = max(64, rows // 8)
    samples[unit].append(flat[:: max(1, len(flat) // per_batch)][:per_batch])


def _joined(thin: BlockNetwork, pairing: Pairing) -> list[list[int]]:
    """Unit boundaries in runs joined by identity skips."""
    groups = [[0]]
    for unit in range(1, pairing.units + 1):
        if thin.why_not_foldable(pairing.student[unit - 1]) is None:
            groups.append([])
        groups[-1].append(unit)
    return groups
