"""A learner: the units whose gradients are clipped and stepped together, as one DeepSpeed engine over the replicas of their span."""

from typing import Any

import torch
from torch import Tensor, nn

from wtn_pretrain.errors import UserError
from wtn_pretrain.imitation.config import ImitateSection
from wtn_pretrain.imitation.units import Unit
from wtn_pretrain.parallel.batchnorm import synchronise_batch_norm
from wtn_pretrain.parallel.replicas import Replicas
from wtn_pretrain.training.engine import average_only_with_others, filled_config, read_deepspeed_json
from wtn_pretrain.training.optimizers import decay_groups, make_optimizer


class _Parameters(nn.Module):
    """The trained parameters alone: DeepSpeed needs to know of nothing else."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.own = nn.ParameterList(parameters)


class Learner:
    """Gradients of `units`, averaged over replicas, clipped as one and stepped by one optimizer."""

    def __init__(self, units: list[Unit], section: ImitateSection, replicas: Replicas) -> None:
        import deepspeed

        self.units, self._replicas = units, replicas
        config = learner_config(section, replicas.count)
        self.zero = zero_stage(section)
        if replicas.count > 1:
            for unit in units:
                synchronise_batch_norm(unit.student, replicas.group)
        parameters = [parameter for unit in units for parameter in unit.own_parameters()]
        optimizer = make_optimizer(section.optimizer, decay_groups(parameters, section.optimizer.weight_decay))
        self._engine, *_ = deepspeed.initialize(model=_Parameters(parameters), optimizer=optimizer, config=config, mpu=replicas)
        average_only_with_others(self._engine, replicas.count)

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        """Torch's own, under ZeRO the one that steps this rank's partition."""
        return self._engine.optimizer.optimizer if self.zero else self._engine.optimizer

    def start_afresh(self) -> None:
        """Forgets the moments."""
        self._optimizer.state.clear()

    def backward(self, loss: Tensor) -> None:
        """Gradients of this replica's part of the loss; those of all replicas add up."""
        # DeepSpeed averages
        self._engine.backward(loss * self._replicas.count)

    def step(self, rate: float) -> None:
        """Takes an optimizer step at `rate` if this was the last micro-batch of a step."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()

    def state(self) -> dict[str, Any]:
        """The optimizer's state; under ZeRO this replica's part."""
        return self._optimizer.state_dict()

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores `state` after the weights have been restored."""
        self.weights_changed()
        self._optimizer.load_state_dict(state)

    def moments(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The optimizer's state of one parameter, to be changed in place; empty before the first step."""
        return self._optimizer.state.get(parameter, {})

    def weights_changed(self) -> None:
        """To be called when weights were set from outside."""
        if self.zero:
            self._engine.optimizer.refresh_fp32_params()

    def close(self) -> None:
        self._engine.destroy()


def zero_stage(section: ImitateSection) -> int:
    """The ZeRO stage of the section's DeepSpeed file."""
    return int(read_deepspeed_json(section.deepspeed, "narrow").get("zero_optimization", {}).get("stage", 0))


def learner_config(section: ImitateSection, replicas: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a span's learners.

    Raises:
        UserError: the file contradicts the recipe or does not work here.
    """
    accumulation = section.batch_size // (section.micro_batch_size or section.batch_size)
    tree = filled_config(
        section.deepspeed,
        "narrow",
        section.optimizer,
        {
            # replicas may hold different numbers of samples, and DeepSpeed only checks that these three fit
            "train_batch_size": ("narrow.batch_size", accumulation * replicas),
            "train_micro_batch_size_per_gpu": ("narrow.micro_batch_size", 1),
            "gradient_accumulation_steps": ("narrow.micro_batch_size", accumulation),
            "gradient_clipping": ("narrow.clip", section.clip),
        },
    )
    zero = tree["zero_optimization"]
    if zero.get("stage", 0) > 2:
        raise UserError(f"narrow.deepspeed: {section.deepspeed} is ZeRO 3, and a span is already a part of the network; use ZeRO 0, 1 or 2")
    if zero.get("stage", 0) and section.schedule == "bottom_up" and section.below == "joint":
        raise UserError(f"narrow.deepspeed: {section.deepspeed} would decay the units that narrow.below=joint has not reached; use ZeRO 0")
    if zero.get("stage", 0) and section.offload != "none":
        raise UserError(f"narrow.deepspeed: {section.deepspeed} lays a unit's weights out anew, and narrow.offload moves them; use ZeRO 0")
    # its default buckets are for networks, not for units
    zero.setdefault("reduce_bucket_size", 50_000_000)
    zero.setdefault("allgather_bucket_size", 50_000_000)
    return tree
