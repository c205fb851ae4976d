"""The loader's benchmark at its tiny preset."""

import json
import subprocess
import sys
from pathlib import Path

from tests.running import environment

ROOT = Path(__file__).parents[3]


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/image_loader.py", "--preset", "ci", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment())


def test_every_row_has_a_rate(tmp_path: Path) -> None:
    done = call("--workers", "1", "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "figures.json").read_text())
    assert list(found["rows"]) == [
        *("whole decode", "crop", "+ flip", "+ RandAugment", "+ random erasing", "+ mixup and CutMix", "all, 1 workers")
    ]
    assert all(row["images_per_second"] > 0 and name in done.stdout for name, row in found["rows"].items())
    assert found["images_per_second"] == found["rows"]["+ mixup and CutMix"]["images_per_second"]


def test_an_odd_batch_cannot_be_mixed() -> None:
    done = call("--batch", "7")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("image_loader.py: data.mixup, data.cutmix: ")
