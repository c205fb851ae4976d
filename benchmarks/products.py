"""The matrix products and convolutions of a piece of work: their model FLOPs, and how fast this machine computes the same shapes."""

import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.convolution, aten.convolution_backward}
ATTENTION = {aten._scaled_dot_product_flash_attention_for_cpu: 4, aten._scaled_dot_product_flash_attention_for_cpu_backward: 8}
"""Fused attention on the CPU, which torch does not count: FLOPs for each query, key and channel, what is computed anew left out."""


class Shape(NamedTuple):
    """A tensor without its values."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Products(TorchDispatchMode):
    """Records every product that is computed while it is active. `flops` counts attention too, `calls` are the plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.calls: Counter[tuple[Any, tuple[Any, ...]]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in PRODUCTS:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
            self.calls[func, _described(args)] += 1
        elif packet in ATTENTION:
            # the backward pass gets the gradient first
            query, key = args[packet is not aten._scaled_dot_product_flash_attention_for_cpu :][:2]
            self.flops += ATTENTION[packet] * query.numel() * key.shape[-2]
        return result


def rate(calls: Counter[tuple[Any, tuple[Any, ...]]], seconds: float = 0.03) -> float:
    """FLOP/s of one product after the other, each at its own best pace (the median of runs of `seconds` in a loop)."""
    flops = taken = 0.0
    for (func, described), count in calls.items():
        arguments = _made(described)
        with torch.no_grad():
            result = func(*arguments)
            flops += count * flop_registry[func._overloadpacket](*arguments, out_val=result)
            taken += count * _timed(partial(func, *arguments), seconds)
    return flops / taken


def _timed(work: Callable[[], object], seconds: float) -> float:
    work()
    runs: list[float] = []
    while len(runs) < 5 or sum(runs) < seconds:
        began = time.perf_counter()
        work()
        runs.append(time.perf_counter() - began)
    return median(runs)


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Shape(tuple(value.shape), value.stride(), value.dtype)
    return tuple(map(_described, value)) if isinstance(value, list | tuple) else value


def _made(value: Any) -> Any:
    if isinstance(value, Shape):
        return torch.empty_strided(value.size, value.stride, dtype=value.dtype).normal_()
    return [_made(item) for item in value] if isinstance(value, tuple) else value
