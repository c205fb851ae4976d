"""Dropout drawn by words, and attention with it, on the CPU."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from wtn_pretrain.kernels.attention import attend, same_document
from wtn_pretrain.kernels.dropout import Dropout, draw_seed, dropout, gain, kept
from wtn_pretrain.kernels.live import using
from wtn_pretrain.kernels.select import choose


@pytest.fixture(autouse=True)
def by_words() -> Iterator[None]:
    with using(choose("auto", torch.device("cpu"))):
        yield


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
def test_as_many_are_kept_as_should_be(p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(1000, 1001)
    found = dropout(x, p)
    share = float((found > 0).double().mean())
    # five standard deviations of a mean of a million draws, and half of 2 ** -16 for the nearest multiple
    assert abs(share - (1 - p)) < 5 * (p * (1 - p) / x.numel()) ** 0.5 + 2**-17
    assert found.max() == pytest.approx(1 / (1 - p), rel=1e-3)
    # neighbours, which share a word, and rows know nothing of one another
    drawn = (found > 0).double() - share
    for other in (drawn[:, 1:], drawn[:, 2:], drawn[:, 4:], drawn[1:]):
        together = (drawn[: other.shape[0], : other.shape[1]] * other).mean() / (share * (1 - share))
        assert abs(float(together)) < 5e-3


def test_gradients_pass_where_values_do() -> None:
    torch.manual_seed(1)
    x = torch.randn(7, 33).T.requires_grad_()
    found = dropout(x, 0.3)
    (of_x,) = torch.autograd.grad(found, x, torch.ones_like(found))
    assert torch.equal(of_x != 0, found != 0)
    torch.testing.assert_close(of_x[found != 0].unique(), torch.tensor([gain(0.3)]))
    torch.testing.assert_close(found, of_x * x)


def test_what_is_recomputed_drops_the_same() -> None:
    layer, x = Dropout(0.4), torch.randn(64, 10, requires_grad=True)
    torch.manual_seed(2)
    plain = torch.autograd.grad(layer(x).square().sum(), x)[0]
    torch.manual_seed(2)
    assert torch.equal(torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), x)[0], plain)
    assert not torch.equal(torch.autograd.grad(layer(x).square().sum(), x)[0], plain)


def test_nothing_is_dropped_where_nothing_should_be() -> None:
    x = torch.randn(5)
    assert Dropout(0.5).eval()(x) is x
    assert torch.equal(dropout(x, 1e-9), F.dropout(x, 0.0)) and not dropout(x, 1.0).any()
    assert dropout(x.double(), 0.5).dtype is torch.float64


def masked(name: str) -> Tensor | None:
    segments = torch.tensor([[1, 1, 1, 2, 2, 0], [1, 2, 2, 3, 3, 3], [1] * 6])
    padding = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6, [1, 0, 0, 0, 0, 0]])[:, None, None, :].bool()
    return {"none": None, "segments": segments, "one document": torch.ones_like(segments), "padding": padding}[name]


@pytest.mark.parametrize("name", ["none", "segments", "one document", "padding"])
def test_attention_is_that_of_the_definition(name: str) -> None:
    """fp32 against fp64, of order 1: products of 6 and 8 terms."""
    mask, p = masked(name), 0.3
    given = [torch.randn(3, 6, 2, 8, generator=torch.Generator().manual_seed(n)).transpose(1, 2).requires_grad_() for n in range(3)]
    of_mixed = torch.randn(3, 2, 6, 8)
    torch.manual_seed(3)
    mixed = attend(*given, mask, p)
    assert "_Dropped" in type(mixed.grad_fn).__name__
    torch.manual_seed(3)
    keeps = kept(draw_seed(), torch.empty(6, 6, 6), p).view(3, 2, 6, 6).double()
    exact = [x.detach().double().requires_grad_() for x in given]
    scores = exact[0] @ exact[1].mT * 8**-0.5
    if mask is not None:
        seen = mask if mask.dtype is torch.bool else same_document(mask)
        scores = scores.masked_fill(~seen, torch.finfo(torch.float32).min)
    expected = (scores.softmax(-1) * keeps * gain(p)) @ exact[2]
    torch.testing.assert_close(mixed.double(), expected, atol=1e-5, rtol=1e-5)
    pairs = zip(torch.autograd.grad(mixed, given, of_mixed), torch.autograd.grad(expected, exact, of_mixed.double()), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine.double(), theirs, atol=1e-5, rtol=1e-5)


def test_a_mask_that_is_written_anew_is_read_anew() -> None:
    query, key, value = torch.randn(3, 1, 1, 4, 8).unbind()
    segments = torch.ones(1, 4, dtype=torch.int64)

    def mixed() -> Tensor:
        torch.manual_seed(4)
        return attend(query, key, value, segments, 0.1)

    before = mixed()
    segments[0, 2:] = 2
    assert not torch.equal(mixed(), before)
