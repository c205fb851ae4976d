"""Every set of kernels that runs on this machine's accelerator, forward and backward, against fp64 on the CPU."""

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.gpu.accelerator import needed
from tests.unit.kernels.comparing import (
    CASES,
    MASKS,
    TOLERANCE,
    Errors,
    attended,
    bridge,
    cross_entropy,
    gelu,
    masks_are_as_defined,
    norm,
    on,
)
from tests.unit.kernels.test_convolution import pair
from wtn_pretrain.device import allow_tf32, device
from wtn_pretrain.errors import UserError
from wtn_pretrain.kernels import bridge_energy, linear_cross_entropy
from wtn_pretrain.kernels.convolution import folded
from wtn_pretrain.kernels.live import Choice, live, using
from wtn_pretrain.kernels.select import FUSED, choose

pytestmark = needed

LARGE: dict[str, Callable[[str], Errors]] = {
    "gelu, BERT-Large": lambda dtype: gelu(dtype, 512, 4096),
    "norm, BERT-Large": lambda dtype, **more: norm(dtype, 2048, 1024, p=0.1, **more),
    # logits of about 1, as at the start of a training: of large ones bf16 leaves little of a softmax
    "cross-entropy, a whole vocabulary": lambda dtype: cross_entropy(dtype, 300, 30528, width=256, scale=0.06),
    "bridge, four times the width": lambda dtype: bridge(dtype, (4, 128, 256), 1024, mask=(4, 128)),
}
"""Several blocks each way."""


@pytest.fixture(scope="module", params=["torch", "triton", "apex", "auto"])
def chosen(request: pytest.FixtureRequest) -> Iterator[Choice]:
    """A set of kernels, live on the accelerator; those that are not there are left out with the words that a user would read."""
    allow_tf32(False)
    try:
        choice = choose(request.param)
    except UserError as error:
        pytest.skip(str(error))
    print(f"{choice.describe()}\n{choice.explain()}")
    with using(choice), on(device()):
        yield choice


def largest(cases: dict[str, Callable[..., Errors]], dtype: str) -> dict[str, float]:
    """The largest error of each case."""
    triton = {"triton": live("dropout_add_norm", torch.empty(1, device=device())) == "triton"}
    return {name: max(case(dtype, **(triton if name.startswith("norm") else {})).values()) for name, case in cases.items()}


def require(errors: dict[str, float], dtype: str) -> None:
    print(f"{dtype}: at most {max(errors.values()):.1e}")
    assert all(error <= TOLERANCE[dtype] for error in errors.values()), {
        name: error for name, error in errors.items() if not error <= TOLERANCE[dtype]
    }


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_operations_of_odd_shapes(dtype: str, chosen: Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    # chunks of a few rows, so that small inputs have several and the last one is not full
    monkeypatch.setattr(linear_cross_entropy, "CHUNK", (500, 500))
    monkeypatch.setattr(bridge_energy, "CHUNK", (500, 500))
    require(largest(CASES, dtype), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_operations_of_large_shapes(dtype: str, chosen: Choice) -> None:
    require(largest(LARGE, dtype), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention(dtype: str, chosen: Choice) -> None:
    sizes = (8, 64)
    require({f"{mask}, {size}": max(attended(dtype, mask, size).values()) for mask in MASKS for size in sizes}, dtype)


def test_what_was_asked_for_is_live(chosen: Choice) -> None:
    names = {operation: live(operation, torch.empty(1, device=device(), dtype=torch.bfloat16)) for operation in FUSED}
    if chosen.kernels == "triton":
        assert set(names.values()) == {"triton"}
        assert masks_are_as_defined() == [True] * 3
    elif chosen.kernels == "apex":
        assert names["dropout_add_norm"] == "apex"
    elif chosen.kernels == "torch":
        assert set(names.values()) == {"torch"}


def test_folded_norms() -> None:
    allow_tf32(False)
    conv, norm = pair(8, 12)
    x = torch.randn(2, 8, 9, 10)
    exact = norm.double()(conv.double()(x.double()))
    one = folded(conv.float(), norm.float()).to(device())
    # fp32: sums of 72 products, in an order of the device's own
    assert (one(x.to(device())).double().cpu() - exact).abs().max() <= 1e-5 * exact.abs().max()
