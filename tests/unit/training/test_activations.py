"""Activation checkpointing: the same gradients to the bit, the same statistics, the same names, and less that is kept."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn

from wtn_pretrain.models import BertConfig, ResNetConfig
from wtn_pretrain.models.base import BlockConfig, BlockNetwork, Carry
from wtn_pretrain.training.activations import checkpoint_blocks

BERT = BertConfig(
    hidden_size=32, layers=4, heads=2, intermediate_size=64, max_positions=32, vocab_size=50, dropout=0.1, attention_dropout=0.1
)
RESNET = ResNetConfig(
    block="bottleneck", stem="cifar", stem_channels=8, channels=(16, 32), depths=(3, 3), image_channels=3, image_size=8, classes=5
)


def started(config: BlockConfig) -> tuple[BlockNetwork, dict[str, Tensor]]:
    torch.manual_seed(3)
    network = config.build().train()
    inputs = config.example_inputs(6, "cpu")
    return network, {name: torch.randn_like(value) if value.is_floating_point() else value for name, value in inputs.items()}


def trained(network: BlockNetwork, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, gradients and buffers after two micro-batches; the second sees other dropout."""
    torch.manual_seed(7)
    losses = [network(inputs).square().mean() for _ in range(2)]
    sum(losses, torch.zeros(())).backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}
    return torch.stack(losses).detach(), gradients, dict(network.named_buffers())


class Kept:
    """Counts the bytes that the backward pass of what runs within will need: what autograd saves, and the inputs of blocks."""

    def __init__(self, network: BlockNetwork) -> None:
        self._storages: dict[int, int] = {}
        self._own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
        for block in network.blocks:
            block.register_forward_pre_hook(self._entered)

    def _entered(self, block: nn.Module, carried: tuple[Carry]) -> None:
        self._see(carried[0].hidden)

    def _see(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def saving(self) -> AbstractContextManager[None]:
        return torch.autograd.graph.saved_tensors_hooks(self._see, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        return sum(self._storages.values())


def kept(network: BlockNetwork, inputs: dict[str, Tensor]) -> int:
    counter = Kept(network)
    with counter.saving():
        # alive until all is counted, so that no address comes twice
        loss = network(inputs).square().mean()
    assert loss.grad_fn is not None
    return counter.bytes


@pytest.mark.parametrize("config", [BERT, RESNET], ids=["bert", "resnet"])
@pytest.mark.parametrize(("every", "reentrant"), [(1, False), (2, False), (1, True)])
def test_gradients_and_statistics_are_the_same_to_the_bit(config: BlockConfig, every: int, reentrant: bool) -> None:
    network, inputs = started(config)
    names = list(network.state_dict())
    losses, gradients, buffers = trained(network, inputs)
    again, _ = started(config)
    runs = [count(block) for block in again.blocks]
    checkpoint_blocks(again, every, reentrant)
    their_losses, their_gradients, their_buffers = trained(again, inputs)
    assert list(again.state_dict()) == names
    # the blocks that forget ran twice for each of the two micro-batches
    assert [run() for run in runs] == [4 if index % every == 0 else 2 for index in range(len(runs))]
    assert torch.equal(their_losses, losses)
    assert losses[0] != losses[1] or config is RESNET
    assert their_gradients.keys() == gradients.keys() and all(
        torch.equal(their_gradients[name], value) for name, value in gradients.items()
    )
    assert their_buffers.keys() == buffers.keys() and all(torch.equal(their_buffers[name], value) for name, value in buffers.items())


def count(block: nn.Module) -> Callable[[], int]:
    """How often the first layer of a block that begins with a norm or a projection runs."""
    runs = [0]

    def more(*_: object) -> None:
        runs[0] += 1

    next(module for module in block.modules() if isinstance(module, nn.Linear | nn.Conv2d)).register_forward_hook(more)
    return lambda: runs[0]


@pytest.mark.parametrize(("config", "most"), [(BERT, 0.35), (RESNET, 0.5)], ids=["bert", "resnet"])
def test_less_is_kept(config: BlockConfig, most: float) -> None:
    network, inputs = started(config)
    everything = kept(network, inputs)
    some, _ = started(config)
    checkpoint_blocks(some, 2)
    least, _ = started(config)
    checkpoint_blocks(least)
    shares = kept(least, inputs) / everything, kept(some, inputs) / everything
    print(f"{type(network).__name__}: {everything} bytes; every block {shares[0]:.2f}, every second {shares[1]:.2f}")
    assert shares[0] < most
    assert shares[0] < shares[1] < 0.9


def test_evaluation_computes_once() -> None:
    network, inputs = started(BERT)
    network.eval()
    plain = network(inputs)
    checkpoint_blocks(network)
    assert torch.equal(network(inputs), plain)
    with torch.no_grad():
        assert torch.equal(network.train()(inputs).isfinite(), torch.ones_like(plain, dtype=torch.bool))
