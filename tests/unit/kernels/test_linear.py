"""Linear layers by oneDNN against torch's in fp64."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from wtn_pretrain.kernels import linear as linears
from wtn_pretrain.kernels.linear import Linear, linear, why_no_onednn
from wtn_pretrain.kernels.live import using
from wtn_pretrain.kernels.select import choose

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    assert why_no_onednn(CPU) is None
    # small ones as well
    monkeypatch.setattr(linears, "SMALL", 0)
    with using(choose("auto", CPU)):
        yield


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 24), (7, 24), (2, 3, 4, 24)])
@pytest.mark.parametrize("strided", [False, True])
def test_values_and_gradients(shape: tuple[int, ...], bias: bool, strided: bool) -> None:
    """fp32 of order 1, sums of 24 terms: 1e-5."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape[:-1], 48, generator=generator)[..., ::2] if strided else torch.randn(shape, generator=generator)
    given = [x, torch.randn(10, 24, generator=generator), *([torch.randn(10, generator=generator)] if bias else [])]
    mine, exact = ([value.to(dtype).requires_grad_() for value in given] for dtype in (torch.float32, torch.float64))
    found, expected = linear(*mine), F.linear(*exact)
    assert "_Linear" in type(found.grad_fn).__name__
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    of_found = torch.randn(found.shape, generator=generator)
    pairs = zip(torch.autograd.grad(found, mine, of_found), torch.autograd.grad(expected, exact, of_found.double()), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)


def test_only_what_learns_gets_a_gradient() -> None:
    layer = Linear(4, 3).requires_grad_(False)
    x = torch.randn(2, 4, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 4))
    layer.weight.requires_grad_()
    layer(torch.ones(2, 4)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.full((3, 4), 2.0)) and layer.bias.grad is None


def test_where_torchs_stays() -> None:
    x, weight = torch.randn(2, 4, requires_grad=True), torch.randn(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight).dtype is torch.bfloat16
    for own in (linear(x.double(), weight.double()), linear(x.bfloat16(), weight.bfloat16())):
        assert "_Linear" not in type(own.grad_fn).__name__
    with using(choose("torch", CPU)):
        assert "_Linear" not in type(linear(x, weight).grad_fn).__name__
