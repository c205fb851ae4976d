"""Activation checkpointing (Chen et al. 2016): what a block computes on the way is forgotten, and computed anew when gradients need it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint

from wtn_pretrain.models.base import BlockNetwork, Carry


def checkpoint_blocks(network: BlockNetwork, every: int = 1, reentrant: bool = False) -> None:
    """Lets the first of every `every` blocks keep its input alone while it trains, in place; names and results stay as they are.

    Args:
        reentrant: in a backward pass of the block's own. ZeRO 3 needs it: autograd hooks would see weights that have been let go of.
    """
    for block in list(network.blocks)[::every]:
        # an attribute of the instance: hooks stay outside, and state dicts do not know of it
        block.forward = (_in_its_own_pass if reentrant else _recomputed)(block)


def _recomputed(block: nn.Module) -> Any:
    forward = block.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        if not (block.training and is_grad_enabled()):
            return forward(*args, **kwargs)
        # the random state of dropout is kept and set again
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=True, context_fn=partial(_contexts, block), **kwargs)

    return call


def _in_its_own_pass(block: nn.Module) -> Any:
    forward = block.forward

    def tensors(hidden: Tensor, *context: Tensor) -> Tensor:
        # the first time without gradients, then with them
        with _statistics_kept(block) if is_grad_enabled() else nullcontext():
            return forward(Carry(hidden, context)).hidden

    def call(carry: Carry, *args: Any, **kwargs: Any) -> Any:
        if not (block.training and is_grad_enabled()) or args or kwargs:
            return forward(carry, *args, **kwargs)
        hidden = checkpoint(tensors, carry.hidden, *carry.context, use_reentrant=True, preserve_rng_state=True)
        return Carry(hidden, carry.context)

    return call


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _statistics_kept(block)


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Within, running statistics of batch norms are copies: they have moved in the forward pass already. Ranges of rounded inputs, which
    decide what comes out, do not even move in the copy."""
    own: list[tuple[nn.Module, str, Tensor]] = [
        (module, name, buffer) for module in block.modules() for name, buffer in module._buffers.items() if buffer is not None
    ]
    for module, name, buffer in own:
        # not copied back afterwards: autograd has saved them, and refuses what has changed since
        module._buffers[name] = torch.zeros_like(buffer) if name == "observer_enabled" else buffer.clone()
    try:
        yield
    finally:
        for module, name, buffer in own:
            module._buffers[name] = buffer
