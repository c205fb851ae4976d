"""Weights under somebody else's names, brought under ours with nothing missing, left over or of another shape."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from wtn_pretrain.config import validate
from wtn_pretrain.errors import UserError
from wtn_pretrain.models.base import BlockConfig

LISTED = 12
"""Keys of one kind that a refusal writes out; of more, it says how many."""
COUNTER = "num_batches_tracked"
"""A batch norm's count of batches, which files of torch before 0.4.1 lack and inference never reads."""

C = TypeVar("C", bound=BlockConfig)


def told(family: type[C], source: str, keys: Mapping[str, Any]) -> C:
    """The shape that somebody else's settings or tensors tell.

    Raises:
        UserError: there is no such network; names `source` and the key.
    """
    try:
        config = validate(family, keys)
    except UserError as error:
        raise UserError(f"{source}: tells the shape of no network ({error}); give one with its own, unchanged settings") from None
    for key in keys:
        value = getattr(config, key)
        # 0 stands for what the data decides, in a recipe
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise UserError(f"{source}: tells the shape of no network ({key} is {value}); give one with its own, unchanged settings")
    return config


def convert(theirs: Mapping[str, Tensor], names: Mapping[str, str], config: BlockConfig, source: str) -> dict[str, Tensor]:
    """The tensors of `theirs` under our names, fp32, counters int64; every bit of their values is kept.

    Args:
        names: their name of every tensor -> ours.
        config: the shape of the network that they are for.
        source: what a refusal calls them.

    Raises:
        UserError: lists the keys that are missing, unexpected (with the missing ones that they may be) or of another shape,
            and those that hold what is no weight (integers, infinities, NaN).
    """
    with torch.device("meta"):
        own = config.build().state_dict(keep_vars=True)
    counters = {name for name, ours in names.items() if ours.endswith(COUNTER) and name not in theirs}
    missing = [name for name in names if name not in theirs and name not in counters]
    extra = [name for name in theirs if name not in names]
    kept = [(name, ours) for name, ours in names.items() if name in theirs]
    wrong = [
        f"{name} {list(theirs[name].shape)} for {list(own[ours].shape)}" for name, ours in kept if theirs[name].shape != own[ours].shape
    ]
    unfit = [
        name
        for name, ours in kept
        if own[ours].is_floating_point() and not (theirs[name].is_floating_point() and bool(theirs[name].isfinite().all()))
    ]
    problems = [
        f"{kind} {_listed(found)}"
        for kind, found in (
            ("missing", missing),
            ("unexpected", [f"{name}{_perhaps(name, theirs, missing, names, own)}" for name in extra]),
            ("of another shape", wrong),
            ("not finite or not of floating point", unfit),
        )
        if found
    ]
    if problems:
        raise UserError(f"{source}: its keys do not fit a {config.family} of this shape: {'; '.join(problems)}")
    state = {ours: theirs[name].detach().to("cpu", own[ours].dtype) for name, ours in kept}
    state |= {names[name]: torch.zeros((), dtype=torch.int64) for name in counters}
    untold = {id(value) for value in own.values()} - {id(own[name]) for name in state}
    assert not untold, "names leave a tensor of the network without a source"
    return state


def _perhaps(name: str, theirs: Mapping[str, Tensor], missing: list[str], names: Mapping[str, str], own: Mapping[str, Tensor]) -> str:
    """Which missing key an unexpected one may be: one of its shape that begins or ends alike."""
    alike = [
        other
        for other in missing
        if own[names[other]].shape == theirs[name].shape
        and (other.rpartition(".")[0] == name.rpartition(".")[0] or other.endswith(name) or name.endswith(other))
    ]
    return f" (renamed from {alike[0]}?)" if len(alike) == 1 else ""


def _listed(found: list[str]) -> str:
    more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
    return ", ".join(found[:LISTED]) + more
