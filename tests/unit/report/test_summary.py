import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from wtn_pretrain.errors import UserError
from wtn_pretrain.report.latency import measure_latency
from wtn_pretrain.report.summary import Arm, Metric, Summary, collect, gain, read_summary, write_summary
from wtn_pretrain.report.table import amount, duration, table, verdict

Make = Callable[..., Summary]


def arm(values: list[float]) -> Arm:
    return Arm(**Arm.statistics(values), parameters=1, flops=1.0, latency_ms=None, training=None)


def test_gain_is_welchs() -> None:
    noise = np.random.default_rng(0)
    win, scratch = list(noise.normal(83, 0.3, 5)), list(noise.normal(81, 0.9, 3))
    found = gain(arm(win), arm(scratch))
    welch = stats.ttest_ind(win, scratch, equal_var=False)
    assert arm(win).spread == pytest.approx(np.std(win, ddof=1))
    assert found.mean == pytest.approx(np.mean(win) - np.mean(scratch))
    assert found.standard_error is not None and found.mean / found.standard_error == pytest.approx(welch.statistic)


@pytest.mark.parametrize(
    ("win", "scratch", "within"),
    [
        ([83.0, 83.2], [81.0, 81.2], False),
        ([83.0, 83.2], [82.9, 83.1], True),
        ([81.2, 84.8], [82.0, 82.1], True),  # less than one arm's own spread
        ([83.0], [81.0], False),
        ([83.0], [83.0], True),
    ],
)
def test_within_spread(win: list[float], scratch: list[float], within: bool) -> None:
    assert gain(arm(win), arm(scratch)).within_spread is within


@pytest.mark.parametrize(
    ("scratch", "win", "said"),
    [
        (
            [81.0, 80.4, 81.3],
            [82.9, 83.2, 82.7],
            "WIN is ahead of scratch by 2.03 points (+- 0.30 standard error, 3 and 3 seeds); this is more",
        ),
        (
            [82.9, 83.2, 82.7],
            [81.0, 80.4, 81.3],
            "WIN is behind scratch by 2.03 points (+- 0.30 standard error, 3 and 3 seeds); this is more",
        ),
        ([82.0, 83.0], [82.4, 83.4], "it does not show that either is better"),
        ([81.0], [82.0], "WIN is ahead of scratch by 1.00 points (one seed each, so no standard error); only more seeds can tell"),
        ([81.0, 81.2], [82.0], "one arm has a single seed"),
        ([81.0], [81.0], "come out equal"),
        ([float("nan")], [81.0], "cannot be compared"),
    ],
)
def test_verdict_is_honest(summarise: Make, scratch: list[float], win: list[float], said: str) -> None:
    assert said in verdict(summarise("bert", "b", scratch, win))


def test_verdict_where_lower_is_better(summarise: Make) -> None:
    summary = dataclasses.replace(summarise("bert", "b", [3.10, 3.12], [2.80, 2.81]), metric=Metric("perplexity", "", False))
    assert verdict(summary).startswith("WIN is ahead of scratch by 0.305 (+- ")
    alone = dataclasses.replace(summary, thin_scratch=None, gain=None)
    assert "nothing to compare" in verdict(alone) and "scratch  " not in table([alone])


def test_table(summarise: Make) -> None:
    text = table([summarise("bert", "base", [81.0, 80.4, 81.3], [82.9, 83.2, 82.7]), summarise("resnet", "r", [91.0], [92.0])])
    lines = text.splitlines()
    assert lines[0] == "bert / base: masked accuracy (%), higher is better"
    assert len({len(line) for line in lines[2:7]}) == 1  # aligned
    assert [line.split("  ")[0] for line in lines[4:7]] == ["wide", "thin from scratch", "thin by WIN"]
    assert " ".join(lines[6].split()) == "thin by WIN 82.93 +- 0.25 (3 seeds) 3.41 M 410 M 3.88 ms 340 T 30 min 30 s"
    assert text.count("WIN is ahead of scratch by") == 2


def test_json_round_trip(tmp_path: Path, summarise: Make) -> None:
    summary = summarise("bert", "base", [81.0, float("nan")], [82.9, 83.2])
    write_summary(tmp_path / "summary.json", summary)
    assert repr(read_summary(tmp_path / "summary.json")) == repr(summary)
    text = (tmp_path / "summary.json").read_text()
    assert text.count("imitation_error") == 1 and '"curves": null' in text
    assert list(tmp_path.iterdir()) == [tmp_path / "summary.json"]


def test_wrong_summary_is_named(tmp_path: Path, summarise: Make) -> None:
    path = tmp_path / "summary.json"
    write_summary(path, summarise("bert", "base", [81.0], [82.9]))
    path.write_text(path.read_text().replace('"parameters": 27900000', '"parameters": "many"'))
    with pytest.raises(UserError, match=r"summary\.json: wide\.parameters"):
        read_summary(path)
    path.write_text("{")
    with pytest.raises(UserError, match="summary"):
        read_summary(path)
    with pytest.raises(UserError, match="No such file"):
        read_summary(tmp_path / "none.json")


def test_collected_runs_keep_apart(tmp_path: Path, summarise: Make) -> None:
    for folder, model, name in [("a", "bert", "x"), ("b", "bert", "x"), ("c", "bert", "x"), ("d", "resnet", "y")]:
        (tmp_path / folder).mkdir()
        write_summary(tmp_path / folder / "summary.json", summarise(model, name, [1.0], [2.0]))
    assert list(collect(tmp_path)) == ["bert", "x", "c", "resnet"]


@pytest.mark.parametrize(
    ("count", "text"), [(None, "-"), (0, "0"), (999, "999"), (999_600, "1 M"), (27_900_000, "27.9 M"), (3.3e9, "3.3 G"), (4.2e19, "42 E")]
)
def test_amount(count: float | None, text: str) -> None:
    assert amount(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.99, "1 min 0 s"), (1830, "30 min 30 s"), (9120, "2 h 32 min"), (200_000, "2 d 7 h")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_latency_counts_every_call() -> None:
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        time.sleep(0.002)

    taken = measure_latency(call, repeats=20, warmup=3)
    assert calls == 23
    assert 2 <= taken["min_ms"] <= taken["p50_ms"] <= taken["p99_ms"] < 500
    with pytest.raises(UserError, match="repeats"):
        measure_latency(lambda: None, repeats=0, warmup=0)
