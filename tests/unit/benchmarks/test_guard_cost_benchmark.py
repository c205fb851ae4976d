"""The benchmark of what guarding steps costs at its tiny preset: its keys, and that its figures follow from one another."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import environment

ROOT = Path(__file__).parents[3]


def test_what_the_guard_costs(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/guard_cost.py", "--preset", "ci", "--clip", "0", "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "figures.json").read_text())
    assert all(found[key] in done.stdout for key in ("date", "commit", "hardware", "command"))
    for model in ("bert", "resnet"):
        assert len(found["pairs"][model]) == 2 and found["step_seconds"][model] > 0
        assert found["guard_cost"][model] == pytest.approx(statistics.median(found["pairs"][model]))
        assert found["guard_cost"][model] > -1
