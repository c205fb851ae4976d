"""Frozen batch norms folded into their convolutions."""

import pytest
import torch
from torch import nn

from wtn_pretrain.kernels.convolution import fold_batch_norm, folded


def pair(inputs: int, outputs: int, bias: bool = False, affine: bool = True, **settings: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """A convolution and a norm that has seen something."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(inputs, outputs, 3, bias=bias, **settings), nn.BatchNorm2d(outputs, affine=affine)
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.normal_(std=0.3)
    norm.running_var.uniform_(0.2, 3)
    if affine:
        norm.weight.data.normal_(1, 0.5)
        norm.bias.data.normal_()
    return conv.eval(), norm.eval()


@pytest.mark.parametrize("settings", [{}, {"bias": True}, {"affine": False}, {"stride": 2, "padding": 1}, {"groups": 4}])
def test_one_convolution_does_what_both_do(settings: dict[str, int]) -> None:
    conv, norm = pair(8, 12, **settings)
    x = torch.randn(2, 8, 9, 10)
    exact = norm.double()(conv.double()(x.double()))
    conv, norm = conv.float(), norm.float()
    one = folded(conv, norm)
    assert not any(parameter.requires_grad for parameter in one.parameters())
    # one rounding of each weight and sums of 72 products
    assert (one(x) - exact).abs().max() <= 1e-6 * exact.abs().max()
    weight, bias = fold_batch_norm(conv, norm)
    assert weight.dtype is bias.dtype is torch.float32
    assert torch.equal(weight, one.weight) and one.bias is not None and torch.equal(bias, one.bias)


def test_weights_keep_their_layout_and_the_pair_stays_as_it_is() -> None:
    conv, norm = pair(4, 6)
    conv.to(memory_format=torch.channels_last)
    before = [value.clone() for module in (conv, norm) for value in module.state_dict().values()]
    one = folded(conv, norm)
    assert one.weight.is_contiguous(memory_format=torch.channels_last)
    after = [value for module in (conv, norm) for value in module.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert one.padding_mode == conv.padding_mode and one.stride == conv.stride


def test_a_norm_without_statistics_cannot_be_folded() -> None:
    with pytest.raises(ValueError, match="running statistics"):
        fold_batch_norm(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, track_running_stats=False))
