"""The benchmark of what saving costs at its tiny preset: its keys, and that its figures follow from one another."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import environment

ROOT = Path(__file__).parents[3]


def test_what_a_save_costs(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "benchmarks/save_stall.py",
        "--preset",
        "ci",
        "--folder",
        str(tmp_path),
        "--json",
        str(tmp_path / "figures.json"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "figures.json").read_text())
    assert all(found[key] in done.stdout for key in ("date", "commit", "hardware", "command"))
    assert len(found["stalls"]) == len(found["stalls_waited"]) == found["pairs"] == 2
    assert found["save_stall"] == pytest.approx(statistics.median(found["stalls"]))
    assert f"save_stall {found['save_stall']:.4f}" in done.stdout
    # a weight and two moments of four bytes, and a little beside them
    assert 12 * found["parameters"] <= found["bytes"] < 12 * found["parameters"] + 10_000
    assert found["step_seconds"] > 0 and found["held_seconds"] > 0 and found["write_seconds"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
