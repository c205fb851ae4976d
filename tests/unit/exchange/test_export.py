"""Exports are held against the original, open in the tools of those who deploy, and one that misses is not left behind."""

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from wtn_pretrain.data.images import ImageData
from wtn_pretrain.data.prepare.sentencepiece_model import read_sentencepiece
from wtn_pretrain.data.text import TextData
from wtn_pretrain.errors import UserError
from wtn_pretrain.exchange.card import Origin
from wtn_pretrain.exchange.config import ExportSection
from wtn_pretrain.exchange.foreign import open_foreign
from wtn_pretrain.exchange.formats import FORMATS, holding
from wtn_pretrain.exchange.int8 import quantise_weights
from wtn_pretrain.exchange.onnx import open_onnx, operators, write_onnx
from wtn_pretrain.exchange.parity import parity, task_metric
from wtn_pretrain.exchange.probes import probes
from wtn_pretrain.exchange.write import MissedError, export_network
from wtn_pretrain.models import BertConfig, ResNetConfig
from wtn_pretrain.models.base import BlockNetwork
from wtn_pretrain.tasks.base import Task
from wtn_pretrain.tasks.classify import ClassifySection, ClassifyTask
from wtn_pretrain.tasks.mlm import MlmSection, MlmTask

ORIGIN = Origin("a-run", "finetune", "masked accuracy (%)", {"finetune": {"metric": 12.5, "steps": 3}}, "run: {name: a-run}", "abc1234")
BERT = BertConfig(hidden_size=16, heads=2, layers=2, max_positions=512, initializer_range=0.2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> MlmTask:
    data = TextData(source="pydoc", vocab_size=200, sequence_length=16, limit_mb=0.05)
    return MlmTask(MlmSection(), data, BERT, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def images() -> ClassifyTask:
    return ClassifyTask(ClassifySection(), ImageData(source="digits"))


def section(**changes: Any) -> ExportSection:
    return ExportSection(**{"samples": 64, "calibration": 32, **changes})


def made(task: Task, config: BertConfig | ResNetConfig) -> BlockNetwork:
    torch.manual_seed(0)
    network = task.complete(config).build()
    for value in network.buffers():
        if value.is_floating_point():
            value.add_(0.2 * torch.rand_like(value))
    return network.eval()


GRID = [[count, length] for length in (1, 7, 128, 512) for count in (1, 3, 32)]


@pytest.fixture(scope="module")
def bert(text: MlmTask, tmp_path_factory: pytest.TempPathFactory) -> tuple[BlockNetwork, Path, dict[str, dict[str, Any]]]:
    """A BERT with heads wider than its hidden size would give, in every format that can hold it."""
    folder = tmp_path_factory.mktemp("bert")
    network = made(text, BERT.model_copy(update={"heads": 4, "norm": "pre"}))
    formats = ["hf", "onnx_fused", "torch_export", "onnx_int8_dynamic"]
    return network, folder, export_network(network, text, formats, folder, section(int8_drop=100), ORIGIN)


def test_an_inner_widened_bert_in_the_formats_that_hold_it(bert: tuple[BlockNetwork, Path, dict[str, dict[str, Any]]]) -> None:
    _, folder, written = bert
    assert "no inner-widened attention" in written["hf"]["refused"]
    assert written["hf"]["refused"].endswith("these can: onnx, onnx_fused, onnx_int8, onnx_int8_dynamic, torch_export")
    assert not (folder / "hf").exists()
    for name, tolerance in (("onnx_fused", 1e-4), ("torch_export", 1e-5)):
        assert json.loads((folder / name / "parity.json").read_text()) == written[name]
        assert written[name]["difference"] <= tolerance == written[name]["tolerance"]
        assert [shape["shape"] for shape in written[name]["shapes"]] == GRID
        assert written[name]["metric_before"] == written[name]["metric_after"]
    assert written["onnx_fused"]["operators"]["MultiHeadAttention"] == 2
    assert written["onnx_fused"]["operators"]["BiasGelu"] == 3
    assert written["onnx_fused"]["operators"]["SkipLayerNormalization"] >= 2
    assert "Softmax" not in written["onnx_fused"]["operators"]


def test_dynamic_int8_is_smaller_and_nearly_the_same(bert: tuple[BlockNetwork, Path, dict[str, dict[str, Any]]]) -> None:
    found = bert[2]["onnx_int8_dynamic"]
    assert found["operators"]["MatMulInteger"] >= 12
    assert 0 < found["difference"] < 0.2
    assert found["top1_agreement"] > 0.8
    assert found["model_bytes"]["int8"] < 0.8 * found["model_bytes"]["fp32"]
    assert found["latency_ms"].keys() == {"int8", "fp32"}
    assert found["tolerance"] is None


def test_a_bert_for_hugging_face_and_as_standard_onnx(text: MlmTask, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, pipeline

    network = made(text, BERT.model_copy(update={"pair_head": "nsp"}))
    written = export_network(network, text, ["hf", "onnx"], tmp_path, section(shard="20KB", license="mit", opset=20), ORIGIN)
    assert written["hf"]["difference"] <= 1e-5
    assert written["onnx"]["difference"] <= 1e-4
    assert [shape["shape"] for shape in written["hf"]["shapes"]] == GRID
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    back = open_foreign(tmp_path / "hf").network().state_dict()
    assert all(torch.equal(value, back[name]) for name, value in network.state_dict().items())
    opsets = {entry.domain: entry.version for entry in onnx.load(tmp_path / "onnx" / "model.onnx").opset_import}
    assert opsets[""] == written["onnx"]["opset"] == 20
    card = (tmp_path / "hf" / "README.md").read_text()
    for said in ("license: mit", "Go Wide, Then Narrow", "| finetune | 12.50 | 3 |", "abc1234", "run: {name: a-run}"):
        assert said in card
    hashes = written["hf"]["files"]
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {*hashes, "parity.json", "README.md"}
    assert all(len(value) == 64 for value in hashes.values())
    # programs that cut texts know where, and our own tokenizer goes on cutting nothing
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").model_max_length == 512 < text.tokenizer.model_max_length
    # the pipeline's answers are those of our network
    sentence = f"the value of the {text.tokenizer.mask_token} is"
    answers = pipeline("fill-mask", model=str(tmp_path / "hf"), device="cpu")(sentence)
    inputs = text.tokenizer(sentence, return_tensors="pt")
    with torch.no_grad():
        logits = network(dict(inputs))[inputs["input_ids"] == text.tokenizer.mask_token_id]
    best = logits.softmax(-1).topk(5)
    assert [answer["token"] for answer in answers] == best.indices[0].tolist()
    assert [answer["score"] for answer in answers] == pytest.approx(best.values[0].tolist(), rel=1e-4)


def test_a_bert_of_sentence_pieces_for_hugging_face(tmp_path: Path, shared: Any) -> None:
    """Under a class that every version of transformers has, and to the same ids."""
    from transformers import AutoTokenizer, pipeline

    words = tmp_path / "words"
    read_sentencepiece(shared("fixtures") / "sentencepiece" / "test_model.model").save_pretrained(words)
    data = TextData(source="pydoc", tokenizer=str(words), sequence_length=16, limit_mb=0.05)
    task = MlmTask(MlmSection(), data, BERT, tmp_path / "data")
    network = made(task, BERT.model_copy(update={"layers": 1, "max_positions": 32}))
    export_network(network, task, ["hf"], tmp_path / "out", section(samples=16))
    folder = tmp_path / "out" / "hf"
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    sentence = f"I saw a {task.tokenizer.mask_token} with a telescope."
    inputs = task.tokenizer(sentence, return_tensors="pt")
    assert AutoTokenizer.from_pretrained(folder)(sentence).input_ids == inputs["input_ids"][0].tolist()
    answers = pipeline("fill-mask", model=str(folder), device="cpu")(sentence)
    with torch.no_grad():
        logits = network(dict(inputs))[inputs["input_ids"] == task.tokenizer.mask_token_id]
    assert [answer["token"] for answer in answers] == logits.topk(5).indices[0].tolist()


CIFAR = ResNetConfig(block="basic", stem="cifar", channels=(4, 8), depths=(1, 1), stem_channels=4)


def test_a_cifar_resnet_as_onnx_fp32_and_int8(images: ClassifyTask, tmp_path: Path) -> None:
    network = made(images, CIFAR)
    formats = ["hf", "timm", "onnx", "onnx_fused", "onnx_int8", "onnx_int8_dynamic"]
    written = export_network(network, images, formats, tmp_path, section(int8_drop=100), ORIGIN)
    for name in ("hf", "timm"):
        assert "no CIFAR stem" in written[name]["refused"]
    assert "made of convolutions" in written["onnx_int8_dynamic"]["refused"]
    assert written["hf"]["refused"].endswith("these can: onnx, onnx_fused, onnx_int8, torch_export")
    assert "FusedConv" in written["onnx_fused"]["operators"]
    call = open_onnx(tmp_path / "onnx")
    assert parity(network, call, [{"pixels": torch.randn(11, 1, 8, 8)}])["max_difference"] <= 1e-4
    int8 = written["onnx_int8"]
    assert int8["operators"]["QuantizeLinear"] > 5
    assert 0 < int8["difference"] < 0.2
    assert int8["top1_agreement"] > 0.8
    # scales of the weights: one an output channel
    scales = [value for value in onnx.load(tmp_path / "onnx_int8" / "model.onnx").graph.initializer if value.name.endswith("weight_scale")]
    assert {tuple(value.dims) for value in scales} >= {(4,), (8,)}


def test_weights_beside_the_graph(images: ClassifyTask, text: MlmTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # as if 2 GiB had been passed
    monkeypatch.setattr("wtn_pretrain.exchange.onnx.ONE_FILE", 0)
    written = export_network(made(images, CIFAR), images, ["onnx", "onnx_fused", "onnx_int8"], tmp_path, section(int8_drop=100))
    assert "model.onnx.data" in written["onnx"]["files"]
    outside = (tmp_path / "onnx" / "model.onnx.data").stat().st_size
    assert written["onnx"]["bytes"] > outside > 0
    assert written["onnx_int8"]["model_bytes"]["fp32"] > outside
    assert "model.onnx.data" in written["onnx_fused"]["files"]
    network = made(text, BERT.model_copy(update={"layers": 1}))
    formats = ["onnx_fused", "onnx_int8", "onnx_int8_dynamic"]
    written = export_network(network, text, formats, tmp_path, section(int8_drop=100, calibration=8))
    assert written["onnx_fused"]["difference"] <= 1e-4
    for name in formats:
        # the weights of int8 too, the export's own and none of what it was made from
        assert {file for file in written[name]["files"] if "onnx" in file} == {"model.onnx", "model.onnx.data"}
        assert (tmp_path / name / "model.onnx.data").stat().st_size > 16 * 200


def test_int8_that_loses_too_much_is_not_written(images: ClassifyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = made(images, CIFAR)
    real = task_metric
    monkeypatch.setattr(
        "wtn_pretrain.exchange.write.task_metric", lambda task, net, call, n: real(task, net, call, n) if call else (99.0, n)
    )
    with pytest.raises(UserError, match=r"onnx_int8 loses .* more than export.int8_drop 1; nothing was written; train with finetune.int8"):
        export_network(network, images, ["onnx_int8"], tmp_path, section())
    assert not list(tmp_path.iterdir())


def test_a_resnet_50_for_torchvision_and_timm(images: ClassifyTask, tmp_path: Path) -> None:
    """The real shapes at 8 pixels; torchvision's and timm's own classes open it where they are installed, else it is read back."""
    config = ResNetConfig(depths=(1, 1, 1, 1), inner_channels=(128, 256, 512, 1024), image_channels=1)
    network = made(images, config)
    written = export_network(network, images, ["torchvision", "timm"], tmp_path, section(samples=16))
    assert "takes 3 channels" in written["torchvision"]["refused"]
    assert written["timm"]["difference"] <= 1e-5
    told = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert (told["architecture"], told["model_args"]) == ("resnet50", {"layers": [1, 1, 1, 1], "base_width": 128})
    # else timm would cut off an eighth, and resize otherwise than we did
    pretrained = told["pretrained_cfg"]
    assert (pretrained["crop_pct"], pretrained["interpolation"], pretrained["crop_mode"]) == (1.0, "bilinear", "center")
    back = open_foreign(tmp_path / "timm").state
    assert all(torch.equal(value, back[name]) for name, value in network.state_dict().items())
    state = load_file(tmp_path / "timm" / "model.safetensors")
    assert state["layer4.0.downsample.0.weight"].shape == (2048, 1024, 1, 1)
    assert torch.equal(state["layer1.0.conv2.weight"], network.state_dict()["blocks.0.convs.1.weight"])
    assert holding(config.model_copy(update={"image_channels": 3}))[-3:] == ["torchvision", "timm", "torch_export"]


def test_an_export_that_misses_its_tolerance_leaves_the_one_before(images: ClassifyTask, tmp_path: Path) -> None:
    network = made(images, CIFAR)
    export_network(network, images, ["torch_export"], tmp_path, section())
    before = {path.name: path.read_bytes() for path in (tmp_path / "torch_export").iterdir()}
    torch.nn.init.normal_(network.head.classifier.weight)
    real = FORMATS["torch_export"]
    wrong = real._replace(open=lambda job, folder: lambda inputs: real.open(job, folder)(inputs) + 1e-3)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="more than export.tolerance 1e-05; nothing was written"):
        patch.setitem(FORMATS, "torch_export", wrong)
        export_network(network, images, ["torch_export"], tmp_path, section())
    assert {path.name: path.read_bytes() for path in (tmp_path / "torch_export").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["torch_export"]


def test_what_is_no_export_stays(images: ClassifyTask, tmp_path: Path) -> None:
    network = made(images, CIFAR)
    for place in (tmp_path / "onnx", tmp_path / ".work"):
        place.mkdir()
        (place / "thesis.tex").write_text("years of work")
    (tmp_path / "hf").write_text("a file")
    with pytest.raises(UserError, match=r"onnx is there and holds no parity.json, so that it is no export; move it"):
        export_network(network, images, ["torch_export", "onnx"], tmp_path, section())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".work", "hf", "onnx"]
    # an empty folder is nobody's loss, and a refused format takes no place
    (tmp_path / "torch_export").mkdir()
    assert export_network(network, images, ["torch_export", "hf"], tmp_path, section())["torch_export"]["difference"] <= 1e-5
    assert [(tmp_path / name / "thesis.tex").read_text() for name in ("onnx", ".work")] == ["years of work"] * 2
    assert (tmp_path / "hf").read_text() == "a file"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".work", "hf", "onnx", "torch_export"]


def test_two_exports_into_one_place(images: ClassifyTask, tmp_path: Path) -> None:
    """The second begins and ends while the first compares."""
    network = made(images, CIFAR)
    real = FORMATS["torch_export"]

    def meanwhile(job: Any, folder: Path) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(FORMATS, "torch_export", real)
            export_network(network, images, ["torch_export"], tmp_path, section(samples=16))
        return real.open(job, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FORMATS, "torch_export", real._replace(open=meanwhile))
        written = export_network(network, images, ["torch_export"], tmp_path, section(samples=64))
    assert json.loads((tmp_path / "torch_export" / "parity.json").read_text()) == written["torch_export"]
    assert written["torch_export"]["metric_samples"] == 64
    assert [path.name for path in tmp_path.iterdir()] == ["torch_export"]


def test_int8_that_is_not_finite_is_not_written(images: ClassifyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its metric alone may not show it, and JSON has no word for infinity."""
    real = FORMATS["onnx_int8"]

    def poisoned(job: Any, folder: Path) -> Any:
        call = real.open(job, folder)
        return lambda inputs: call(inputs).masked_fill(torch.tensor(len(next(iter(inputs.values()))) == 1), float("nan"))

    monkeypatch.setitem(FORMATS, "onnx_int8", real._replace(open=poisoned))
    with pytest.raises(MissedError, match="onnx_int8 gives logits that are not finite; nothing was written"):
        export_network(made(images, CIFAR), images, ["onnx_int8"], tmp_path, section(int8_drop=100, samples=16))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shard", ["lots", "", "5", "-1GB", "5 XB"])
def test_a_size_of_shards_that_is_none(shard: str) -> None:
    with pytest.raises(ValueError, match="shard"):
        section(shard=shard)
    assert section(shard="1.5 GB").shard == "1.5 GB"


@pytest.mark.parametrize("opset", [7, 99])
def test_an_opset_that_cannot_express_the_network(opset: int, images: ClassifyTask, tmp_path: Path) -> None:
    network = made(images, CIFAR)
    with pytest.raises(UserError, match=r"export.opset.* set (it|export.opset) to \d+"):
        write_onnx(network, tmp_path / "onnx", probes(images, network.config)[1], opset)


def test_an_opset_that_the_runtime_cannot_run(text: MlmTask, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """From 23 on the standard has an operator for attention, which the exporter takes and ONNX Runtime 1.31 does not run with a mask."""
    network = made(text, BERT.model_copy(update={"layers": 1}))
    with pytest.raises(MissedError, match=r"onnx: ONNX Runtime cannot run it at export.opset 23 .*; set export.opset to 18; written: hf$"):
        export_network(network, text, ["onnx", "hf"], tmp_path, section(opset=23))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert "ERROR" not in capfd.readouterr().err.upper()


def test_the_trace_leaves_no_notes(images: ClassifyTask, tmp_path: Path) -> None:
    network = made(images, CIFAR)
    write_onnx(network, tmp_path, probes(images, network.config)[1])
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert not any(part.metadata_props or part.doc_string for part in (graph, *graph.node, *graph.value_info, *graph.initializer))
    assert b".py" not in (tmp_path / "model.onnx").read_bytes()


def test_dynamic_int8_reaches_the_product_with_a_large_vocabulary(tmp_path: Path) -> None:
    """The exporter turns small embeddings for the head beforehand and leaves large ones, of 2 ** 18 numbers and more, to be turned as it
    runs; either way the head's product, the largest of a thin BERT, must be one of integers."""
    network = BertConfig(vocab_size=16_500, hidden_size=16, heads=2, layers=1, max_positions=8).build()
    inputs = {name: torch.ones(2, 4, dtype=torch.long) for name in network.config.dynamic_axes}
    write_onnx(network, tmp_path, inputs)
    before = (tmp_path / "model.onnx").stat().st_size
    quantise_weights(tmp_path)
    found = operators(tmp_path)
    # six products with weights a layer and the head's two; attention's two stay fp32
    assert (found["MatMulInteger"], found["MatMul"]) == (6 + 2, 2)
    assert before > 4 * 16_500 * 16 and (tmp_path / "model.onnx").stat().st_size < 0.7 * before
    with torch.no_grad():
        difference = (open_onnx(tmp_path)(inputs) - network.eval()(inputs)).abs().max()
    assert 0 < difference < 0.05


def test_parity_sees_a_difference_and_a_nan() -> None:
    network = CIFAR.model_copy(update={"image_channels": 1, "image_size": 8, "classes": 3}).build()
    inputs = [{"pixels": torch.randn(2, 1, 8, 8)}]

    def plus(value: float) -> Any:
        def call(given: dict[str, Tensor]) -> Tensor:
            return network(given) + value

        return call

    with torch.no_grad():
        assert parity(network, plus(0.5), inputs)["max_difference"] == pytest.approx(0.5, abs=1e-5)
        assert parity(network, plus(float("nan")), inputs)["max_difference"] > 1e30
        assert parity(network, lambda given: -network(given), inputs)["top1_agreement"] < 1
