"""The fused operations against eager torch and torch.compile, and against what the device could do.

    python benchmarks/kernels.py [--[no-]compile] [--only OPERATION ...] [--preset ci|full] [--json FILE]

Forward and backward of each operation in what `kernels: auto` makes live here (fused), in its plain form (eager) and in that form under
torch.compile, one after the other in turns, medians. Preset full has the shapes of BERT-Large at 128 tokens in bf16 on an accelerator,
where all takes about two minutes, and smaller ones in fp32 on the CPU. On the CPU the fused form of elementwise operations is the plain
one. What the device could do, the floor, is the larger of two times: for the bytes that cannot but move, at the bandwidth of a large
copy, and for the products, at the rate of a large square one; both are measured here.

    bytes that cannot but move, forward and backward, each tensor once a pass
    bias_gelu             x, y; gradient, x, its gradient
    dropout_add_norm      x, residual, sum, normed; gradient, sum, two gradients
    attention, documents  query, key, value, answer; those and the gradient, three gradients
    linear_cross_entropy  chunks of logits: written, read twice, their gradient written, read by two products
    bridge_energy         chunks of E h: written, read with the target, error written, read by two products

JSON keys: `operations` {operation: {live, bytes, flops, seconds {arm: s}, over_eager, over_compile, of_floor, error}}, `copy_bandwidth`
[B/s], `product_rate` [FLOP/s], `kernels`. `error` is the largest relative difference between the fused and the plain form's answers.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from common import parser, run, table
from peaks import enough, rates, timed
from torch import Tensor

from wtn_pretrain.device import device
from wtn_pretrain.kernels import attention, bias_gelu, bridge_energy, dropout_add_norm, linear_cross_entropy
from wtn_pretrain.kernels.live import live
from wtn_pretrain.kernels.select import activate


class Shape(NamedTuple):
    """Sizes of the tensors."""

    batch: int
    length: int
    width: int
    heads: int
    predicted: int
    """Rows whose token is predicted."""
    vocabulary: int
    repeats: int
    dtype: torch.dtype = torch.float32


SHAPES = {
    "ci": Shape(2, 32, 32, 2, 16, 512, 3),
    "full": Shape(16, 128, 256, 4, 320, 30522, 7),
    "accelerator": Shape(256, 128, 1024, 16, 5120, 30522, 9, torch.bfloat16),
}
WIDER = 4
"""The feed-forward width over the carried one, and the teacher's width over the student's."""
DOCUMENTS = 4
"""Documents in a row."""
DROPOUT = 0.1


class Work(NamedTuple):
    """One operation on given tensors."""

    leaves: list[Tensor]
    """What gradients are taken of."""
    plain: Callable[..., Any]
    fused: Callable[..., Any]
    bytes: int
    flops: int = 0
    compiles: bool = True
    comparable: bool = True
    """Whether both forms compute the same; with dropout they draw different masks."""


def works(shape: Shape) -> dict[str, Callable[[], Work]]:
    """How to make each operation's work."""
    here, dtype = device(), shape.dtype
    rows, width, size = shape.batch * shape.length, shape.width, shape.dtype.itemsize

    def made(*sizes: int, scale: float = 1.0) -> Tensor:
        return torch.empty(sizes, device=here, dtype=dtype).normal_(std=scale).requires_grad_()

    def gelu() -> Work:
        leaves = [made(rows, WIDER * width), made(WIDER * width)]
        return Work(leaves, bias_gelu.reference, bias_gelu.bias_gelu, 5 * leaves[0].numel() * size)

    def norm() -> Work:
        leaves = [made(rows, width), made(width), made(rows, width), made(width), made(width)]
        # post-LN: the sum itself goes nowhere
        plain, fused = (
            partial(lambda form, *given: form(*given, 1e-12, DROPOUT, True)[0], form)
            for form in (dropout_add_norm.reference, dropout_add_norm.dropout_add_norm)
        )
        return Work(leaves, plain, fused, 8 * leaves[0].numel() * size, comparable=False)

    def heads(segments: Tensor | None, plain: Callable[..., Tensor]) -> Work:
        leaves = [made(shape.batch, shape.length, shape.heads, width // shape.heads) for _ in range(3)]
        seen = shape.length // (DOCUMENTS if segments is not None else 1)

        def along(form: Callable[..., Tensor], *given: Tensor) -> Tensor:
            return form(*(x.transpose(1, 2) for x in given), segments)

        # two products forward, five backward, one of them the scores anew
        flops = 7 * 2 * rows * seen * width
        return Work(leaves, partial(along, plain), partial(along, attention.attend), 12 * rows * width * size, flops, compiles=False)

    def packed() -> Work:
        segments = (torch.arange(shape.length, device=here) * DOCUMENTS // shape.length + 1).expand(shape.batch, -1).contiguous()
        masked = attention.same_document(segments)
        return heads(segments, lambda query, key, value, _: attention.attend(query, key, value, masked))

    def entropy() -> Work:
        leaves = [made(shape.predicted, width), made(shape.vocabulary, width, scale=0.02), made(shape.vocabulary)]
        targets = torch.randint(shape.vocabulary, (shape.predicted,), device=here)
        plain, fused = (
            partial(lambda form, hidden, weight, bias: form(hidden, weight, bias, targets)[0], form)
            for form in (linear_cross_entropy.reference, linear_cross_entropy.linear_cross_entropy)
        )
        logits = shape.predicted * shape.vocabulary
        return Work(leaves, plain, fused, 6 * logits * size, 3 * 2 * logits * width)

    def bridge() -> Work:
        leaves = [made(rows, width), made(WIDER * width, width, scale=0.05)]
        target = made(rows, WIDER * width).detach()
        plain, fused = (
            partial(lambda form, hidden, expand: form(hidden, expand, target)[0], form)
            for form in (bridge_energy.reference, bridge_energy.bridge_energy)
        )
        return Work(leaves, plain, fused, 6 * target.numel() * size, 3 * 2 * target.numel() * width)

    return {
        "bias_gelu": gelu,
        "dropout_add_norm": norm,
        "attention": partial(heads, None, attention.reference),
        "documents": packed,
        "linear_cross_entropy": entropy,
        "bridge_energy": bridge,
    }


def both_ways(form: Callable[..., Tensor], leaves: Sequence[Tensor], given: Tensor) -> tuple[Tensor, ...]:
    """The answer of a forward pass, and the gradients of a backward pass that is `given` the answer's."""
    answer = form(*leaves)
    return (answer.detach(), *torch.autograd.grad(answer, leaves, given))


def figures_of(work: Work, shape: Shape, compiles: bool, seconds: float) -> dict[str, Any]:
    """Seconds of each arm, in turns, and how far apart their answers are."""
    answer = work.plain(*work.leaves).detach()
    given = torch.ones_like(answer) if not answer.dim() else torch.empty_like(answer).normal_()
    arms = {"eager": partial(both_ways, work.plain, work.leaves, given), "fused": partial(both_ways, work.fused, work.leaves, given)}
    if compiles and work.compiles:
        arms["compile"] = partial(both_ways, torch.compile(work.plain, dynamic=False), work.leaves, given)
    error = 0.0
    if work.comparable:
        pairs = zip(arms["eager"](), arms["fused"](), strict=True)
        error = max(float((mine.float() - theirs.float()).abs().max() / theirs.float().abs().max()) for theirs, mine in pairs)
    times = {arm: enough(call, seconds) for arm, call in arms.items()}
    taken: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(shape.repeats):
        for arm, call in arms.items():
            taken[arm].append(timed(call, times[arm]))
    return {"seconds": {arm: median(values) for arm, values in taken.items()}, "error": error}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of the benchmark."""
    choice = activate("auto")
    small = options.preset == "ci"
    shape = SHAPES["ci" if small else "full" if device().type == "cpu" else "accelerator"]
    seconds = 0.002 if small else 0.1
    torch.manual_seed(0)
    bandwidth, rate = rates(seconds, shape.dtype, small)
    operations = {}
    for name, make in works(shape).items():
        if options.only and name not in options.only:
            continue
        work = make()
        found = figures_of(work, shape, not small if options.compile is None else options.compile, seconds)
        eager, fused, compiled = (found["seconds"].get(arm) for arm in ("eager", "fused", "compile"))
        operations[name] = {
            "live": live(name, work.leaves[0]) if name != "attention" else choice.operations[name].name,
            "bytes": work.bytes,
            "flops": work.flops,
            **found,
            "over_eager": eager / fused,
            "over_compile": compiled / fused if compiled else None,
            "of_floor": max(work.bytes / bandwidth, work.flops / rate) / fused,
        }
    return {
        "kernels": choice.describe(),
        "shape": {**shape._asdict(), "dtype": str(shape.dtype).removeprefix("torch.")},
        "copy_bandwidth": bandwidth,
        "product_rate": rate,
        "operations": operations,
    }


def show(figures: dict[str, Any]) -> str:
    """The table."""
    rows = []
    for name, found in figures["operations"].items():
        times = [f"{1e3 * found['seconds'][arm]:.3f}" if arm in found["seconds"] else "-" for arm in ("eager", "compile", "fused")]
        over = [f"{found[key]:.2f}" if found[key] else "-" for key in ("over_eager", "over_compile")]
        rows.append([name, found["live"], *times, *over, f"{found['bytes'] / 2**20:.0f}", f"{found['of_floor']:.2f}"])
    head = ["forward and backward", "live", "eager ms", "compile ms", "fused ms", "over eager", "over compile", "MiB moved", "of the floor"]
    shape = ", ".join(f"{key} {value}" for key, value in figures["shape"].items())
    rates_line = f"copy {figures['copy_bandwidth'] / 1e9:.1f} GB/s, products {figures['product_rate'] / 1e12:.2f} TFLOP/s; {shape}"
    return "\n".join([figures["kernels"], rates_line, "", table(head, rows)])


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile too (default: in preset full)")
    arguments.add_argument("--only", nargs="+", metavar="OPERATION", choices=list(works(SHAPES["ci"])), help="these operations alone")
    return run(measure, arguments, show)


if __name__ == "__main__":
    sys.exit(main())
