import json
from pathlib import Path
from typing import Any

import pytest

from wtn_pretrain.errors import UserError
from wtn_pretrain.training.trace import GAP, INPUT, OUTPUT
from wtn_pretrain.training.utilisation import UTILISATION, Use, bubble, read_utilisation, utilisation, write_utilisation

Span = tuple[str, float, float]


def trace_of(*ranks: list[Span], lane: str = "compute") -> list[dict[str, Any]]:
    """Events of spans (name, begin, end) in milliseconds; the steps of a rank are its students, in order."""
    events: list[dict[str, Any]] = []
    for rank, spans in enumerate(ranks):
        events.append({"name": "process_name", "ph": "M", "pid": rank, "tid": 0, "args": {"name": f"rank {rank} (units {rank})"}})
        for number, (name, begin, end) in enumerate(spans):
            event = {"name": name, "cat": lane, "ph": "X", "pid": rank, "tid": 0, "ts": begin * 1e3, "dur": (end - begin) * 1e3}
            events.append({**event, "args": {} if name in (INPUT, OUTPUT, GAP) else {"step": number}})
    return events


def pipeline(ranks: int, steps: int, work: list[float], period: float) -> list[list[Span]]:
    """Rank r begins its work of step s at (r + s) * period, and waits for its input before."""
    found: list[list[Span]] = []
    for rank in range(ranks):
        spans: list[Span] = []
        for step in range(steps):
            begin = (rank + step) * period
            spans += [("teacher", begin, begin + work[rank] / 4), ("student", begin + work[rank] / 4, begin + work[rank])]
            spans.append((INPUT, begin + work[rank], begin + period))
        found.append(spans)
    return found


def test_a_pipeline_without_its_filling_and_draining() -> None:
    uses = utilisation(trace_of(*pipeline(4, 50, [10, 8, 10, 5], 10)))
    assert [use.name for use in uses] == [f"rank {rank} (units {rank})" for rank in range(4)]
    assert [use.busy for use in uses] == pytest.approx([1, 0.8, 1, 0.5])
    assert [use.input for use in uses] == pytest.approx([0, 0.2, 0, 0.5])
    # rank 3 begins after 30 ms; rank 0 ends its last work after 500 ms
    assert [use.seconds for use in uses] == pytest.approx([0.47] * 4)
    assert uses[1].work == pytest.approx({"student": 0.6, "teacher": 0.2}) and list(uses[1].work) == ["student", "teacher"]
    assert bubble(uses) == pytest.approx((0 + 0.2 + 0 + 0.5) / 4)


def test_what_is_not_recorded_as_anything_is_idle() -> None:
    spans: list[Span] = [("student", 0, 4), (OUTPUT, 4, 5), ("student", 7, 10)]
    (use,) = utilisation(trace_of(spans))
    assert (use.busy, use.input, use.output, use.idle) == pytest.approx((0.7, 0, 0.1, 0.2))


def test_spans_in_spans_count_once() -> None:
    spans: list[Span] = [("student", 0, 10), ("optimizer", 0, 2), (INPUT, 4, 7), ("student", 10, 12)]
    (use,) = utilisation(trace_of(spans))
    assert use.work == pytest.approx({"student": 7 / 12, "optimizer": 2 / 12})
    assert use.input == pytest.approx(3 / 12) and use.idle == pytest.approx(0)


def test_what_was_left_out_of_the_record_counts_for_nothing() -> None:
    spans: list[Span] = [("student", 0, 8), (INPUT, 8, 10), (GAP, 10, 900), ("student", 900, 910)]
    (use,) = utilisation(trace_of(spans))
    assert use.seconds == pytest.approx(0.02) and use.busy == pytest.approx(0.9)


def test_first_steps_can_be_left_out() -> None:
    slow: list[Span] = [("student", 0, 1000), (INPUT, 1000, 3000)]
    spans = slow + [("student", 3000 + 10 * step, 3000 + 10 * step + 9) for step in range(20)]
    assert utilisation(trace_of(spans))[0].busy < 0.5
    (use,) = utilisation(trace_of(spans), settle=1)
    assert use.busy == pytest.approx(20 * 9 / 199)


def test_other_lanes_are_not_the_ranks_time() -> None:
    events = trace_of([("student", 0, 5), ("student", 8, 10)])
    events += [{"name": "receive", "cat": "receive", "ph": "X", "pid": 0, "tid": 1, "ts": 5e3, "dur": 3e3, "args": {}}]
    assert utilisation(events)[0].busy == pytest.approx(0.7)


@pytest.mark.parametrize(
    "ranks", [[], [[(INPUT, 0.0, 5.0)]], [[("student", 0.0, 1.0)], [("student", 2.0, 3.0)]], [[("student", 0.0, 1.0)], [(INPUT, 0.0, 1.0)]]]
)
def test_without_a_steady_part_there_is_nothing(ranks: list[list[Span]]) -> None:
    assert utilisation(trace_of(*ranks)) == [] and bubble([]) == 0


def test_file(tmp_path: Path) -> None:
    uses = utilisation(trace_of(*pipeline(3, 20, [10, 8, 6], 10)))
    write_utilisation(tmp_path, uses)
    assert read_utilisation(tmp_path / UTILISATION) == uses
    assert json.loads((tmp_path / UTILISATION).read_text())["bubble"] == pytest.approx(0.2)
    for text in ("{", "[]", '{"ranks": [{"rank": 1}]}', '{"ranks": [1]}', json.dumps({"ranks": [uses[0]._replace(busy="x")._asdict()]})):  # type: ignore[arg-type]
        (tmp_path / UTILISATION).write_text(text)
        with pytest.raises(UserError, match=r"utilisation\.json: holds no utilisation"):
            read_utilisation(tmp_path / UTILISATION)
    with pytest.raises(UserError, match="No such file"):
        read_utilisation(tmp_path / "none.json")


def test_shares_add_up() -> None:
    for use in utilisation(trace_of(*pipeline(5, 30, [9, 3, 7, 1, 10], 10))):
        assert use.busy + use.input + use.output + use.idle == pytest.approx(1)
        assert isinstance(use, Use) and sum(use.work.values()) == pytest.approx(use.busy)
