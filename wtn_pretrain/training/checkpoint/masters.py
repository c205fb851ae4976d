"""The fp32 weights and optimizer states of a DeepSpeed engine, parameter by parameter, wherever it keeps them.

An optimizer steps the parameters themselves (ZeRO 0), fp32 copies of them, or flat partitions in which a rank has runs of their elements.
Here a parameter has one spot in what is stepped, its own states there, and a whole that is the same under any of these layouts.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wtn_pretrain.device import device
from wtn_pretrain.errors import UserError
from wtn_pretrain.parallel.tensor import whole


class Spot(NamedTuple):
    """Where a parameter is stepped: elements `first` to `first + length` of it stand in `stepped` from `start` on."""

    stepped: Tensor
    optimizer: torch.optim.Optimizer
    group: int
    """Number of the optimizer's parameter group."""
    start: int
    first: int
    length: int


class Held(NamedTuple):
    """A parameter and its states, whole."""

    values: list[Tensor]
    """The weights, then a state for each of `states`: fp32, of the parameter's whole shape."""
    states: list[str]
    updates: int | None
    """How often it was stepped, where the optimizer counts."""


class Masters:
    """What the optimizer of `engine` steps, by parameter.

    Raises:
        UserError: the optimizer's state is where it cannot be read from.
    """

    def __init__(self, engine: Any, stage: str) -> None:
        if getattr(engine.optimizer, "swap_optimizer", False):
            raise UserError(
                f"{stage}.deepspeed: offloads the optimizer to NVMe, from where no checkpoint can be written; offload it to the CPU"
            )
        self._wrapped, self._zero = engine.optimizer, engine.zero_optimization_stage()
        self._spots = _spots(engine)
        # the ranks that share parameters out among them
        self._ranks = self._wrapped.dp_process_group if self._zero else None

    def __contains__(self, parameter: nn.Parameter) -> bool:
        return parameter in self._spots

    def read(self, parameter: nn.Parameter) -> Held:
        """The parameter as it is now, on this rank's device; views where nothing has to be gathered. Every rank must call it."""
        spot = self._spots[parameter]
        state = spot.optimizer.state.get(spot.stepped, {})
        # what does not have a number for each weight, such as the count of updates, is no part of a parameter
        states = sorted(key for key, value in state.items() if _like(value, spot.stepped) and key != "step")
        values = [spot.stepped.detach(), *(state[key] for key in states)]
        if not self._zero:
            found = [value.float() for value in values]
        else:
            shape = local_shape(parameter)
            rows = torch.zeros(len(values), shape.numel(), device=device())
            for row, value in zip(rows, values, strict=True):
                row[spot.first : spot.first + spot.length] = value[spot.start : spot.start + spot.length]
            # each element comes from one rank: as integers the sum keeps every bit, that of a negative zero too
            dist.all_reduce(rows.view(torch.int32), group=self._ranks)
            found = [row.view(shape) for row in rows]
        updates = state.get("step", spot.optimizer.param_groups[spot.group].get("step"))
        return Held([whole(parameter, value) for value in found], states, None if updates is None else int(updates))

    def begin(self) -> None:
        """Lets the optimizer make its states, as it would with the first step, for `write` to fill. Every rank must call it.

        The step moves weights, all of which have to be written, and then `end`.
        """
        for spot in {id(spot.stepped): spot for spot in self._spots.values()}.values():
            stepped, optimizer = spot.stepped, spot.optimizer
            kept, groups = stepped.grad, optimizer.param_groups
            # where the optimizer is offloaded its gradients have a place of their own
            stepped.grad = torch.zeros_like(stepped) if kept is None else kept.zero_()
            optimizer.param_groups = [{**groups[spot.group], "params": [stepped]}]
            optimizer.step()
            stepped.grad, optimizer.param_groups = kept, groups
            _count(spot, 0)

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, held: Held) -> None:
        """Sets the parameter, whose whole `held` is on this rank's device; states that it does not name stay 0. Every rank must call it."""
        spot = self._spots[parameter]
        parts = [cut(parameter, value) for value in held.values]
        if spot.stepped is not parameter:
            # before the masters: at ZeRO 3 the network's weights may share memory with them
            self._set_weights(parameter, parts[0])
        state = spot.optimizer.state[spot.stepped]
        for value, part in zip([spot.stepped, *(state[key] for key in held.states)], parts, strict=True):
            if not self._zero:
                value.copy_(part)
            else:
                value[spot.start : spot.start + spot.length] = part.reshape(-1)[spot.first : spot.first + spot.length]
        if held.updates is not None:
            _count(spot, held.updates)
        elif not self._zero and not held.states:
            # a parameter that never had a gradient has no state
            spot.optimizer.state.pop(spot.stepped, None)

    def end(self) -> None:
        """Leaves the network's weights as a step does. Every rank must call it, once all is written."""
        if self._zero == 3:
            # small parameters are whole between steps, in fp32; fetched when they are needed, autocast would have them rounded
            self._wrapped.checkpoint_event_epilogue()

    def _set_weights(self, parameter: nn.Parameter, value: Tensor) -> None:
        if self._zero < 3:
            parameter.data.copy_(value)
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)


def local_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter on this rank, as if ZeRO did not partition it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def whole_shape(parameter: Any) -> tuple[int, ...]:
    """The shape of a parameter of which tensor-parallel ranks may have parts."""
    shape = list(local_shape(parameter))
    if hasattr(parameter, "tensor_parallel_dim"):
        shape[parameter.tensor_parallel_dim] *= dist.get_world_size(parameter.tensor_parallel_group)
    return tuple(shape)


def cut(parameter: Any, value: Tensor) -> Tensor:
    """This tensor-parallel rank's part of a whole `value` of a parameter; undoes `parallel.tensor.whole`."""
    if not hasattr(parameter, "tensor_parallel_dim"):
        return value
    group = parameter.tensor_parallel_group
    return value.chunk(dist.get_world_size(group), parameter.tensor_parallel_dim)[dist.get_rank(group)]


def _count(spot: Spot, updates: int) -> None:
    """Sets how often a spot was stepped: optimizers count in its state, as a tensor or a number, or in its group."""
    state, group = spot.optimizer.state.get(spot.stepped, {}), spot.optimizer.param_groups[spot.group]
    if isinstance(state.get("step"), Tensor):
        state["step"].fill_(updates)
    elif "step" in state:
        state["step"] = updates
    if "step" in group:
        group["step"] = updates


def _like(value: Any, stepped: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == stepped.shape


def _spots(engine: Any) -> dict[nn.Parameter, Spot]:
    """The spot of every parameter."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    wrapped, optimizer = engine.optimizer, engine.basic_optimizer
    if isinstance(wrapped, torch.optim.Optimizer):
        groups = [group["params"] for group in wrapped.param_groups]
        return _one_by_one(optimizer, groups, groups)
    if isinstance(wrapped, FP16_UnfusedOptimizer):
        return _one_by_one(optimizer, wrapped.fp16_groups, wrapped.fp32_groups)
    if isinstance(wrapped, DeepSpeedZeroOptimizer_Stage3):
        return _shares(wrapped)
    if isinstance(wrapped, DeepSpeedZeroOptimizer):
        return _fragments(optimizer, wrapped.bit16_groups, wrapped.single_partition_of_fp32_groups)
    if isinstance(wrapped, BF16_Optimizer):
        return _fragments(optimizer, wrapped.bf16_groups, wrapped.fp32_groups_flat_partition)
    raise RuntimeError(f"what a {type(wrapped).__name__} steps is not known")


def _one_by_one(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Sequence[nn.Parameter]], stepped: Sequence[Sequence[Tensor]]
) -> dict[nn.Parameter, Spot]:
    return {
        parameter: Spot(value, optimizer, group, 0, 0, parameter.numel())
        for group, (members, values) in enumerate(zip(parameters, stepped, strict=True))
        for parameter, value in zip(members, values, strict=True)
    }


def _fragments(optimizer: torch.optim.Optimizer, parameters: Sequence[Sequence[Any]], flats: Sequence[Tensor]) -> dict[nn.Parameter, Spot]:
    """The runs that this rank has under ZeRO 1 and 2, by DeepSpeed's own map of them."""
    spots = {}
    for group, (members, flat) in enumerate(zip(parameters, flats, strict=True)):
        for parameter in members:
            start, first, length = 0, 0, 0
            if parameter._hp_mapping is not None:
                there, here = parameter._hp_mapping.get_hp_fragment_address(), parameter._hp_mapping.lp_fragment_address
                start, first, length = there.start, here.start, here.numel
            spots[parameter] = Spot(flat, optimizer, group, start, first, length)
    return spots


def _shares(wrapped: Any) -> dict[nn.Parameter, Spot]:
    """The runs that this rank has under ZeRO 3: an equal share of every parameter, the last ones filled up."""
    spots = {}
    for number, (flat, members) in enumerate(zip(wrapped.fp32_partitioned_groups_flat, wrapped.fp16_groups, strict=True)):
        # of an optimizer that is offloaded in part, the rest is stepped by another one
        beside = wrapped.offload_optimizer and wrapped.subgroup_to_device[number] != "cpu"
        optimizer = wrapped.backup_optimizer if beside else wrapped.optimizer
        start = 0
        for parameter in members:
            share = parameter.partition_numel()
            first = min(share * parameter.ds_zero_partition_rank, parameter.ds_numel)
            length = min(share, parameter.ds_numel - first)
            spots[parameter] = Spot(flat, optimizer, wrapped.sub_group_to_group_id[number], start, first, length)
            start += share
    return spots


_COUNTERS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def counters(engine: Any) -> dict[str, int | float]:
    """What the engine counts: steps that it skipped, and the state of its dynamic loss scaler if it has one."""
    scaler = _scaler(engine)
    found = {name: getattr(scaler, name) for name in _COUNTERS if getattr(scaler, name, None) is not None}
    return {"skipped_steps": engine.skipped_steps, **found}


def set_counters(engine: Any, values: dict[str, int | float], step: int) -> None:
    """Restores `counters` at a step. What another kind of scaler has counted is left aside."""
    engine.global_steps, engine.skipped_steps = step, int(values["skipped_steps"])
    scaler = _scaler(engine)
    for name in _COUNTERS:
        if name in values and getattr(scaler, name, None) is not None:
            setattr(scaler, name, values[name])


def _scaler(engine: Any) -> Any:
    """DeepSpeed's dynamic loss scaler, which ZeRO keeps in an object of its own and the plain fp16 optimizer in its settings."""
    scaler = getattr(engine.optimizer, "loss_scaler", None) or getattr(engine.optimizer, "loss_scale_config", None)
    dynamic = getattr(scaler, "dynamic", False) or getattr(scaler, "dynamic_loss_scale", False)
    return scaler if dynamic else None
