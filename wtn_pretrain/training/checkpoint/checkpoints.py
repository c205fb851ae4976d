"""Saving and resuming a training stage, whatever number of ranks, ZeRO stage, precision or tensor parallelism wrote what is resumed.

A checkpoint is a folder `stepN` that is switched in once all of it is durable, so what stands under that name was whole once. A start takes
the newest that still is.
"""

import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wtn_pretrain.checkpoint.files import DamagedError, Parts, dtype_name, dtype_of, on_host, require_same, versions
from wtn_pretrain.checkpoint.keeping import LAST_TWO, Keep
from wtn_pretrain.device import device
from wtn_pretrain.errors import UserError
from wtn_pretrain.parallel.launch import Place
from wtn_pretrain.parallel.tensor import whole
from wtn_pretrain.screen import say
from wtn_pretrain.training.checkpoint.manifest import (
    BUFFERS,
    FORMAT,
    Layout,
    Manifest,
    Other,
    Parameter,
    check_parts,
    checkpoints_in,
    read_manifest,
)
from wtn_pretrain.training.checkpoint.masters import Held, Masters, counters, cut, set_counters, whole_shape
from wtn_pretrain.training.checkpoint.writer import Writer


class Stateful(Protocol):
    """What is kept beside the engine, such as an average of the weights; the same on every rank but for tensor-parallel parts."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> None: ...


class Saved(NamedTuple):
    """What a save costs a rank."""

    seconds: float
    """For which its training stood still."""
    bytes: int
    """That it writes while the training goes on."""


class Checkpoints:
    """The checkpoints of a stage in `folder`, which all ranks share. Every rank must call every method, in the same order."""

    def __init__(
        self,
        folder: Path,
        engine: Any,
        network: nn.Module,
        place: Place,
        *,
        identity: Mapping[str, int | str],
        beside: Mapping[str, Stateful] | None = None,
        keep: Keep = LAST_TWO,
    ) -> None:
        """
        Args:
            network: the part of the engine's module whose parameters and buffers are kept, under their names in it.
            identity: what a run must have in common with another to continue its checkpoints, `stage` among it.
            beside: what else is kept, by name.
            keep: which checkpoints are kept.
        """
        self.folder = folder
        self._engine, self._network, self._place = engine, network, place
        self._identity, self._beside = dict(identity), dict(beside or {})
        self._stage = str(identity["stage"])
        self._masters = Masters(engine)
        self._parameters: dict[str, nn.Parameter] = dict(network.named_parameters())
        strangers = [name for name, parameter in self._parameters.items() if parameter not in self._masters]
        assert not strangers, f"the optimizer does not step {strangers[0]}"
        self._writer = Writer(folder, place, keep)

    # saving

    @torch.no_grad()
    def save(self, step: int, seconds: float) -> Saved:
        """Copies the state after `step` steps, and lets it be written while the training goes on.

        Args:
            seconds: wall time of the training so far.
        """
        began = time.monotonic()
        # there is never more than one copy in host memory
        self._writer.wait()
        part, mine = self._writer.part, _Deal(self._place).mine
        tensors: dict[str, Tensor] = {}
        parameters: dict[str, Parameter] = {}
        others: dict[str, Other] = {}
        for name, held in self._masters.read(self._parameters):
            if mine(held.values[0].numel()):
                kept = Parameter(part=part, shape=tuple(held.values[0].shape), states=tuple(held.states), updates=held.updates)
                parameters[name] = kept
                tensors.update(zip(kept.keys(name), map(on_host, held.values), strict=True))
        for key, source, value in self._others():
            value = whole(source, value)
            if mine(value.numel()):
                others[key] = Other(part=part, shape=tuple(value.shape), dtype=dtype_name(value.dtype))
                tensors[key] = on_host(value)
        manifest = Manifest(
            format=FORMAT,
            identity=self._identity,
            step=step,
            seconds=seconds,
            layout=self._layout(),
            versions=versions(),
            counters=counters(self._engine),
            parameters=parameters,
            others=others,
            parts={},
        )
        self._writer.start(manifest, tensors)
        return Saved(time.monotonic() - began, sum(value.nbytes for value in tensors.values()))

    def settle(self) -> None:
        """Returns when this rank has written what was begun, or could not; once all ranks have, it is the newest."""
        self._writer.wait()

    def close(self) -> None:
        """Returns when all ranks have written all that they have to.

        Raises:
            UserError: the last save could not be written; the checkpoint before it is kept.
        """
        self._writer.close()

    def _others(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """What the optimizer does not step, in the same order on every rank: its key, what says whether it is divided, its value."""
        for name, value in self._buffers():
            yield f"{BUFFERS}/{name}", value, value
        for owner, one in self._beside.items():
            for key, value in one.state_dict().items():
                # what is kept for a parameter, under some prefix, is divided as the parameter is
                parameter = self._parameters.get(key.partition(".")[2])
                yield f"{owner}/{key}", value if parameter is None or parameter.shape != value.shape else parameter, value

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        stored = self._network.state_dict(keep_vars=True).keys()
        return ((name, value) for name, value in self._network.named_buffers() if name in stored)

    def _layout(self) -> Layout:
        groups = [getattr(parameter, "tensor_parallel_group", None) for parameter in self._parameters.values()]
        return Layout(
            ranks=self._place.world_size,
            tensor=max((dist.get_world_size(group) for group in groups if group is not None), default=1),
            zero=int(self._engine.zero_optimization_stage()),
            weights=dtype_name(next(iter(self._parameters.values())).dtype),
        )

    # resuming

    def resume(self) -> tuple[int, float]:
        """Continues from the newest checkpoint that is whole: the steps done and the seconds spent, (0, 0.0) where there is none.

        Raises:
            UserError: there are checkpoints, and none can be used.
        """
        found = self._found()
        newest = ""
        for number, step in enumerate(found):
            problem = self._agreed(self._problem(step))
            if problem is None:
                self._writer.continues(step)
                return step, self._load(step)
            newest = newest or problem
            if number + 1 < len(found):
                say(f"{self._stage}: {problem}; the checkpoint before it is used")
        if found:
            raise UserError(f"{newest}; there is no other checkpoint: remove {self.folder} to start {self._stage} again")
        return 0, 0.0

    def _found(self) -> list[int]:
        """The steps of the checkpoints that stand there, newest first, as rank 0 sees them."""
        found: list[Any] = [[]]
        if self._place.rank == 0 and self.folder.is_dir():
            for left in self.folder.glob(".*.part"):
                # of a start that ended while it wrote
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
            found = [[step for step, _ in checkpoints_in(self.folder)]]
        if self._place.world_size > 1:
            dist.broadcast_object_list(found, src=0)
        return found[0]

    def _problem(self, step: int) -> str | None:
        """Why a checkpoint cannot be used, as far as this rank sees: each looks at its share of the parts."""
        folder = self.folder / f"step{step}"
        try:
            manifest = read_manifest(folder)
            self._require_fit(folder, manifest, step)
            check_parts(folder, manifest, sorted(manifest.parts)[self._place.rank :: self._place.world_size])
        except DamagedError as error:
            return str(error)
        return None

    def _require_fit(self, folder: Path, manifest: Manifest, step: int) -> None:
        require_same(folder, manifest.identity, self._identity)
        if manifest.step != step:
            raise DamagedError(f"{folder}: is the checkpoint of step {manifest.step}")
        here = {name: whole_shape(parameter) for name, parameter in self._parameters.items()}
        there = {name: parameter.shape for name, parameter in manifest.parameters.items()}
        wrong = next((name for name in sorted(here.keys() | there.keys()) if here.get(name) != there.get(name)), None)
        if wrong is not None:
            raise DamagedError(f"{folder}: belongs to another network ({wrong} {there.get(wrong)}, and here {here.get(wrong)})")
        missing = next((key for key, _, _ in self._others() if key not in manifest.others), None)
        if missing is not None:
            raise DamagedError(f"{folder}: holds no {missing}")

    def _agreed(self, problem: str | None) -> str | None:
        """The problem of the first rank that has one."""
        if self._place.world_size == 1:
            return problem
        first = torch.tensor(self._place.world_size if problem is None else self._place.rank, device=device())
        dist.all_reduce(first, op=dist.ReduceOp.MIN)
        if first == self._place.world_size:
            return None
        told = [problem]
        dist.broadcast_object_list(told, src=int(first))
        return told[0]

    @torch.no_grad()
    def _load(self, step: int) -> float:
        """Sets everything to what a checkpoint that was found whole says; the seconds spent."""
        folder = self.folder / f"step{step}"
        manifest, parts = read_manifest(folder), Parts(folder)
        # a part is read by the rank that has checked it, and sent to the others: storage that all share is read once
        readers = {name: number % self._place.world_size for number, name in enumerate(sorted(manifest.parts))}

        def fetch(part: str, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            if self._place.world_size == 1:
                return parts.read(part, key).to(device())
            if readers[part] == self._place.rank:
                value = parts.read(part, key).to(device())
            else:
                value = torch.empty(shape, dtype=dtype, device=device())
            dist.broadcast(value, src=readers[part])
            return value

        self._masters.begin()
        for name, parameter in self._masters.in_order(self._parameters).items():
            kept = manifest.parameters[name]
            values = [fetch(kept.part, key, kept.shape, torch.float32) for key in kept.keys(name)]
            self._masters.write(parameter, Held(values, list(kept.states), kept.updates))
        self._masters.end()
        others = {key: fetch(other.part, key, other.shape, dtype_of(other.dtype)) for key, other in sorted(manifest.others.items())}
        for name, buffer in self._buffers():
            buffer.copy_(others[f"{BUFFERS}/{name}"])
        restored: dict[str, dict[str, Tensor]] = {owner: {} for owner in self._beside}
        for key, source, _ in self._others():
            owner, _, name = key.partition("/")
            if owner in restored:
                restored[owner][name] = cut(source, others[key])
        for owner, state in restored.items():
            self._beside[owner].load_state_dict(state)
        set_counters(self._engine, manifest.counters, step)
        return manifest.seconds


class _Deal:
    """Deals tensors out to the ranks, each to the one that has the fewest elements so far; the same on every rank."""

    def __init__(self, place: Place) -> None:
        self._rank, self._elements = place.rank, [0] * place.world_size

    def mine(self, elements: int) -> bool:
        rank = self._elements.index(min(self._elements))
        self._elements[rank] += elements
        return rank == self._rank
