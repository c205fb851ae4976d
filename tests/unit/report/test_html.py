import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from wtn_pretrain.errors import UserError
from wtn_pretrain.report.curves import average, read_logs, thin
from wtn_pretrain.report.html import is_run, write_index, write_report
from wtn_pretrain.report.summary import Arm, Summary, read_summary, write_summary
from wtn_pretrain.training.monitor import METRICS
from wtn_pretrain.training.utilisation import UTILISATION, Use, write_utilisation

Make = Callable[..., Summary]
TOOL = Path(__file__).parents[3] / "tools" / "report.py"
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Reader(HTMLParser):
    """Checks that elements nest, and keeps tags, ids, references and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag not in VOID:
            self.open.append(tag)
        self._read(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self._read(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def _read(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("href", "xlink:href", "src"):
                self.references.append(value or "")
            else:
                self.references += re.findall(r"url\((.*?)\)", value or "")


def check(page: Path) -> Reader:
    """A page that is well formed, has no id twice and refers to nothing outside it but neighbouring reports."""
    text = page.read_text()
    read = Reader(text)
    assert len(set(read.ids)) == len(read.ids)
    for reference in read.references:
        local = reference.startswith("#") and reference[1:] in read.ids
        assert local or reference.startswith("data:image/png;base64,") or re.fullmatch(r"[\w%.-]+/report\.html", reference), reference
    assert "http" not in text.lower() and "@import" not in text and not {"script", "link", "iframe", "img"} & read.tags.keys()
    return read


def test_report_of_a_finished_run(run: Path) -> None:
    page = write_report(run)
    read = check(page)
    assert page == run / "report.html" and page.stat().st_size < 400_000
    assert read.tags["svg"] == read.tags["figure"] == 2 + 3 + 2
    for part in (
        "WIN is ahead of scratch by 2.03 points (± 0.30",
        "80.90 ± 0.46 (3 seeds)",
        "teacher-fed",
        "student-fed",
        "schedule: hybrid",
    ):
        assert part in read.text
    assert "name: demo <b>&" in read.text and read.tags["b"] == 4
    assert "no calibration data" in read.text and "2.1e-06" in read.text
    assert "prefers-color-scheme: dark" in page.read_text() and "currentColor" in page.read_text()


def test_curves_are_what_was_recorded(run: Path) -> None:
    logs = {(log.seed, log.stage): log for log in read_logs(run)}
    seeds = {"seed-0", "seed-1", "seed-2"}
    assert set(logs) == {("seed-0", "wide")} | {(seed, stage) for seed in seeds for stage in ("narrow", "finetune", "scratch")}
    narrow = logs["seed-1", "narrow"]
    steps, errors = narrow.units()
    assert errors.shape == (80, 12) and steps[-1] == narrow.last_step == 800
    assert narrow.phases() == [(10.0, "teacher-fed"), (510.0, "student-fed")]
    steps, losses = logs["seed-0", "scratch"].series("valid", "loss")
    assert list(steps) == list(range(200, 2001, 200)) and (np.diff(losses) < 0).all()


def test_thinning_and_averages() -> None:
    steps, values = np.arange(1000.0), np.where(np.arange(1000) % 2, np.nan, 3.0)
    short, means = thin(steps, values, 100)
    assert len(short) == 100 and (means == 3.0).all() and short[0] == 4.5
    grid, mean = average([(np.array([0.0, 2.0, 4.0]), np.array([0.0, 2.0, 4.0])), (np.array([0.0, 2.0]), np.array([2.0, 4.0]))])
    assert list(grid) == [0, 2] and list(mean) == [1, 3]


def test_names_cannot_inject(tmp_path: Path, summarise: Make) -> None:
    nasty = "<script>alert(1)</script>$\\frac$\"' onload=x"
    summary = summarise("bert", nasty, [81.0], [82.0])
    summary = dataclasses.replace(
        summary, hardware=nasty, export={nasty: [nasty]}, metric=dataclasses.replace(summary.metric, name=nasty, unit="<i>")
    )
    folder = tmp_path / "a <b>&"
    folder.mkdir()
    write_summary(folder / "summary.json", summary)
    (folder / "config.yaml").write_text(f"name: '{nasty}'\n</pre><script>")
    (folder / "narrow").mkdir()
    record = {"time": "t", "stage": "narrow", "step": 1, "kind": "train", "units": [0.5], "phase": nasty}
    valid = {"time": "t", "stage": nasty, "step": 1, "kind": "valid", "loss": 1.0}
    (folder / "narrow" / METRICS).write_text("\n".join(map(json.dumps, (record, record | valid))))
    assert nasty in check(write_report(folder)).text
    read = check(write_index(tmp_path))
    assert nasty in read.text and not read.tags["script"] and not read.tags["i"] - 3


def test_missing_pieces_do_not_break(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "crashed"
    shutil.copytree(run / "wide", folder / "wide")
    with (folder / "wide" / METRICS).open("a") as file:
        file.write('{"time": "2026-')
    read = check(write_report(folder))
    assert "has not finished" in read.text and "No imitation error" in read.text and read.tags["svg"] == 3
    (tmp_path / "empty").mkdir()
    assert "No training curves" in check(write_report(tmp_path / "empty")).text


def at_work(ranks: int) -> list[Use]:
    """Ranks of which the second has least to do, with names that a page must not read as markup."""
    busy = [0.93 if rank != 1 else 0.71 for rank in range(ranks)]
    work = [{"student": share * 0.6, "teacher": share * 0.3, "optimizer": share * 0.1} for share in busy]
    return [
        Use(rank, f"rank {rank} (units {rank}-{rank} <b>$)", 42.0, share, 0.97 - share, 0.01, 0.02, parts)
        for rank, (share, parts) in enumerate(zip(busy, work, strict=True))
    ]


def test_ranks_at_work(run: Path, tmp_path: Path) -> None:
    assert "Ranks at work" not in check(write_report(run)).text
    folder = tmp_path / "pipelined"
    shutil.copytree(run / "narrow", folder / "narrow")
    write_utilisation(folder / "narrow", at_work(4))
    read = check(write_report(folder))
    assert "Ranks at work" in read.text and read.tags["b"] == 0 and read.tags["svg"] == 3
    assert read.text.count("93.0% at work") == 3 and read.text.count("71.0% at work") == 1
    assert "rank 1 (units 1-1 <b>$)" in read.text and "waits for input" in read.text
    assert "Bubble: 12.5% of the ranks' time, 29.0% at most (rank 1 (units 1-1 <b>$))" in read.text
    write_utilisation(folder / "narrow", at_work(200))
    read = check(write_report(folder))
    assert read.text.count("% at work") == 24 and "24 of 200 ranks are shown" in read.text
    write_utilisation(folder / "narrow", [])
    assert "Ranks at work" not in check(write_report(folder)).text
    (folder / "narrow" / UTILISATION).write_text("{")
    with pytest.raises(UserError, match=rf"narrow/{UTILISATION}: "):
        write_report(folder)


def test_corrupt_metrics_are_named(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "wide", tmp_path / "wide")
    lines = (tmp_path / "wide" / METRICS).read_text().splitlines()
    lines[6] = lines[6][:20]
    (tmp_path / "wide" / METRICS).write_text("\n".join(lines))
    with pytest.raises(UserError, match=rf"wide/{METRICS}:7: "):
        write_report(tmp_path)


def test_unusual_figures_do_not_break(run: Path, tmp_path: Path, summarise: Make) -> None:
    summary = summarise("bert", "diverged", [float("nan")], [82.0])
    bare = Arm(**Arm.statistics([84.0]), parameters=summary.thin_win.parameters, flops=None, latency_ms=None, training=None)
    write_summary(tmp_path / "summary.json", dataclasses.replace(summary, wide=bare))
    assert "cannot be compared" in check(write_report(tmp_path)).text
    write_summary(tmp_path / "summary.json", dataclasses.replace(summary, thin_scratch=None, gain=None, commit=None))
    assert "nothing to compare" in check(write_report(tmp_path)).text


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_tool_on_a_run_and_on_a_folder_of_runs(run: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(run / "narrow", tmp_path / "runs" / name / "narrow")
        shutil.copy(run / "summary.json", tmp_path / "runs" / name)
    one = call(tmp_path / "runs" / "one", "--json", tmp_path / "copy.json")
    assert one.returncode == 0 and one.stdout.count("thin by WIN") == 1 and (tmp_path / "runs" / "one" / "report.html").exists()
    assert read_summary(tmp_path / "copy.json") == read_summary(run / "summary.json")
    for _ in range(2):  # the combined summary.json does not make it a run
        many = call(tmp_path / "runs", "--json", tmp_path / "copy.json")
        assert many.returncode == 0 and many.stdout.count("thin by WIN") == 2
    assert list(json.loads((tmp_path / "copy.json").read_text())) == ["bert", "bert-thin"]
    assert (tmp_path / "copy.json").read_bytes() == (tmp_path / "runs" / "summary.json").read_bytes()
    assert {"one/report.html", "two/report.html"} <= set(check(tmp_path / "runs" / "report.html").references)


def test_tool_refuses_in_one_line(tmp_path: Path) -> None:
    refused = call(tmp_path)
    assert refused.returncode == 2 and refused.stdout == "" and len(refused.stderr.splitlines()) == 1
    with pytest.raises(UserError, match="no such folder"):
        is_run(tmp_path / "none")
