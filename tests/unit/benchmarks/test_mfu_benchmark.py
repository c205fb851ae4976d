"""The benchmark of MFU and memory at its tiny preset: its keys, and that its figures follow from one another."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import environment

ROOT = Path(__file__).parents[3]


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/mfu.py", "--preset", "ci", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment())


def test_stage_one_is_trained_and_its_flops_counted(tmp_path: Path) -> None:
    done = call("--micro-batch", "2", "--checkpoint-activations", "2", "--memory", "zero2", "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "figures.json").read_text())
    assert all(found[key] in done.stdout for key in ("date", "commit", "hardware", "command"))
    bert, resnet = found["arms"]["bert"], found["arms"]["resnet"]
    for name, one in found["arms"].items():
        assert found[f"mfu_{name}"] == one["mfu"] and f"mfu_{name} " in done.stdout
        assert 0 < one["mfu_range"][0] <= one["mfu"] <= one["mfu_range"][1]
        promised = {"data sheet": one["promised_flops"], "measured product": one["product_rate"]}[one["promise"]]
        assert one["mfu"] == pytest.approx(one["samples_per_second"] * one["flops_per_sample"] / promised)
        assert one["memory"] > 0 and one["kernels"].startswith("kernels auto on ")
    # encoder layers, the head's transform and decoder at 4 of 32 positions, three passes of two operations a weight; scores and their use
    layer = 4 * 32 * 32 + 2 * 32 * 128
    assert bert["flops_per_sample"] == 3 * (2 * (32 * 2 * layer + 2 * 2 * 32 * 32 * 32) + 4 * 2 * (32 * 32 + 32 * 512))
    assert bert["tokens_per_second"] == 32 * bert["samples_per_second"] and resnet["tokens_per_second"] is None
    # a few steps: the loss of guessing
    assert bert["loss"] == pytest.approx(math.log(512), abs=0.4) and resnet["loss"] == pytest.approx(math.log(10), abs=1)
    assert list(found["memory"]) == ["zero2"] and found["memory_ranks"] == len(found["memory"]["zero2"]["all_bytes"])
    # weights, gradients and two moments, the last three in halves
    assert found["memory"]["zero2"]["bytes"] > 4 * bert["parameters"]


def test_what_stage_one_refuses_is_one_line() -> None:
    done = call("--model", "bert", "--precision", "bf16_weights")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines()[-1].startswith("mfu.py: wide.precision: bf16_weights would add up gradients in bf16 under ZeRO 0")
