"""Fused operations against their plain form in fp64: what the tests in this process, in Triton's interpreter and on an accelerator share.

The plain form is computed on the CPU wherever the other one is. A case gives, for every output and every gradient, the largest difference
to fp64 over the largest value of the fp64 tensor. Inputs are rounded to the dtype under test first, so that both sides start from the same
numbers.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wtn_pretrain.kernels import attention, bias_gelu, bridge_energy, dropout_add_norm, linear_cross_entropy

Errors = dict[str, float]
Inputs = Mapping[str, Tensor | None]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2, "fp16": 4e-3}
"""fp32: round-off of sums of some hundred terms is 1e-6. bf16 has 8 bits (4e-3, twice that where Triton's interpreter cuts instead of
rounding) and several roundings follow each other; fp16 has 11 bits."""
_place = torch.device("cpu")


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Within, the operations under test run on `device`."""
    global _place
    before, _place = _place, device
    try:
        yield
    finally:
        _place = before


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def apart(mine: Tensor | None, theirs: Tensor | None) -> float:
    assert mine is not None and theirs is not None, "one side has no gradient"
    assert mine.shape == theirs.shape, (mine.shape, theirs.shape)
    if not theirs.numel():
        return 0.0
    largest = theirs.abs().max().item()
    return (mine.double().cpu() - theirs).abs().max().item() / (largest or 1.0)


def compare(function: Callable[..., Any], plain: Callable[..., Any], inputs: Inputs, dtype: str, **settings: Any) -> Errors:
    """`function` on `inputs` in `dtype` against `plain` in fp64; tensors that are no floats are passed as they are."""
    sides = []
    for call, kind, place in ((function, DTYPES[dtype], _place), (plain, torch.float64, torch.device("cpu"))):
        given: dict[str, Any] = {}
        for name, value in inputs.items():
            floats = value is not None and value.is_floating_point()
            # rounded, then laid out as the value is
            if value is None or not floats:
                given[name] = None if value is None else value.to(place)
            else:
                given[name] = value.detach().to(DTYPES[dtype]).to(place, kind).requires_grad_()
        answers = call(**given, **settings)
        answers = answers if isinstance(answers, tuple) else (answers,)
        answers = tuple(answer for answer in answers if answer.is_floating_point())
        # every output counts in the gradient, each element with a weight of its own
        weights = [drawn(*answer.shape, seed=90 + number).to(DTYPES[dtype]) for number, answer in enumerate(answers)]
        learned = [(a, w) for a, w in zip(answers, weights, strict=True) if a.requires_grad]
        torch.autograd.backward([a for a, _ in learned], [w.to(a) for a, w in learned])
        sides.append((answers, {name: value.grad for name, value in given.items() if value is not None and value.is_floating_point()}))
    (mine, my_grads), (theirs, their_grads) = sides
    errors = {f"output {number}": apart(a, b) for number, (a, b) in enumerate(zip(mine, theirs, strict=True))}
    for name, gradient in their_grads.items():
        if gradient is None:
            assert my_grads[name] is None
        else:
            assert my_grads[name].dtype is DTYPES[dtype]
            errors[f"gradient of {name}"] = apart(my_grads[name], gradient)
    return errors


def gelu(dtype: str, *shape: int, turned: bool = False) -> Errors:
    x = drawn(*shape, scale=2)
    return compare(
        bias_gelu.bias_gelu,
        bias_gelu.reference,
        {"x": x.mT if turned else x, "bias": drawn(x.mT.shape[-1] if turned else shape[-1], seed=1)},
        dtype,
    )


def norm(dtype: str, *shape: int, p: float = 0.0, bias: bool = True, training: bool = True, triton: bool = False) -> Errors:
    """`triton`: dropout's masks are those of the Triton kernel."""
    columns = shape[-1]
    inputs = {
        "x": drawn(*shape),
        "bias": drawn(columns, seed=1) if bias else None,
        "residual": drawn(*shape, seed=2) + 0.5,
        "weight": drawn(columns, seed=3) + 1,
        "norm_bias": drawn(columns, seed=4),
    }
    torch.manual_seed(5)
    kept = None
    if p and training and triton:
        kept = dropout_add_norm.kept_by(dropout_add_norm.draw_seed(), inputs["x"].numel() // columns, columns, p).view(shape)
    elif p and training:
        kept = (F.dropout(torch.ones(shape, dtype=DTYPES[dtype], device=_place), p) > 0).cpu()
    torch.manual_seed(5)  # the operation draws what was drawn here
    plain = partial(dropout_add_norm.reference, kept=kept)
    return compare(dropout_add_norm.dropout_add_norm, plain, inputs, dtype, eps=1e-5, p=p, training=training)


def cross_entropy(
    dtype: str,
    rows: int,
    vocabulary: int,
    width: int = 13,
    bias: bool = True,
    smoothing: float = 0.0,
    ignored: float = 0.3,
    scale: float = 1.0,
) -> Errors:
    targets = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(7))
    targets[torch.rand(rows, generator=torch.Generator().manual_seed(8)) < ignored] = -100
    inputs = {
        # neither lies in rows
        "hidden": drawn(width, rows, scale=scale).T,
        "weight": drawn(width, vocabulary, seed=1).T,
        "bias": drawn(vocabulary, seed=2) if bias else None,
        "targets": targets,
    }
    return compare(linear_cross_entropy.linear_cross_entropy, linear_cross_entropy.reference, inputs, dtype, label_smoothing=smoothing)


def bridge(
    dtype: str,
    shape: tuple[int, ...],
    width: int | None,
    mask: tuple[int, ...] | None = None,
    axis: int = -1,
    layout: torch.memory_format = torch.contiguous_format,
    near: float = 0.0,
) -> Errors:
    """`width`: the teacher's, None without a bridge; `near`: how far a student that has learned is from its teacher."""
    hidden, expand = drawn(*shape), None if width is None else drawn(width, shape[axis], seed=1)
    target = list(shape)
    target[axis] = width or shape[axis]
    taught = drawn(*target, seed=2)
    if near:
        # in the dtype under test, as inputs are, so that the distance is what remains of it
        hidden, matrix = hidden.to(DTYPES[dtype]).double(), None if expand is None else expand.to(DTYPES[dtype]).double()
        answer = hidden if matrix is None else hidden @ matrix.T
        taught = answer + near * taught
    inputs = {
        "hidden": hidden.to(memory_format=layout),
        "expand": expand,
        "mask": None if mask is None else torch.rand(mask, generator=torch.Generator().manual_seed(3)) < 0.6,
    }
    teacher = taught.to(DTYPES[dtype]).to(memory_format=layout)

    def against(call: Callable[..., Any], **given: Any) -> Any:
        return call(given["hidden"], given["expand"], teacher.to(given["hidden"]), given["mask"], axis)

    return compare(partial(against, bridge_energy.bridge_energy), partial(against, bridge_energy.reference), inputs, dtype)


SEGMENTS = torch.tensor([[1, 1, 2, 2, 2, 3, 0], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]])
MASKS = {
    "everything": None,
    "padding": torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0]]).bool()[:, None, None],
    "documents": SEGMENTS,
}


def attended(dtype: str, mask: str, head_size: int = 8) -> Errors:
    """`mask`: one of `MASKS`."""
    # heads before positions by a transposition, as a model has them
    names = ("query", "key", "value")
    inputs = {name: drawn(3, 7, 2, head_size, seed=seed).transpose(1, 2) for seed, name in enumerate(names)}
    return compare(attention.attend, attention.reference, {**inputs, "mask": MASKS[mask]}, dtype)


def masks_are_as_defined() -> list[bool]:
    """Whether the Triton kernel's dropout keeps what the generator's definition says, for several blocks and probabilities."""
    same = []
    for columns, p in ((8, 0.5), (37, 0.1), (300, 0.9)):
        torch.manual_seed(3)
        kept = dropout_add_norm.kept_by(dropout_add_norm.draw_seed(), 20, columns, p)
        torch.manual_seed(3)
        x = torch.ones(20, columns, device=_place)
        _, total = dropout_add_norm.dropout_add_norm(x, None, torch.zeros_like(x), x[0], x[0], 1e-5, p, True)
        same.append(torch.equal((total > 0).cpu(), kept))
    return same


LAST = torch.channels_last
CASES: dict[str, Callable[[str], Errors]] = {
    "gelu, nothing divides": lambda dtype: gelu(dtype, 7, 130),
    "gelu, three axes": lambda dtype: gelu(dtype, 2, 3, 200),
    "gelu, several groups of rows": lambda dtype: gelu(dtype, 300, 12),
    "gelu, no rows": lambda dtype: gelu(dtype, 0, 8),
    "gelu, columns first": lambda dtype: gelu(dtype, 6, 9, turned=True),
    "cross-entropy, several chunks": lambda dtype: cross_entropy(dtype, 37, 101),
    "cross-entropy, smoothed": lambda dtype: cross_entropy(dtype, 21, 50, smoothing=0.1),
    "cross-entropy, no bias": lambda dtype: cross_entropy(dtype, 9, 33, bias=False),
    "cross-entropy, beyond a block": lambda dtype: cross_entropy(dtype, 5, 5000, width=4, smoothing=0.2),
    "cross-entropy, one row": lambda dtype: cross_entropy(dtype, 1, 3, width=1, ignored=0),
    "cross-entropy, all ignored": lambda dtype: cross_entropy(dtype, 8, 20, ignored=1),
    "cross-entropy, no rows": lambda dtype: cross_entropy(dtype, 0, 20),
    "bridge, nothing divides": lambda dtype: bridge(dtype, (3, 7, 5), 12),
    "bridge, masked": lambda dtype: bridge(dtype, (3, 7, 5), 12, mask=(3, 7)),
    "bridge, one mask for all": lambda dtype: bridge(dtype, (3, 7, 5), 12, mask=(1, 7)),
    "bridge, none": lambda dtype: bridge(dtype, (3, 7, 5), None, mask=(3, 7)),
    "bridge, none, images": lambda dtype: bridge(dtype, (2, 5, 3, 4), None, axis=1, layout=LAST),
    "bridge, images": lambda dtype: bridge(dtype, (2, 5, 3, 4), 7, axis=1),
    "bridge, images, channels last": lambda dtype: bridge(dtype, (4, 5, 3, 4), 7, axis=1, layout=LAST),
    "bridge, beyond a block": lambda dtype: bridge(dtype, (3, 4), 2500),
    "bridge, one vector": lambda dtype: bridge(dtype, (5,), 8),
    "bridge, no rows": lambda dtype: bridge(dtype, (0, 7, 5), 12, mask=(0, 7)),
    "bridge, a student that has learned": lambda dtype: bridge(dtype, (6, 7, 5), None, near=0.05),
}
for setting, options in {
    "with dropout": {"p": 0.3},
    "without": {},
    "no bias": {"bias": False},
    "no bias, dropout": {"bias": False, "p": 0.1},
    "eval": {"p": 0.3, "training": False},
}.items():
    for size in ((5, 33), (2, 3, 48), (0, 8)):
        CASES[f"norm {'x'.join(map(str, size))}, {setting}"] = partial(
            lambda dtype, size, options, **more: norm(dtype, *size, **options, **more), size=size, options=options
        )
CASES["norm 11x6, more rows than programs"] = lambda dtype, **more: norm(dtype, 11, 6, p=0.5, **more)
