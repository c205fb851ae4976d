"""What cannot work is refused before the data are looked at: they are absent here, and nobody notices."""

from pathlib import Path
from typing import Any

import pytest

from tests.running import BERT, RESNET, contents, recipe, stages_here
from wtn_pretrain.errors import UserError
from wtn_pretrain.training import engine

TEXT = {"data.source": "files", "data.paths": ["absent.txt"]}
IMAGES = {"data.source": "folder", "data.path": "absent"}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "heads": (BERT, {"finetune.tensor_parallel": 4}, "finetune.tensor_parallel: 4 ranks do not divide model.heads 2"),
    "vocabulary": (BERT, {"wide.tensor_parallel": 2, "model.vocab_size": 301}, "wide.tensor_parallel: .* model.vocab_size 301"),
    "short rows": (
        BERT,
        {"wide.tensor_parallel": 2, "wide.sequence_parallel": True, "data.lengths": [[0.5, 15]]},
        "wide.tensor_parallel: 2 ranks do not divide sequences of 15 tokens",
    ),
    "tensor ranks of a ResNet": (RESNET, {"wide.tensor_parallel": 2}, "wide.tensor_parallel: a resnet has no tensor parallelism"),
    "ZeRO 3 and tensor ranks": (
        BERT,
        {"wide.tensor_parallel": 2, "wide.deepspeed": "ds_configs/zero3.json"},
        "wide.tensor_parallel: ds_configs/zero3.json is ZeRO 3.*use ds_configs/zero2.json",
    ),
    "ZeRO 3 and the compiler": (
        BERT,
        {"finetune.compile": True, "finetune.deepspeed": "ds_configs/zero3.json"},
        "finetune.compile: needs whole layers",
    ),
    "fp16": (BERT, {"finetune.precision": "fp16"}, "finetune.precision: fp16 is not supported on this device .*use bf16 or fp32"),
    "rounded batch norms": (
        RESNET,
        {"wide.precision": "bf16_weights", "wide.deepspeed": "ds_configs/zero1.json"},
        "wide.precision: bf16_weights would round the statistics of a resnet's batch norms",
    ),
    "batch norms of a BERT": (BERT, {"finetune.batch_norms": "rank"}, "finetune.batch_norms: a bert has none.*leave the key out"),
    "positions": (BERT, {"data.sequence_length": 40}, "data.sequence_length: 40 is longer than model.max_positions 32"),
    "kernels": (BERT, {"run.kernels": "apex"}, "run.kernels: apex: .*set run.kernels to auto or torch"),
    "a disk": (
        BERT,
        {"wide.deepspeed": "ds_configs/zero3_nvme.json"},
        "ds_configs/zero3_nvme.json: offload_optimizer: no folder /local_nvme",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_before_the_data(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, changes, message = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    # some CPUs compute in half precision
    monkeypatch.setattr(engine, "supports_fp16", lambda: False)
    with pytest.raises(UserError, match=rf"^{message}") as refused:
        stages_here(recipe(base, {**(TEXT if base is BERT else IMAGES), **changes}))
    assert "\n" not in str(refused.value)
    assert contents(tmp_path) == {}


def test_what_the_data_tell_is_looked_at_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^absent.txt: no such file"):
        stages_here(recipe(BERT, {**TEXT, "wide.tensor_parallel": 2}))
    # 255 words, which two ranks do not divide, are what the tokenizer comes to have
    with pytest.raises(UserError, match=r"^wide.tensor_parallel: 2 ranks do not divide model.vocab_size 255"):
        stages_here(recipe(BERT, {"wide.tensor_parallel": 2, "data.vocab_size": 255}))
