"""A learner: the units whose gradients are clipped and stepped together, as one DeepSpeed engine over the replicas of their span.

A step whose gradient is not finite is left out by the learner that has it, on all of its replicas; others go on.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wtn_pretrain.errors import UserError
from wtn_pretrain.imitation.config import ImitateSection
from wtn_pretrain.imitation.units import Unit
from wtn_pretrain.parallel.batchnorm import synchronise_batch_norm
from wtn_pretrain.parallel.replicas import Replicas
from wtn_pretrain.training.engine import average_only_with_others, filled_config, gradient_norm, read_deepspeed_json
from wtn_pretrain.training.guard import Buffers, Wary
from wtn_pretrain.training.optimizers import decay_groups, make_optimizer


class _Parameters(nn.Module):
    """The trained parameters alone: DeepSpeed needs to know of nothing else."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.own = nn.ParameterList(parameters)


class Look(NamedTuple):
    """What is known of a gradient before it is stepped."""

    norm: Tensor
    """[], before clipping."""
    finite: bool


class DivergedError(Exception):
    """More steps in a row would have been left out than may be."""

    def __init__(self, units: list[int], steps: list[int]) -> None:
        """`units`: of the learner, by index; `steps`: of the phase, from 0."""
        super().__init__(units, steps)
        self.units, self.steps = units, steps


class Learner:
    """Gradients of `units`, averaged over replicas, clipped as one and stepped by one optimizer."""

    def __init__(self, units: list[Unit], section: ImitateSection, replicas: Replicas) -> None:
        import deepspeed

        self.units, self._replicas, self._max_skipped = units, replicas, section.max_skipped
        config = learner_config(section, replicas.count)
        self.zero = zero_stage(section)
        if replicas.count > 1:
            for unit in units:
                synchronise_batch_norm(unit.student, replicas.group)
        parameters = [parameter for unit in units for parameter in unit.own_parameters()]
        # ZeRO makes whole buckets at every backward pass, however few gradients come
        zero, numbers = config["zero_optimization"], sum(parameter.numel() for parameter in parameters)
        zero["reduce_bucket_size"] = min(zero["reduce_bucket_size"], numbers)
        optimizer = make_optimizer(section.optimizer, decay_groups(parameters, section.optimizer.weight_decay))
        self._engine, *_ = deepspeed.initialize(model=_Parameters(parameters), optimizer=optimizer, config=config, mpu=replicas)
        average_only_with_others(self._engine, replicas.count)
        # DeepSpeed's own optimizers look at the norm, torch's do not
        self._wary = None if self.zero else Wary(self._engine)
        self._buffers = Buffers(unit.student for unit in units)
        self.in_a_row: list[int] = []
        """The steps of the phase, from 0, that were left out since the last one that was taken."""

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        """Torch's own, under ZeRO the one that steps this rank's partition."""
        return self._engine.optimizer.optimizer if self.zero else self._engine.optimizer

    def start_afresh(self) -> None:
        """Forgets the moments, and what was left out."""
        self._optimizer.state.clear()
        self.in_a_row.clear()

    def backward(self, loss: Tensor) -> None:
        """Gradients of this replica's part of the loss; those of all replicas add up."""
        # DeepSpeed averages
        self._engine.backward(loss * self._replicas.count)

    @property
    def ends_step(self) -> bool:
        """Whether the micro-batch that is under way is the last one of a step."""
        return bool(self._engine.is_gradient_accumulation_boundary())

    def step(self, rate: float, number: int, look: Look | None = None) -> bool:
        """Takes an optimizer step at `rate` if this was the last micro-batch of a step.

        Args:
            number: of the step in its phase, from 0.
            look: what `looks` has found, if it was asked.

        Returns:
            Whether the step was left out, as its gradient is not finite; nothing has changed then.

        Raises:
            DivergedError: too many were left out in a row.
        """
        ends = self.ends_step
        if ends and self._wary is not None:
            look = look or looks([self])[0]
            assert look is not None
            self._wary.norm, self._wary.finite = look
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()
        if not ends:
            return False
        if self._engine.was_step_applied():
            self.in_a_row.clear()
            self._buffers.keep()
            return False
        self._buffers.restore()
        self.in_a_row.append(number)
        if len(self.in_a_row) > self._max_skipped:
            raise DivergedError([unit.index for unit in self.units], list(self.in_a_row))
        return True

    def norm(self) -> Tensor | None:
        """Of the gradient of all replicas at the end of a step, before clipping; None where DeepSpeed looks at it by itself."""
        if self._wary is None or not self.ends_step:
            return None
        norm = gradient_norm(self._engine)
        assert isinstance(norm, Tensor)
        return norm

    def state(self) -> dict[str, Any]:
        """The optimizer's state (under ZeRO this replica's part), and which steps in a row were left out."""
        return {**self._optimizer.state_dict(), _IN_A_ROW: list(self.in_a_row)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores `state` after the weights have been restored."""
        self.weights_changed()
        # checkpoints of before steps could be left out say nothing of them
        self.in_a_row = list(state.get(_IN_A_ROW, []))
        self._optimizer.load_state_dict({name: value for name, value in state.items() if name != _IN_A_ROW})

    def moments(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The optimizer's state of one parameter, to be changed in place; empty before the first step."""
        return self._optimizer.state.get(parameter, {})

    def weights_changed(self) -> None:
        """To be called when weights were set from outside."""
        self._buffers.keep()
        if self.zero:
            self._engine.optimizer.refresh_fp32_params()

    def close(self) -> None:
        self._engine.destroy()


_IN_A_ROW = "left_out_in_a_row"


def looks(learners: Sequence[Learner]) -> list[Look | None]:
    """What there is to know of each gradient before it is stepped; the host waits for the device once for all of them."""
    norms = [learner.norm() for learner in learners]
    known = [norm for norm in norms if norm is not None]
    finite = iter(torch.isfinite(torch.stack(known)).tolist() if known else [])
    return [None if norm is None else Look(norm, next(finite)) for norm in norms]


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
