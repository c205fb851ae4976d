"""Plans as text and as files, and what every rank reads out of one."""

import json
import random
from pathlib import Path

import pytest

from wtn_pretrain.errors import UserError
from wtn_pretrain.imitation.pairing import Pairing, pair
from wtn_pretrain.imitation.plan import Plan, Span, check, fingerprint, parse, read, shares, single, starts, write
from wtn_pretrain.models import BertConfig, ResNetConfig


def some_plans(count: int = 200) -> list[Plan]:
    """Plans of any number of spans, units and replicas."""
    chance = random.Random(0)
    plans = []
    for _ in range(count):
        first, spans = 0, []
        for _ in range(chance.randint(1, 12)):
            last = first + chance.choice([0, 0, 1, 5])
            spans.append(Span(first, last, chance.choice([1, 1, 2, 3, 40])))
            first = last + 1
        plans.append(Plan(tuple(spans)))
    return plans


def test_a_plan_is_its_text() -> None:
    for plan in some_plans():
        assert parse(str(plan)) == plan
    assert parse(" 0-3 , 4x2,5-6x3").spans == (Span(0, 3), Span(4, 4, 2), Span(5, 6, 3))
    assert str(single(5, 2)) == "0-4x2"


def test_every_rank_has_one_seat() -> None:
    for plan in some_plans():
        seats = [plan.seat(rank) for rank in range(plan.ranks)]
        assert seats == [(span, replica) for span, held in enumerate(plan.spans) for replica in range(held.replicas)]
        assert [rank for span in range(len(plan.spans)) for rank in plan.ranks_of(span)] == list(range(plan.ranks))
        assert all(rank in plan.ranks_of(seat.span) for rank, seat in enumerate(seats))
        assert [unit for span in plan.spans for unit in span.units] == list(range(plan.units))
        assert check(plan, plan.units, plan.ranks) is plan


@pytest.mark.parametrize("text", ["", "0-", "-3", "0-3x", "0-3,", "0..3", "0-3y2", "0 - 3", "1.5-2", "٣-x", "0-1;2-3", "auto", "0x2x2"])
def test_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is no span; write FIRST-LASTxREPLICAS, such as 0-3,4-6x2"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "ranks", "words"),
    [
        ("0-1,3-3", None, "span 3-3x1 does not follow 0-1x1"),
        ("0-2,2-3", None, "span 2-3x1 does not follow 0-2x1"),
        ("2-3,0-1", None, "span 0-1x1 does not follow 2-3x1"),
        ("1-3", None, "covers units 1 to 3; the model has 0"),
        ("0-2", None, "covers units 0 to 2; the model has 0 .the stem. to 3"),
        ("0-4", None, "covers units 0 to 4"),
        ("0-1,3-2", None, "span 3-2x1 is empty"),
        ("0-1,2-3x0", None, "span 2-3x0 is empty"),
        ("0-1,2-3x2", 2, "is for 3 ranks and this run has 2; make one with tools/plan.py --ranks 2"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(text: str, ranks: int | None, words: str) -> None:
    with pytest.raises(UserError, match=f"^narrow.plan: .*{words}"):
        check(parse(text), 4, ranks)


def test_rows_are_shared_evenly_and_completely() -> None:
    for rows in range(1, 40):
        for parts in range(1, rows + 1):
            counts = shares(rows, parts)
            assert sum(counts) == rows and len(counts) == parts
            assert max(counts) - min(counts) <= 1 and counts == sorted(counts, reverse=True) and min(counts) > 0
            assert starts(counts) == [sum(counts[:part]) for part in range(parts)]


def test_a_plan_comes_back_from_its_file(tmp_path: Path) -> None:
    for plan in some_plans(20):
        write(tmp_path / "plan.json", plan, "abc")
        assert read(tmp_path / "plan.json", "abc") == plan
    with pytest.raises(UserError, match="was made for other networks than this run's"):
        read(tmp_path / "plan.json", "abd")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "7",
        "null",
        '{"model": "abc"}',
        '{"model": "abc", "spans": []}',
        '{"model": "abc", "spans": 3}',
        '{"spans": [[0, 1, 1]]}',
    ]
    + [json.dumps({"model": "abc", "spans": [span]}) for span in ([], [1], [0, 1, 2, 3], ["a", 1, 1], 5, None)],
)
def test_a_file_that_holds_no_plan_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(UserError, match="holds no plan; make one with tools/plan.py"):
        read(path, "abc")
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "absent.json", "abc")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="holds no plan"):
        read(path, "abc")


def test_a_fingerprint_tells_networks_and_pairings_apart() -> None:
    thin = BertConfig(vocab_size=31, hidden_size=8, heads=2, layers=4)
    wide = thin.widen(2, 1, None)
    other = ResNetConfig(
        block="basic", stem="cifar", channels=(4, 8), depths=(1, 2), stem_channels=4, image_channels=1, image_size=8, classes=3
    )
    pairs: list[tuple[object, ...]] = [
        (thin, wide, pair(thin, wide)),
        (thin, wide, Pairing((0, 2, 4), (0, 2, 4))),
        (thin, thin.widen(1, 2, None), pair(thin, wide)),
        (thin.model_copy(update={"norm": "pre"}), wide, pair(thin, wide)),
        (other, other.widen(2, 1, None), pair(other, other.widen(2, 1, None))),
        (other, other.widen(2, 1, None), pair(other, other.widen(2, 1, None), unit="stage")),
    ]
    found = [fingerprint(*one) for one in pairs]  # type: ignore[arg-type]
    assert len(set(found)) == len(found)
    assert found == [fingerprint(*one) for one in pairs]  # type: ignore[arg-type]
