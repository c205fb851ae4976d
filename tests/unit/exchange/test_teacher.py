"""A wide network from elsewhere in the place of stage 1's, through the stages: its shape, its data and its way into the run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertTokenizer

import wtn_pretrain
from tests.running import BERT, RESNET, ROOT, recipe, stages_here
from wtn_pretrain.config import validate
from wtn_pretrain.data.images import ImageData
from wtn_pretrain.errors import UserError
from wtn_pretrain.exchange.config import ExportSection
from wtn_pretrain.exchange.foreign import open_foreign
from wtn_pretrain.exchange.teacher import require_kin, require_same_inputs
from wtn_pretrain.exchange.write import export_network
from wtn_pretrain.imitation.bridges import bridge_kinds
from wtn_pretrain.imitation.pairing import pair
from wtn_pretrain.method import run_method
from wtn_pretrain.models import BertConfig, BlockNetwork, ResNetConfig
from wtn_pretrain.models.base import expand_preset
from wtn_pretrain.models.hf import to_hf
from wtn_pretrain.models.store import load_network, save_network
from wtn_pretrain.recipe import Recipe, load_recipe
from wtn_pretrain.stages import Stages, open_task
from wtn_pretrain.tasks.base import evaluate
from wtn_pretrain.tasks.classify import ClassifySection, ClassifyTask

FEW = {"narrow.steps": 6, "finetune.steps": 6, "narrow.micro_batch_size": 0}


def stages(folder: Path, base: dict[str, Any], changes: dict[str, Any]) -> Stages:
    tree = recipe(base, {"run.folder": str(folder / "runs"), **FEW, **changes})
    return stages_here(tree)


def refused(folder: Path, base: dict[str, Any], changes: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        stages(folder, base, changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizer:
    """The tokenizer that the recipe's text gives."""
    made = validate(Recipe, recipe(BERT))
    return open_task(made, tmp_path_factory.mktemp("data")).tokenizer  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def large(words: BertTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a BERT of four layers, 48 wide, of six heads, and its tokenizer."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=256, hidden_size=48, layers=4, heads=6, max_positions=32, norm="pre", initializer_range=0.2)
    folder = tmp_path_factory.mktemp("large")
    to_hf(config.build()).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


DEEP = {"model.layers": 2, "widen": None, "narrow.depth_map": [2, 4], "model.vocab_size": 0}


def test_a_deeper_and_wider_bert_teaches_by_a_depth_map(large: Path, tmp_path: Path, one_rank: None) -> None:
    teacher = shutil.copytree(large, tmp_path / "teacher")
    run = stages(tmp_path, BERT, {**DEEP, "wide.teacher": str(teacher)})
    assert (run.wide_shape.layers, run.wide_shape.hidden_size, run.wide_shape.heads) == (4, 48, 6)  # type: ignore[attr-defined]
    assert (run.thin.layers, run.thin.hidden_size, run.thin.vocab_size) == (2, 32, 256)  # type: ignore[attr-defined]
    assert run.pairing.teacher == (0, 2, 4)
    result = run.narrow(0)
    assert len(result["imitation_error"]) == 3
    assert all(error < 1.5 for error in result["imitation_error"])
    told = run.wide()
    assert (told["steps"], told["flops"]) == (0, 0)
    assert told["sha256"] == open_foreign(large).hashes()
    kept, given = load_network(run.folder.stage("wide")).state_dict(), open_foreign(large).network().state_dict()
    assert all(torch.equal(kept[name], given[name]) for name in given)
    assert run.finetune(0)["steps"] == 6
    # the run goes on where the teacher is gone
    shutil.rmtree(teacher)
    again = stages(tmp_path, BERT, {**DEEP, "wide.teacher": str(teacher)})
    assert again.narrow(0) == result


def test_teachers_that_do_not_fit_the_thin_network(large: Path, words: BertTokenizer, tmp_path: Path, one_rank: None) -> None:
    changes = {**DEEP, "wide.teacher": str(large)}
    for key, value, said in (
        ("model.vocab_size", 320, "model.vocab_size: is 320 and that of wide.teacher"),
        ("model.max_positions", 64, "model.max_positions: is 64 and that of wide.teacher"),
        ("model.norm", "post", "model.norm: is post and that of wide.teacher"),
        ("narrow.depth_map", [3, 2], "narrow.depth_map: [3, 2] goes from teacher block 3 to 2"),
        ("model.hidden_size", 64, "the student is wider (64) than its teacher (48)"),
    ):
        assert said in refused(tmp_path, BERT, {**changes, key: value})
    assert "is a bert and model.family is resnet" in refused(tmp_path, RESNET, {"wide.teacher": str(large)})
    assert "no such file or folder" in refused(tmp_path, RESNET, {"wide.teacher": str(tmp_path / "absent")})
    # the same number of words, two of them exchanged
    other = shutil.copytree(large, tmp_path / "other")
    told = json.loads((other / "tokenizer.json").read_text())
    vocab = told["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.get)[100:102]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(told))
    (other / "vocab.txt").unlink(missing_ok=True)
    line = refused(tmp_path, BERT, {**changes, "wide.teacher": str(other)})
    assert "has another vocabulary of 256 words for 256" in line
    assert f"set data.tokenizer to {other}" in line
    # without a tokenizer beside it the count must do
    for file in other.glob("*token*"):
        file.unlink()
    config = BertConfig(vocab_size=9000, hidden_size=48, layers=4, heads=6, max_positions=32, norm="pre")
    to_hf(config.build()).save_pretrained(other)
    line = refused(tmp_path, BERT, {**changes, "wide.teacher": str(other)})
    assert "has 9000 rows of words and the tokenizer 256 tokens" in line
    # words that are there in a form that cannot be compared
    (other / "spiece.model").write_bytes(b"pieces")
    to_hf(config.model_copy(update={"vocab_size": 256}).build()).save_pretrained(other)
    line = refused(tmp_path, BERT, {**changes, "wide.teacher": str(other)})
    assert f"tokenizer {other}: neither tokenizer_config.json nor vocab.txt in it" in line
    # the same words and numbers, of texts with capitals
    cased = shutil.copytree(large, tmp_path / "cased")
    told = json.loads((cased / "tokenizer.json").read_text())
    assert told["normalizer"]["type"] == "BertNormalizer"
    told["normalizer"]["lowercase"] = not told["normalizer"]["lowercase"]
    (cased / "tokenizer.json").write_text(json.dumps(told))
    if (cased / "tokenizer_config.json").exists():
        settings = json.loads((cased / "tokenizer_config.json").read_text())
        settings["do_lower_case"] = told["normalizer"]["lowercase"]
        (cased / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "the same words and another normalizer (another lowercase)" in refused(tmp_path, BERT, {**changes, "wide.teacher": str(cased)})
    assert not (tmp_path / "runs" / "bert" / "wide").exists()


def test_a_stage_of_another_run_brings_its_words_and_pixels(words: BertTokenizer, tmp_path: Path) -> None:
    bert = BertConfig(vocab_size=256, hidden_size=48, layers=2, heads=6, max_positions=32, norm="pre").build()
    words.save_pretrained(tmp_path / "run" / "data" / "tokenizer")
    (tmp_path / "run" / "config.yaml").write_text("data: {mean: [0.5], std: [0.25]}")
    for place in ("finetune", "seed-1/finetune"):
        save_network(tmp_path / "run" / place, bert.config, bert.state_dict())
        found = open_foreign(tmp_path / "run" / place)
        assert found.tokenizer == (tmp_path / "run" / "data" / "tokenizer").resolve()
        assert found.pixels == ((0.5,), (0.25,))
    save_network(tmp_path / "alone", bert.config, bert.state_dict())
    assert open_foreign(tmp_path / "alone").tokenizer is None


def test_a_checkpoint_has_the_words_of_a_teacher_that_is_gone(words: BertTokenizer, tmp_path: Path, one_rank: None) -> None:
    """The teacher's embedding is padded: the tokenizer alone would give another shape."""
    teacher = BertConfig(vocab_size=264, hidden_size=32, layers=2, heads=4, max_positions=32, norm="pre").build()
    save_network(tmp_path / "teacher", teacher.config, teacher.state_dict())
    changes = {**DEEP, "narrow.depth_map": None, "wide.teacher": str(tmp_path / "teacher"), "export.samples": 8}
    run = stages(tmp_path, BERT, {**changes, "finetune.checkpoint_every": 2, "finetune.steps": 4, "narrow.steps": 4})
    run.wide()
    run.scratch(0)
    shutil.rmtree(tmp_path / "teacher")
    step = max((run.folder.stage("scratch") / "checkpoints").glob("step*"))
    wtn_pretrain.export(run.folder.path, "hf", stage="scratch", checkpoint=step.name, out=tmp_path / "out")
    assert wtn_pretrain.load(tmp_path / "out" / "hf").config.vocab_size == 264  # type: ignore[attr-defined]


def test_bert_large_teaches_bert_base() -> None:
    """The published sizes, as shapes alone: 24 layers 1,024 wide for 12 layers 768 wide."""
    made = load_recipe(ROOT / "configs" / "cluster" / "bert-base-from-large.yaml")
    thin = made.model
    large = validate(BertConfig, {**expand_preset({"preset": "bert-large"})})
    wide = require_kin(thin, large, "bert-large")
    assert isinstance(wide, BertConfig) and isinstance(thin, BertConfig)
    assert (wide.layers, wide.hidden_size, thin.layers, thin.hidden_size) == (24, 1024, 12, 768)
    for depth_map in ((), tuple(range(2, 25, 2))):
        pairing = pair(thin, wide, depth_map=depth_map)
        assert pairing.teacher == tuple(range(0, 25, 2)) and pairing.student == tuple(range(13))
        with torch.device("meta"):
            kinds = bridge_kinds(thin.build(), wide.build(), pairing, made.narrow.bridge)
        # every skip is the identity, and the final norm of a pre-LN network stands before the head
        assert set(kinds[:-1]) == {"constrained"} and kinds[-1] in ("constrained", "free")
    with pytest.raises(UserError, match="model.norm: is post and that of wide.teacher"):
        require_kin(thin, large.model_copy(update={"norm": "pre"}), "bert-large")


def digits(channels: tuple[int, ...], stem: int, **more: Any) -> BlockNetwork:
    torch.manual_seed(1)
    config = ResNetConfig(
        block="basic",
        stem="cifar",
        stem_channels=stem,
        channels=channels,
        depths=(2, 2),
        image_channels=1,
        image_size=8,
        classes=10,
        **more,
    )
    return config.build()


@pytest.mark.parametrize("shortcut", ["projection", "padding"])
def test_a_resnet_with_padded_shortcuts_teaches_through_bridges(shortcut: str, tmp_path: Path, one_rank: None) -> None:
    teacher = digits((16, 32), 16, shortcut="padding")
    save_network(tmp_path / "teacher", teacher.config, teacher.state_dict())
    changes = {"widen": None, "model.shortcut": shortcut, "model.depths": [1, 1], "wide.teacher": str(tmp_path / "teacher")}
    run = stages(tmp_path, RESNET, changes)
    run.narrow(0)
    merged = json.loads((run.folder.stage("narrow") / "merge.json").read_text())
    # the boundary before a padded shortcut cannot take a map, the one before a projection can
    assert merged["bridges"] == {"0": "constrained", "1": "free" if shortcut == "projection" else "constrained", "2": "constrained"}
    assert merged["difference_fp64"] < 1e-10


def test_the_whole_method_with_a_teacher(tmp_path: Path, one_rank: None) -> None:
    teacher = digits((8, 16), 8, shortcut="padding")
    save_network(tmp_path / "teacher", teacher.config, teacher.state_dict())
    changes = {"widen": None, "wide.teacher": str(tmp_path / "teacher"), "compare.scratch": False, "export.formats": ["torch_export"]}
    run = stages(tmp_path, RESNET, changes)
    summary = run_method(run)
    assert summary is not None and summary.wide.training is not None
    assert summary.wide.training.steps == summary.wide.training.flops == 0
    assert summary.wide.mean == run.wide()["metric"] == evaluate(teacher.eval(), run.task)["metric"]
    card = (run.folder.path / "export" / "torch_export" / "README.md").read_text()
    (digest,) = run.wide()["sha256"].values()
    assert f"The wide network was not trained here: it was read from teacher (SHA-256: model.safetensors {digest})." in card
    assert str(tmp_path / "teacher") not in card
    assert (run.folder.path / "report.html").exists()


HOLD = """
import fcntl, os, sys
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print(f"process {os.getpid()}", file=file, flush=True)
print("held", flush=True)
sys.stdin.read()
"""


def test_the_run_is_held_while_a_teacher_comes_in(tmp_path: Path, one_rank: None) -> None:
    teacher = digits((8, 16), 8)
    save_network(tmp_path / "teacher", teacher.config, teacher.state_dict())
    changes = {"widen": None, "wide.teacher": str(tmp_path / "teacher")}
    # the first start holds the run it has made until it is gone
    stages(tmp_path, RESNET, changes)
    run = stages(tmp_path, RESNET, changes)
    call = [sys.executable, "-c", HOLD, str(run.folder.path / ".lock")]
    with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        for stage in (run.wide, lambda: run.narrow(0)):
            with pytest.raises(UserError, match=f"process {other.pid} works on this run"):
                stage()
        assert not run.folder.stage("wide").exists()
        other.communicate()
    assert run.wide()["steps"] == 0


def test_how_a_wide_network_would_be_trained_is_not_asked(tmp_path: Path, one_rank: None) -> None:
    teacher = digits((8, 16), 8)
    save_network(tmp_path / "teacher", teacher.config, teacher.state_dict())
    changes = {"wide.tensor_parallel": 3, "wide.deepspeed": str(tmp_path / "absent.json"), "wide.schedule": {"name": "constant"}}
    assert "wide.tensor_parallel: " in refused(tmp_path, RESNET, changes)
    assert "absent.json" in refused(tmp_path, RESNET, {**changes, "wide.tensor_parallel": 1})
    run = stages(tmp_path, RESNET, {**changes, "widen": None, "wide.teacher": str(tmp_path / "teacher")})
    assert run.wide()["steps"] == 0
    assert run.recipe.scratch().schedule == run.recipe.finetune.schedule != run.recipe.wide.schedule


def test_pixels_of_another_normalisation(tmp_path: Path, one_rank: None) -> None:
    config = ResNetConfig(block="basic", depths=(1, 1), channels=(8, 16), stem_channels=8, image_channels=1, classes=10)
    to_hf(config.build()).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "preprocessor_config.json").write_text('{"image_mean": [0.5], "image_std": [0.25]}')
    changes = {
        "widen": None,
        "wide.teacher": str(tmp_path / "hf"),
        "data.size": 32,
        "model": {"family": "resnet", "block": "basic", "channels": [4, 8], "depths": [1, 1], "stem_channels": 4},
    }
    line = refused(tmp_path, RESNET, changes)
    assert "its images had mean [0.5] and the data's have" in line
    assert "--data.mean='[0.5]' --data.std='[0.25]'" in line
    run = stages(tmp_path, RESNET, {**changes, "data.mean": [0.5], "data.std": [0.25]})
    run.narrow(0)
    with pytest.raises(UserError, match="2 numbers and the images 1 channels"):
        ClassifyTask(ClassifySection(), ImageData(source="digits", mean=(0.5, 0.5), std=(0.2, 0.2)))


def test_classes_in_another_order(tmp_path: Path) -> None:
    task = ClassifyTask(ClassifySection(), ImageData(source="digits"))
    model = to_hf(ResNetConfig(block="basic", depths=(1,), channels=(8,), stem_channels=8, image_channels=1, classes=10).build())
    for names, said in ((list("0123456789"), None), (list("1023456789"), "'1' is number 0 there and '0' here"), (list("abcdefghij"), None)):
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: number for number, name in enumerate(names)}
        model.save_pretrained(tmp_path)
        found = open_foreign(tmp_path)
        assert found.labels == tuple(names)
        if said is None:
            require_same_inputs(found, task, "there")
        else:
            with pytest.raises(UserError, match=f"wide.teacher there: has the data's classes in another order .{said}"):
                require_same_inputs(found, task, "there")


def test_what_a_run_has_come_to_is_told_where_an_export_misses(tmp_path: Path, one_rank: None) -> None:
    teacher = digits((8, 16), 8)
    save_network(tmp_path / "teacher", teacher.config, teacher.state_dict())
    formats = {"export.formats": ["onnx", "onnx_int8"], "export.samples": 16, "export.calibration": 16}
    changes = {"widen": None, "wide.teacher": str(tmp_path / "teacher"), "compare.scratch": False, **formats, "export.tolerance": 1e-30}
    run = stages(tmp_path, RESNET, {**changes, "export.int8_drop": 100})
    with pytest.raises(UserError, match=r"onnx logits differ .* than export.tolerance 1e-30; nothing was written; written: onnx_int8$"):
        run_method(run)
    told = json.loads((run.folder.path / "summary.json").read_text())["export"]
    assert "more than export.tolerance" in told["onnx"]["refused"] and told["onnx_int8"]["bytes"] > 0
    assert (run.folder.path / "report.html").exists()
    assert [path.name for path in (run.folder.path / "export").iterdir()] == ["onnx_int8"]


def cifar(folder: Path, shared: Any, images: int) -> ClassifyTask:
    """CIFAR-10's first test images, normalised as the public networks had them."""
    source = shared("cifar10")
    binary = folder / "cifar" / "test_batch.bin"
    binary.parent.mkdir()
    subprocess.run([sys.executable, str(source / "unpack.py"), str(source / "test.imp.xz"), str(binary)], check=True)
    binary.write_bytes(binary.read_bytes()[: images * 3073])
    # the training images do not matter here
    shutil.copy(binary, binary.with_name("data_batch_1.bin"))
    data = ImageData(source="cifar", path=str(binary.parent), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    return ClassifyTask(ClassifySection(), data)


def scores(task: ClassifyTask, shared: Any, depth: int, folder: Path) -> tuple[float, float]:
    """The score of a public network in ours and after its export to ONNX."""
    (file,) = shared("fixtures").glob(f"resnet-cifar/resnet{depth}-*.th")
    network = open_foreign(file, pickles=True, image_size=32).network()
    written = export_network(network, task, ["onnx"], folder, ExportSection(samples=0))["onnx"]
    assert written["metric_samples"] == len(task.valid) and written["difference"] <= 1e-4
    return written["metric_before"], written["metric_after"]


def test_a_trained_cifar_network_scores_as_published(tmp_path: Path, shared: Any) -> None:
    """On all 10,000 test images ours scores the published 91.73; of the first 1,500, which take a tenth of the time, it tells 1,373."""
    task = cifar(tmp_path, shared, 1500)
    assert scores(task, shared, 20, tmp_path / "export") == pytest.approx((100 * 1373 / 1500,) * 2)


@pytest.mark.slow
def test_all_trained_cifar_networks_keep_their_scores(tmp_path: Path, shared: Any) -> None:
    """The published 91.73, 92.63, 93.10 and 93.39 on 10,000 images; of the first 1,000, four standard errors are 3.5 points."""
    task = cifar(tmp_path, shared, 1000)
    for depth, published in ((20, 91.73), (32, 92.63), (44, 93.10), (56, 93.39)):
        before, after = scores(task, shared, depth, tmp_path / f"export{depth}")
        print(f"ResNet-{depth}: {before:.2f} before, {after:.2f} after")
        assert before == after == pytest.approx(published, abs=3.5)
