"""Marks what a rank does, for those who watch over it and for the trace."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from wtn_pretrain.parallel.launch import Place
from wtn_pretrain.parallel.watch import Watch
from wtn_pretrain.training.trace import INPUT, OUTPUT, Trace


class Observer:
    """One rank's marks. Without a watch and a trace it does next to nothing."""

    def __init__(self, watch: Watch | None = None, trace: Trace | None = None) -> None:
        self._watch = watch or Watch(Place(0, 1), ["rank 0"])
        self._trace = trace or Trace(0, "rank 0", enabled=False)
        self.step = 0
        """The step that marks belong to."""

    @contextmanager
    def work(self, what: str, unit: int | None = None) -> Iterator[None]:
        """The main thread works."""
        self.at(what if unit is None else f"{what} {unit}")
        arguments: dict[str, Any] = {"step": self.step} if unit is None else {"step": self.step, "unit": unit}
        with self._trace.device_span(what, **arguments):
            yield

    def at(self, what: str) -> None:
        """The main thread begins something that is not traced."""
        self._watch.at(what, self.step)

    @contextmanager
    def input(self, ranks: Sequence[int]) -> Iterator[None]:
        """The main thread waits for what comes from `ranks`."""
        with self._watch.waiting(*ranks), self._trace.device_span(INPUT, step=self.step):
            yield

    @contextmanager
    def output(self, ranks: Sequence[int]) -> Iterator[None]:
        """The main thread waits for `ranks` to take what it has made."""
        with self._watch.waiting(*ranks), self._trace.device_span(OUTPUT, step=self.step):
            yield

    def waiting(self, *ranks: int) -> AbstractContextManager[Any]:
        """The main thread works together with `ranks` (none given: all others), whichever of them is late."""
        return self._watch.waiting(*ranks)

    def allow(self, seconds: float, what: str) -> AbstractContextManager[Any]:
        """The main thread does something that may take as long as this."""
        return self._watch.allow(seconds, what)

    def lane(self, name: str) -> AbstractContextManager[Any]:
        """Another thread works, which the trace shows on a lane of its own."""
        return self._trace.span(name, lane=name)
