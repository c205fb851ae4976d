"""DeepSpeed's configuration: filled in from the run's, contradictions refused."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from wtn_pretrain.errors import UserError
from wtn_pretrain.training import engine
from wtn_pretrain.training.config import OptimizerSection, TrainSection
from wtn_pretrain.training.engine import ROOT, deepspeed_config, filled_config

SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))


def section(path: Path | str, **values: object) -> TrainSection:
    return TrainSection(deepspeed=str(path), batch_size=32, micro_batch_size=4, **values)


def written(folder: Path, tree: object) -> Path:
    path = folder / "ds.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_shipped_files_hold_only_what_is_deepspeeds_own(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from deepspeed.runtime.config import DeepSpeedConfig

    tree = json.loads(path.read_text())
    for what in ("offload_optimizer", "offload_param"):
        if tree["zero_optimization"].get(what, {}).get("device") == "nvme":
            # the disk and the library are the user's
            tree["zero_optimization"][what]["nvme_path"] = str(tmp_path)
            monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: True)
    config = deepspeed_config(section(written(tmp_path, tree), clip=0.5), "wide", world_size=1, accumulation=8)
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


def test_layerwise_optimizers_need_an_engine_that_follows_layers() -> None:
    for name in ("lamb", "lars"):
        chosen = OptimizerSection(name=name)
        with pytest.raises(UserError, match=f"narrow.optimizer.name: {name} needs whole layers and ds_configs/zero2.json is ZeRO 2"):
            filled_config("ds_configs/zero2.json", "narrow", chosen, {})
        filled_config("ds_configs/zero0.json", "narrow", chosen, {})
        deepspeed_config(section("ds_configs/zero2.json", optimizer=chosen), "wide", 1, 8)


def test_precisions_are_deepspeeds_where_they_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    autocast = deepspeed_config(section("ds_configs/zero1.json", precision="bf16"), "wide", 1, 8)
    assert autocast["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"} and "bf16" not in autocast
    weights = deepspeed_config(section("ds_configs/zero1.json", precision="bf16_weights"), "wide", 1, 8)
    assert weights["bf16"] == {"enabled": True} and weights["data_types"] == {"grad_accum_dtype": "fp32"}
    with pytest.raises(UserError, match=r"wide.precision: bf16_weights would add up gradients in bf16 under ZeRO 0.*zero1.json"):
        deepspeed_config(section("ds_configs/zero0.json", precision="bf16_weights"), "wide", 1, 8)
    monkeypatch.setattr(engine, "supports_fp16", lambda: False)
    with pytest.raises(UserError, match=r"wide.precision: fp16 is not supported on this device .*use bf16 or fp32"):
        deepspeed_config(section("ds_configs/zero0.json", precision="fp16"), "wide", 1, 8)
    monkeypatch.setattr(engine, "supports_fp16", lambda: True)
    with pytest.raises(UserError, match=r"wide.precision: fp16 needs ZeRO 1 or above.*zero1.json"):
        deepspeed_config(section("ds_configs/zero0.json", precision="fp16"), "wide", 1, 8)
    path = written(tmp_path, {"zero_optimization": {"stage": 1}, "fp16": {"initial_scale_power": 9}})
    scaled = deepspeed_config(section(path, precision="fp16"), "wide", 1, 8)["fp16"]
    assert (scaled["enabled"], scaled["loss_scale"], scaled["initial_scale_power"]) == (True, 0, 9)
    with pytest.raises(UserError, match=r"fp16 belongs in wide.precision"):
        deepspeed_config(section(written(tmp_path, {"fp16": {"enabled": True}})), "wide", 1, 8)
    with pytest.raises(ValidationError, match="ema averages fp32 weights"):
        section("ds_configs/zero1.json", precision="bf16_weights", ema=0.9)


def test_zero_3_refuses_what_needs_whole_layers() -> None:
    for key, value in (("compile", True), ("ema", 0.9)):
        with pytest.raises(
            UserError, match=rf"wide.{key}: needs whole layers, and ds_configs/zero3.json is ZeRO 3; use ds_configs/zero2.json"
        ):
            deepspeed_config(section("ds_configs/zero3.json", **{key: value}), "wide", 1, 8)
        deepspeed_config(section("ds_configs/zero2.json", **{key: value}), "wide", 1, 8)


NVME = {"device": "nvme", "nvme_path": "nowhere"}
OFFLOADS: dict[str, tuple[dict[str, object], str]] = {
    "optimizer under ZeRO 0": ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, "needs ZeRO 1.*zero1_offload.json"),
    "parameters under ZeRO 2": ({"stage": 2, "offload_param": {"device": "cpu"}}, "offload_param to cpu needs ZeRO 3.*zero3_offload.json"),
    "NVMe under ZeRO 2": ({"stage": 2, "offload_optimizer": NVME}, "offload_optimizer to nvme needs ZeRO 3.*zero3_nvme.json"),
    "NVMe without a path": ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, "nvme_path is missing; name a folder"),
    "parameters on NVMe": (
        {"stage": 3, "offload_param": NVME},
        "offload_param to nvme fails in DeepSpeed.*set offload_param.device to cpu",
    ),
    "NVMe without its folder": ({"stage": 3, "offload_optimizer": NVME}, "no folder nowhere; copy the file"),
    "a part of the optimizer": ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "ratio.*optimizer.name is sgd"),
}


@pytest.mark.parametrize("name", OFFLOADS)
def test_offload_that_cannot_work_is_refused(name: str, tmp_path: Path) -> None:
    zero, message = OFFLOADS[name]
    path = written(tmp_path, {"zero_optimization": zero})
    with pytest.raises(UserError, match=message):
        deepspeed_config(section(path, optimizer=OptimizerSection(name="sgd")), "wide", 1, 8)


def test_nvme_needs_libaio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    path = written(tmp_path, {"zero_optimization": {"stage": 3, "offload_optimizer": {**NVME, "nvme_path": str(tmp_path)}}})
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    with pytest.raises(UserError, match="needs libaio.*apt-get install libaio-dev"):
        deepspeed_config(section(path), "wide", 1, 8)


def test_deepspeeds_kernel_steps_offloaded_adamw_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = OptimizerSection(cpu_kernel="deepspeed")
    with pytest.raises(UserError, match="ds_configs/zero2.json does not offload it; use ds_configs/zero2_offload.json"):
        deepspeed_config(section("ds_configs/zero2.json", optimizer=kernel), "wide", 1, 8)
    with pytest.raises(UserError, match="is an adamw of the stages"):
        deepspeed_config(section("ds_configs/zero2_offload.json", optimizer=kernel.model_copy(update={"name": "sgd"})), "wide", 1, 8)
    with pytest.raises(UserError, match="is an adamw of the stages"):
        filled_config("ds_configs/zero2_offload.json", "narrow", kernel, {})
    deepspeed_config(section("ds_configs/zero2_offload.json", optimizer=kernel), "wide", 1, 8)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="no-such-compiler is not on the path; install a C"):
        deepspeed_config(section("ds_configs/zero2_offload.json", optimizer=kernel), "wide", 1, 8)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"wide.deepspeed: no file nowhere.json"):
        deepspeed_config(section("nowhere.json"), "wide", 1, 8)
    with pytest.raises(UserError, match="not valid JSON"):
        deepspeed_config(section(written(tmp_path, "{")), "wide", 1, 8)
    with pytest.raises(UserError, match="must hold an object"):
        deepspeed_config(section(written(tmp_path, "[1]")), "wide", 1, 8)
