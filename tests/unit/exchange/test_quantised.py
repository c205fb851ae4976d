"""int8 exports and what they are measured on: rounding as in training, documents that share rows, samples out of the files' order."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor

from wtn_pretrain.data.images import ImageData
from wtn_pretrain.data.stream import batches
from wtn_pretrain.data.text import TextData
from wtn_pretrain.errors import UserError
from wtn_pretrain.exchange.config import ExportSection
from wtn_pretrain.exchange.int8 import quantise
from wtn_pretrain.exchange.onnx import operators, write_onnx
from wtn_pretrain.exchange.parity import task_metric
from wtn_pretrain.exchange.probes import apart, calibration, inputs_of, mixed, probes
from wtn_pretrain.exchange.write import export_network
from wtn_pretrain.models import BertConfig, ResNetConfig
from wtn_pretrain.models.base import BlockNetwork
from wtn_pretrain.tasks.base import Task, evaluate
from wtn_pretrain.tasks.classify import ClassifySection, ClassifyTask
from wtn_pretrain.tasks.mlm import MlmSection, MlmTask
from wtn_pretrain.training.int8 import Rounding, fake_quantise

BERT = BertConfig(hidden_size=16, heads=2, layers=2, max_positions=32, initializer_range=0.2, token_types=1)
NETWORKS: dict[str, Any] = {
    "bert, post-LN": BERT,
    "bert, pre-LN": BERT.model_copy(update={"norm": "pre"}),
    "resnet, projected": ResNetConfig(block="basic", stem="cifar", channels=(8, 16), depths=(2, 1), stem_channels=8),
    "resnet, padded": ResNetConfig(block="basic", stem="cifar", channels=(8, 16), depths=(1, 2), stem_channels=8, shortcut="padding"),
    "resnet, bottlenecks": ResNetConfig(channels=(16, 32), depths=(2, 1), stem_channels=8),
}


def text(folder: Path, **changes: Any) -> MlmTask:
    data = TextData(source="pydoc", vocab_size=200, sequence_length=16, limit_mb=0.05, **changes)
    return MlmTask(MlmSection(), data, BERT, folder)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Task]:
    return {
        "bert": text(tmp_path_factory.mktemp("data")),
        "resnet": ClassifyTask(ClassifySection(), ImageData(source="digits")),
    }


def made(task: Task, config: BertConfig | ResNetConfig) -> BlockNetwork:
    """A network with no tensor at its initial value."""
    torch.manual_seed(0)
    network = task.complete(config).build()
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.add_(0.1 * torch.rand_like(value))
    return network.eval()


def in_fp32(folder: Path, inputs: dict[str, Tensor]) -> Tensor:
    """The logits of an int8 model as its nodes say, without the kernels of a CPU, some of which saturate."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    return torch.from_numpy(session.run(["logits"], {name: np.ascontiguousarray(inputs[name]) for name in names})[0])


@pytest.mark.parametrize("name", NETWORKS)
def test_training_rounds_what_the_export_rounds(name: str, tasks: dict[str, Task], tmp_path: Path) -> None:
    """Over the same ranges, the network that training sees and the exported one differ by a step here and there: where round-off moves
    a value over the edge of its step. Rounding a place more or less costs several times that."""
    task = tasks["bert" if "bert" in name else "resnet"]
    network, rounding = made(task, NETWORKS[name]), fake_quantise(made(task, NETWORKS[name])).eval()
    places = [module for module in rounding.modules() if isinstance(module, Rounding)]
    (seen,) = calibration(task, network.config, 16, 16)
    write_onnx(network, tmp_path, probes(task, network.config)[-1])
    quantise(tmp_path, task, network.config, 16)
    with torch.no_grad():
        for place in places:
            place.observer_enabled[0], place.fake_quant_enabled[0] = 1, 0
        # calibration sees the fp32 network
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("wtn_pretrain.training.int8.rounded", lambda weight: weight)
            torch.testing.assert_close(rounding(seen), network(seen), rtol=1e-5, atol=1e-5)
        for place in places:
            place.observer_enabled[0], place.fake_quant_enabled[0] = 0, 1
        simulated, plain = rounding(seen), network(seen)
    exported = in_fp32(tmp_path, seen)
    apart_, cost = float((simulated - exported).abs().mean()), float((plain - exported).abs().mean())
    print(f"{name}: training from export {apart_:.1e}, fp32 from export {cost:.1e}")
    assert 0 < cost < 0.1 * float(plain.abs().mean())
    # biases of convolutions are int32 in the export alone, which moves a few values more over an edge
    assert apart_ < (0.25 if network.config.family == "resnet" else 1e-3) * cost


def test_a_bert_in_static_int8(tasks: dict[str, Task], tmp_path: Path) -> None:
    network = made(tasks["bert"], BERT)
    section = ExportSection(samples=40, calibration=40, int8_drop=100)
    written = export_network(network, tasks["bert"], ["onnx_int8"], tmp_path, section)["onnx_int8"]
    assert 0 < written["difference"] < 0.2
    assert written["top1_agreement"] > 0.8
    assert written["model_bytes"]["int8"] < written["model_bytes"]["fp32"]
    assert written["metric_samples"] == 40
    # six products with weights a layer, the head's two; attention's two a layer stay as they are
    found = operators(tmp_path / "onnx_int8")
    products = found.get("MatMul", 0) + found.get("Gemm", 0)
    assert products == 2 * (6 + 2) + 2
    assert "BERT" not in found and found["DequantizeLinear"] > found["QuantizeLinear"] > 0


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> MlmTask:
    return text(tmp_path_factory.mktemp("packed"), packing="documents", valid_fraction=0.3)


def test_documents_of_a_row_are_read_one_by_one_to_the_same_answers(packed: MlmTask) -> None:
    network = made(packed, BERT.model_copy(update={"dropout": 0.0}))
    batch = next(batches(packed.valid, len(packed.valid)))
    assert int(batch["segments"].max()) > 1, "no row holds two documents"
    single = apart(batch, packed)
    assert single["input_ids"].shape[0] == int(batch["segments"].amax(1).sum())
    assert int(single["attention_mask"].sum()) == int((batch["segments"] > 0).sum())
    with torch.no_grad():
        for ours, theirs in zip(packed.tally(network, single).values(), packed.tally(network, batch).values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    metric, counted = task_metric(packed, network, None, 0)
    assert (metric, counted) == (pytest.approx(evaluate(network, packed)["metric"]), len(packed.valid))


def test_int8_is_held_to_the_metric_where_documents_share_rows(packed: MlmTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = made(packed, BERT)
    written = export_network(network, packed, ["onnx_int8_dynamic"], tmp_path, ExportSection(int8_drop=100))["onnx_int8_dynamic"]
    assert abs(written["metric_before"] - written["metric_after"]) < 5
    assert written["metric_samples"] == len(packed.valid)
    real = task_metric
    monkeypatch.setattr(
        "wtn_pretrain.exchange.write.task_metric", lambda task, net, call, n: real(task, net, call, n) if call else (99.0, n)
    )
    with pytest.raises(UserError, match="onnx_int8_dynamic loses .* more than export.int8_drop 1; nothing was written"):
        export_network(network, packed, ["onnx_int8_dynamic"], tmp_path / "again", ExportSection())


def test_class_folders_are_sampled_from_all_classes(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for part, count in (("train", 40), ("valid", 33)):
        for number, label in enumerate("abc"):
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(80 * number, 80 * number + 80, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index:02}.png")
    task = ClassifyTask(ClassifySection(), ImageData(source="folder", path=str(tmp_path), size=8, channels=1))
    assert sorted(set(task.valid.fetch(np.arange(33), None)["labels"].tolist())) == [0]

    def classes(pixels: Sequence[Tensor]) -> set[int]:
        """By how bright the images are."""
        means = torch.cat([value.mean((1, 2, 3)) for value in pixels])
        return set(torch.bucketize(means * 0.226 + 0.449, torch.tensor([80 / 255, 160 / 255])).tolist())

    config = task.complete(NETWORKS["resnet, projected"])
    assert classes([probe["pixels"] for probe in probes(task, config)]) == {0, 1, 2}
    assert classes([inputs["pixels"] for inputs in calibration(task, config, 32, 16)]) == {0, 1, 2}
    network = config.build().eval()
    assert [task_metric(task, network, None, samples)[1] for samples in (50, 70, 0, 500)] == [50, 70, 99, 99]
    first = [batch["labels"] for batch in mixed(task.valid, 30, 16)]
    assert [len(labels) for labels in first] == [16, 14] and set(torch.cat(first).tolist()) == {0, 1, 2}
    # the same samples each time, all of them once
    again = torch.cat([inputs_of(batch, config)["pixels"] for batch in mixed(task.valid, 0, 16)])
    assert torch.equal(again[:30], torch.cat([batch["pixels"] for batch in mixed(task.valid, 30, 16)]))
    assert len(again.flatten(1).unique(dim=0)) == 99
