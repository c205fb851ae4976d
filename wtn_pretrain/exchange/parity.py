"""The certificate: how far an export's logits are from the original's."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from wtn_pretrain.models.base import BlockNetwork

Inputs = dict[str, Tensor]


@torch.no_grad()
def parity(network: BlockNetwork, exported: Callable[[Inputs], Tensor], probes: Iterable[Inputs]) -> dict[str, Any]:
    """Compares `exported(inputs)` with the network's own logits on `probes`; padded positions do not count.

    Returns:
        `max_difference` and `mean_difference` (absolute, of logits), `top1_agreement` (share) and the `shapes` compared.
    """
    network.eval()
    largest, total, count, agreed, answers = 0.0, 0.0, 0, 0, 0
    shapes = []
    for inputs in probes:
        ours, theirs = network(inputs).float(), exported(inputs).float()
        shapes.append(next(list(value.shape) for value in inputs.values()))
        if "attention_mask" in inputs:
            kept = inputs["attention_mask"].bool()
            ours, theirs = ours[kept], theirs[kept]
        difference = (ours - theirs).abs()
        # a NaN must not pass for a small difference
        largest = max(largest, float(difference.max().nan_to_num(nan=float("inf"))))
        total, count = total + float(difference.sum()), count + difference.numel()
        agreed, answers = agreed + int((ours.argmax(-1) == theirs.argmax(-1)).sum()), answers + ours[..., 0].numel()
    return {"max_difference": largest, "mean_difference": total / count, "top1_agreement": agreed / answers, "shapes": shapes}
