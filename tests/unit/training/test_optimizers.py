"""LAMB and LARS against their published update rules in numpy, and the schedules at the points that matter."""

import numpy as np
import pytest
import torch

from wtn_pretrain.training.config import OptimizerSection, ScheduleSection
from wtn_pretrain.training.layers import Layers, Part, Partition
from wtn_pretrain.training.optimizers import LayerwiseOptimizer, decay_groups, make_optimizer
from wtn_pretrain.training.schedules import scale

STEPS = 6


def trajectory(section: OptimizerSection) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray, np.ndarray]:
    """Weights of a matrix and a bias after every step on fixed gradients."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 4).double()
    start = layer.weight.detach().numpy().copy(), layer.bias.detach().numpy().copy()
    gradients = np.random.default_rng(0).normal(size=(STEPS, 24))
    optimizer = make_optimizer(section, decay_groups(layer.parameters(), section.weight_decay))
    weights, biases = [], []
    for gradient in gradients:
        layer.weight.grad = torch.from_numpy(gradient[:20].reshape(4, 5).copy())
        layer.bias.grad = torch.from_numpy(gradient[20:].copy())
        optimizer.step()
        weights.append(layer.weight.detach().numpy().copy())
        biases.append(layer.bias.detach().numpy().copy())
    return weights, biases, gradients, np.concatenate([start[0].ravel(), start[1]])


def lamb(x: np.ndarray, gradients: np.ndarray, section: OptimizerSection, decay: float, scaled: bool) -> list[np.ndarray]:
    m, v, path = np.zeros_like(x), np.zeros_like(x), []
    for step, g in enumerate(gradients, start=1):
        m = section.betas[0] * m + (1 - section.betas[0]) * g
        v = section.betas[1] * v + (1 - section.betas[1]) * g**2
        update = (m / (1 - section.betas[0] ** step)) / (np.sqrt(v / (1 - section.betas[1] ** step)) + section.eps) + decay * x
        x = x - section.lr * (np.linalg.norm(x) / np.linalg.norm(update) if scaled else 1.0) * update
        path.append(x)
    return path


def lars(x: np.ndarray, gradients: np.ndarray, section: OptimizerSection, decay: float, scaled: bool) -> list[np.ndarray]:
    buffer, path = np.zeros_like(x), []
    for g in gradients:
        update = g + decay * x
        if scaled:
            update = update * section.trust * np.linalg.norm(x) / np.linalg.norm(update)
        buffer = section.momentum * buffer + update
        x = x - section.lr * buffer
        path.append(x)
    return path


@pytest.mark.parametrize("decay", [0.02, 0.0])
@pytest.mark.parametrize(("name", "rule"), [("lamb", lamb), ("lars", lars)])
def test_layerwise_optimizers_follow_their_update_rules(name: str, rule, decay: float) -> None:
    section = OptimizerSection(name=name, lr=0.05, weight_decay=decay, trust=0.1)
    weights, biases, gradients, start = trajectory(section)
    # a matrix is scaled whether it decays or not, a bias never
    for ours, theirs in zip(weights, rule(start[:20], gradients[:, :20], section, decay, True), strict=True):
        np.testing.assert_allclose(ours.ravel(), theirs, rtol=1e-12, atol=1e-14)
    for ours, theirs in zip(biases, rule(start[20:], gradients[:, 20:], section, 0.0, False), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-14)


def test_lamb_of_zero_weights_moves() -> None:
    layer = torch.nn.Linear(3, 3, bias=False)
    torch.nn.init.zeros_(layer.weight)
    layer.weight.grad = torch.ones(3, 3)
    make_optimizer(OptimizerSection(name="lamb", lr=0.1), [{"params": list(layer.parameters()), "weight_decay": 0.01}]).step()
    assert torch.isfinite(layer.weight).all()
    assert (layer.weight < 0).all()


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_a_partition_whose_layers_are_not_known_is_refused(name: str) -> None:
    flat = torch.nn.Parameter(torch.ones(6))
    flat.grad = torch.ones(6)
    optimizer = make_optimizer(OptimizerSection(name=name), [{"params": [torch.nn.Parameter(torch.ones(2, 3))], "weight_decay": 0.01}])
    # as ZeRO does
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match="not told which layers"):
        optimizer.step()
    assert torch.equal(flat.detach(), torch.ones(6))


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_a_partition_is_stepped_layer_by_layer(name: str, one_rank: None) -> None:
    """Two layers in one flat tensor, with padding behind them, against the two by themselves."""
    torch.manual_seed(0)
    section = OptimizerSection(name=name, lr=0.1, weight_decay=0.02, trust=0.1)
    layers = [torch.nn.Parameter(torch.randn(3, 4) * scale) for scale in (1, 10)]
    flat = torch.nn.Parameter(torch.cat([*(layer.detach().flatten() for layer in layers), torch.zeros(3)]))
    whole, partitioned = (make_optimizer(section, [{"params": layers, "weight_decay": 0.02}]) for _ in range(2))
    assert isinstance(partitioned, LayerwiseOptimizer)
    # as ZeRO does
    partitioned.param_groups[0]["params"] = [flat]
    partitioned.layers = Layers([Partition(flat, 2, (Part(0, 0, 12), Part(1, 12, 12)), ())])
    for _ in range(3):
        for layer in layers:
            layer.grad = torch.randn(3, 4)
        flat.grad = torch.cat([*(layer.grad.flatten() for layer in layers), torch.zeros(3)])
        whole.step()
        partitioned.step()
    expected = torch.cat([layer.detach().flatten() for layer in layers])
    # the same numbers, added up in another order
    torch.testing.assert_close(flat.detach()[:24], expected, rtol=1e-6, atol=1e-6)
    assert not flat.detach()[24:].any()


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_gradients_are_left_as_they_are(name: str) -> None:
    layer = torch.nn.Linear(3, 3)
    for parameter in layer.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = [parameter.grad.clone() for parameter in layer.parameters()]
    make_optimizer(OptimizerSection(name=name, weight_decay=0.0), decay_groups(layer.parameters(), 0.0)).step()
    assert all(torch.equal(parameter.grad, kept) for parameter, kept in zip(layer.parameters(), before, strict=True))


def test_biases_and_norms_do_not_decay() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.Flatten(), torch.nn.Linear(3, 2))
    decayed, plain = decay_groups(network.parameters(), 0.1)
    assert [tuple(parameter.shape) for parameter in decayed["params"]] == [(3, 2, 3, 3), (2, 3)]
    assert (decayed["weight_decay"], plain["weight_decay"], len(plain["params"])) == (0.1, 0.0, 4)


def test_schedules_at_the_points_that_matter() -> None:
    linear = ScheduleSection(name="linear", warmup=10)
    assert scale(linear, 0, 110) == pytest.approx(1 / 11)
    assert scale(linear, 9, 110) == pytest.approx(10 / 11)
    assert scale(linear, 10, 110) == 1.0
    assert scale(linear, 60, 110) == pytest.approx(0.5)
    assert scale(linear, 109, 110) == pytest.approx(0.01)
    assert scale(ScheduleSection(name="cosine", final=0.1), 50, 100) == pytest.approx(0.55)
    assert scale(ScheduleSection(name="polynomial", power=2), 50, 100) == pytest.approx(0.25)
    assert scale(ScheduleSection(name="constant", warmup=0.5), 99, 100) == 1.0
    steps = ScheduleSection(name="steps", milestones=(0.3, 0.6), gamma=0.1)
    assert [round(scale(steps, step, 100), 6) for step in (0, 29, 30, 60, 99)] == [1, 1, 0.1, 0.01, 0.01]
    for name in ("linear", "cosine", "polynomial"):
        rates = [scale(ScheduleSection(name=name, warmup=0.1, final=0.2), step, 50) for step in range(50)]
        assert max(rates) <= 1.0
        assert rates == sorted(rates[:5]) + sorted(rates[5:], reverse=True)
        assert rates[-1] >= 0.2
