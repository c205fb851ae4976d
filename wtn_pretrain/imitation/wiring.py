"""Who talks to whom: the links between the spans of a plan, and what flows over them."""

import torch
from torch import Tensor

from wtn_pretrain.device import backend
from wtn_pretrain.imitation.plan import Plan, shares, starts
from wtn_pretrain.models.base import Carry
from wtn_pretrain.parallel.launch import Place
from wtn_pretrain.parallel.relay import Link, Message, Overlap, overlaps
from wtn_pretrain.parallel.replicas import Replicas, kept, local_group


class Wiring:
    """One rank's place in a plan: its span, its rows of every micro-batch and its links to the spans below and above.

    Every rank makes its own; neighbours meet while they do.
    """

    def __init__(self, plan: Plan, place: Place, rows: int, wire: torch.dtype | None = None) -> None:
        """`rows`: samples of a micro-batch; `wire`: the dtype in which float32 activations travel, None: as they are."""
        self.plan, self.place, self.rows = plan, place, rows
        self.seat = plan.seat(place.rank)
        self.span = plan.spans[self.seat.span]
        self.part = _parts(rows, self.span.replicas)[self.seat.replica]
        """First row and number of rows of a micro-batch that this rank works on."""
        # plans that divide the ranks alike use the same groups
        self._division = tuple(tuple(plan.ranks_of(span)) for span in range(len(plan.spans)))
        self.replicas = kept(self._division, lambda: Replicas(plan.ranks_of(self.seat.span), place.rank))
        # even boundaries, then odd ones: a rank has at most one of each
        links = {edge: self._links(edge, wire) for edge in sorted((self.seat.span - 1, self.seat.span), key=lambda edge: edge % 2)}
        self.below, self.lead_below = links[self.seat.span - 1]
        self.above, self.lead_above = links[self.seat.span]

    @property
    def leads(self) -> bool:
        """Whether this rank is the first replica of its span."""
        return self.seat.replica == 0

    def _links(self, edge: int, wire: torch.dtype | None) -> tuple[Link | None, Link | None]:
        """The links over the boundary between spans `edge` and `edge` + 1: between all replicas, and between the leaders alone."""
        exists = 0 <= edge < len(self.plan.spans) - 1
        none = range(0)
        lower, upper = (self.plan.ranks_of(edge), self.plan.ranks_of(edge + 1)) if exists else (none, none)
        ranks = [*lower, *upper] or [self.place.rank]
        group = kept((self._division, edge, "gloo"), lambda: local_group(ranks, "gloo"))
        payload = kept((self._division, edge), lambda: local_group(ranks)) if backend() != "gloo" else None
        if not exists:
            return None, None
        sending = self.seat.span == edge
        others = upper if sending else lower
        peers = overlaps(self.part, _parts(self.rows, len(others)), others, sending)
        leader = [Overlap(others[0], 0, None, whole=True)]
        return Link(peers, group, payload, wire), Link(leader, group, payload, None) if self.leads else None


def _parts(rows: int, replicas: int) -> list[tuple[int, int]]:
    counts = shares(rows, replicas)
    return list(zip(starts(counts), counts, strict=True))


def pack(teacher: Carry | None, student: Carry | None, expand: Tensor | None) -> Message:
    """What goes over a boundary: the activations of either side, and E of the bridge there if the span above needs it."""
    rows = {f"context{number}": tensor for number, tensor in enumerate((teacher or student or Carry(torch.empty(0))).context)}
    if teacher is not None:
        rows["teacher"] = teacher.hidden
    if student is not None:
        rows["student"] = student.hidden
    return Message(rows, {} if expand is None else {"expand": expand.detach().clone()})


def unpack(message: Message) -> tuple[Carry | None, Carry | None, Tensor | None]:
    """The inverse of `pack`."""
    context = tuple(message.rows[f"context{number}"] for number in range(len(message.rows)) if f"context{number}" in message.rows)
    teacher, student = (Carry(message.rows[side], context) if side in message.rows else None for side in ("teacher", "student"))
    return teacher, student, message.whole.get("expand")
