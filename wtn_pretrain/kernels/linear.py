"""Linear layers, on the CPU by oneDNN where they are large: it adds the bias on the way, and needs a fifth less time than the BLAS."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wtn_pretrain.kernels.live import live

SMALL = 2**26
"""Multiplications up to which oneDNN's preparations take longer than it saves."""


class Linear(nn.Linear):
    """`torch.nn.Linear` by whatever is live."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight' + bias: [..., D], [F, D] and [F] to [..., F]."""
    if (
        live("linear", x) == "onednn"
        and x.dtype is weight.dtype is torch.float32
        and x.numel() * weight.shape[0] > SMALL
        and not torch.is_autocast_enabled(x.device.type)
    ):
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def why_no_onednn(device: torch.device) -> str | None:
    """None where torch's oneDNN multiplies on `device`, tried out, else what stands against it."""
    if device.type != "cpu":
        return "it is for CPUs"
    if not torch.backends.mkldnn.is_available():
        return "this torch is built without it"
    x, weight, bias = (torch.arange(float(n)).view(shape) % 7 for n, shape in ((24, (2, 3, 4)), (20, (5, 4)), (5, (5,))))
    try:
        wrong = not torch.equal(_product(x, weight, bias), F.linear(x, weight, bias))
    except (AttributeError, RuntimeError) as error:  # its operator is torch's own affair, and may go
        return f"it does not run here ({' '.join(str(error).split())[:160]})"
    # sums of small integers are exact
    return "it computes wrongly here" if wrong else None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        rows = of_y.flatten(0, -2)
        return (
            _product(of_y, weight.t(), None) if to_x else None,
            rows.t() @ x.flatten(0, -2) if to_weight else None,
            rows.sum(0) if to_bias else None,
        )
