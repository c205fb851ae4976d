"""Watching ranks where no stage is at work: while data is opened, networks are loaded and written, and one waits for another."""

from collections.abc import Iterator
from contextlib import contextmanager

from wtn_pretrain.parallel.launch import Place, wait_for_all
from wtn_pretrain.parallel.watch import Watch

SILENCE = 30.0
"""Seconds after which a rank that is not heard of counts as lost; one that dies is noticed at once."""
PREPARE = 12 * 3600.0
"""Seconds that such work may take before a rank counts as hung: the tokens of a large corpus are made by one rank, and the others wait."""


@contextmanager
def watched(place: Place, what: str) -> Iterator[None]:
    """Within, a rank that dies or stops ends the others in bounded time, as in a stage; at its end all ranks have come there.

    To be entered by every rank at the same place, within `SILENCE` seconds of one another, and where no other watch is at work. `what`
    is done meanwhile. A rank alone has nobody to wait for, and takes as long as it takes.
    """
    if place.world_size == 1:
        yield
        return
    with Watch(place, [f"rank {rank}" for rank in range(place.world_size)], SILENCE) as watch, watch.allow(PREPARE, what):
        yield
        wait_for_all(place)
