"""torch.compile, block by block: blocks of the same shape share their code, so that a deep network compiles as fast as a shallow one."""

from typing import Any

import torch
from torch import nn

from wtn_pretrain.models.base import BlockNetwork


def compile_blocks(network: BlockNetwork) -> None:
    """Compiles the training pass of every block at its first call, in place; names stay, and evaluation runs as it was."""
    import torch._dynamo

    # beyond its limit dynamo gives up in silence, and a ResNet has a shape for every stage
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(network.blocks) + 8)
    for block in network.blocks:
        block.forward = _compiled(block)


def _compiled(block: nn.Module) -> Any:
    plain = block.forward
    quick = torch.compile(plain)

    def call(*args: Any, **kwargs: Any) -> Any:
        return (quick if block.training and torch.is_grad_enabled() else plain)(*args, **kwargs)

    return call
