"""Training for int8 (Jacob et al. 2018): every product and convolution sees its weights and inputs as an int8 network will have them."""

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

MARK = "int8_input"
"""Name of the module by which a layer rounds its input; its running range is a buffer, so that checkpoints hold it."""
_LEAST = 1e-8


class Rounding(FakeQuantize):
    """Rounds a layer's input; its range moves while the layer is in training mode."""

    def train(self, mode: bool = True) -> "Rounding":
        self.observer_enabled[0] = int(mode)
        return super().train(mode)


def fake_quantise(network: nn.Module) -> nn.Module:
    """Makes all linear layers and convolutions of `network` round, in place; parameters keep their names and stay fp32.

    Inputs are rounded to 8 bits over a moving average of their range, which moves while the network is in training mode; weights to -127
    ... 127 of a scale an output channel. The gradient goes through the rounding unchanged. A batch norm after a convolution scales output
    channels, so folding it into the weights changes their scales and none of their integers.
    """
    for module in list(network.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            rounding = Rounding(MovingAverageMinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8)
            module.add_module(MARK, rounding.train(module.training))
            module.forward = types.MethodType(_forward, module)  # type: ignore[method-assign]
    return network


def without_ranges(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state of the network without what rounding keeps: the plain network's."""
    return {name: value for name, value in state.items() if MARK not in name.split(".")}


def rounded(weight: Tensor) -> Tensor:
    """`weight` [outputs, ...] as int8 with a scale an output channel gives it, symmetric about zero."""
    scale = weight.detach().flatten(1).abs().amax(1).float().clamp_min(_LEAST) / 127
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight.float(), scale, zero, 0, -127, 127)


def _forward(layer: Any, x: Tensor) -> Tensor:
    weight = layer.weight
    # for the layer's own forward, whatever that does beside the product; found before the parameter, which stays where ZeRO 3 wants it
    layer.__dict__["weight"] = rounded(weight).to(weight.dtype)
    try:
        return type(layer).forward(layer, getattr(layer, MARK)(x.float()).to(x.dtype))
    finally:
        del layer.__dict__["weight"]
