"""The fp32 weights and optimizer states of a DeepSpeed engine, parameter by parameter, wherever it keeps them.

Here a parameter has one spot in what is stepped, its own states there, and a whole that is the same under any layout.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wtn_pretrain.device import device
from wtn_pretrain.parallel.tensor import whole
from wtn_pretrain.training.checkpoint.swapped import Swapped
from wtn_pretrain.training.partitions import Spot, local_shape, spots_of


class Held(NamedTuple):
    """A parameter and its states, whole."""

    values: list[Tensor]
    """The weights, then a state for each of `states`: fp32, of the parameter's whole shape."""
    states: list[str]
    updates: int | None
    """How often it was stepped, where the optimizer counts."""


class Masters:
    """What the optimizer of `engine` steps, by parameter."""

    def __init__(self, engine: Any) -> None:
        self._wrapped, self._zero = engine.optimizer, engine.zero_optimization_stage()
        self._spots = spots_of(engine)
        self._swapped = Swapped(engine.optimizer)
        # the ranks that share parameters out among them
        self._ranks = self._wrapped.dp_process_group if self._zero else None

    def __contains__(self, parameter: nn.Parameter) -> bool:
        return parameter in self._spots

    def in_order(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """The same parameters, those that are stepped together behind one another: the fastest order to `write` them in."""
        return dict(sorted(parameters.items(), key=lambda item: self._spots[item[1]].number))

    def read(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Held]]:
        """The parameters as they are now, on this rank's device; views where nothing has to be gathered.

        Every rank must go through all of them before it does anything else with the engine.
        """
        try:
            for name, parameter in self.in_order(parameters).items():
                self._swapped.bring(self._spots[parameter].number)
                yield name, self._read(parameter)
        finally:
            self._swapped.put_back()

    def _read(self, parameter: nn.Parameter) -> Held:
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
        for spot in {spot.number: spot for spot in self._spots.values()}.values():
            self._swapped.bring(spot.number, to_change=True)
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
        self._swapped.bring(spot.number, to_change=True)
        parts = [cut(parameter, value) for value in held.values]
        if 0 < self._zero < 3:
            parameter.data.copy_(parts[0])
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
            self._wrapped.checkpoint_event_prologue()
            for number in range(len(self._wrapped.fp16_groups)):
                self._swapped.bring(number)
                self._wrapped._reassign_or_swap_out_partitioned_parameters(number)
            # small parameters are whole between steps, in fp32; fetched when they are needed, autocast would have them rounded
            self._wrapped.checkpoint_event_epilogue()
        self._swapped.put_back()


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
