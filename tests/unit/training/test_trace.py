import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wtn_pretrain.errors import UserError
from wtn_pretrain.training.trace import COMPUTE, GAP, TRACE, Trace, merge


def spans(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["ph"] == "X"]


def test_spans_of_several_threads(tmp_path: Path) -> None:
    trace = Trace(3, "rank 3 (units 7-9)")

    def send() -> None:
        for step in range(50):
            with trace.span("send", lane="send", step=step):
                time.sleep(0.0002)

    threads = [threading.Thread(target=send)]
    for thread in threads:
        thread.start()
    for step in range(50):
        with trace.span("student", unit=7, step=step), trace.span("optimizer"):
            time.sleep(0.0002)
    for thread in threads:
        thread.join()
    trace.write(tmp_path)
    events = json.loads(merge(tmp_path, 4).read_text())["traceEvents"]
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == {"rank 3 (units 7-9)"}
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert lanes == {0: COMPUTE, 1: "send"}
    found = spans(events)
    assert {event["pid"] for event in events} == {3} and len(found) == 150
    assert all(event["dur"] >= 190 for event in found) and min(event["ts"] for event in found) == 0
    for name, lane in (("student", 0), ("optimizer", 0), ("send", 1)):
        assert [event["tid"] for event in found if event["name"] == name] == [lane] * 50
    outer = {event["args"]["step"]: event for event in found if event["name"] == "student"}
    inner = [event for event in found if event["name"] == "optimizer"]
    for step, event in enumerate(inner):
        around = outer[step]
        assert around["args"] == {"unit": 7, "step": step}
        # the times in the file are rounded to nanoseconds
        assert around["ts"] <= event["ts"] + 0.002 and event["ts"] + event["dur"] <= around["ts"] + around["dur"] + 0.002


def test_a_span_that_fails_is_recorded() -> None:
    trace = Trace(0, "rank 0")
    with pytest.raises(KeyError), trace.span("student"):
        raise KeyError
    assert [event["name"] for event in spans(trace.events())] == ["student"]


def test_memory_is_bounded_and_the_gap_is_shown() -> None:
    trace = Trace(0, "rank 0", limit=10)
    for step in range(100):
        with trace.span("student", step=step):
            pass
    found = spans(trace.events())
    kept = [event["args"]["step"] for event in found if event["name"] == "student"]
    assert kept == [*range(10), *range(90, 100)]
    (gap,) = (event for event in found if event["name"] == GAP)
    assert gap["args"] == {"spans": 80}
    by_step = {event["args"]["step"]: event for event in found if event["name"] == "student"}
    assert gap["ts"] == pytest.approx(by_step[9]["ts"] + by_step[9]["dur"]) and gap["ts"] + gap["dur"] == pytest.approx(by_step[90]["ts"])


def test_nothing_left_out_has_no_gap() -> None:
    trace = Trace(0, "rank 0", limit=10)
    for _ in range(20):
        with trace.span("student"):
            pass
    assert [event["name"] for event in spans(trace.events())] == ["student"] * 20


def test_disabled_leaves_nothing(tmp_path: Path) -> None:
    trace = Trace(0, "rank 0", enabled=False)
    with trace.span("student", step=1), trace.device_span("teacher"):
        pass
    trace.write(tmp_path)
    assert spans(trace.events()) == [] and list(tmp_path.iterdir()) == []


def test_processes_meet_on_one_clock(tmp_path: Path) -> None:
    """Two processes, started one after the other, one of which says by the wall clock when it did what it recorded."""
    program = (
        "import sys, time; from pathlib import Path; from wtn_pretrain.training.trace import Trace\n"
        "rank = int(sys.argv[1]); trace = Trace(rank, f'rank {rank}'); began = time.time()\n"
        "with trace.span('student'): time.sleep(0.05)\n"
        "trace.write(Path(sys.argv[2])); print(began)\n"
    )
    began = []
    for rank in (0, 1):
        call = [sys.executable, "-c", program, str(rank), str(tmp_path)]
        began.append(float(subprocess.run(call, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": "."}).stdout))
    found = {event["pid"]: event for event in spans(json.loads(merge(tmp_path, 2).read_text())["traceEvents"])}
    assert found[0]["ts"] == 0
    assert found[1]["ts"] / 1e6 == pytest.approx(began[1] - began[0], abs=0.01)


def test_merging_takes_what_is_there(tmp_path: Path) -> None:
    for rank in (0, 2, 5):
        trace = Trace(rank, f"rank {rank}")
        with trace.span("student"):
            pass
        trace.write(tmp_path)
    events = json.loads(merge(tmp_path, 4).read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 2}  # rank 1 was killed, and rank 5 is of a run before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trace-rank-5.json", TRACE]
    (tmp_path / "trace-rank-1.json").write_text('{"begin": 1')
    with pytest.raises(UserError, match=r"trace-rank-1\.json: no part of a trace"):
        merge(tmp_path, 4)


class Device:
    """A device whose queue runs behind the host, on a clock of its own."""

    def __init__(self) -> None:
        self.done = 0
        self.recorded: list[float] = []
        self.busy_ms = 0.0

    def event(self) -> "Event":
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device

    def record(self) -> None:
        self.at = self.device.busy_ms
        self.number = len(self.device.recorded)
        self.device.recorded.append(self.at)

    def query(self) -> bool:
        return self.number < self.device.done

    def synchronize(self) -> None:
        self.device.done = max(self.device.done, self.number + 1)

    def elapsed_time(self, other: "Event") -> float:
        assert self.query() and other.query(), "asked of an event that has not happened"
        return other.at - self.at


def test_spans_on_a_device_are_timed_by_its_clock(tmp_path: Path) -> None:
    device = Device()
    make: Callable[[], Any] = device.event
    before = time.perf_counter_ns()
    trace = Trace(0, "rank 0", event=make)
    for step in range(2000):
        device.busy_ms += 1  # between launches the queue is idle
        with trace.device_span("student", step=step):
            device.busy_ms += 3
        assert not spans(trace.events())[step:]  # what has not happened is not asked for
    device.done = 101
    with trace.device_span("student", step=2000):
        device.busy_ms += 3
    assert len(spans(trace.events())) == 50  # those that are over; the first event is that of the clock
    trace.write(tmp_path)
    found = spans(json.loads(merge(tmp_path, 1).read_text())["traceEvents"])
    assert len(found) == 2001
    assert [event["dur"] for event in found] == pytest.approx([3000] * 2001)
    assert [event["ts"] for event in found[:2000]] == pytest.approx([4000 * step for step in range(2000)])
    assert spans(trace.events())[0]["ts"] - 1000 == pytest.approx(before / 1e3, abs=1e6)


def test_device_spans_on_a_cpu_are_spans() -> None:
    trace = Trace(0, "rank 0")
    with trace.device_span("student"):
        time.sleep(0.001)
    (event,) = spans(trace.events())
    assert event["dur"] >= 1000
