"""Optimizers: torch's AdamW and SGD, and LAMB and LARS in plain torch, since DeepSpeed's LAMB has no CPU op and torch has neither."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wtn_pretrain.training.config import OptimizerSection
from wtn_pretrain.training.layers import Layers, layers_of

STATES = {"adamw": 2, "lamb": 2, "sgd": 1, "lars": 1}
"""Tensors that an optimizer keeps of each weight."""


class LayerwiseOptimizer(Optimizer):
    """An optimizer that scales the update of each matrix and convolution by its norm; biases and norms, in groups of their own, are not.

    Under ZeRO it steps partitions: `follow_layers` says which layers lie in them, and without that they are refused.
    """

    layers = Layers()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        # while the parameters have their shapes, which partitions do not have
        kinds = {decayed(parameter) for parameter in param_group["params"]}
        assert len(kinds) == 1, "biases and norms need a group of their own, as decay_groups makes it"
        param_group["scaled"] = kinds.pop()

    def _scale(self, parameters: list[Tensor], updates: list[Tensor], coefficient: float = 1.0) -> None:
        """Multiplies every layer's update by `coefficient` x |weights| / |update|; by `coefficient` alone where one of them is zero."""
        if any(parameter.dim() < 2 for parameter in parameters) and self.layers is LayerwiseOptimizer.layers:
            raise RuntimeError(f"{type(self).__name__} was given a partition and not told which layers it holds")
        weights, lengths = self.layers.norms(parameters, (parameters, updates))
        ratios = torch.where((weights > 0) & (lengths > 0), weights / lengths, torch.ones_like(weights))
        self.layers.scale(parameters, updates, ratios * coefficient)


class Lamb(LayerwiseOptimizer):
    """LAMB (You et al. 2020, algorithm 2): Adam's direction with bias correction, scaled layer by layer to the norm of the weights."""

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = closure() if closure else None
        for group in self.param_groups:
            parameters, gradients = _learning(group)
            if not parameters:
                continue
            first, second = group["betas"]
            states = [self.state[parameter] for parameter in parameters]
            for parameter, state in zip(parameters, states, strict=True):
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
                state["step"] += 1
            means, squares = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
            torch._foreach_lerp_(means, gradients, 1 - first)
            torch._foreach_mul_(squares, second)
            torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
            lengths = torch._foreach_sqrt(squares)
            torch._foreach_div_(lengths, [math.sqrt(1 - second ** state["step"]) for state in states])
            torch._foreach_add_(lengths, group["eps"])
            updates = list(torch._foreach_div(means, lengths))
            torch._foreach_div_(updates, [1 - first ** state["step"] for state in states])
            del lengths
            if group["weight_decay"]:
                torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
            if group["scaled"]:
                self._scale(parameters, updates)
            torch._foreach_add_(parameters, updates, alpha=-group["lr"])
        return loss


class Lars(LayerwiseOptimizer):
    """LARS (You et al. 2017): SGD with momentum, each layer's rate scaled by trust x |weights| / |gradient + decay|."""

    def __init__(self, params: Iterable[Any], lr: float, momentum: float, weight_decay: float, trust: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = closure() if closure else None
        for group in self.param_groups:
            parameters, updates = _learning(group)
            if not parameters:
                continue
            if group["weight_decay"] or group["scaled"]:
                # gradients stay as they are
                updates = list(torch._foreach_add(updates, parameters, alpha=group["weight_decay"]))
            if group["scaled"]:
                self._scale(parameters, updates, group["trust"])
            states = [self.state[parameter] for parameter in parameters]
            for parameter, state in zip(parameters, states, strict=True):
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
            buffers = [state["momentum_buffer"] for state in states]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates)
            torch._foreach_add_(parameters, buffers, alpha=-group["lr"])
        return loss


def follow_layers(engine: Any, optimizer: Optimizer) -> None:
    """Tells an optimizer that scales layers which of them lie in what `engine`, a DeepSpeed engine around it, lets it step."""
    if isinstance(optimizer, LayerwiseOptimizer):
        optimizer.layers = layers_of(engine)


def _learning(group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters of a group that have a gradient, and their gradients."""
    parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
    return parameters, [parameter.grad for parameter in parameters]


def decayed(parameter: nn.Parameter) -> bool:
    """Matrices and convolutions decay; biases and norms do not."""
    return parameter.dim() >= 2


def make_optimizer(section: OptimizerSection, groups: list[dict[str, Any]], offloaded: bool = False) -> Optimizer:
    """The optimizer over parameter groups; a group's own `weight_decay` wins. `offloaded`: ZeRO keeps what it steps in host memory."""
    common: dict[str, Any] = {"lr": section.lr, "weight_decay": section.weight_decay}
    if section.name == "adamw" and section.cpu_kernel == "deepspeed" and offloaded:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, betas=section.betas, eps=section.eps, adamw_mode=True, **common)
    # fused: one pass over weights, gradients and moments instead of several
    if section.name == "adamw":
        return torch.optim.AdamW(groups, betas=section.betas, eps=section.eps, fused=True, **common)
    if section.name == "lamb":
        return Lamb(groups, betas=section.betas, eps=section.eps, **common)
    if section.name == "lars":
        return Lars(groups, momentum=section.momentum, trust=section.trust, **common)
    return torch.optim.SGD(groups, momentum=section.momentum, nesterov=section.nesterov, fused=True, **common)


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: with weight decay and without."""
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if decayed(parameter)], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if not decayed(parameter)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
