"""The benchmark of plans for stages 1 and 3 at its tiny preset: cases and keys."""

import json
import subprocess
import sys
from pathlib import Path

from tests.running import environment

ROOT = Path(__file__).parents[3]


def test_plans_are_measured(tmp_path: Path) -> None:
    # of one rank: each case takes as many processes, which import everything, as it has ranks, four times
    command = [sys.executable, "benchmarks/stage_plan.py", "--preset", "ci", "--case", "resnet", "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(), timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "figures.json").read_text())
    assert len(found["cases"]) == 1
    for key, name in (("stage_plan_memory", "memory_error"), ("stage_plan_time", "time_error")):
        assert found[key] == max(case[name] for case in found["cases"]) >= 0
    for case in found["cases"]:
        # these networks weigh nothing beside the process, which is measured
        assert case["memory_error"] < 0.3
        assert case["predicted_seconds"] > 0
