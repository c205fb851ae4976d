"""Peak memory of the two losses whose inputs would make something far larger than themselves, in chunks against plain.

    python benchmarks/loss_memory.py [--preset ci|full] [--json FILE]

`cross_entropy` is a linear map to a vocabulary of 32768 and its cross-entropy; `bridge` is the distance of a student, through its
bridge, from a teacher of 4 times its width. Each arm computes loss and gradients once in a process of its own, and its peak is what that
raises the most that its device has held above what there was before, the inputs among it; on the CPU that is the resident set (Linux).
Gradients, which both arms leave behind, count. The arms must agree.

JSON keys: `cross_entropy_share` and `bridge_share`, the peak of the chunked form over that of the plain one (claim: at most a third);
`arms` {loss: {arm: {bytes, loss, gradient}}}, the gradient by its norm; `shapes`.
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from common import parser, run, table
from peaks import peak, require_peak, start_of_peak

from wtn_pretrain.device import device
from wtn_pretrain.kernels import bridge_energy, linear_cross_entropy
from wtn_pretrain.kernels.select import activate

VOCABULARY = 32768
RATIO = 4
"""The teacher's width over the student's."""
SHAPES = {
    "full": {"cross_entropy": (4096, 512), "bridge": (65536, 256)},
    "ci": {"cross_entropy": (1536, 64), "bridge": (32768, 64)},
}
"""Rows and width of what comes in."""
ARMS = ("plain", "chunks")
AGREE = 1e-3
"""Relative difference of losses and of norms of gradients that round-off explains, TF32 included."""


def inputs(loss: str, rows: int, width: int) -> list[torch.Tensor]:
    """What a loss is computed from, made where it stays."""
    here = device()
    hidden = torch.empty(rows, width, device=here).normal_().requires_grad_()
    matrix = torch.empty(VOCABULARY if loss == "cross_entropy" else RATIO * width, width, device=here).normal_(std=0.05).requires_grad_()
    if loss == "bridge":
        return [hidden, matrix, torch.empty(rows, RATIO * width, device=here).normal_()]
    return [hidden, matrix, torch.randint(VOCABULARY, (rows,), device=here)]


def compute(loss: str, arm: str, hidden: torch.Tensor, matrix: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The loss, after its gradients."""
    if loss == "cross_entropy":
        form = linear_cross_entropy.linear_cross_entropy if arm == "chunks" else linear_cross_entropy.reference
        value, _ = form(hidden, matrix, None, target)
    else:
        energy = bridge_energy.bridge_energy if arm == "chunks" else bridge_energy.reference
        value, _ = energy(hidden, matrix, target)
    value.backward()
    return value.detach()


def arm_figures(loss: str, arm: str, rows: int, width: int, threads: int) -> dict[str, float]:
    """Bytes by which a loss and its gradients raise the peak of this process, and what they are."""
    torch.set_num_threads(threads)
    activate("auto")
    # libraries keep buffers from their first use on
    compute(loss, arm, *inputs(loss, 8, width))
    torch.manual_seed(0)
    hidden, matrix, target = inputs(loss, rows, width)
    before = start_of_peak()
    value = compute(loss, arm, hidden, matrix, target)
    grown = peak() - before
    gradient = sum(float(x.grad.norm()) for x in (hidden, matrix) if x.grad is not None)
    return {"bytes": grown, "loss": value.item(), "gradient": gradient}


def in_fresh_process(*arguments: Any) -> dict[str, float]:
    """`arm_figures` in a process of its own, whose allocator hands freed tensors back to the system at once."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(64 * 1024)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(arm_figures, *arguments).result()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of the benchmark."""
    require_peak()
    shapes = SHAPES[options.preset]
    arms = {loss: {arm: in_fresh_process(loss, arm, *shape, options.threads) for arm in ARMS} for loss, shape in shapes.items()}
    for loss, of_loss in arms.items():
        for key in ("loss", "gradient"):
            plain, chunks = (of_loss[arm][key] for arm in ARMS)
            if abs(plain - chunks) > AGREE * abs(plain):
                raise RuntimeError(f"{loss}: the arms' {key} differ, {plain} and {chunks}: they do not compute the same")
    shares = {f"{loss}_share": of_loss["chunks"]["bytes"] / of_loss["plain"]["bytes"] for loss, of_loss in arms.items()}
    return {**shares, "kernels": activate("auto").describe(), "shapes": shapes, "arms": arms}


def show(figures: dict[str, Any]) -> str:
    """The table, and whether the claim holds."""
    rows = []
    for loss, of_loss in figures["arms"].items():
        peaks = [f"{of_loss[arm]['bytes'] / 2**20:.1f}" for arm in ARMS]
        rows.append([f"{loss} {'x'.join(map(str, figures['shapes'][loss]))}", *peaks, f"{figures[f'{loss}_share']:.3f}"])
    worst = max(figures["cross_entropy_share"], figures["bridge_share"])
    verdict = f"largest share {worst:.3f} (claim: at most a third; {'holds' if worst <= 1 / 3 else 'falls short'})"
    return "\n".join([figures["kernels"], "", table(["peak MiB above the inputs", *ARMS, "share"], rows), "", verdict])


def main() -> int:
    return run(measure, parser(__doc__ or ""), show)


if __name__ == "__main__":
    sys.exit(main())
