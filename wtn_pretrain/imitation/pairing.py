"""Which student blocks answer to which teacher blocks."""

from itertools import accumulate, pairwise
from typing import NamedTuple

from wtn_pretrain.errors import UserError
from wtn_pretrain.models.base import BlockConfig, boundary_shapes


class Pairing(NamedTuple):
    """The units of imitation above the stem: unit k holds student blocks [student[k], student[k+1]) and the teacher's likewise."""

    student: tuple[int, ...]
    teacher: tuple[int, ...]

    @property
    def units(self) -> int:
        return len(self.student) - 1

    def blocks_of(self, unit: int) -> tuple[range, range]:
        """Student and teacher blocks (from 0) of a unit above the stem, counted from 1."""
        return range(self.student[unit - 1], self.student[unit]), range(self.teacher[unit - 1], self.teacher[unit])

    def teacher_parts(self, unit: int) -> list[str]:
        """Names of the teacher's modules in a unit; the stem is unit 0."""
        return [f"blocks.{block}" for block in self.blocks_of(unit)[1]] if unit else ["stem"]


def pair(thin: BlockConfig, wide: BlockConfig, *, unit: str = "block", depth_map: tuple[int, ...] = ()) -> Pairing:
    """Pairs the blocks of two networks, checking that the shapes at every boundary fit.

    Args:
        unit: `block`, or `stage` for the networks' natural groups.
        depth_map: for every student unit the number (from 1) of the teacher block whose output it answers to; empty spreads
            the teacher's blocks evenly within each stage.

    Raises:
        UserError: the map skips, reverses or leaves the teacher, or a boundary's shapes differ in more than width.
    """
    thin_stages, wide_stages = thin.stages, wide.stages
    student = (0, *accumulate(thin_stages)) if unit == "stage" else tuple(range(sum(thin_stages) + 1))
    teacher = (0, *_check(depth_map, len(student) - 1, sum(wide_stages))) if depth_map else _spread(thin_stages, wide_stages, unit)
    thin_shapes, wide_shapes = boundary_shapes(thin), boundary_shapes(wide)
    for number, (mine, theirs) in enumerate(zip(student, teacher, strict=True)):
        small, large = thin_shapes[mine], wide_shapes[theirs]
        where = "after the stem" if number == 0 else f"of student block {mine} and teacher block {theirs}"
        # the carried width is the last axis of a sequence [S, D] and the first of an image [C, Y, X]
        axis = -1 if len(small) == 2 else 0
        if len(small) != len(large) or _without(small, axis) != _without(large, axis):
            raise UserError(
                f"narrow.depth_map: the outputs {where} have shapes {list(small)} and {list(large)}, which differ in more than width; "
                "choose a teacher block of the same resolution"
            )
        if small[axis] > large[axis]:
            raise UserError(
                f"narrow: the student is wider ({small[axis]}) than its teacher ({large[axis]}) {where}; a teacher must be at least as wide"
            )
    return Pairing(student, teacher)


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return tuple(value for index, value in enumerate(shape) if index != axis % len(shape))


def _check(depth_map: tuple[int, ...], units: int, blocks: int) -> tuple[int, ...]:
    text = list(depth_map)
    if len(depth_map) != units:
        raise UserError(f"narrow.depth_map: {text} has {len(depth_map)} numbers for {units} student units; give one a unit, none skipped")
    for before, after in pairwise(depth_map):
        if after <= before:
            raise UserError(f"narrow.depth_map: {text} goes from teacher block {before} to {after}; it must rise from unit to unit")
    if depth_map[0] < 1 or depth_map[-1] > blocks:
        raise UserError(f"narrow.depth_map: {text} leaves the teacher's blocks 1 to {blocks}")
    if depth_map[-1] != blocks:
        raise UserError(f"narrow.depth_map: {text} skips the teacher's top blocks {depth_map[-1] + 1} to {blocks}; end with {blocks}")
    return depth_map


def _spread(thin: tuple[int, ...], wide: tuple[int, ...], unit: str) -> tuple[int, ...]:
    if len(thin) != len(wide):
        raise UserError(f"narrow.depth_map: the student has {len(thin)} stages and the teacher {len(wide)}; give the map")
    if unit == "stage":
        return (0, *accumulate(wide))
    ends = [0]
    for small, large in zip(thin, wide, strict=True):
        if large < small:
            raise UserError(
                f"narrow.depth_map: a stage of {small} student blocks has a teacher of {large}; a teacher must be at least as deep"
            )
        first = ends[-1]
        ends += [first + (index * large + small // 2) // small for index in range(1, small)] + [first + large]
    return tuple(ends)
