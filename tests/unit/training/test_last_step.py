"""A checkpoint stands behind the last step: what follows can be lost without a step of training."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.running import BERT, RESNET, equal_bits, losses, recipe, records, stages_here, weights
from wtn_pretrain.training.checkpoint.manifest import checkpoints_in
from wtn_pretrain.training.loop import _Training

pytestmark = pytest.mark.usefixtures("one_rank")


def told(stage: Path) -> dict[str, Any]:
    return json.loads((stage / "done.json").read_text())


class Killed(Exception):
    """Of a stage, in the midst of something."""


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (BERT, {"model.dropout": 0.1, "wide.ema": 0.9}),
        (RESNET, {"wide.deepspeed": "ds_configs/zero2.json", "wide.checkpoint_every": 4, "wide.checkpoint_keep_every": 5}),
    ],
    ids=["bert, averaged", "resnet, ZeRO 2"],
)
def test_killed_in_the_last_validation_it_only_validates(
    base: dict[str, Any], changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = {**changes, "run.folder": str(tmp_path), "wide.steps": 12}
    whole = stages_here(recipe(base, {**tree, "run.name": "whole"}))
    whole.wide()
    whole_stage = whole.folder.stage("wide")
    reported = told(whole_stage)
    killed = stages_here(recipe(base, {**tree, "run.name": "killed"}))
    stage = killed.folder.stage("wide")

    def dying(self: _Training) -> None:
        # behind the last validation, before there is a network; what is written beside may be there or not by then: here it is
        self.checkpoints._writer.wait()
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(_Training, "_close", dying)
        killed.wide()
    assert len(records(stage, "valid")) == 1
    steps = [step for step, _ in checkpoints_in(stage / "checkpoints")]
    assert steps == ([12, 10, 5] if "checkpoint_keep_every" in str(changes) else [12, 11])

    def never(self: _Training, *arguments: object) -> None:
        raise AssertionError("a step was taken again")

    monkeypatch.setattr(_Training, "_step", never)
    killed.wide()
    again = told(stage)
    for key in ("metric", "loss", "steps", "flops", "model_sha256"):
        assert again[key] == reported[key], key
    assert again["seconds"] < reported["seconds"] + 60
    assert equal_bits(weights(stage), weights(whole_stage))
    assert losses(stage) == losses(whole_stage)
    (mine,), (theirs,) = records(stage, "valid"), records(whole_stage, "valid")
    assert (mine["step"], mine["metric"]) == (theirs["step"], theirs["metric"]) == (12, reported["metric"])


def test_a_stage_whose_network_was_damaged_ends_again_from_its_last_checkpoint(tmp_path: Path) -> None:
    run = stages_here(recipe(BERT, {"run.folder": str(tmp_path), "wide.steps": 6}))
    run.wide()
    stage = run.folder.stage("wide")
    before = told(stage)["model_sha256"]
    assert before == hashlib.sha256((stage / "model.safetensors").read_bytes()).hexdigest()
    (stage / "done.json").unlink()
    (stage / "model.safetensors").write_bytes(b"damaged")
    run.wide()
    assert told(stage)["model_sha256"] == before
