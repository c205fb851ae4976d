"""The benchmark of BERT's throughput at its tiny preset: all arms do the same job, and its figures hang together."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import environment

ROOT = Path(__file__).parents[3]
ARMS = ["ours", "ours, padded rows", "Trainer", "plain loop"]


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/bert_throughput.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**environment(), "TMPDIR": str(folder)})


def test_the_arms_do_the_same_job(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="Hugging Face's Trainer needs accelerate")
    done = call(tmp_path, "--preset", "ci", "--documents", "paragraphs", "--peak", "1", "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "figures.json").read_text())
    assert all(found[key] in done.stdout for key in ("date", "commit", "hardware", "command"))
    arms = found["arms"]
    assert list(arms) == ARMS and all(arm in done.stdout for arm in ARMS)
    for arm in arms.values():
        # a few steps from the same weights: the loss of guessing
        assert arm["loss"] == pytest.approx(math.log(512), abs=0.3)
        assert all(arm["seconds"][name] > 0 for name in ("data", "forward", "backward", "optimizer"))
        assert sum(arm["seconds"].values()) == pytest.approx(arm["seconds_per_step"], rel=1e-6)
    assert arms["ours"]["padding"] < 0.1 < arms["ours, padded rows"]["padding"]
    # padded to the longest of a batch, not to the full length
    assert arms["Trainer"]["padding"] <= arms["ours, padded rows"]["padding"] + 0.1
    for key, arm in (("ratio_over_hf_trainer", "Trainer"), ("ratio_over_plain_loop", "plain loop")):
        (mine,), (theirs,) = arms["ours"]["tokens_per_second"], arms[arm]["tokens_per_second"]
        assert found[key] == pytest.approx(mine / theirs)
    assert found["mfu"] == pytest.approx(found["flops_per_second"] / 1e12)
    assert found["pieces_per_step"] >= found["shape"]["rows"]


def test_a_wrong_argument_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="it is asked for first")
    done = call(tmp_path, "--preset", "ci", "--text", str(tmp_path / "absent"))
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines() == [f"bert_throughput.py: {tmp_path / 'absent'}: no such file or folder; set data.paths"]
