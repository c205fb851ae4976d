"""What a checkpoint belongs to: a run that computes something else, or on something else, does not continue it."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.distributed.imitating import Imitations
from tests.distributed.test_checkpoints import again_from
from tests.running import BERT, RESNET, Forge, Started, equal_bits, losses, recipe, weights, write_recipe
from wtn_pretrain.folder import RunFolder

pytestmark = pytest.mark.slow

OFTEN = {"wide.checkpoint_every": 6, "wide.checkpoint_keep": 9}


def refused(started: Started) -> str:
    assert set(started.codes()) == {2}, started.stderr()[-4000:]
    (line,) = [line for line in started.errors() if line.startswith("error:")]
    return line


def test_a_checkpoint_of_the_same_network_trained_otherwise(forge: Forge, tmp_path: Path) -> None:
    config = write_recipe(tmp_path / "recipe.yaml", recipe(RESNET, OFTEN))
    stage, other = (tmp_path / "runs" / name / "wide" for name in ("resnet", "other"))
    forge.start("train_wide.py", config).succeed()
    forge.start("train_wide.py", config, "--run.name=other", "--wide.optimizer.lr=0.1").succeed()
    alone, state = losses(stage), weights(stage)
    again_from(stage, 12)
    newest = stage / "checkpoints" / "step12"
    shutil.rmtree(newest)
    shutil.copytree(other / "checkpoints" / "step12", newest)
    again = forge.start("train_wide.py", config)
    again.succeed()
    (said,) = [line for line in again.stderr().splitlines() if "step12" in line]
    assert said.endswith("step12: belongs to another run (wide.optimizer.lr 0.1, and here 0.2); the checkpoint before it is used")
    # what it has said of itself was replaced
    assert losses(stage) == alone
    assert equal_bits(weights(stage), state)


def test_a_text_that_changes_in_its_place(forge: Forge, tmp_path: Path) -> None:
    text, held_out = tmp_path / "text.txt", tmp_path / "held-out.txt"
    lines = [
        f"the {word} of {number} hills and {number * 7 % 90} rivers is told here in a line of its own\n\n"
        for number in range(400)
        for word in ("tale", "song")
    ]
    text.write_text("".join(lines))
    held_out.write_text("".join(lines[:200]))
    changes = {**OFTEN, "data.source": "files", "data.paths": [str(text)], "data.valid_paths": [str(held_out)]}
    config = write_recipe(tmp_path / "recipe.yaml", recipe(BERT, changes))
    stage = tmp_path / "runs" / "bert" / "wide"
    forge.start("train_wide.py", config).succeed()
    again_from(stage, 12)
    # as many words, and rows
    text.write_text("".join(reversed(lines)))
    line = refused(forge.start("train_wide.py", config))
    assert re.search(r"step12: belongs to another run \(data.rows \w+, and here \w+\)", line), line


def test_a_teacher_that_was_trained_anew(imitations: Imitations) -> None:
    config = imitations.config(BERT, {"narrow.checkpoint_every": 10})
    imitations.start(config, ranks=1).succeed()
    stage = imitations.stage(config)
    again_from(stage, 0)
    wide = stage.parent / "wide"
    told = json.loads((wide / "done.json").read_text())
    # the bytes of another network of the same shape
    content = bytearray((wide / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (wide / "model.safetensors").write_bytes(content)
    RunFolder.finish(wide, told)
    line = refused(imitations.start(config, ranks=1))
    assert re.search(r"belongs to another run \(start.sha256 \w+, and here \w+\)", line), line


def test_hosts_that_share_no_folder(forge: Forge, tmp_path: Path) -> None:
    config = write_recipe(tmp_path / "recipe.yaml", recipe(RESNET))
    started = forge.program(Path(__file__).with_name("own_disks.py"), "--config", str(config), cwd=tmp_path, ranks=2)
    line = refused(started)
    assert re.fullmatch(
        r"error: run.folder: rank 1 on \S+ does not see in \S+/host-1/runs/resnet what rank 0 on \S+ has put into \S+/host-0/runs/resnet; "
        r"choose a --run.folder on a file system that all hosts share",
        line,
    ), line
    assert not list(tmp_path.rglob("config.yaml")) and not list(tmp_path.rglob(".probe*"))
