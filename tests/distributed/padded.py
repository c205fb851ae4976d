"""Stage 2 as `scripts/imitate.py` runs it, on rows that are padded, and with a record of what each rank has loaded.

Every rank writes into FOLDER/rank-N.json (FOLDER is that of the configuration) which modules of teacher and student are real.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wtn_pretrain.cli import main
from wtn_pretrain.data.masking import MaskedText
from wtn_pretrain.models.base import BlockNetwork
from wtn_pretrain.narrow import Narrow

plain_fetch, plain_wide, plain_student = MaskedText.fetch, Narrow._wide, Narrow._student
real: dict[str, list[str]] = {}


def padded(self: MaskedText, indices: np.ndarray, seeds: np.ndarray | None) -> dict[str, torch.Tensor]:
    """Rows that lack up to fifteen tokens at the end."""
    batch = plain_fetch(self, indices, seeds)
    length = batch["input_ids"].shape[1]
    kept = length - torch.from_numpy(indices * 7 % 16)
    return {**batch, "attention_mask": (torch.arange(length) < kept[:, None]).long()}


def noted(side: str, network: BlockNetwork) -> BlockNetwork:
    parts: dict[str, Any] = {"stem": network.stem, **{f"block {n + 1}": block for n, block in enumerate(network.blocks)}}
    parts["head"] = network.head
    real[side] = [name for name, part in parts.items() if not any(value.is_meta for value in part.state_dict().values())]
    mixed = [name for name, part in parts.items() if len({value.is_meta for value in part.state_dict().values()}) > 1]
    assert not mixed, mixed
    Path(f"rank-{os.environ['RANK']}.json").write_text(json.dumps(real))
    return network


MaskedText.fetch = padded  # type: ignore[method-assign]
Narrow._wide = lambda self, *rest, **named: noted("teacher", plain_wide(self, *rest, **named))  # type: ignore[method-assign]
Narrow._student = lambda self, *rest, **named: noted("student", plain_student(self, *rest, **named))  # type: ignore[method-assign]

if __name__ == "__main__":
    main(lambda stages: [stages.narrow(seed) for seed in stages.recipe.compare.seeds], "padded", sys.argv[1:])
