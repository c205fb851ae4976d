"""The benchmark of the data path at its tiny preset."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import environment

ROOT = Path(__file__).parents[3]


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/data.py", "--preset", "ci", "--workers", "1", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment())


def test_every_arm_has_a_rate(tmp_path: Path) -> None:
    done = call("--megabytes", "0.4", "--corpus-gb", "0.001", "--folder", str(tmp_path), "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "figures.json").read_text())
    assert {"date", "commit", "hardware", "command", "preset"} <= found.keys()
    for key in ("preprocess_ratio", "masking_ratio", "image_ratio", "open_seconds", "open_packed_seconds"):
        assert found[key] > 0 and f"{key} {found[key]:.4g}" in done.stdout
    made = found["preprocessing"]
    assert made["ratio"] == pytest.approx(made["map_seconds"][0] / made["ours_seconds"][0]) and made["tokens"] > 100_000
    assert found["preprocess_ratio_from_file"] > found["preprocess_ratio"]
    rates = found["masking"]["tokens_per_second"]
    assert list(rates) == ["Hugging Face", "ours", "ours, whole words", "ours, spans"]
    assert found["masking_ratio"] == pytest.approx(rates["ours"] / rates["Hugging Face"])
    # opening reads sizes alone, however large the file is
    small, large = found["opening"]
    assert large["bytes"] == 10 * small["bytes"] and large["memory"] < 4 << 20
    small, large = found["opening_packed"]
    assert large["rows"] == pytest.approx(10 * small["rows"], rel=0.01) and large["again_memory"] < 4 << 20
    assert found["corpus"]["bytes"] > 1e6 and 0 < found["corpus"]["peak_memory"] < 2 << 30
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_a_wrong_argument_is_one_line(tmp_path: Path) -> None:
    done = call("--text", str(tmp_path / "absent"))
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines()[-1].startswith(f"data.py: {tmp_path / 'absent'}: no such file or folder")
