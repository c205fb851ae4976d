"""A network under ZeRO 3 that no device ever holds whole, from its start on.

Left to itself DeepSpeed moves a network to the device whole and divides it there: one that is too large for a device, which is what ZeRO 3
is chosen for, would fail before the first step. `deepspeed.zero.Init` takes a network in host memory instead, parameter by parameter.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from wtn_pretrain.device import device


def partition(module: nn.Module, config: Mapping[str, Any]) -> None:
    """Leaves of `module`, in host memory, this rank's part of every parameter, in place: on its device, or in host memory where
    `offload_param` of the DeepSpeed configuration `config` says so. Each parameter goes to the device alone. Every rank must call it.

    Parameters stay the objects they are, and have no shape until a forward pass brings them together: whoever needs it, such as an
    optimizer that tells matrices from biases, looks first.
    """
    import deepspeed

    rounded = _rounded(config)
    if rounded is not None:
        # as DeepSpeed does with a network that is not divided yet; buffers keep their dtype
        for parameter in module.parameters():
            parameter.data = parameter.data.to(rounded)
    # it fills in what it is given
    deepspeed.zero.Init(module=module, config_dict_or_path=copy.deepcopy(dict(config)))
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = buffer.to(device())


def _rounded(config: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype of weights that are not fp32."""
    for key, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if config.get(key, {}).get("enabled"):
            return dtype
    return None
