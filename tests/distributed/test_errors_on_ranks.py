"""A mistake that a rank meets is said once, whichever rank it is, and ends them all."""

import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.running import BERT, RESNET, Forge, error_lines, recipe, start, steps_logged, write_recipe
from wtn_pretrain.cli import AGAIN
from wtn_pretrain.data.stream import BatchStream
from wtn_pretrain.recipe import load_recipe
from wtn_pretrain.stages import open_task

pytestmark = pytest.mark.slow


def image_folder(root: Path) -> list[Path]:
    """Two classes of sixteen images for training, in the order in which they are numbered, and of four for validation."""
    noise = np.random.default_rng(0)
    for split, count in (("train", 16), ("valid", 4)):
        for label in ("dark", "light"):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                Image.fromarray(noise.integers(0, 256, (8, 8, 3), np.uint8)).save(root / split / label / f"{number:02}.png")
    return sorted((root / "train").rglob("*.png"))


@pytest.mark.parametrize("rank", [0, 1])
def test_image_that_only_one_rank_reads(rank: int, tmp_path: Path) -> None:
    images = image_folder(tmp_path / "images")
    data = {"kind": "images", "source": "folder", "path": str(tmp_path / "images"), "size": 8}
    config = write_recipe(
        tmp_path / "recipe.yaml", recipe(RESNET, {"data": data, "wide.batch_size": 8, "narrow.batch_size": 8, "finetune.batch_size": 8})
    )
    settings = load_recipe(config)
    indices, _ = BatchStream(open_task(settings, tmp_path / "data").train, 8, seed=settings.run.seed).sample_ids(0)
    damaged = images[int(indices[4 * rank])]
    damaged.write_bytes(b"no image")
    done = start("train_wide.py", config, ranks=2)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    lines = [line for line in error_lines(done.stderr, launched=True) if not line.startswith("wide ")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f"error: {damaged}: cannot be decoded")


def test_a_run_that_is_at_work_is_not_started_twice(forge: Forge, tmp_path: Path) -> None:
    config = write_recipe(tmp_path / "recipe.yaml", recipe(BERT, {"wide.steps": 400}))
    stage = tmp_path / "runs" / "bert" / "wide"
    first = forge.start("train_wide.py", config, ranks=2)
    deadline = time.monotonic() + 60
    while not steps_logged(stage):
        assert not first.ended() and time.monotonic() < deadline, first.stderr()[-4000:]
        time.sleep(0.01)
    second = forge.start("train_wide.py", config, ranks=2)
    assert second.codes() == [2, 2]
    (said,) = second.errors()
    assert re.fullmatch(r"error: runs/bert: process \d+ on \S+ works on this run; wait for it, or choose another --run.name", said), said
    assert not first.ended()
    first.kill(by=signal.SIGTERM)
    first.codes()
    # free again
    third = forge.start("train_wide.py", config, "--run.time_limit=0.001", ranks=2)
    assert third.codes() == [AGAIN, AGAIN], third.stderr()[-4000:]
