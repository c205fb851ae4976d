"""A plan played through, micro-batch by micro-batch, with what each span can hold: who does what when."""

from typing import NamedTuple

from wtn_pretrain.planning.predict import Prediction


class Event(NamedTuple):
    """Something that a span does with a micro-batch, in seconds from the start."""

    span: int
    packet: int
    kind: str
    """wait (for the span below, or for room above), teacher, student, reduce; send beside them."""
    start: float
    end: float


def simulate(prediction: Prediction, packets: int) -> list[Event]:
    """Everything that happens until `packets` micro-batches have gone through, span by span in the order of time.

    A span takes a micro-batch when it has arrived and the one before is done. It hands on what the span above waits for at once,
    but waits while `in_flight` others have not left; a transfer waits while `in_flight` have arrived that the span above has not taken.
    """
    stages, links = prediction.stages, [*prediction.links, 0.0]
    room = prediction.flow.in_flight
    free = [0.0] * len(stages)
    taken: list[list[float]] = [[] for _ in stages]
    delivered: list[list[float]] = [[] for _ in stages]
    events: list[list[Event]] = [[] for _ in stages]
    for packet in range(packets):
        arrived = 0.0
        for number, stage in enumerate(stages):
            begin = max(free[number], arrived)
            taken[number].append(begin)
            ready = begin + stage.leaves
            go_on = ready
            top = number == len(stages) - 1
            if not top:
                if packet >= room:
                    go_on = max(ready, delivered[number][packet - room])
                leave = max(ready, delivered[number][-1] if packet else 0.0)
                if packet >= room:
                    leave = max(leave, taken[number + 1][packet - room])
                arrived = leave + links[number]
                delivered[number].append(arrived)
            taught, end = begin + stage.teacher, go_on + stage.busy - stage.leaves
            parts = [
                ("wait", free[number], begin),
                ("teacher", begin, taught),
                ("student", taught, ready),
                ("wait", ready, go_on),
                ("student", go_on, end - stage.reduce),
                ("reduce", end - stage.reduce, end),
            ]
            if not top:
                parts.append(("send", leave, arrived))
            events[number] += [Event(number, packet, kind, start, stop) for kind, start, stop in parts if stop > start]
            free[number] = end
    return [event for of_span in events for event in of_span]
