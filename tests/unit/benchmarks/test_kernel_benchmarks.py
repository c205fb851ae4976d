"""The benchmarks of the fused operations at their tiny preset: their keys, and the figures that do not depend on the machine."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.running import environment

ROOT = Path(__file__).parents[3]


def figures(script: str, folder: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, f"benchmarks/{script}.py", "--preset", "ci", *arguments, "--json", str(folder / "figures.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "figures.json").read_text())
    assert {"date", "commit", "hardware", "command", "preset"} <= found.keys()
    assert found["kernels"] in done.stdout and found["kernels"].startswith("kernels auto on ")
    return found


def test_losses_take_a_third_of_the_memory(tmp_path: Path) -> None:
    found = figures("loss_memory", tmp_path)
    for loss in ("cross_entropy", "bridge"):
        plain, chunks = found["arms"][loss]["plain"]["bytes"], found["arms"][loss]["chunks"]["bytes"]
        assert 0 < chunks < plain and found[f"{loss}_share"] == chunks / plain <= 1 / 3
    # the plain arm did make all logits: a row of them for every target
    assert found["arms"]["cross_entropy"]["plain"]["bytes"] > 4 * 32768 * found["shapes"]["cross_entropy"][0]


def test_kernels_are_set_against_what_they_move(tmp_path: Path) -> None:
    found = figures("kernels", tmp_path)
    assert found["copy_bandwidth"] > 0
    assert set(found["operations"]) == {"bias_gelu", "dropout_add_norm", "attention", "documents", "linear_cross_entropy", "bridge_energy"}
    for operation in found["operations"].values():
        assert {"eager", "fused"} <= operation["seconds"].keys() and all(seconds > 0 for seconds in operation["seconds"].values())
        assert operation["bytes"] > 0 and operation["error"] <= 1e-4
        assert operation["over_eager"] == operation["seconds"]["eager"] / operation["seconds"]["fused"]
