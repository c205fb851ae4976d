"""DeepSpeed's configuration: filled in from the run's, contradictions refused."""

import json
from pathlib import Path

import pytest

from wtn_pretrain.errors import UserError
from wtn_pretrain.training.config import OptimizerSection, TrainSection
from wtn_pretrain.training.engine import ROOT, deepspeed_config

SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))


def section(path: Path | str, **values: object) -> TrainSection:
    return TrainSection(deepspeed=str(path), batch_size=32, micro_batch_size=4, **values)


def written(folder: Path, tree: object) -> Path:
    path = folder / "ds.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_shipped_files_hold_only_what_is_deepspeeds_own(path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = deepspeed_config(section(path, clip=0.5), "wide", world_size=1, accumulation=8)
    assert config["train_batch_size"] == 32
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 8
    assert config["gradient_clipping"] == 0.5
    parsed = DeepSpeedConfig(config)
    assert parsed.gradient_clipping == 0.5
    assert f"zero{parsed.zero_config.stage}" == path.stem.split("_")[0]


def test_clipping_off_is_said_to_deepspeed() -> None:
    assert deepspeed_config(section("ds_configs/zero0.json", clip=0), "wide", 1, 8)["gradient_clipping"] == 0


def test_contradictions_name_both_places(tmp_path: Path) -> None:
    path = written(tmp_path, {"gradient_clipping": 1.0})
    with pytest.raises(UserError, match=r"gradient_clipping 1.0 contradicts wide.clip, which gives 0.5; remove it"):
        deepspeed_config(section(path, clip=0.5), "wide", 1, 8)
    assert deepspeed_config(section(written(tmp_path, {"gradient_clipping": "auto"}), clip=0.5), "wide", 1, 8)["gradient_clipping"] == 0.5
    for key, home in (("optimizer", "wide.optimizer"), ("scheduler", "wide.schedule"), ("bf16", "wide.precision")):
        with pytest.raises(UserError, match=f"{key} belongs in {home}"):
            deepspeed_config(section(written(tmp_path, {key: {}})), "wide", 1, 8)


def test_layerwise_optimizers_are_refused_where_layers_are_partitioned() -> None:
    for name in ("lamb", "lars"):
        with pytest.raises(UserError, match=f"{name} needs whole layers and ds_configs/zero2.json is ZeRO 2"):
            deepspeed_config(section("ds_configs/zero2.json", optimizer=OptimizerSection(name=name)), "wide", 1, 8)
        deepspeed_config(section("ds_configs/zero0.json", optimizer=OptimizerSection(name=name)), "wide", 1, 8)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"wide.deepspeed: no file nowhere.json"):
        deepspeed_config(section("nowhere.json"), "wide", 1, 8)
    with pytest.raises(UserError, match="not valid JSON"):
        deepspeed_config(section(written(tmp_path, "{")), "wide", 1, 8)
    with pytest.raises(UserError, match="must hold an object"):
        deepspeed_config(section(written(tmp_path, "[1]")), "wide", 1, 8)
