"""The moving average against its formula, and what it leaves alone."""

import copy

import pytest
import torch
from torch import nn

from wtn_pretrain.models import ResNetConfig
from wtn_pretrain.training.ema import Average

SHAPE = ResNetConfig(
    block="basic", stem="cifar", channels=(4, 8), depths=(1, 1), stem_channels=4, image_channels=1, image_size=8, classes=3
)


def trained(network: nn.Module, average: Average, steps: int) -> list[dict[str, torch.Tensor]]:
    """The states after each of some steps of SGD, each taken into the average."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.3)
    states = []
    for _ in range(steps):
        optimizer.zero_grad()
        network({"pixels": torch.randn(6, 1, 8, 8)}).square().mean().backward()
        optimizer.step()
        average.update()
        states.append(copy.deepcopy(network.state_dict()))
    return states


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_averages_are_the_formulas(decay: float) -> None:
    torch.manual_seed(0)
    network = SHAPE.build()
    start, average = copy.deepcopy(network.state_dict()), Average(network, decay)
    states = trained(network, average, 5)
    expected = {name: value.double() for name, value in start.items()}
    for t, state in enumerate(states):
        kept = min(decay, (1 + t) / (10 + t))
        expected = {name: kept * expected[name] + (1 - kept) * state[name].double() for name in expected}
    found = {name.removeprefix("average."): value for name, value in average.state_dict().items()}
    assert found.pop("updates") == 5
    counters = {name for name in start if name.endswith("num_batches_tracked")}
    assert found.keys() == start.keys() - counters and any("running_var" in name for name in found)
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-7)  # five roundings of fp32
        assert not torch.equal(value, states[-1][name])


def test_swapped_in_for_a_while_and_back_bit_for_bit() -> None:
    network = SHAPE.build()
    average = Average(network, 0.9)
    before = trained(network, average, 3)[-1]
    averages = {name: value.clone() for name, value in average.state_dict().items()}
    network.eval()
    inputs = {"pixels": torch.randn(2, 1, 8, 8)}
    own = network(inputs)
    with pytest.raises(ZeroDivisionError), average.swap():
        assert all(torch.equal(value, averages[f"average.{name}"]) for name, value in network.named_parameters())
        assert not torch.equal(network(inputs), own)
        with pytest.raises(RuntimeError, match="update after"):
            average.update()
        with pytest.raises(RuntimeError, match="already"), average.swap():
            pass
        1 / 0
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(torch.equal(value, averages[name]) for name, value in average.state_dict().items())


def test_a_resumed_average_goes_on_as_if_nothing_had_been() -> None:
    def network_after(resume: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        network = SHAPE.build()
        average = Average(network, 0.99)
        trained(network, average, 3)
        if resume:
            kept = {name: value.clone() for name, value in average.state_dict().items()}
            average = Average(network, 0.99)
            average.load_state_dict(kept)
        trained(network, average, 3)
        return average.state_dict()

    one, other = network_after(False), network_after(True)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_low_precision_weights_have_fp32_averages() -> None:
    network = nn.Linear(4, 4).bfloat16()
    average = Average(network, 0.5)
    start = network.weight.detach().float()
    with torch.no_grad():
        network.weight += 1
    moved = network.weight.detach().clone()
    average.update()
    found = average.state_dict()["average.weight"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, 0.1 * start + 0.9 * moved.float())
    with average.swap():
        assert torch.equal(network.weight, found.bfloat16())
    assert torch.equal(network.weight, moved)
    assert torch.equal(average.state_dict()["average.weight"], found)


def test_a_state_that_does_not_fit_is_refused() -> None:
    average = Average(nn.Linear(2, 3), 0.9)
    state = {name: value.clone() for name, value in average.state_dict().items()}
    with pytest.raises(ValueError, match="no average.other"):
        average.load_state_dict({**state, "average.other": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"average.bias has shape \[2\] for \[3\]"):
        average.load_state_dict({**state, "average.bias": torch.zeros(2)})
    with pytest.raises(KeyError):
        average.load_state_dict({name: value for name, value in state.items() if name != "average.weight"})
    with pytest.raises(ValueError, match="decay"):
        Average(nn.Linear(2, 3), 1.0)
