"""tools/bench_latency.py at its tiny preset: its arms, keys and files, which do not depend on the machine."""

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import ROOT, environment


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/bench_latency.py", *arguments], cwd=ROOT, capture_output=True, text=True, env=environment()
    )


def test_every_arm_at_every_shape(tmp_path: Path) -> None:
    json_file, picture = tmp_path / "figures.json", tmp_path / "plot.png"
    done = call("--preset", "ci", "--model", "bert", "--json", str(json_file), "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    found = json.loads(json_file.read_text())
    (bert,) = found["models"].values()
    arms = {"thin, ONNX Runtime", "thin, Hugging Face eager", "thin, torch eager", "wide, ONNX Runtime", "wide, torch eager"}
    assert bert["bytes"].keys() == bert["peak_memory"].keys() == arms
    assert {(row["arm"], row["batch"], row["length"]) for row in bert["rows"]} == {(arm, batch, 16) for arm in arms for batch in (1, 2)}
    assert all(0 < row["p50_ms"] <= row["p99_ms"] for row in bert["rows"])
    ratios = [row["ort_over_hf_eager"] for row in bert["rows"] if "ort_over_hf_eager" in row and row["batch"] == 1]
    assert found["ort_over_hf_eager"] == bert["ort_over_hf_eager"] == pytest.approx(math.prod(ratios) ** (1 / len(ratios)))
    assert bert["bytes"]["wide, torch eager"] > bert["bytes"]["thin, torch eager"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "Hugging Face eager over ONNX Runtime at batch 1" in done.stdout


def test_a_wrong_argument_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--json", str(tmp_path / "absent" / "figures.json")], "no folder"),
        (["--preset", "none"], "invalid choice"),
        (["--wrong"], "--wrong"),
        (["--threads", "0"], "--threads 0: give 1 or more"),
        (["--plot", str(tmp_path / "plot.xyz")], "name a file that ends in .png, .svg, .pdf"),
    ):
        monkeypatch.setattr(sys, "argv", ["bench_latency.py", *arguments])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(ROOT / "tools" / "bench_latency.py"), run_name="__main__")
        told = capsys.readouterr().err
        assert left.value.code == 2 and len(told.splitlines()) == 1 and said in told
