"""Where a DeepSpeed engine steps each parameter.

An optimizer steps the parameters themselves (ZeRO 0), fp32 copies of them, or flat partitions in which a rank has runs of their elements:
parameters follow one another there, and are cut where a rank's share ends.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Spot(NamedTuple):
    """Where a parameter is stepped: elements `first` to `first + length` of it stand in `stepped` from `start` on."""

    stepped: Tensor
    """Empty between steps where it lies on NVMe."""
    number: int
    """Of `stepped` among all that is stepped, the same on every rank."""
    optimizer: torch.optim.Optimizer
    group: int
    """Number of the optimizer's parameter group."""
    start: int
    first: int
    length: int


def spots_of(engine: Any) -> dict[nn.Parameter, Spot]:
    """The spot of every parameter that learns, in the order in which they follow one another, at any ZeRO stage.

    Raises:
        RuntimeError: DeepSpeed wraps the optimizer in a way that is not known here.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    wrapped, optimizer = engine.optimizer, engine.basic_optimizer
    if isinstance(wrapped, torch.optim.Optimizer):
        return _themselves(wrapped, optimizer)
    if isinstance(wrapped, DeepSpeedZeroOptimizer_Stage3):
        return dict(_shares(wrapped))
    if isinstance(wrapped, DeepSpeedZeroOptimizer):
        return dict(_fragments(optimizer, wrapped.bit16_groups, wrapped.single_partition_of_fp32_groups))
    if isinstance(wrapped, BF16_Optimizer):
        return dict(_fragments(optimizer, wrapped.bf16_groups, wrapped.fp32_groups_flat_partition))
    raise RuntimeError(f"what a {type(wrapped).__name__} steps is not known")


def local_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter on this rank, as if ZeRO did not partition it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _themselves(wrapped: torch.optim.Optimizer, optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, Spot]:
    members = [(group, parameter) for group, settings in enumerate(wrapped.param_groups) for parameter in settings["params"]]
    return {
        parameter: Spot(parameter, number, optimizer, group, 0, 0, parameter.numel()) for number, (group, parameter) in enumerate(members)
    }


def _fragments(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Sequence[Any]], flats: Sequence[Tensor]
) -> Iterator[tuple[nn.Parameter, Spot]]:
    """The runs that this rank has under ZeRO 1 and 2, by DeepSpeed's own map of them."""
    for group, (members, flat) in enumerate(zip(parameters, flats, strict=True)):
        for parameter in members:
            start, first, length = 0, 0, 0
            if parameter._hp_mapping is not None:
                there, here = parameter._hp_mapping.get_hp_fragment_address(), parameter._hp_mapping.lp_fragment_address
                start, first, length = there.start, here.start, here.numel
            yield parameter, Spot(flat, group, optimizer, group, start, first, length)


def _shares(wrapped: Any) -> Iterator[tuple[nn.Parameter, Spot]]:
    """The runs that this rank has under ZeRO 3: an equal share of every parameter, the last ones filled up."""
    for number, (flat, members) in enumerate(zip(wrapped.fp32_partitioned_groups_flat, wrapped.fp16_groups, strict=True)):
        # of an optimizer that is offloaded in part, the rest is stepped by another one
        beside = wrapped.offload_optimizer and wrapped.subgroup_to_device[number] != "cpu"
        optimizer = wrapped.backup_optimizer if beside else wrapped.optimizer
        start = 0
        for parameter in members:
            share = parameter.partition_numel()
            first = min(share * parameter.ds_zero_partition_rank, parameter.ds_numel)
            length = min(share, parameter.ds_numel - first)
            yield parameter, Spot(flat, number, optimizer, wrapped.sub_group_to_group_id[number], start, first, length)
            start += share
