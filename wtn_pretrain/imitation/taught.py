"""What the teacher answers, from a cache that is filled once and shared, in place of the teacher itself."""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

from wtn_pretrain.device import device
from wtn_pretrain.imitation.cache import ActivationCache, CacheReader
from wtn_pretrain.imitation.cache_key import Key
from wtn_pretrain.imitation.cache_layout import CacheLayout
from wtn_pretrain.imitation.imitator import Entry, Imitator, Send
from wtn_pretrain.imitation.wiring import Wiring
from wtn_pretrain.models.base import Carry


class Taught:
    """The teacher's outputs of this rank's rows of every cached micro-batch."""

    def __init__(self, reader: CacheReader, layout: CacheLayout, wiring: Wiring, folder: Path) -> None:
        self._reader, self._layout, self._part = reader, layout, wiring.part
        self.folder = folder
        units = wiring.span.units
        self._boundaries = [*([units.start - 1] if units.start else []), *units]

    @property
    def batches(self) -> int:
        """Micro-batches in the cache; later ones begin again with the first."""
        return self._layout.batches

    def stream(self, positions: Iterable[int]) -> Iterator[Mapping[int, Carry]]:
        """Unit -> its teacher's output, of the span's units and the one below, for each of `positions`; read ahead."""
        first, rows = self._part
        for found in self._reader.stream(self._boundaries, (position % self.batches for position in positions), first, rows):
            yield {unit: self._layout.restore(unit, carry, device()) for unit, carry in found.items()}

    def at(self, unit: int) -> "TaughtUnit":
        """The outputs of one unit alone."""
        return TaughtUnit(self, unit)

    def read(self, unit: int, position: int) -> Carry:
        first, rows = self._part
        return self._layout.restore(unit, self._reader.read([unit], position % self.batches, first, rows)[unit], device())


class TaughtUnit:
    """One unit's outputs, to be read like an `ActivationStore`."""

    complete = True

    def __init__(self, taught: Taught, unit: int) -> None:
        self._taught, self._unit = taught, unit
        self.folder = taught.folder / str(unit)

    def read(self, index: int) -> Carry:
        return self._taught.read(self._unit, index)


def as_text(key: Key) -> str:
    """A key as rank 0 tells it to the others, who need not hash the teacher again."""
    return json.dumps(key._asdict())


def from_text(text: str) -> Key:
    parts = json.loads(text)
    return Key(**{**parts, "units": tuple(parts["units"])})


def fill(
    cache: ActivationCache, imitator: Imitator, wiring: Wiring, first: int, entries: Iterator[Entry], send: Send | None, together: int
) -> None:
    """Runs this rank's teachers over `entries`, the micro-batches from number `first` on, and stores what they answer.

    Each teacher is brought once for `together` micro-batches.
    """
    with cache.writer() as writer:
        while flows := [entry.teacher for entry in islice(entries, together)]:
            for unit in imitator.units:
                for number, flow in enumerate(flows):
                    assert flow is not None
                    carry = imitator.teach(unit, flow)[0]
                    if send is not None and unit is imitator.units[-1]:
                        send(carry, None, None)
                    with imitator.observer.work("store", unit=unit.index):
                        writer.write(unit.index, first + number, wiring.part[0], carry)
                    flows[number] = carry
            first += len(flows)
