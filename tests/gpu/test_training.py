"""Stage 1 on this machine's accelerator, by the script that users start: every precision and every saving of memory trains alike."""

import math
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.accelerator import needed
from tests.running import BERT, RESNET, losses, recipe, records, succeed, write_recipe
from wtn_pretrain.device import peak_flops

pytestmark = [needed, pytest.mark.slow]

RUNS: dict[str, tuple[dict[str, Any], float]] = {
    # changes, largest relative difference of a loss to fp32's
    "bf16": ({"wide.precision": "bf16"}, 2e-2),  # 8 bits of products
    "bf16 weights, ZeRO 2": ({"wide.precision": "bf16_weights", "wide.deepspeed": "ds_configs/zero2.json"}, 2e-2),
    "fp16, ZeRO 1": ({"wide.precision": "fp16", "wide.deepspeed": "ds_configs/zero1.json"}, 1e-2),  # 11 bits
    "bf16, recomputed, compiled": ({"wide.precision": "bf16", "wide.compile": True, "wide.checkpoint_activations": 2}, 2e-2),
    # sums in another order, over 20 steps
    "plain kernels": ({"run.kernels": "torch"}, 1e-4),
    "recomputed": ({"wide.checkpoint_activations": True}, 1e-4),
    "compiled": ({"wide.compile": True}, 1e-4),
    "accumulated": ({"wide.micro_batch_size": 4}, 1e-4),
    "ZeRO 3": ({"wide.deepspeed": "ds_configs/zero3.json"}, 1e-4),
    "ZeRO 2, offloaded": ({"wide.deepspeed": "ds_configs/zero2_offload.json"}, 1e-4),
}


def trained(folder: Path, base: dict[str, Any], changes: dict[str, Any]) -> Path:
    """The folder of stage 1."""
    folder.mkdir()
    # a start on an accelerator may compile
    succeed("train_wide.py", write_recipe(folder / "recipe.yaml", recipe(base, changes)), timeout=600)
    return folder / "runs" / base["run"]["name"] / "wide"


def apart(mine: Path, theirs: Path, steps: int = 20) -> float:
    pairs = list(zip(losses(mine), losses(theirs), strict=True))[:steps]
    return max(abs(one / other - 1) for one, other in pairs)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In fp32."""
    return trained(tmp_path_factory.mktemp("plain") / "run", BERT, {})


@pytest.mark.parametrize("name", RUNS)
def test_bert(name: str, plain: Path, tmp_path: Path) -> None:
    changes, tolerance = RUNS[name]
    folder = trained(tmp_path / "run", BERT, changes)
    found, last = apart(folder, plain), records(folder)[-1]
    print(f"{name}: losses {found:.1e}, {last['memory'] / 2**20:.0f} MiB, {last['rate']} samples/s")
    assert found < tolerance
    assert losses(folder)[-1] < 0.97 * losses(folder)[0]
    assert last["memory"] > 0 and math.isfinite(last["grad_norm"])
    assert ("mfu" in last) == (peak_flops("fp16" if "fp16" in name else "bf16" if "bf16" in name else "fp32") is not None)


@pytest.mark.parametrize("changes", [{"wide.precision": "bf16"}, {"wide.compile": True}], ids=["bf16", "compiled"])
def test_resnet(changes: dict[str, Any], tmp_path: Path) -> None:
    folder, plain = (trained(tmp_path / name, RESNET, more) for name, more in (("run", changes), ("plain", {})))
    # a high rate and few images: later steps amplify what the first ones round
    found = apart(folder, plain, steps=5)
    print(f"{changes}: losses {found:.1e}, {records(folder)[-1]['memory'] / 2**20:.0f} MiB")
    assert found < 2e-2
    assert losses(folder)[-1] < 0.9 * losses(folder)[0]


def test_recomputing_saves_memory(tmp_path: Path) -> None:
    shape = {"model.layers": 12, "model.hidden_size": 128, "model.intermediate_size": 512, "model.max_positions": 64}
    size = {"data.sequence_length": 64, "wide.batch_size": 128, "wide.steps": 3, "narrow.batch_size": 128, "finetune.batch_size": 128}
    peaks = {
        name: records(trained(tmp_path / name, BERT, {**shape, **size, **more}))[-1]["memory"]
        for name, more in (("kept", {}), ("recomputed", {"wide.checkpoint_activations": True}))
    }
    print({name: f"{value / 2**20:.0f} MiB" for name, value in peaks.items()})
    # of twelve blocks one is there at a time; weights and their states stay
    assert peaks["recomputed"] < 0.6 * peaks["kept"]
