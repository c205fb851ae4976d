"""The cross-entropy of a divided vocabulary against torch's of the whole one in fp64, on every rank of a tensor group.

Writes {case: findings} into FOLDER/rank-N.json: vocabulary.py FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wtn_pretrain.kernels import linear_cross_entropy
from wtn_pretrain.parallel.grid import Grid
from wtn_pretrain.parallel.launch import start_ranks, stop_ranks
from wtn_pretrain.parallel.tensor import Ranks
from wtn_pretrain.parallel.vocabulary import vocabulary_cross_entropy

WORDS, WIDTH = 120, 8
CASES: dict[str, dict[str, Any]] = {
    "one chunk": {"rows": 10, "chunk": 10**6},
    "several chunks": {"rows": 50, "chunk": 7 * WORDS},
    "a row a chunk": {"rows": 5, "chunk": 1},
    "large logits": {"rows": 20, "chunk": 300, "scale": 300.0},
    "nothing counts": {"rows": 9, "chunk": 300, "ignored": 1.0},
    "no rows": {"rows": 0, "chunk": 300},
    "bf16": {"rows": 50, "chunk": 900, "autocast": True},
    "fp64": {"rows": 20, "chunk": 900, "dtype": torch.float64},
}


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, *(leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, Tensor)), 0)
        return made


def compare(
    ranks: Ranks,
    rows: int,
    chunk: int,
    scale: float = 1.0,
    ignored: float = 0.3,
    autocast: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Differences relative to the largest value that is right, and the largest tensor over this rank's logits if they were whole."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(size, generator=generator).to(dtype) for size in ((rows, WIDTH), (WORDS, WIDTH), (WORDS,)))
    hidden *= scale
    targets = torch.randint(WORDS, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = -100
    if autocast:
        # what autocast rounds, so that round-off of sums alone is left
        hidden, weight, bias = hidden.bfloat16().float(), weight.bfloat16().float(), bias.bfloat16().float()
    whole = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    right = F.cross_entropy(F.linear(*whole), targets, ignore_index=-100, reduction="sum") * 3
    exact = torch.autograd.grad(right, whole)
    linear_cross_entropy.CHUNK = (chunk, chunk)
    mine = [hidden, ranks.part(weight, 0).clone(), ranks.part(bias, 0).clone()]
    mine = [x.requires_grad_() for x in mine]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Largest() as largest:
        loss, count = vocabulary_cross_entropy(*mine, targets, ranks)
        gradients = torch.autograd.grad(loss * 3, mine)
        with torch.no_grad():
            untaught, _ = vocabulary_cross_entropy(*mine, targets, ranks)
    assert count == (targets != -100).sum() and untaught == loss
    assert loss.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert all(gradient.dtype is x.dtype for gradient, x in zip(gradients, mine, strict=True))
    found = {
        "loss": float((3 * loss - right).abs() / right.abs().clamp_min(1e-30)),
        "largest": largest.elements / max(1, rows * len(mine[1])),
    }
    for name, gradient, other in zip(("hidden", "weight", "bias"), gradients, exact, strict=True):
        other = other if name == "hidden" else ranks.part(other, 0)
        if other.numel():
            found[name] = float((gradient - other).abs().max() / other.abs().max().clamp_min(1e-30))
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    place = start_ranks()
    grid = Grid(place, place.world_size)
    assert grid.tensor_group is not None
    ranks = Ranks(grid.tensor_group)
    found = {name: compare(ranks, **case) for name, case in CASES.items()}
    dist.barrier()
    (folder / f"rank-{place.rank}.json").write_text(json.dumps(found))
    stop_ranks()


if __name__ == "__main__":
    main()
