"""The benchmarks of stage 2 at their tiny preset: their keys, and the figures that do not depend on the machine."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.running import environment

ROOT = Path(__file__).parents[3]


def call(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"benchmarks/{script}.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment())


def figures(script: str, folder: Path, *arguments: str) -> dict[str, Any]:
    done = call(script, "--preset", "ci", *arguments, "--json", str(folder / "figures.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "figures.json").read_text())
    assert {"date", "commit", "hardware", "command", "preset"} <= found.keys()
    assert found["command"].endswith(f"python benchmarks/{script}.py --preset ci {' '.join(arguments)}".strip())
    assert all(found[key] in done.stdout for key in ("date", "commit", "hardware", "command"))
    return found


def test_cost_counts_the_analytic_teacher_work(tmp_path: Path) -> None:
    found = figures("imitation_cost", tmp_path)
    assert found["blocks"] == 12 and found["wall_ratio"] > 0
    assert found["teacher_flops_ratio"] == min(model["teacher_flops_ratio"] for model in found["models"].values())
    # encoder layers cost alike and embeddings nothing: 12 * 13 / 2 layers against 12
    assert found["models"]["bert"]["teacher_flops_ratio"] == 6.5
    assert found["teacher_flops_ratio"] >= 4
    for model in found["models"].values():
        arms = model["arms"]
        assert list(arms) == ["naive", "bottom_up", "parallel", "bottom_up, student-fed"]
        for arm in ("bottom_up", "parallel"):
            assert arms[arm]["teacher_flops_ratio"] == pytest.approx(model["analytic_ratio"], rel=1e-12)
            assert arms[arm]["student_flops"] == arms["naive"]["student_flops"]
            # the same job: equal but for round-off
            assert arms[arm]["weight_difference"] < 1e-2
        # student-fed blocks see other inputs: the comparison of weights is able to tell
        assert arms["bottom_up, student-fed"]["weight_difference"] > 0.1


def test_memory_is_flat_in_depth(tmp_path: Path) -> None:
    found = figures("imitation_memory", tmp_path, "--model", "bert")
    assert found["flatness"] <= 1.10
    assert found["joint_growth"] > 6
    peaks = found["peak_activation_bytes"]
    assert list(peaks) == ["parallel", "student-fed", "joint"]
    assert all(list(peak) == ["4", "12", "48"] for peak in peaks.values())
    assert peaks["parallel"]["48"] < peaks["joint"]["12"]


def test_a_wrong_argument_is_one_line() -> None:
    done = call("imitation_cost", "--blocks", "7", "--model", "resnet")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("imitation_cost.py: --blocks 7: ")
    assert not done.stdout
