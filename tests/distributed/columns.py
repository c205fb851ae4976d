"""What column-parallel layers keep for the backward pass, on every rank: columns.py FOLDER

Writes {"whole"|"parts": the most elements of a tensor that is kept and no weight} into FOLDER/rank-N.json.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from wtn_pretrain.parallel.columns import columns
from wtn_pretrain.parallel.grid import Grid
from wtn_pretrain.parallel.launch import start_ranks, stop_ranks
from wtn_pretrain.parallel.tensor import Ranks

SHAPE = (3, 8, 16)


def main() -> None:
    place = start_ranks()
    grid = Grid(place, place.world_size)
    assert grid.tensor_group is not None
    found = {}
    for name, sequence in (("whole", False), ("parts", True)):
        ranks = Ranks(grid.tensor_group, sequence)
        torch.manual_seed(0)
        x = torch.randn(SHAPE)
        layers = [(torch.randn(4, 16, requires_grad=True), torch.randn(4, requires_grad=True)) for _ in range(2)]
        mine = (ranks.part(x, 1) if sequence else x).clone().requires_grad_()
        kept: list[int] = []

        def keep(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(tensor.numel() if tensor.dim() == 3 else 0)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            made = columns(mine, layers, ranks)
        assert all(one.shape == (3, 8, 4) for one in made)
        found[name] = max(kept)
    (Path(sys.argv[1]) / f"rank-{place.rank}.json").write_text(json.dumps(found))
    stop_ranks()


if __name__ == "__main__":
    main()
