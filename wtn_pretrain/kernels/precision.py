"""The dtypes of operations that compute their own gradients, which autocast does not see into."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a matrix product of `tensor` is computed: autocast's where that is on, else the tensor's own."""
    kind = tensor.device.type
    if tensor.dtype is not torch.float64 and _autocasts(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return tensor.dtype


def as_written(tensor: Tensor) -> AbstractContextManager[Any]:
    """Within, operations on the device of `tensor` are computed in the dtypes of what they are given."""
    kind = tensor.device.type
    autocasts = _autocasts(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if autocasts else nullcontext()


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def _autocasts(kind: str) -> bool:
    # tensors without data have no autocast
    return torch.amp.is_autocast_available(kind)
