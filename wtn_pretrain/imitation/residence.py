"""Where the units of a rank live: all on the device, or one at a time, the others in host memory or on disk.

One unit is home and the next one is being brought. What is brought is the teacher's modules, which never change, and the
student's weights with their optimizer state, which go back when the unit leaves.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from wtn_pretrain.device import SideStream
from wtn_pretrain.imitation.learner import Learner
from wtn_pretrain.imitation.pairing import Pairing
from wtn_pretrain.imitation.units import Unit
from wtn_pretrain.models.base import BlockNetwork
from wtn_pretrain.models.store import load_shape, read_parts
from wtn_pretrain.parallel.relay import Mark

State = dict[str, Tensor]


class Residence:
    """The units of a rank and where they are.

    Where none are away, all teachers must be real; else they may be of meta tensors until they come home.
    """

    def __init__(
        self, units: Sequence[Unit], teacher: Path, pairing: Pairing, where: str, students_move: bool = False, mark: Mark | None = None
    ) -> None:
        """`teacher`: folder of the wide network.

        Args:
            where: place of the teachers that are away: `none` (none is), `host` or `disk`.
            students_move: whether students come and go with their teachers; away, they are in host memory.
            mark: marks in a trace when a unit is brought.
        """
        self._units, self._folder, self._pairing, self._where = list(units), teacher, pairing, where
        self._side = SideStream()
        self._kept: dict[int, list[State]] = {}
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        self._shape: BlockNetwork | None = None
        self._home: Unit | None = None
        self._coming: tuple[Unit, Future[tuple[list[State], torch.Event | None]]] | None = None
        self.students_move, self._mark = students_move, mark or (lambda _: nullcontext())
        self._pool: ThreadPoolExecutor | None = None
        self._learners: dict[int, Learner] = {}
        if where != "none":
            self._start()

    @property
    def comes_and_goes(self) -> bool:
        """Whether one teacher at a time is home."""
        return self._pool is not None

    def knows(self, unit: int, learner: Learner) -> None:
        """From now on the optimizer state of a unit goes where the unit goes."""
        self._learners[unit] = learner

    def home(self, unit: Unit, then: Unit | None = None) -> None:
        """Makes `unit` the one that is home, and begins to bring `then`."""
        if self._pool is None or unit is self._home:
            return
        if self._home is not None:
            self._leave(self._home)
        if self._coming is None or self._coming[0] is not unit:
            self._drop()
            self._coming = (unit, self._pool.submit(self._bring, unit))
        states, ready = self._coming[1].result()
        self._side.wait(ready, [value for state in states for value in state.values()])
        for module, state in zip(unit.teacher, states, strict=True):
            module.load_state_dict(state, assign=True)
        self._move(unit, self._side.device)
        self._home = unit
        self._coming = None
        if then is not None and then is not unit:
            self._coming = (then, self._pool.submit(self._bring, then))

    def vacate(self) -> None:
        """Gives up the teachers that are on the device: they come from disk, one at a time, if they are wanted again."""
        self._drop()
        for unit in self._units if self._pool is None else [self._home] if self._home else []:
            self._leave(unit)
        self._home = None
        if self._pool is None:
            self._where = "disk"
            self._start()

    def close(self) -> None:
        self._drop()
        if self._pool is not None:
            self._pool.shutdown()

    def _start(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="bring")

    def _bring(self, unit: Unit) -> tuple[list[State], torch.Event | None]:
        with self._mark("bring"):
            return self._fetch(unit)

    def _fetch(self, unit: Unit) -> tuple[list[State], torch.Event | None]:
        states = self._kept.get(unit.index)
        if states is None:
            states = self._read(unit.index)
            if self._where == "host":
                self._kept[unit.index] = states
        if self._side.device.type == "cpu":
            return states, None
        with self._side.scope():
            placed = [{name: self._side.to_device(value) for name, value in state.items()} for state in states]
            ready = self._side.done()
        if self._where == "disk":
            self._side.synchronize()
            self._give_back(states)
        return placed, ready

    def _read(self, unit: int) -> list[State]:
        if self._shape is None:
            with torch.device("meta"):
                self._shape = load_shape(self._folder).build()
        return read_parts(self._folder, self._shape, self._pairing.teacher_parts(unit), self._take)

    def _take(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Host memory, of a unit that has left where one of this size has."""
        free = self._free.get((shape, dtype))
        if free:
            return free.pop()
        # convolutions in the layout of what flows through them
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        return torch.empty(shape, dtype=dtype, pin_memory=self._side.pinned, memory_format=layout)

    def _give_back(self, states: list[State]) -> None:
        for state in states:
            for value in state.values():
                self._free.setdefault((value.shape, value.dtype), []).append(value)

    def _leave(self, unit: Unit) -> None:
        if self._where == "disk" and self._side.device.type == "cpu":
            # memory that is given back to the system and asked for again comes back in ever more pieces
            self._give_back([{name: value.detach() for name, value in module.state_dict().items()} for module in unit.teacher])
        for module in unit.teacher:
            # leaves its shapes alone
            module.to("meta")
        self._move(unit, torch.device("cpu"))

    def _move(self, unit: Unit, to: torch.device) -> None:
        """The student's weights, buffers and moments."""
        if self._side.device.type == "cpu" or not self.students_move:
            return
        learner = self._learners.get(unit.index)
        for parameter in unit.student.parameters():
            parameter.data = _moved(parameter.data, to)
            if learner is not None:
                moments = learner.moments(parameter)
                moments.update({name: _moved(value, to) for name, value in moments.items() if isinstance(value, Tensor) and value.dim()})
        for buffer in unit.student.buffers():
            buffer.data = _moved(buffer.data, to)
        if to.type == "cpu":
            # what was copied must have arrived before it is brought again from another stream
            torch.accelerator.current_stream().synchronize()

    def _drop(self) -> None:
        if self._coming is not None:
            self._coming[1].result()
            self._coming = None


def _moved(tensor: Tensor, to: torch.device) -> Tensor:
    if to.type == "cpu":
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    return tensor.to(to, non_blocking=True)
