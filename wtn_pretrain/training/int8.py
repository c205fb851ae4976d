"""Training for int8 (Jacob et al. 2018, section 3): weights and activations are rounded where the static int8 export rounds them.

That is: the weights and the inputs of every product and convolution, and in ResNets, which add integers, both sides of every addition and
what the average pool takes. Attention's products of activations, softmax, norms and GELU stay fp32 there and here. A tensor is rounded
once for all that read it: in a post-LN BERT the skip carries what its products take.
"""

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

from wtn_pretrain.models.base import Carry
from wtn_pretrain.models.bert.model import BertBlock, BertHead
from wtn_pretrain.models.resnet.model import ResNetBlock, ResNetHead

MARK = "int8_range"
"""Name of the module by which a layer rounds; its running range is a buffer, so that checkpoints hold it."""
_LEAST = 1e-8


class Rounding(FakeQuantize):
    """Rounds an activation; its range moves while the layer is in training mode."""

    def train(self, mode: bool = True) -> "Rounding":
        self.observer_enabled[0] = int(mode)
        return super().train(mode)


def fake_quantise(network: nn.Module) -> nn.Module:
    """Makes `network` round as its int8 export will, in place; parameters keep their names and stay fp32.

    Activations are rounded to 8 bits over a moving average of their range, which moves while the network is in training mode; weights to
    -127 ... 127 of a scale an output channel. The gradient goes through the rounding unchanged. A batch norm after a convolution scales
    output channels, so folding it into the weights changes their scales and none of their integers.
    """
    taken: set[nn.Module] = set()
    for module in list(network.modules()):
        if isinstance(module, ResNetBlock):
            # the block's input is rounded once, for its convolutions and for the sum
            _round(module, _carried)
            taken.add(module.convs[0])
            _round(module.norms[-1], _after)
            if isinstance(module.shortcut, nn.Sequential):
                taken.add(module.shortcut[0])
                _round(module.shortcut[1], _after)
            elif module.shortcut is not None:
                _round(module.shortcut, _after)
        elif isinstance(module, BertBlock) and not module.pre_norm:
            # what a norm leaves goes into products and on along the skip, once rounded
            _round(module, _carried)
            _round(module.attention_norm, _normed)
            taken.update((module.query, module.key, module.value, module.intermediate))
        elif isinstance(module, ResNetHead):
            _round(module, _carried)
        elif isinstance(module, BertHead):
            _round(module, _decoded)
            module.predicted = types.MethodType(_predicted, module)  # type: ignore[method-assign]
    for module in list(network.modules()):
        if module in taken:
            module.forward = types.MethodType(_weighted, module)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            _round(module, _both)
    return network


def without_ranges(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state of the network without what rounding keeps: the plain network's."""
    return {name: value for name, value in state.items() if MARK not in name.split(".")}


def rounded(weight: Tensor) -> Tensor:
    """`weight` [outputs, ...] as int8 with a scale an output channel gives it, symmetric about zero."""
    scale = weight.detach().flatten(1).abs().amax(1).float().clamp_min(_LEAST) / 127
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight.float(), scale, zero, 0, -127, 127)


def _round(module: nn.Module, forward: Any) -> None:
    rounding = Rounding(MovingAverageMinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8)
    module.add_module(MARK, rounding.train(module.training))
    module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]


def _activation(layer: Any, x: Tensor) -> Tensor:
    return getattr(layer, MARK)(x.float()).to(x.dtype)


def _both(layer: Any, x: Tensor) -> Tensor:
    return _weighted(layer, _activation(layer, x))


def _weighted(layer: Any, *inputs: Any, name: str = "weight") -> Any:
    """The layer's own forward with its weight rounded."""
    weight = getattr(layer, name)
    # for whatever that forward does beside the product; found before the parameter, which stays where ZeRO 3 wants it
    layer.__dict__[name] = rounded(weight).to(weight.dtype)
    try:
        return type(layer).forward(layer, *inputs)
    finally:
        del layer.__dict__[name]


def _after(layer: Any, x: Tensor) -> Tensor:
    return _activation(layer, type(layer).forward(layer, x))


def _normed(norm: Any, *inputs: Any) -> Any:
    found = type(norm).forward(norm, *inputs)
    return (_activation(norm, found[0]), *found[1:]) if isinstance(found, tuple) else _activation(norm, found)


def _carried(part: Any, carry: Carry, *more: Any) -> Any:
    return type(part).forward(part, Carry(_activation(part, carry.hidden), carry.context), *more)


def _decoded(head: Any, carry: Carry, positions: Tensor | None = None, targets: Tensor | None = None, ignore: int = -100) -> Any:
    return _weighted(head, carry, positions, targets, ignore, name="decoder")


def _predicted(head: Any, carry: Carry, positions: Tensor | None) -> Tensor:
    return _activation(head, type(head).predicted(head, carry, positions))
