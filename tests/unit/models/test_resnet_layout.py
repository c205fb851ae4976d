"""The memory layout of a ResNet's activations and gradients, and which of its parameters LARS scales."""

import pytest
import torch
from torch import nn

from wtn_pretrain.models import ResNetConfig
from wtn_pretrain.training.optimizers import decay_groups

SHAPES = {
    "bottleneck": ResNetConfig(depths=(2, 1), channels=(16, 32), stem_channels=8, image_channels=3, image_size=40, classes=5),
    "basic": ResNetConfig(
        block="basic", stem="cifar", depths=(1, 2), channels=(8, 16), stem_channels=8, image_channels=3, image_size=12, classes=5
    ),
}


def channels_last(value: torch.Tensor) -> bool:
    return value.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("autocast", [False, True])
def test_forward_and_backward_stay_channels_last(name: str, given: torch.memory_format, autocast: bool) -> None:
    network = SHAPES[name].build()
    side = SHAPES[name].image_size
    seen: list[tuple[str, bool]] = []

    def watch(path: str):
        def forward(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            seen.append((f"{path} forward", channels_last(output)))
            # copies the layout that autograd hands to whoever computes the gradient
            output.register_hook(lambda gradient: seen.append((f"{path} backward", channels_last(gradient))))

        return forward

    for path, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(watch(path))
    pixels = torch.randn(2, 3, side, side).contiguous(memory_format=given)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = network({"pixels": pixels}).float().square().mean()
    loss.backward()
    convolutions = sum(isinstance(module, nn.Conv2d) for module in network.modules())
    assert len(seen) == 2 * convolutions
    assert not [where for where, kept in seen if not kept]


def test_zero_initialised_blocks_are_identities() -> None:
    network = SHAPES["bottleneck"].model_copy(update={"zero_init_residual": True}).build()
    for block in network.blocks:
        assert not block.norms[-1].weight.any() and all(norm.weight.all() for norm in block.norms[:-1])
    carry = network.stem({"pixels": torch.randn(2, 3, 40, 40)})
    entered = network.blocks[0](carry)
    left = network.blocks[1](type(carry)(entered.hidden.clone()))
    torch.testing.assert_close(left.hidden, entered.hidden)


def test_lars_scales_neither_biases_nor_norms() -> None:
    network = SHAPES["bottleneck"].build()
    scaled, plain = decay_groups(network.parameters(), 1e-4)
    norms = {id(parameter) for module in network.modules() if isinstance(module, nn.BatchNorm2d) for parameter in module.parameters()}
    assert scaled["weight_decay"] == 1e-4 and plain["weight_decay"] == 0
    assert {id(parameter) for parameter in plain["params"]} == norms | {id(network.head.classifier.bias)}
    assert len(scaled["params"]) + len(plain["params"]) == len(list(network.parameters()))
