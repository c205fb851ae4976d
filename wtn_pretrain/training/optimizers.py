"""Optimizers: torch's AdamW and SGD, and LAMB and LARS in plain torch, since DeepSpeed's LAMB has no CPU op and torch has neither."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from wtn_pretrain.training.config import OptimizerSection


class Lamb(Optimizer):
    """LAMB (You et al. 2020, algorithm 2): Adam's direction, scaled layer by layer to the norm of the weights.

    Groups without weight decay (biases, norms) are not scaled, as in the authors' code.
    Needs whole layers: the trust ratio of a partition is another number, so it must not run under ZeRO 1 and above.
    """

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = closure() if closure else None
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
                state["step"] += 1
                mean = state["exp_avg"].lerp_(parameter.grad, 1 - first)
                square = state["exp_avg_sq"].lerp_(parameter.grad.square(), 1 - second)
                update = mean / (1 - first ** state["step"]) / ((square / (1 - second ** state["step"])).sqrt() + group["eps"])
                if group["weight_decay"]:
                    update += group["weight_decay"] * parameter
                    update *= _trust_ratio(parameter, update)
                parameter.sub_(update, alpha=group["lr"])
        return loss


class Lars(Optimizer):
    """LARS (You et al. 2017): SGD with momentum, each layer's rate scaled by trust x |weights| / |gradient + decay|.

    Groups without weight decay (biases, norms) are not scaled. Needs whole layers, as LAMB does.
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float, weight_decay: float, trust: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = closure() if closure else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad
                if group["weight_decay"]:
                    update = update + group["weight_decay"] * parameter
                    update = update * (_trust_ratio(parameter, update) * group["trust"])
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                parameter.sub_(buffer, alpha=group["lr"])
        return loss


def _trust_ratio(weights: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    size, length = weights.norm(), update.norm()
    return torch.where((size > 0) & (length > 0), size / length, torch.ones_like(size))


def decayed(parameter: nn.Parameter) -> bool:
    """Matrices and convolutions decay; biases and norms do not."""
    return parameter.dim() >= 2


def make_optimizer(section: OptimizerSection, groups: list[dict[str, Any]]) -> Optimizer:
    """The optimizer over parameter groups; a group's own `weight_decay` wins."""
    common: dict[str, Any] = {"lr": section.lr, "weight_decay": section.weight_decay}
    if section.name == "adamw":
        # one pass over weights, gradients and moments instead of a dozen
        return torch.optim.AdamW(groups, betas=section.betas, eps=section.eps, fused=True, **common)
    if section.name == "lamb":
        return Lamb(groups, betas=section.betas, eps=section.eps, **common)
    if section.name == "lars":
        return Lars(groups, momentum=section.momentum, trust=section.trust, **common)
    return torch.optim.SGD(groups, momentum=section.momentum, nesterov=section.nesterov, **common)


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: with weight decay and without."""
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if decayed(parameter)], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if not decayed(parameter)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
