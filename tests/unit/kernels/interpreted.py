"""The Triton kernels in Triton's interpreter, against fp64. `test_triton.py` starts this in a process of its own: Triton reads how it is to
run when it is imported. Prints {case: {dtype: errors}} as JSON, and what was live."""

import json
import sys

import torch

from tests.unit.kernels.comparing import CASES, Errors, masks_are_as_defined
from wtn_pretrain.kernels import bridge_energy, dropout_add_norm, linear_cross_entropy
from wtn_pretrain.kernels.live import active, live
from wtn_pretrain.kernels.select import FUSED, activate


def main() -> None:
    torch.set_num_threads(1)
    activate("triton")
    linear_cross_entropy.CHUNK = bridge_energy.CHUNK = (500, 500)
    dropout_add_norm.PROGRAMS = 4
    results: dict[str, dict[str, Errors]] = {}
    for name, case in CASES.items():
        triton = {"triton": True} if name.startswith("norm") else {}
        results[name] = {dtype: case(dtype, **triton) for dtype in ("fp32", "bf16")}
    choice = active()
    assert choice is not None
    json.dump(
        {
            "results": results,
            "described": choice.describe(),
            "live": {name: live(name, torch.empty(1)) for name in FUSED},
            "masks": masks_are_as_defined(),
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
