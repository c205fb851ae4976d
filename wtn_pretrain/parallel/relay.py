"""The relay: messages of tensors that flow from the ranks of one span to those of the next, beside the computation.

A message goes out as soon as it is put into the outbox, and the next ones come in while the current one is worked on. Both
boxes hold `in_flight` messages and no more: who is ahead waits. Spans with different numbers of replicas are matched row by row.
"""

import itertools
import json
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from wtn_pretrain.device import SideStream

HEADER = 4096
"""Bytes of the header that goes before each message; it says what follows, so that any shape and dtype may."""


Mark = Callable[[str], AbstractContextManager[Any]]
"""Marks in a trace what happens within: `with span("send"):`."""


class Message(NamedTuple):
    """What flows over a boundary at once."""

    rows: dict[str, Tensor]
    """Tensors whose first axis is the samples; each replica gets its rows."""
    whole: dict[str, Tensor]
    """Tensors that every replica gets whole."""


class Overlap(NamedTuple):
    """The rows that this rank shares with one of the other side of a boundary."""

    rank: int
    first: int
    """Counted from this rank's first row."""
    rows: int | None
    """None: all rows, however many a message has."""
    whole: bool
    """Whether the `whole` tensors go this way: to each receiver from its first sender."""


class PeerLostError(Exception):
    """The connection to another rank broke."""

    def __init__(self, ranks: Sequence[int], cause: BaseException) -> None:
        super().__init__(f"lost rank {', '.join(map(str, ranks))}: {cause}")
        self.ranks = list(ranks)


def overlaps(mine: tuple[int, int], others: Sequence[tuple[int, int]], ranks: Sequence[int], sending: bool) -> list[Overlap]:
    """Which rows of `mine` (first, count) each of `others` shares, `ranks` being theirs."""
    found = []
    for rank, (first, count) in zip(ranks, others, strict=True):
        low, high = max(mine[0], first), min(mine[0] + mine[1], first + count)
        if low < high:
            receiver = first if sending else mine[0]
            found.append(Overlap(rank, low - mine[0], high - low, low == receiver))
    return found


class Link:
    """One boundary as a rank sees it: who is on the other side, with which rows.

    `group` carries headers and, where there is no `payload` group of the device's own backend, the tensors, through host memory.
    `wire` is the dtype in which float32 rows travel, None: their own.
    """

    def __init__(self, peers: list[Overlap], group: dist.ProcessGroup, payload: dist.ProcessGroup | None, wire: torch.dtype | None) -> None:
        self.peers, self.group, self.payload, self.wire = peers, group, payload, wire
        self.ranks = [peer.rank for peer in peers]

    def exact(self) -> "Link":
        """The same link, over which everything travels as it is."""
        return Link(self.peers, self.group, self.payload, None)


class Outbox:
    """Sends messages over a link from a thread of its own."""

    def __init__(self, link: Link, in_flight: int, span: Mark | None = None) -> None:
        self._link, self._side, self._span = link, SideStream(), span or (lambda _: nullcontext())
        self._queue: queue.Queue[tuple[Message, torch.Event | None] | None] = queue.Queue(in_flight - 1)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="send", daemon=True)
        self._thread.start()

    def put(self, message: Message) -> None:
        """Hands over a message; waits while `in_flight` others have not left. Its tensors must not be written to any more."""
        item = (message, self._side.mark())
        while True:
            self._raise()
            try:
                self._queue.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def close(self) -> None:
        """Returns when everything has arrived on the other side."""
        while self._thread.is_alive():
            try:
                self._queue.put(None, timeout=0.2)
                break
            except queue.Full:
                continue
        self._thread.join()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise PeerLostError(self._link.ranks, self._error) from self._error

    def _run(self) -> None:
        try:
            while (item := self._queue.get()) is not None:
                with self._span("send"):
                    self._send(*item)
                # not kept alive while waiting for the next
                del item
        except BaseException as error:  # given to the thread that computes
            self._error = error

    def _send(self, message: Message, after: torch.Event | None) -> None:
        link = self._link
        payload = link.payload or link.group
        works: list[tuple[Any, Tensor]] = []
        with self._side.scope(after):
            parcels = [self._parcel(message, peer) for peer in link.peers]
        if link.payload is None:
            self._side.synchronize()
        for peer, (header, tensors) in zip(link.peers, parcels, strict=True):
            works.append((dist.isend(header, peer.rank, group=link.group), header))
            with self._side.scope():
                # one byte type for all: the transport need not know bool or bfloat16
                works += [(dist.isend(tensor.view(-1).view(torch.uint8), peer.rank, group=payload), tensor) for tensor in tensors]
        with self._side.scope():
            for work, _ in works:
                if work is not None:
                    work.wait()
        self._side.synchronize()

    def _parcel(self, message: Message, peer: Overlap) -> tuple[Tensor, list[Tensor]]:
        """The header and the tensors that go to one peer, each in the order of its memory: a channels-last map arrives as one."""
        fields = {name: value if peer.rows is None else value.narrow(0, peer.first, peer.rows) for name, value in message.rows.items()}
        if peer.whole:
            fields.update({f"={name}": value for name, value in message.whole.items()})
        described, tensors = [], []
        for name, value in fields.items():
            order, dtype = value.dim_order(), _name(value.dtype)
            if self._link.wire is not None and value.dtype is torch.float32 and not name.startswith("="):
                value = value.to(self._link.wire)
            described.append([name, list(value.shape), list(order), _name(value.dtype), dtype])
            tensor = value.permute(order).contiguous()
            tensors.append(self._side.to_host(tensor) if self._link.payload is None else tensor)
        header = json.dumps(described).encode()
        if len(header) > HEADER:
            raise RuntimeError(f"a message of {len(tensors)} tensors does not fit its header")
        return torch.frombuffer(bytearray(header.ljust(HEADER, b"\0")), dtype=torch.uint8), tensors


class Inbox:
    """Receives `count` messages over a link in a thread of its own, ahead of who takes them; None: all, until one without rows."""

    def __init__(
        self, link: Link, count: int | None, in_flight: int, span: Callable[[str], AbstractContextManager[Any]] | None = None
    ) -> None:
        self._link, self._side, self._span = link, SideStream(), span or (lambda _: nullcontext())
        self._queue: queue.Queue[tuple[Message, torch.Event | None]] = queue.Queue(in_flight - 1)
        self._error: BaseException | None = None
        self._count = count
        self._thread = threading.Thread(target=self._run, name="receive", daemon=True)
        self._thread.start()

    def take(self) -> Message:
        """The next message, on this rank's device."""
        while True:
            try:
                message, ready = self._queue.get(timeout=0.2)
                break
            except queue.Empty:
                if self._error is not None:
                    raise PeerLostError(self._link.ranks, self._error) from self._error
        self._side.wait(ready, [*message.rows.values(), *message.whole.values()])
        return message

    def _run(self) -> None:
        try:
            for _ in itertools.count() if self._count is None else range(self._count):
                item = self._receive()
                last = self._count is None and not item[0].rows
                self._queue.put(item)
                # not kept alive while waiting for the next
                del item
                if last:
                    return
        except BaseException as error:  # given to the thread that computes
            self._error = error

    def _receive(self) -> tuple[Message, torch.Event | None]:
        parts: list[dict[str, Tensor]] = []
        for peer in self._link.peers:
            header = torch.empty(HEADER, dtype=torch.uint8)
            dist.recv(header, peer.rank, group=self._link.group)
            # the trace counts the transfer, not the wait for it
            with self._span("receive"), self._side.scope():
                parts.append(self._unpack(json.loads(header.numpy().tobytes().rstrip(b"\0")), peer.rank))
        with self._side.scope():
            whole = {name[1:]: value for part in parts for name, value in part.items() if name.startswith("=")}
            names = [name for name in parts[0] if not name.startswith("=")]
            rows = {name: parts[0][name] if len(parts) == 1 else _joined([part[name] for part in parts]) for name in names}
        return Message(rows, whole), self._side.done()

    def _unpack(self, described: list[Any], rank: int) -> dict[str, Tensor]:
        """Receives the tensors that a header describes."""
        direct = self._link.payload is not None
        found: dict[str, Tensor] = {}
        for name, shape, order, travels, dtype in described:
            place = {"device": self._side.device} if direct else {"pin_memory": self._side.pinned}
            tensor = torch.empty([shape[axis] for axis in order], dtype=getattr(torch, travels), **place)
            dist.recv(tensor.view(-1).view(torch.uint8), rank, group=self._link.payload or self._link.group)
            inverse = [order.index(axis) for axis in range(len(order))]
            found[name] = self._side.to_device(tensor).permute(inverse).to(getattr(torch, dtype))
        return found


def _joined(parts: list[Tensor]) -> Tensor:
    """Rows of several senders as one tensor, in their memory layout."""
    order = parts[0].dim_order()
    inverse = [order.index(axis) for axis in range(len(order))]
    return torch.cat([part.permute(order) for part in parts], dim=order.index(0)).permute(inverse)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
