"""The benchmarks of the pipeline at their tiny preset: their keys, the plans and the students, which do not depend on the machine."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.running import environment
from wtn_pretrain.imitation.plan import check, parse

ROOT = Path(__file__).parents[3]


def call(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"benchmarks/{script}.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment())


def figures(script: str, folder: Path, *arguments: str) -> dict[str, Any]:
    done = call(script, "--preset", "ci", *arguments, "--json", str(folder / "figures.json"))
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "figures.json").read_text())


@pytest.mark.parametrize(
    ("model", "widening", "compared"),
    # (a) and (b) each run every block; of an outer widened BERT, constrained bridges feed all units but the stem
    [("bert", "inner4", 6), ("bert", "outer2", 2), ("resnet", "outer4", 6)],
)
def test_arms_do_the_same_job(model: str, widening: str, compared: int, tmp_path: Path) -> None:
    found = figures("pipeline", tmp_path, "--model", model, "--widening", widening)
    (case,) = found["cases"].values()
    check(parse(case["plan"]), 4, 2)
    assert case["compared"] == compared
    assert case["weight_difference"] < 0.05
    for key in ("speedup_over_naive", "share_of_work_ratio", "speedup_over_prefix", "scaling_2_over_1", "gemm_share"):
        assert found[key] == case[key] > 0
    assert 0 <= found["idle_share"] <= 1
    assert case["sampled"] is None


def test_blocks_are_sampled_evenly_and_tasks_dealt_longest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from pipeline import all_of, analytic, longest_first, spread, steady
    from pipeline_arms import Taken

    assert spread(range(1, 25), 6) == [3, 7, 11, 15, 19, 23]
    assert longest_first({1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}, 2) == [[1, 4], [2, 3]]
    timed = {block: Taken(2.0 * block, 1.0) for block in (3, 11, 23)}
    assert all_of(timed, range(1, 25)) == pytest.approx(2 * 24 * 25 / 2 + 24)
    # L (L + 1) / 2 T + L s over L T + L s; a stem that is copied is nobody's task
    assert analytic([0.0, *[4.0] * 24], [0.0, *[3.0] * 24]) == pytest.approx((12.5 * 4 + 3) / (4 + 3))
    assert steady([[0, 1, 2, 3, 4], [1, 3, 5, 7, 9]], 1) == 2


def test_plans_are_measured_in_time_and_memory(tmp_path: Path) -> None:
    found = figures("plan_accuracy", tmp_path)
    assert [plan["plan"] for plan in found["plans"]] == ["0-1,2-3", "0-3x2"]
    for key in ("step_time_error", "memory_error", "memory_error_without_base"):
        assert found[key] == max(plan[key] for plan in found["plans"])
    for plan in found["plans"]:
        assert len(plan["predicted_bytes"]) == len(plan["measured_bytes"]) == 2
        assert all(size > sum(terms.values()) * 0.5 for size, terms in zip(plan["measured_bytes"], plan["terms"], strict=True))


def test_a_wrong_argument_is_one_line() -> None:
    done = call("pipeline", "--blocks", "7", "--model", "resnet")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("pipeline.py: --blocks 7: ")
    assert not done.stdout
