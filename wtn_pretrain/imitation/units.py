"""A unit of imitation: student modules, the teacher modules they answer to, and the bridges at both ends.

A unit needs nothing of another but the activations at its entry, which is what lets units run on different ranks.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wtn_pretrain.imitation.bridges import Bridge, apply_map
from wtn_pretrain.imitation.config import ImitateSection
from wtn_pretrain.imitation.losses import Ratio, energy_mse, mobilebert
from wtn_pretrain.imitation.pairing import Pairing
from wtn_pretrain.models.base import BlockNetwork, Carry, Flops, Flow, Taps, channels_last
from wtn_pretrain.parallel.batchnorm import enough_samples


class Unit(nn.Module):
    """One student unit, its teacher and its bridges; unit 0 is the stem."""

    def __init__(
        self,
        index: int,
        student: list[nn.Module],
        teacher: list[nn.Module],
        entry: Bridge | None,
        exit_: Bridge | None,
        network: BlockNetwork,
        section: ImitateSection,
        flops: tuple[int, int],
    ) -> None:
        super().__init__()
        self.index = index
        self.student = nn.ModuleList(student)
        self.entry, self.exit = entry, exit_
        # the teacher is no part of this module: it has no state to save and must never leave eval mode
        self.teacher = tuple(module.eval().requires_grad_(False) for module in teacher)
        if index:  # a stem that was copied is bit for bit the student's
            for module in self.teacher:
                channels_last(module)
        self._axis = network.channel_axis
        self._counted: Callable[[Carry], Tensor | None] = network.counted
        self._section = section
        self.needs_taps = section.loss == "mobilebert" and section.mobilebert.attention > 0 and index > 0
        self.student_flops, self.teacher_flops = flops
        """FLOPs of a forward pass of one sample."""

    def own_parameters(self) -> list[nn.Parameter]:
        """What this unit trains: its student modules, the map out of it and a free map into it."""
        own = list(self.student.parameters())
        if self.exit is not None:
            own.append(self.exit.expand)
        if self.entry is not None and self.entry.free_reduce is not None:
            own.append(self.entry.free_reduce)
        return own

    def own_state(self) -> dict[str, Tensor]:
        """What this unit alone holds, by name: its students with their buffers, the map out of it and a free map into it."""
        state = {f"student.{name}": value for name, value in self.student.state_dict().items()}
        if self.exit is not None:
            state["exit.expand"] = self.exit.expand.detach()
        if self.entry is not None and self.entry.free_reduce is not None:
            state["entry.free_reduce"] = self.entry.free_reduce.detach()
        return state

    @torch.no_grad()
    def load_own_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores `own_state`."""
        self.student.load_state_dict({name.removeprefix("student."): value for name, value in state.items() if name.startswith("student.")})
        if self.exit is not None:
            self.exit.expand.copy_(state["exit.expand"])
        if self.entry is not None and self.entry.free_reduce is not None:
            self.entry.free_reduce.copy_(state["entry.free_reduce"])

    def leaving(self, fed: str) -> Tensor | None:
        """E of the bridge above this unit if the unit above needs it to make its input: R = pinv(E) where it is constrained and
        teacher-fed, the product R E where it is free and student-fed."""
        if self.exit is None or self.exit.free == (fed == "teacher"):
            return None
        return self.exit.expand

    def arriving(self, fed: str) -> bool:
        """Whether this unit needs E of the bridge below it: see `leaving` of the unit below."""
        return self.entry is not None and self.entry.free != (fed == "teacher")

    def learn(self, learning: bool) -> None:
        """Train mode without dropout (the target is a function of the input) while learning, else eval mode."""
        self.student.train(learning).requires_grad_(learning)
        for module in self.student.modules():
            if isinstance(module, nn.Dropout):
                module.eval()

    @torch.no_grad()
    def teach(self, flow: Flow) -> tuple[Carry, Taps]:
        """The teacher's output for the teacher's input."""
        return self._run(self.teacher, flow)

    def answer(self, flow: Flow) -> tuple[Carry, Taps]:
        """The student's output, before the bridge.

        Raises:
            UserError: a batch norm learns from one sample's one pixel.
        """
        with enough_samples("narrow.micro_batch_size", "take more samples"):
            return self._run(self.student, flow)

    def enter(self, teacher: Flow | None, student: Flow | None, fed: str, local: bool, expand: Tensor | None = None) -> Flow:
        """The student's input, from the teacher's activation through R or from the student's own below.

        A constrained bridge is the identity between student blocks, so there the student's activation enters as it is.

        Args:
            expand: E of the bridge below as it was when the input was made; None: as it is.
        """
        flow = teacher if fed == "teacher" else student
        assert flow is not None
        if not isinstance(flow, Carry):
            return flow
        hidden = flow.hidden.detach() if local else flow.hidden
        if self.entry is not None:
            if fed == "teacher":
                reduce = self.entry.reduce(expand)
                hidden = apply_map(reduce if self.entry.free else reduce.detach(), hidden, self._axis)
            elif self.entry.free:
                own = self.entry.expand if expand is None else expand
                hidden = apply_map(self.entry.reduce(), apply_map(own.detach() if local else own, hidden, self._axis), self._axis)
        return Carry(hidden, flow.context)

    def loss(self, student: Carry, student_taps: Taps, teacher: Carry, teacher_taps: Taps) -> Ratio:
        """How far the student's output, through E, is from the teacher's."""
        mask, expand = self._counted(teacher), None if self.exit is None else self.exit.expand
        if self._section.loss == "mobilebert" and self.index > 0:
            hidden = student.hidden if expand is None else apply_map(expand, student.hidden, self._axis)
            return mobilebert(hidden, teacher.hidden, student_taps, teacher_taps, self._section.mobilebert, mask)
        return energy_mse(student.hidden, teacher.hidden, mask, expand, self._axis)

    @torch.no_grad()
    def error(self, student: Carry, teacher: Carry) -> Ratio:
        """Energy-normalised error, the figure that is reported whatever the training loss."""
        expand = None if self.exit is None else self.exit.expand
        return energy_mse(student.hidden, teacher.hidden, self._counted(teacher), expand, self._axis)

    def _run(self, modules: Any, flow: Flow) -> tuple[Carry, Taps]:
        taps: Taps = {}
        for position, module in enumerate(modules):
            flow = module(flow, taps) if self.needs_taps and position == len(modules) - 1 else module(flow)
        assert isinstance(flow, Carry)
        return flow, taps


def make_units(
    thin: BlockNetwork,
    wide: BlockNetwork,
    pairing: Pairing,
    bridges: Mapping[int, Bridge],
    section: ImitateSection,
    counts: tuple[Flops, Flops],
    only: range | None = None,
) -> list[Unit]:
    """The stem (unit 0) and the units of `pairing`, or those of them in `only`.

    Args:
        bridges: student boundary -> its maps.
        counts: FLOPs of thin and wide.
    """
    small, large = counts
    units = []
    for index in only or range(pairing.units + 1):
        if index == 0:
            units.append(Unit(0, [thin.stem], [wide.stem], None, bridges.get(0), thin, section, (small.stem, large.stem)))
            continue
        mine, theirs = pairing.blocks_of(index)
        units.append(
            Unit(
                index,
                [thin.blocks[block] for block in mine],
                [wide.blocks[block] for block in theirs],
                bridges.get(mine.start),
                bridges.get(mine.stop),
                thin,
                section,
                (sum(small.blocks[block] for block in mine), sum(large.blocks[block] for block in theirs)),
            )
        )
    return units


@torch.no_grad()
def start_from_teacher(unit: Unit) -> None:
    """Copies every tensor of the teacher that the student has under the same name and shape.

    Where a teacher unit is longer, each student block takes from the teacher block that ends at its share of the unit.
    """
    ratio = len(unit.teacher) / len(unit.student)
    for position, student in enumerate(unit.student):
        theirs = unit.teacher[round((position + 1) * ratio) - 1].state_dict()
        for name, mine in student.state_dict().items():
            if name in theirs and theirs[name].shape == mine.shape:
                mine.copy_(theirs[name])
