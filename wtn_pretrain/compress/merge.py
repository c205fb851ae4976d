"""Merging: fold every bridge away, exactly, and measure that it was."""

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wtn_pretrain.errors import UserError
from wtn_pretrain.imitation.bridges import Bridge, apply_map
from wtn_pretrain.models.base import BlockNetwork, Carry

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Largest relative difference between bridged and merged outputs that counts as equal: round-off of a deep network."""


class Bridged(nn.Module):
    """S-bar: the thin network with its bridges. `bridges` maps a boundary (0 = after the stem, i = after block i) to its maps."""

    def __init__(self, thin: BlockNetwork, bridges: Mapping[int, Bridge]) -> None:
        super().__init__()
        self.thin = thin
        self.bridges = nn.ModuleDict({str(boundary): bridge for boundary, bridge in bridges.items()})

    def forward(self, inputs: Mapping[str, Tensor], **head: Tensor) -> Tensor:
        """Logits, every bridge expanding and reducing what is carried through it."""
        carry = self._through(0, self.thin.stem(inputs))
        for index, block in enumerate(self.thin.blocks):
            carry = self._through(index + 1, block(carry))
        return self.thin.head(carry, **head)

    def _through(self, boundary: int, carry: Carry) -> Carry:
        if str(boundary) not in self.bridges:
            return carry
        bridge = self.bridges[str(boundary)]
        assert isinstance(bridge, Bridge)
        axis = self.thin.channel_axis
        return Carry(apply_map(bridge.reduce(), apply_map(bridge.expand, carry.hidden, axis), axis), carry.context)


class Merged(NamedTuple):
    """The plain thin network and how far its outputs are from the bridged one's."""

    network: BlockNetwork
    difference: float
    """Largest absolute difference of logits over the largest absolute logit."""
    dtype: torch.dtype


def merge(bridged: Bridged) -> BlockNetwork:
    """The plain thin network that computes what `bridged` does, in eval mode. Leaves `bridged` as it is.

    Raises:
        UserError: a bridge is neither the identity nor foldable at its boundary; names it.
    """
    network = copy.deepcopy(bridged.thin)
    for name, bridge in bridged.bridges.items():
        boundary = int(name)
        assert isinstance(bridge, Bridge)
        with torch.no_grad():
            # in double, so that the fold adds no error of its own
            matrix = (bridge.reduce().double() @ bridge.expand.double()).to(bridge.expand.dtype)
        if not bridge.free:
            identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
            if not torch.allclose(matrix, identity, atol=10 * TOLERANCE.get(matrix.dtype, 1e-5), rtol=0):
                raise UserError(
                    f"merge: the constrained bridge at boundary {boundary} is ill-conditioned: reduce x expand misses the identity by "
                    f"{float((matrix - identity).abs().max()):.1e}; lower narrow.optimizer.lr or use inner widening"
                )
            continue
        reason = network.why_not_foldable(boundary)
        if reason:
            raise UserError(
                f"merge: the free bridge at boundary {boundary} cannot be merged exactly: {reason}; "
                "train with narrow.bridge=auto or constrained, narrow.unit=stage, or inner widening"
            )
        network.fold(boundary, matrix)
    return network


@torch.no_grad()
def merge_and_check(bridged: Bridged, inputs: Mapping[str, Tensor], **head: Tensor) -> Merged:
    """`merge`, with the difference measured on `inputs` and held against the tolerance of the network's dtype.

    Raises:
        UserError: the merged network differs by more than the tolerance.
    """
    bridged.eval()
    network = merge(bridged).eval()
    expected, result = bridged(inputs, **head), network(inputs, **head)
    difference = float((expected - result).abs().max() / expected.abs().max().clamp_min(1e-30))
    dtype = expected.dtype
    if not difference <= TOLERANCE[dtype]:
        raise UserError(
            f"merge: the merged network differs from the bridged one by {difference:.1e} (relative), more than {TOLERANCE[dtype]:.0e} for "
            f"{dtype}; train with narrow.bridge=constrained"
        )
    return Merged(network, difference, dtype)
