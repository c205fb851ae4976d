"""What a stage records also goes to the monitors that its DeepSpeed file asks for."""

import csv
import json
from pathlib import Path

import pytest

from tests.running import RESNET, recipe, records, stages_here
from wtn_pretrain.errors import UserError
from wtn_pretrain.imitation.config import ImitateSection
from wtn_pretrain.imitation.learner import learner_config
from wtn_pretrain.training.config import TrainSection
from wtn_pretrain.training.engine import deepspeed_config


def written(folder: Path, **sections: object) -> str:
    path = folder / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, **sections}))
    return str(path)


def rows(path: Path) -> list[tuple[int, float]]:
    head, *lines = csv.reader(path.read_text().splitlines())
    assert head[0] == "step"
    return [(int(step), float(value)) for step, value in lines]


@pytest.mark.usefixtures("one_rank")
def test_csv_files_hold_what_metrics_hold(tmp_path: Path) -> None:
    path = written(tmp_path, csv_monitor={"enabled": True, "output_path": str(tmp_path / "csv"), "job_name": "tiny"})
    steps = {"wide.steps": 4, "narrow.steps": 4, "wide.deepspeed": path, "narrow.deepspeed": path, "narrow.schedule": "parallel"}
    stages = stages_here(recipe(RESNET, {**steps, "run.folder": str(tmp_path), "wide.evaluate_every": 2}))
    stages.wide()
    stages.narrow(0)
    wide, folder = tmp_path / "resnet" / "wide", tmp_path / "csv" / "tiny"
    for name in ("loss", "lr"):
        assert rows(folder / f"wide_{name}.csv") == [(record["step"], record[name]) for record in records(wide)]
    assert rows(folder / "wide_valid_metric.csv") == [(record["step"], record["metric"]) for record in records(wide, "valid")]
    # several engines step the units of stage 2, and each record is there once
    narrow = records(tmp_path / "resnet" / "narrow")
    assert rows(folder / "narrow_loss.csv") == [(record["step"], record["loss"]) for record in narrow]
    # DeepSpeed's own events, which count samples, would stand between ours
    assert not list(folder.glob("Train*"))


@pytest.mark.usefixtures("one_rank")
def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    path = written(tmp_path, wandb={"enabled": True, "project": "tiny"})
    stages_here(recipe(RESNET, {"wide.steps": 3, "wide.deepspeed": path, "run.folder": str(tmp_path)})).wide()
    (kept,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    held = kept.read_bytes()
    assert b"wide/loss" in held
    for record in records(tmp_path / "resnet" / "wide"):
        assert json.dumps(record["loss"]).encode() in held
    # ended: the next stage begins at step 1 of a run of its own
    assert wandb.run is None


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"comet": {"enabled": True}}, r"comet is enabled and the package comet_ml is not installed; pip install comet_ml"),
        ({"csv_monitor": {"enabled": True, "path": "x"}}, r"csv_monitor\.path: "),
        ({"csv_monitor": True}, r"csv_monitor must hold an object"),
    ],
)
def test_mistakes_are_named(sections: dict[str, object], words: str, tmp_path: Path) -> None:
    path = written(tmp_path, **sections)
    for configured in (
        lambda: deepspeed_config(TrainSection(deepspeed=path), "wide", 1, 1),
        lambda: learner_config(ImitateSection(deepspeed=path), 1),
    ):
        with pytest.raises(UserError, match=words):
            configured()
