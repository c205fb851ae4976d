"""The certificate: how far an export's logits are from the original's, and how well it does what the task asks."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from wtn_pretrain.exchange.probes import Inputs, apart, inputs_of, mixed
from wtn_pretrain.models.base import BlockConfig, BlockNetwork
from wtn_pretrain.tasks.base import Task

Call = Callable[[Inputs], Tensor]
"""An exported network: inputs to logits."""

BATCH = {"resnet": 64, "bert": 16}
"""Samples that the metric is taken on at once."""


@torch.no_grad()
def parity(network: BlockNetwork, exported: Call, probes: Iterable[Inputs]) -> dict[str, Any]:
    """Compares `exported(inputs)` with the network's own logits on `probes`; padded positions do not count.

    Returns:
        `max_difference` and `mean_difference` (absolute, of logits), `largest_logit`, `top1_agreement` (share), and the same of every
        shape under `shapes`.
    """
    network.eval()
    largest, total, count, agreed, answers, logit = 0.0, 0.0, 0, 0, 0, 0.0
    shapes = []
    for inputs in probes:
        ours, theirs = network(inputs).float(), exported(inputs).float()
        most, same, rows = 0.0, 0, 0
        # row by row: the logits of a whole batch may take gigabytes
        for row in range(len(ours)):
            mine, other = ours[row], theirs[row]
            if "attention_mask" in inputs:
                kept = inputs["attention_mask"][row].bool()
                mine, other = mine[kept], other[kept]
            difference = (mine - other).abs()
            # a NaN must not pass for a small difference
            most = max(most, float(difference.max().nan_to_num(nan=float("inf"))))
            logit = max(logit, float(mine.abs().max()))
            total, count = total + float(difference.sum()), count + difference.numel()
            same, rows = same + int((mine.argmax(-1) == other.argmax(-1)).sum()), rows + mine[..., 0].numel()
        shape = next(list(value.shape) for value in inputs.values())
        shapes.append({"shape": shape, "max_difference": most, "top1_agreement": same / rows})
        largest, agreed, answers = max(largest, most), agreed + same, answers + rows
    return {
        "max_difference": largest,
        "mean_difference": total / count,
        "largest_logit": logit,
        "top1_agreement": agreed / answers,
        "shapes": shapes,
    }


class _Exported:
    """An exported network in the place of ours, as far as a task's tally goes."""

    def __init__(self, call: Call, config: BlockConfig) -> None:
        self.call, self.config = call, config

    def __call__(self, batch: Mapping[str, Tensor], positions: Tensor | None = None) -> Tensor:
        logits = self.call(inputs_of(dict(batch), self.config)).float()
        return logits if positions is None else logits.gather(1, positions[..., None].expand(-1, -1, logits.shape[-1]))


@torch.no_grad()
def task_metric(task: Task, network: BlockNetwork, exported: Call | None, samples: int) -> tuple[float, int]:
    """The task's metric on `samples` validation samples (0: all), of `exported` or else of the network itself, and how many they were.

    Documents that share a row are read one by one, which is all that an exported network can and gives what the row would.
    """
    sums: dict[str, float] = {"loss": 0.0, "right": 0.0, "count": 0.0}
    stand_in: Any = network.eval() if exported is None else _Exported(exported, network.config)
    counted = 0
    for batch in mixed(task.valid, samples, BATCH[network.config.family]):
        counted += len(next(iter(batch.values())))
        for name, value in task.tally(stand_in, apart(batch, task)).items():
            sums[name] += float(value)
    return task.score(sums)["metric"], counted
