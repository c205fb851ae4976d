"""The benchmark of the activation cache at its tiny preset: its keys, and the figures that do not depend on the machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
KEYS = ("recompute_over_read_cold", "recompute_over_read_warm", "read_over_plain_read", "read_over_plain_read_warm")
# elements of a sample after the stem and the 12 blocks: 16 tokens of 32; maps of the stem and of three stages of four blocks
ELEMENTS = {"bert": 13 * 16 * 32, "resnet": 8 * 8 * 4 + 4 * (8 * 8 * 16 + 4 * 4 * 32 + 2 * 2 * 64)}
CONTEXT = {"bert": 16, "resnet": 0}


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/activation_cache.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize(("stored", "item"), [((), 4), (("--bf16",), 2)], ids=["as computed", "bf16"])
def test_figures_and_exact_sizes(stored: tuple[str, ...], item: int, tmp_path: Path) -> None:
    done = call("--preset", "ci", *stored, "--folder", str(tmp_path), "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "figures.json").read_text())
    assert {"date", "commit", "hardware", "command", "preset"} <= found.keys()
    for key in KEYS:
        assert found[key] == min(model[key] for model in found["models"].values()) > 0
        assert f"{key} {found[key]:.2f}" in done.stdout
    for model, figures in found["models"].items():
        assert figures["bytes_per_sample"] == ELEMENTS[model] * item + CONTEXT[model]
        assert 0 <= figures["dropped"] <= 1
        seconds = figures["seconds"]
        assert figures["recompute_over_read_warm"] == seconds["recompute"][0] / seconds["read warm"][0]
        assert figures["read_over_plain_read"] == seconds["plain cold"][0] / seconds["read cold"][0]
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]  # the caches are gone


def test_a_wrong_argument_is_one_line(tmp_path: Path) -> None:
    done = call("--preset", "ci", "--folder", str(tmp_path / "none"))
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"activation_cache.py: --folder {tmp_path / 'none'}: no such folder; create it or name another one"]
    assert not done.stdout
