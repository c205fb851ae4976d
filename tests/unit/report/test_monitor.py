import json
import math
import os
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from wtn_pretrain.errors import UserError
from wtn_pretrain.training.monitor import METRICS, Monitor, Work, read_metrics


def train(folder: Path, last: int, *, start: int = 0, steps: int = 40, stage: str = "wide", **options: Any) -> None:
    with Monitor(folder, stage, steps, start=start, log_every=5, **options) as monitor:
        for step in range(start + 1, last + 1):
            monitor.step(step, {"loss": torch.tensor(10.0 / step)}, samples=8)
            if step % 20 == 0:
                monitor.evaluated(step, {"accuracy": 50.0 + step})


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "events")).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_records_and_events_hold_the_same(tmp_path: Path) -> None:
    train(tmp_path, 38, steps=38)
    records = read_metrics(tmp_path / METRICS)
    losses = [(r["step"], r["loss"]) for r in records if r["kind"] == "train"]
    assert [step for step, _ in losses] == [5, 10, 15, 20, 25, 30, 35, 38]  # the last step is written too
    assert all(value == pytest.approx(10 / step) for step, value in losses)
    assert [(r["step"], r["accuracy"]) for r in records if r["kind"] == "valid"] == [(20, 70.0)]
    assert all(r["rate"] > 0 for r in records if r["kind"] == "train")
    assert {r["stage"] for r in records} == {"wide"}
    charts = scalars(tmp_path)
    assert [step for step, _ in charts["wide/loss"]] == [step for step, _ in losses]
    assert [value for _, value in charts["wide/loss"]] == pytest.approx([value for _, value in losses])
    assert charts["wide/valid/accuracy"] == [(20, 70.0)]


def test_imitation_error_of_each_block(tmp_path: Path) -> None:
    with Monitor(tmp_path, "narrow", 4, log_every=2) as monitor:
        for step in range(1, 5):
            units = torch.tensor([0.5, 0.25]) / step if step < 4 else [0.1, math.nan]
            monitor.step(step, {"units": units, "phase": "teacher-fed"}, samples=1)
    first, second = read_metrics(tmp_path / METRICS)
    assert first["units"] == [0.25, 0.125] and first["phase"] == "teacher-fed"
    assert second["units"] == [0.1, None]
    assert "NaN" not in (tmp_path / METRICS).read_text()
    assert scalars(tmp_path)["narrow/units/00"] == [(2, 0.25), (4, pytest.approx(0.1))]


def test_tensors_are_read_only_when_written(tmp_path: Path) -> None:
    class Counting:
        reads = 0

        def __float__(self) -> float:
            Counting.reads += 1
            return 1.0

    with Monitor(tmp_path, "wide", 100, log_every=10, tensorboard=False) as monitor:
        for step in range(1, 101):
            monitor.step(step, {"loss": Counting()}, samples=1)
    assert Counting.reads == 10


def test_resumed_run_reads_as_one(tmp_path: Path) -> None:
    train(tmp_path / "whole", 40)
    train(tmp_path / "cut", 30)
    with (tmp_path / "cut" / METRICS).open("a") as file:
        file.write('{"time": "2026-01-31T10:00:00", "stage": "wi')  # the crash
    train(tmp_path / "cut", 40, start=20)
    whole, cut = (
        [{k: v for k, v in r.items() if k not in ("time", "rate")} for r in read_metrics(tmp_path / name / METRICS)]
        for name in ("whole", "cut")
    )
    assert whole == cut
    whole_charts, cut_charts = scalars(tmp_path / "whole"), scalars(tmp_path / "cut")
    assert whole_charts["wide/loss"] == cut_charts["wide/loss"]


def test_a_fresh_start_keeps_other_stages_only(tmp_path: Path) -> None:
    train(tmp_path, 10, stage="narrow", tensorboard=False)
    train(tmp_path, 10, stage="wide", tensorboard=False)
    train(tmp_path, 5, stage="wide", tensorboard=False)
    assert [(r["stage"], r["step"]) for r in read_metrics(tmp_path / METRICS)] == [("narrow", 5), ("narrow", 10), ("wide", 5)]


def test_plain_lines_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, 40, tensorboard=False, title="training the wide network")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 8 + 2
    assert lines[1].startswith("training the wide network 10/40 loss 1, ") and lines[1].endswith(" left") and "samples/s" in lines[1]
    assert "training the wide network 20/40 validation: accuracy 70" in lines


@pytest.mark.parametrize("width", [100, 0])
def test_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, width))
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        train(tmp_path, 40, tensorboard=False)
    shown = ""
    with suppress(OSError):  # the terminal's end
        while part := os.read(ours, 4096):
            shown += part.decode()
    os.close(ours)
    assert "40/40" in shown and "loss 0.25" in shown and "samples/s" in shown and " left" in shown
    assert ("100%|" in shown) == (width > 0)


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", 40, rank=1)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("rank", "heard"), [("0", "heard\n"), ("1", "")])
def test_what_is_said_is_said_once(rank: str, heard: str) -> None:
    """In a process of its own: one that has joined a process group takes its rank from there."""
    program = "from wtn_pretrain.screen import say; say('heard')"
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "RANK": rank}, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", heard)


def test_events(tmp_path: Path) -> None:
    with Monitor(tmp_path, "narrow", 10, tensorboard=False) as monitor:
        monitor.event("plan", spans=[(0, 3), (4, 6)], cache=Path("cache"), error=torch.tensor(0.5))
        monitor.event("checkpoint", step=7)
        with pytest.raises(ValueError, match="stage"):
            monitor.event("plan", stage="wide")
    monitor.close()
    plan, checkpoint = read_metrics(tmp_path / METRICS)
    assert (plan["name"], plan["spans"], plan["cache"], plan["error"], plan["step"]) == ("plan", [[0, 3], [4, 6]], "cache", 0.5, 0)
    assert checkpoint["step"] == 7


def test_rate_leaves_out_settling_and_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    with Monitor(tmp_path, "wide", 20, log_every=5, tensorboard=False) as monitor:
        for step in range(1, 21):
            clock[0] += 10.0 if step <= 5 else 0.5
            monitor.step(step, {}, samples=8)
            if step == 10:
                clock[0] += 100.0
                monitor.evaluated(step, {"loss": 1.0})
    rates = {r["step"]: r["rate"] for r in read_metrics(tmp_path / METRICS) if r["kind"] == "train"}
    assert rates == {5: 0.8, 10: 16.0, 15: 16.0, 20: 16.0}


def test_pace_is_told_without_settling_and_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    work = Work(ranks=2, peak=4e12, memory=lambda: 3 << 29)
    with Monitor(tmp_path, "wide", 20, log_every=5, tensorboard=False, work=work) as monitor:
        for step in range(1, 21):
            clock[0] += 10.0 if step <= 5 else 0.5
            told = {"loss": 2.0, "lr": 1e-3, "grad_norm": math.inf if step == 10 else 0.25, "loss_scale": 1024.0, "skipped": step // 10}
            monitor.step(step, told, samples=8, flops=2e12, tokens=128)
            if step == 10:
                clock[0] += 100.0
                monitor.evaluated(step, {"loss": 1.0})
    first, second, third, _ = (r for r in read_metrics(tmp_path / METRICS) if r["kind"] == "train")
    # the first five steps compile and allocate: of them only the plain rate is told
    assert (first["rate"], first["tokens_rate"], first["memory"]) == (0.8, 102.4, 3 << 29)
    assert "flops_rate" not in first and "mfu" not in first
    for record in (second, third):
        assert (record["rate"], record["tokens_rate"], record["flops_rate"], record["mfu"]) == (16.0, 2048.0, 2e12, 0.5)
    assert (second["grad_norm"], third["grad_norm"], third["loss_scale"], third["skipped"]) == (None, 0.25, 1024.0, 1)
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("wide 15/20"))
    told = "loss 2, lr 0.001, norm 0.25, scale 1024, 1 skipped, 16 samples/s, 2048 tokens/s, 2 TFLOP/s (MFU 0.50), 1.50 GiB, "
    assert line.startswith(f"wide 15/20 {told}")


def test_corrupt_line_is_named(tmp_path: Path) -> None:
    good = json.dumps({"time": "t", "stage": "wide", "step": 1, "kind": "train"})
    (tmp_path / METRICS).write_text(f"{good}\n{{broken\n{good}\n")
    with pytest.raises(UserError, match=rf"{METRICS}:2: not a metrics record"):
        read_metrics(tmp_path / METRICS)
    (tmp_path / METRICS).write_text(f"{good}\n[1]\n{good}\n")
    with pytest.raises(UserError, match=":2:"):
        Monitor(tmp_path, "wide", 10)
    with pytest.raises(UserError, match="log_every"):
        Monitor(tmp_path, "wide", 10, log_every=0)
