"""How micro-batches pass through the spans: from the data or the span below, to the span above."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from wtn_pretrain.data.stream import Batch, BatchStream
from wtn_pretrain.device import to_device
from wtn_pretrain.imitation.imitator import Entry, Imitator, Send
from wtn_pretrain.imitation.observer import Observer
from wtn_pretrain.imitation.wiring import Wiring, pack, unpack
from wtn_pretrain.models.base import Carry
from wtn_pretrain.parallel.relay import Inbox, Link, Outbox


def arriving(below: Link | None, stream: BatchStream, steps: Sequence[int], in_flight: int, observer: Observer) -> Iterator[Entry]:
    """This rank's rows of every micro-batch of `steps`, as they come from the data or from the span below."""
    if below is None:
        batches = stream.iterate_steps(steps)
        for _ in steps:
            with observer.work("data"):
                micro_batches = next(batches)
            for batch in micro_batches:
                flow = to_device(batch)
                yield Entry(flow, flow)
        return
    count = len(steps) * stream.accumulation
    inbox = Inbox(below, count, in_flight, observer.lane)
    for _ in range(count):
        with observer.input(below.ranks):
            message = inbox.take()
        yield Entry(*unpack(message))


def sender(outbox: Outbox, link: Link, observer: Observer) -> Send:
    """Puts what leaves a span into its outbox."""

    def send(teacher: Carry | None, student: Carry | None, expand: Tensor | None) -> None:
        with observer.output(link.ranks):
            outbox.put(pack(teacher, student, expand))

    return send


def imitation_errors(imitator: Imitator, wiring: Wiring, batches: Iterator[Batch], limit: int) -> dict[int, float]:
    """Energy-normalised error of each unit of this span over `limit` batches, run through the leaders of the spans alone.

    On other replicas: nothing. Every leader must call it; only the first reads `batches`.
    """
    if not wiring.leads:
        return {}
    errors = through_leaders(wiring, batches, limit, imitator.section.in_flight, imitator.observer, imitator.errors)
    return dict(zip((unit.index for unit in imitator.units), errors, strict=True))


def through_leaders(
    wiring: Wiring,
    batches: Iterator[Batch],
    limit: int,
    in_flight: int,
    observer: Observer,
    work: Callable[[Iterator[Entry], Send | None], Any],
) -> Any:
    """Runs `work` on whole batches that flow through the first replica of every span; at most `limit` of them."""
    below, above = wiring.lead_below, wiring.lead_above
    # how many there will be is known at the bottom; a message without rows says that there are no more
    entries = _first(batches, limit, observer) if below is None else _until_empty(Inbox(below, None, in_flight), below.ranks, observer)
    if above is None:
        return work(entries, None)
    outbox = Outbox(above, in_flight)

    send = sender(outbox, above, observer)
    result = work(entries, send)
    send(None, None, None)
    with observer.output(above.ranks):
        outbox.close()
    return result


def _first(batches: Iterator[Batch], limit: int, observer: Observer) -> Iterator[Entry]:
    for _ in range(limit):
        observer.at("data")
        batch = next(batches, None)
        if batch is None:
            return
        flow = to_device(batch)
        yield Entry(flow, flow)


def _until_empty(inbox: Inbox, ranks: list[int], observer: Observer) -> Iterator[Entry]:
    while True:
        with observer.input(ranks):
            message = inbox.take()
        if not message.rows:
            return
        yield Entry(*unpack(message))
