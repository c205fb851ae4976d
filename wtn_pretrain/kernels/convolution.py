"""Convolutions with batch norms: what is live for a ResNet, and frozen norms folded into their convolutions.

Nothing of our own runs here. While a network learns, its convolutions take channels-last tensors (the layout of tensor cores and of
oneDNN), batch norms are torch's, and torch.compile, where it is on, joins norm, addition and ReLU. A teacher in eval mode has no batch
statistics to take: there a norm is a scale and a shift of each channel, which its convolution can do at no cost.
"""

import torch
from torch import Tensor, nn


@torch.no_grad()
def fold_batch_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The weight and bias of a convolution that does what `conv` and then `norm` with its running statistics do.

    From norm(y) = (y - mean) / sqrt(variance + eps) * gain + shift, computed in fp64 and rounded once.

    Returns:
        weight, as `conv`'s in shape, dtype and layout, and bias [outputs].
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a batch norm without running statistics cannot be folded")
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    shift = -norm.running_mean.double()
    if conv.bias is not None:
        shift = shift + conv.bias.double()
    if norm.affine:
        scale = scale * norm.weight.double()
    shift = shift * scale
    if norm.affine:
        shift = shift + norm.bias.double()
    weight = conv.weight.double() * scale[:, None, None, None]
    return torch.empty_like(conv.weight).copy_(weight), shift.to(conv.weight.dtype)


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """One frozen convolution in the place of `conv` and `norm`, which stay as they are."""
    weight, bias = fold_batch_norm(conv, norm)
    made = nn.utils.skip_init(
        nn.Conv2d,
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        padding_mode=conv.padding_mode,
        device=weight.device,
        dtype=weight.dtype,
    )
    made.weight, made.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    return made.eval()
