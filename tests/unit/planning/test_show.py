"""What is printed, the plan that every rank finds by itself, and tools/plan.py's own refusals."""

import subprocess
import sys
from pathlib import Path

import pytest

from wtn_pretrain.errors import UserError
from wtn_pretrain.imitation.config import ImitateSection
from wtn_pretrain.imitation.pairing import pair
from wtn_pretrain.imitation.plan import check, fingerprint, parse, read, single
from wtn_pretrain.models import BertConfig
from wtn_pretrain.models.base import flops
from wtn_pretrain.planning.cluster import Cluster, data_centre, usual
from wtn_pretrain.planning.command import read_job, run
from wtn_pretrain.planning.costs import DATA_CENTRE, declared, here
from wtn_pretrain.planning.search import automatic, fed_by
from wtn_pretrain.planning.show import ROWS, WIDTH, describe, seconds
from wtn_pretrain.planning.spans import flow

ROOT = Path(__file__).resolve().parents[3]
CLUSTER = ROOT / "configs/cluster/bert-base-from-large.yaml"
THIN = BertConfig(vocab_size=64, hidden_size=32, layers=40, heads=2, max_positions=16)
WIDE = THIN.widen(2, 1, None)
PAIRING = pair(THIN, WIDE)
COUNTS = flops(THIN), flops(WIDE)


def section(**values: object) -> ImitateSection:
    return ImitateSection.model_validate({"batch_size": 64, "steps": 100, **values})


def shown(spans: str, cluster: Cluster | None = None) -> str:
    """What a plan is told to do, from declared costs."""
    moving = flow(section(), fed_by(section()))
    costs = declared(THIN, WIDE, PAIRING, COUNTS, section(), moving.rows, target=here(), fed=moving.fed)
    made = parse(spans)
    return describe(made, costs, cluster or usual(made.ranks), moving, section())


def plan(*arguments: str) -> str:
    return run("A plan.", ["--config", str(CLUSTER), *arguments])


@pytest.mark.parametrize("spans", ["0-40", "0-20,21-40x3", ",".join(f"{unit}-{unit}" for unit in range(41))])
def test_text_is_ascii_and_fits(spans: str) -> None:
    text = shown(spans, data_centre(64))
    assert text.isascii()
    lines = text.splitlines()
    assert max(map(len, lines)) <= WIDTH
    count = spans.count(",") + 1
    # a line a span in table and timeline, or the first and last of many
    assert sum(line.lstrip().startswith(("0  ", "40  ")) for line in lines) >= 2
    assert text.count("...\n") >= (2 if count > ROWS else 0)
    assert "teacher-fed: 50 steps" in text and "student-fed: 50 steps" in text and "whole stage" in text


def test_the_timeline_shows_that_spans_start_one_after_the_other() -> None:
    text = shown("0-13,14-27,28-40")
    bars = [line[3:] for line in text.splitlines() if line[:3] in ("0  ", "1  ", "2  ")]
    starts = [bar.index("T") for bar in bars]
    assert starts[0] == 0 and starts[0] < starts[1] < starts[2]
    assert all({"T", "S"} <= set(bar) for bar in bars)


def test_a_schedule_that_does_not_stream_takes_the_sum_of_its_phases() -> None:
    split = section(schedule="bottom_up")
    costs = declared(THIN, WIDE, PAIRING, COUNTS, split, 64, target=DATA_CENTRE)
    text = describe(single(41, 4), costs, data_centre(4), flow(split), split)
    assert "unit 1: 100 steps" in text and "unit 40: 100 steps" in text and "whole stage" in text
    assert automatic(THIN, WIDE, PAIRING, COUNTS, split, 4) == single(41, 4)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 64])
def test_the_automatic_plan_fills_the_ranks_and_is_always_the_same(ranks: int) -> None:
    found = automatic(THIN, WIDE, PAIRING, COUNTS, section(), ranks)
    assert check(found, 41, ranks) == automatic(THIN, WIDE, PAIRING, COUNTS, section(), ranks)


def test_the_command_plans_where_the_data_is_not(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    text = plan("--ranks", "16", "--ranks-per-node", "4", "--narrow.wire=bf16", "--finetune.steps", "100000", "--out", str(out))
    job = read_job(str(CLUSTER), [])
    written = read(out, fingerprint(job.thin, job.wide, job.pairing))
    assert check(written, 13, 16) and f"plan: {written}" in text
    again = plan("--ranks", "16", "--ranks-per-node", "4", "--narrow.wire=bf16", "--finetune.steps", "100000", "--compare", str(out))
    assert "1 times the" in again
    assert "under it: " in plan("--ranks", "16", "--compare", "0-6x8,7-12x8")


def test_fewer_ranks_are_named_only_where_a_plan_has_them() -> None:
    """Its best plan is as fast as itself, whatever the order in which seconds were added."""
    for ranks in (2, 4, 8):
        assert "a plan of" not in plan("--ranks", str(ranks))


def test_memory_decides_and_is_refused_by_how_much() -> None:
    assert plan("--ranks", "8", "--memory", "3.5e9") != plan("--ranks", "8")
    with pytest.raises(UserError, match=r"memory: 2 ranks of 1.5 GB lack \d.* GB each"):
        plan("--ranks", "2", "--memory", "1.5e9")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "0"], "not a whole number"),
        (["--ranks", "2", "--memory", "none"], "not a number above 0"),
        (["--ranks", "2", "--nonsense", "1"], "'--nonsense': unknown"),
        (["--ranks", "2", "--narrow.step=3"], "did you mean narrow.steps"),
        (["--ranks", "2", "--narrow.steps"], "has no value"),
        (["--ranks", "99999"], "use fewer ranks"),
        (["--ranks", "2", "--compare", "0-3"], "covers units 0 to 3"),
        (["--ranks", "2", "--profile", "--flops", "1e12"], "leave one of them out"),
        (["--ranks", "2", "--model.vocab_size=0", "--data.vocab_size=30522", "--out", "plan.json"], "model.vocab_size"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        plan(*arguments)
    assert "\n" not in str(caught.value)


def test_the_script_ends_with_status_two_and_one_line() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools/plan.py", "--config", "nowhere.yaml", "--ranks", "2"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", ["--help", "--config configs/quickstart/resnet.yaml --ranks 2"])
def test_who_reads_may_leave(arguments: str) -> None:
    call = f"{sys.executable} tools/plan.py {arguments} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", call], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_seconds_are_read_easily() -> None:
    assert [seconds(value) for value in (2e-5, 0.25, 59.0, 600.0, 10800.0, 3e5)] == ["20 us", "250 ms", "59 s", "10 min", "3 h", "3.5 days"]
