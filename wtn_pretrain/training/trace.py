"""What a rank does when, as Chrome trace events that open in Perfetto (ui.perfetto.dev) or chrome://tracing.

Every rank records for itself and writes its part; rank 0 merges the parts that are there into one file.
"""

import json
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from wtn_pretrain.errors import UserError
from wtn_pretrain.files import write_text

TRACE = "trace.json"
COMPUTE = "compute"
"""The lane of the main thread, of whose spans the utilisation is made."""
INPUT, OUTPUT = "waits for input", "waits for output"
"""What spans are called in which the main thread waits for others; other spans on its lane are work."""
GAP = "not recorded"
"""Stands where spans were left out to bound memory."""
REBASE = 1e6  # microseconds after which the device's clock is taken anew: its differences are single precision

_NOTHING = nullcontext()
_Record = tuple[str, str, int, int, dict[str, Any]]  # name, lane, begin and end on the monotonic clock (ns), arguments


class TimedEvent(Protocol):
    """The part of `torch.Event` that is used."""

    def record(self) -> Any: ...
    def query(self) -> bool: ...
    def synchronize(self) -> Any: ...
    def elapsed_time(self, other: Any) -> float: ...


class Trace:
    """Records spans, from any thread: the first and the last `limit` of them, so that memory is bounded.

    `name` is how the rank is called: 'rank 1 (units 4-6)'. `enabled=False` records nothing, at next to no cost. Clocks of ranks
    agree as far as the wall clocks of their hosts do at the start; later jumps of a wall clock change nothing.
    """

    def __init__(
        self, rank: int, name: str, limit: int = 20_000, *, enabled: bool = True, event: Callable[[], TimedEvent] | None = None
    ) -> None:
        """`event`: makes events of the device that can be timed; by default those of this rank's accelerator, if there is one."""
        self.rank, self.name, self.enabled = rank, name, enabled
        self._limit = limit
        self._first: list[_Record] = []
        self._last: deque[_Record] = deque(maxlen=limit)
        self._dropped = 0
        self._wall = _wall_offset()
        self._clock = _DeviceClock(event) if event is not None else _device_clock() if enabled else None

    def span(self, name: str, lane: str = COMPUTE, **arguments: Any) -> AbstractContextManager[Any]:
        """A context whose time is recorded as `name`, with `arguments` such as `unit=3, step=17` (what JSON knows).

        Spans of one lane must nest, so every thread has a lane of its own.
        """
        return _Span(self, name, lane, arguments) if self.enabled else _NOTHING

    def device_span(self, name: str, lane: str = COMPUTE, **arguments: Any) -> AbstractContextManager[Any]:
        """As `span`, but timed on the accelerator's current stream, where work starts later than it is launched; on a CPU the same."""
        if not self.enabled:
            return _NOTHING
        return _Span(self, name, lane, arguments) if self._clock is None else _DeviceSpan(self, self._clock, name, lane, arguments)

    def write(self, folder: Path) -> None:
        """Writes this rank's part into `folder`.

        Raises:
            UserError: the folder cannot be written.
        """
        if not self.enabled:
            return
        if self._clock is not None:
            self._clock.settle(self._add, wait=True)
        write_text(_part(folder, self.rank), json.dumps({"begin": self._wall, "traceEvents": self.events()}))

    def events(self) -> list[dict[str, Any]]:
        """Chrome trace events, with `ts` in microseconds of this rank's monotonic clock."""
        first, last = list(self._first), list(self._last)
        lanes = sorted({lane for _, lane, *_ in chain(first, last)} | {COMPUTE}, key=lambda lane: (lane != COMPUTE, lane))
        found: list[dict[str, Any]] = [
            _named("process_name", self.rank, 0, name=self.name),
            _named("process_sort_index", self.rank, 0, sort_index=self.rank),
        ]
        for number, lane in enumerate(lanes):
            found += [
                _named("thread_name", self.rank, number, name=lane),
                _named("thread_sort_index", self.rank, number, sort_index=number),
            ]
        if self._dropped and last:
            gap = (GAP, COMPUTE, max(record[3] for record in first), min(record[2] for record in last), {"spans": self._dropped})
            if gap[2] < gap[3]:
                first.append(gap)
        for name, lane, begin, end, arguments in chain(first, last):
            event = {"name": name, "cat": lane, "ph": "X", "ts": begin / 1e3, "dur": (end - begin) / 1e3}
            found.append({**event, "pid": self.rank, "tid": lanes.index(lane), "args": arguments})
        return found

    def _add(self, record: _Record) -> None:
        # appends are atomic; threads that meet at the limit keep a few more
        if len(self._first) < self._limit:
            self._first.append(record)
        else:
            if len(self._last) == self._limit:
                self._dropped += 1
            self._last.append(record)


def merge(folder: Path, ranks: int) -> Path:
    """Joins the parts that `ranks` ranks have written into `folder` to one `trace.json`, and removes them.

    A part that is missing, since its rank was killed, is left out. Raises `UserError` for a part that is none.
    """
    parts: list[dict[str, Any]] = []
    paths = [path for rank in range(ranks) if (path := _part(folder, rank)).exists()]
    for path in paths:
        try:
            part = json.loads(path.read_text(encoding="utf-8"))
            part["begin"] + 0, part["traceEvents"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{path}: no part of a trace; remove it and start again") from None
        parts.append(part)
    # small times keep their nanoseconds in a viewer that reads them in double precision
    begins = [part["begin"] / 1e3 + event["ts"] for part in parts for event in part["traceEvents"] if "ts" in event]
    start = min(begins, default=0.0)
    events = []
    for part in parts:
        for event in part["traceEvents"]:
            moved = {"ts": round(event["ts"] + part["begin"] / 1e3 - start, 3)} if "ts" in event else {}
            events.append({**event, **moved})
    write_text(folder / TRACE, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
    for path in paths:
        path.unlink()
    return folder / TRACE


class _Span:
    """A span on the host's clock."""

    __slots__ = ("_arguments", "_begin", "_lane", "_name", "_trace")

    def __init__(self, trace: Trace, name: str, lane: str, arguments: dict[str, Any]) -> None:
        self._trace, self._name, self._lane, self._arguments = trace, name, lane, arguments

    def __enter__(self) -> None:
        self._begin = time.perf_counter_ns()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._trace._add((self._name, self._lane, self._begin, time.perf_counter_ns(), self._arguments))


class _DeviceSpan:
    """A span between two events on the device's current stream."""

    __slots__ = ("_arguments", "_begin", "_clock", "_lane", "_name", "_trace")

    def __init__(self, trace: Trace, clock: "_DeviceClock", name: str, lane: str, arguments: dict[str, Any]) -> None:
        self._trace, self._clock, self._name, self._lane, self._arguments = trace, clock, name, lane, arguments

    def __enter__(self) -> None:
        self._begin = self._clock.now()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._clock.pending.append((self._name, self._lane, self._begin, self._clock.now(), self._arguments))
        self._clock.settle(self._trace._add)


class _DeviceClock:
    """Times of events on the device, told on the host's clock once they have happened; nothing waits for them before."""

    def __init__(self, make: Callable[[], TimedEvent]) -> None:
        self._make = make
        self.pending: deque[tuple[str, str, TimedEvent, TimedEvent, dict[str, Any]]] = deque()
        self._base = self.now()
        self._base.synchronize()
        self._base_ns = time.perf_counter_ns()

    def now(self) -> TimedEvent:
        event = self._make()
        event.record()
        return event

    def settle(self, add: Callable[[_Record], None], wait: bool = False) -> None:
        """Hands over the spans that are over; with `wait`, all."""
        while self.pending:
            if not wait and not self.pending[0][3].query():
                return
            try:
                name, lane, begin, end, arguments = self.pending.popleft()
            except IndexError:  # another thread was here first
                return
            end.synchronize()
            start = self._base_ns + round(self._base.elapsed_time(begin) * 1e6)
            stop = start + round(begin.elapsed_time(end) * 1e6)
            add((name, lane, start, stop, arguments))
            if start - self._base_ns > REBASE * 1e3:
                self._base, self._base_ns = begin, start


def _device_clock() -> _DeviceClock | None:
    import torch  # here, since reading a trace needs no torch

    from wtn_pretrain.device import device

    here = device()
    return None if here.type == "cpu" else _DeviceClock(lambda: torch.Event(here, enable_timing=True))


def _wall_offset() -> int:
    """Nanoseconds from the monotonic to the wall clock, from the closest of some pairs of readings."""
    pairs = []
    for _ in range(9):
        before, wall, after = time.perf_counter_ns(), time.time_ns(), time.perf_counter_ns()
        pairs.append((after - before, wall - (before + after) // 2))
    return min(pairs)[1]


def _named(kind: str, rank: int, lane: int, **arguments: Any) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": rank, "tid": lane, "args": arguments}


def _part(folder: Path, rank: int) -> Path:
    return folder / f"trace-rank-{rank}.json"
