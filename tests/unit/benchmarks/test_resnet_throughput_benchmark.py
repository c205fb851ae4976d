"""The throughput benchmark of the ResNet at its tiny preset: its keys, and that its arms do the same work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import environment

ROOT = Path(__file__).parents[3]
ARMS = ["ours", "ours, plain", "hugging face", "hugging face, channels-last"]


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/resnet_throughput.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment())


def test_arms_train_the_same_network_on_the_same_batch(tmp_path: Path) -> None:
    done = call("--preset", "ci", "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "figures.json").read_text())
    assert {"date", "commit", "hardware", "command", "preset", "ratio_over_timm", "mfu"} <= found.keys()
    assert list(found["arms"])[:4] == ARMS
    losses = [found["arms"][name]["first_loss"] for name in ARMS]
    # fp32: convolutions add up in another order
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    for name, row in found["arms"].items():
        assert row["images_per_second"] > 0 and name in done.stdout
        low, high = row["ours_over_range"]
        assert low <= row["ours_over"] <= high
    assert found["arms"]["ours"]["ours_over"] == 1
    assert found["ratio_over_hf"] == found["arms"]["hugging face"]["ours_over"]
    assert found["ratio_over_hf_channels_last"] == found["arms"]["hugging face, channels-last"]["ours_over"]
    if "timm" not in found["arms"]:
        assert found["missing"].startswith("timm is left out: ") and found["missing"] in done.stdout


def test_a_wrong_argument_is_one_line() -> None:
    done = call("--preset", "ci", "--batch", "5000")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines()[-1] == "resnet_throughput.py: --batch 5000: there are 1438 images; give fewer"
