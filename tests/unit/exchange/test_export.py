"""Exports are held against the original, and one that misses is not left behind."""

import json
from pathlib import Path

import pytest
import torch

from wtn_pretrain.data.images import ImageData
from wtn_pretrain.data.text import TextData
from wtn_pretrain.errors import UserError
from wtn_pretrain.exchange.formats import open_hf, open_onnx
from wtn_pretrain.exchange.parity import parity
from wtn_pretrain.exchange.write import export
from wtn_pretrain.models import BertConfig, ResNetConfig
from wtn_pretrain.tasks.classify import ClassifySection, ClassifyTask
from wtn_pretrain.tasks.mlm import MlmSection, MlmTask


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> MlmTask:
    config = BertConfig(hidden_size=16, heads=2, layers=2, max_positions=32)
    data = TextData(source="pydoc", vocab_size=200, sequence_length=16, limit_mb=0.05)
    return MlmTask(MlmSection(), data, config, tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_bert_in_both_formats_at_shapes_it_was_not_traced_on(norm: str, text: MlmTask, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = text.complete(BertConfig(hidden_size=16, heads=2, layers=2, max_positions=32, norm=norm, initializer_range=0.2)).build()
    written = export(network, text, ["hf", "onnx"], tmp_path, 1e-5)
    for name, call in (("hf", open_hf(network, tmp_path / "hf")), ("onnx", open_onnx(tmp_path / "onnx"))):
        assert json.loads((tmp_path / name / "parity.json").read_text()) == written[name]
        assert written[name]["max_difference"] <= 1e-5
        for count, length in ((1, 1), (2, 32), (5, 9)):
            ids = torch.randint(5, 100, (count, length))
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
            assert parity(network, call, [inputs])["max_difference"] <= 1e-5


def test_a_resnet_with_a_cifar_stem_is_refused_for_hugging_face_and_written_as_onnx(tmp_path: Path) -> None:
    task = ClassifyTask(ClassifySection(), ImageData(source="digits"))
    config = task.complete(ResNetConfig(block="basic", stem="cifar", channels=(4, 8), depths=(1, 1), stem_channels=4))
    network = config.build()
    written = export(network, task, ["hf", "onnx"], tmp_path, 1e-4)
    assert "no CIFAR stem" in written["hf"]["refused"]
    assert not (tmp_path / "hf").exists()
    call = open_onnx(tmp_path / "onnx")
    assert parity(network, call, [{"pixels": torch.randn(11, 1, 8, 8)}])["max_difference"] <= 1e-4


def test_an_export_that_misses_its_tolerance_leaves_the_one_before(text: MlmTask, tmp_path: Path) -> None:
    network = text.complete(BertConfig(hidden_size=16, heads=2, layers=2, max_positions=32)).build()
    export(network, text, ["onnx"], tmp_path, 1e-4)
    before = {path.name: path.read_bytes() for path in (tmp_path / "onnx").iterdir()}
    torch.nn.init.normal_(network.head.transform.weight)
    with pytest.raises(UserError, match="more than export.tolerance 1e-30; nothing was written"):
        export(network, text, ["onnx"], tmp_path, 1e-30)
    assert {path.name: path.read_bytes() for path in (tmp_path / "onnx").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]


def test_parity_sees_a_difference_and_a_nan() -> None:
    network = ResNetConfig(
        block="basic", stem="cifar", channels=(4,), depths=(1,), stem_channels=4, image_channels=1, image_size=8, classes=3
    ).build()
    probes = [{"pixels": torch.randn(2, 1, 8, 8)}]
    with torch.no_grad():
        assert parity(network, lambda inputs: network(inputs) + 0.5, probes)["max_difference"] == pytest.approx(0.5, abs=1e-5)
        assert parity(network, lambda inputs: network(inputs) * float("nan"), probes)["max_difference"] > 1e30
        assert parity(network, lambda inputs: -network(inputs), probes)["top1_agreement"] < 1
