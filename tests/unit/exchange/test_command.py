"""tools/export.py and its like in Python, on a small run: any stage, a checkpoint in the middle, and what cannot be exported."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import wtn_pretrain
from tests.running import RESNET, ROOT, environment, recipe, stages_here, weights
from wtn_pretrain.data.stream import batches
from wtn_pretrain.errors import UserError
from wtn_pretrain.exchange.command import export_run
from wtn_pretrain.exchange.config import ExportSection
from wtn_pretrain.exchange.formats import FORMATS
from wtn_pretrain.recipe import load_recipe
from wtn_pretrain.stages import open_task
from wtn_pretrain.tasks.base import evaluate

SHAPE = {"family": "resnet", "block": "basic", "stem_channels": 4, "channels": [4, 8], "depths": [1, 1]}
FEW = {f"{stage}.{key}": value for stage in ("wide", "narrow", "finetune") for key, value in (("steps", 4), ("batch_size", 16))}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, one_rank: None) -> Path:
    """A finished run of an ImageNet-style ResNet on digits of 32 x 32, in three channels as Hugging Face's pipeline reads images."""
    folder = tmp_path_factory.mktemp("runs")
    changes = {
        "run.folder": str(folder),
        "model": SHAPE,
        "data.size": 32,
        "data.channels": 3,
        **FEW,
        "finetune.checkpoint_every": 2,
        "finetune.ema": 0.5,
    }
    stages = stages_here(recipe(RESNET, changes))
    stages.wide()
    stages.narrow(0)
    stages.finetune(0)
    return stages.folder.path


def refused(*arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        export_run("Export.", [str(argument) for argument in arguments])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_from_the_command_line(run: Path) -> None:
    call = [sys.executable, str(ROOT / "tools" / "export.py"), str(run), "--to", "hf, timm", "--export.license=mit"]
    done = subprocess.run(call, capture_output=True, text=True, env=environment(), cwd=run)
    assert done.returncode == 0, done.stderr
    assert "export hf: logits within" in done.stdout
    assert "export timm: not written: timm cannot hold this network: its ResNet has 4 stages" in done.stdout
    told = json.loads((run / "export" / "hf" / "parity.json").read_text())
    assert told["network"]["stage"] == "finetune"
    assert len(told["network"]["sha256"]["model.safetensors"]) == 64
    assert (told["network"]["seed"], told["network"]["step"]) == (0, None)
    card = (run / "export" / "hf" / "README.md").read_text()
    assert "It is the network of stage finetune of seed 0, as it ended." in card
    assert all(f"| {stage} |" in card for stage in ("wide", "narrow", "finetune"))


def test_a_format_that_cannot_hold_it_ends_the_command(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["export.py", str(run), "--to", "timm"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / "tools" / "export.py"), run_name="__main__")
    told = capsys.readouterr().err
    assert left.value.code == 2
    assert told.startswith("error: export: timm cannot hold this network") and len(told.splitlines()) == 1


def test_the_pipeline_classifies_as_the_network_does(run: Path, tmp_path: Path) -> None:
    from transformers import pipeline

    wtn_pretrain.export(run, "hf", out=tmp_path)
    task = open_task(load_recipe(run / "config.yaml"), run / "data")
    splits = task.splits  # type: ignore[attr-defined]
    image = Image.fromarray(splits.valid.pixels.read(torch.tensor([5]).numpy(), None, None)[0].transpose(1, 2, 0))
    # the name that transformers before version 5 knows as well
    assert json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())["image_processor_type"] == "BitImageProcessor"
    answers = pipeline("image-classification", model=str(tmp_path / "hf"), device="cpu")(image)
    network = wtn_pretrain.load(run)
    pixels = next(batches(task.valid, 8))["pixels"][5:6]
    with torch.no_grad():
        best = network({"pixels": pixels}).softmax(-1)[0].topk(5)
    assert [answer["label"] for answer in answers] == [splits.classes[index] for index in best.indices]
    assert [answer["score"] for answer in answers] == pytest.approx(best.values.tolist(), rel=1e-3)


def test_any_stage_from_python(run: Path) -> None:
    for stage in ("wide", "narrow"):
        written = wtn_pretrain.export(run, ["hf", "torchvision"], stage=stage, license="no: warranty", tolerance=None)
        assert "refused" in written["torchvision"]
        folder = run / "export" / stage / "hf"
        if stage == "wide":
            assert "no inner-widened blocks" in written["hf"]["refused"] and not folder.exists()
            continue
        assert "\nno: warranty\n" in (folder / "README.md").read_text()
        back, kept = wtn_pretrain.load(folder).state_dict(), weights(run / stage)
        assert all(torch.equal(value, back[name]) for name, value in kept.items())
    assert wtn_pretrain.load(run, stage="wide").config != wtn_pretrain.load(run).config


def test_a_checkpoint_gives_the_averaged_weights_of_its_step(run: Path, tmp_path: Path) -> None:
    (step,) = (run / "finetune" / "checkpoints").glob("step2")
    wtn_pretrain.export(run, "hf", checkpoint=step, out=tmp_path)
    found, end = wtn_pretrain.load(tmp_path / "hf", image_size=32), wtn_pretrain.load(run)
    # its metric is that of a stage which ended there
    section = load_recipe(run / "config.yaml").finetune
    assert section.ema == 0.5
    name = "head.classifier.weight"
    assert not torch.equal(found.state_dict()[name], end.state_dict()[name])
    from safetensors import safe_open

    averages = {}
    for part in step.glob("*.safetensors"):
        with safe_open(part, framework="pt") as file:
            averages |= {key: file.get_tensor(key) for key in file.keys() if key.startswith("average/average.")}  # noqa: SIM118
    assert torch.equal(found.state_dict()[name], averages[f"average/average.{name}"])
    task = open_task(load_recipe(run / "config.yaml"), run / "data")
    assert 0 <= evaluate(found, task)["metric"] <= 100
    told = json.loads((tmp_path / "hf" / "parity.json").read_text())["network"]
    assert (told["stage"], told["seed"], told["step"]) == ("finetune", 0, 2)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "It is the network of stage finetune of seed 0, at its step 2, before its end." in card
    assert "| narrow |" in card and "| finetune |" not in card
    damaged = shutil.copytree(step, tmp_path / "step2")
    part = next(damaged.glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-8])
    assert "give a whole folder stepN" in refused(run, "--to", "hf", "--checkpoint", damaged)
    # whose network it is stands in it
    assert f"--checkpoint {step}: is of stage finetune and not of scratch; give --stage finetune" in refused(
        run, "--stage", "scratch", "--checkpoint", step
    )


def test_a_card_tells_of_its_own_seed(run: Path, tmp_path: Path) -> None:
    both = shutil.copytree(run, tmp_path / "both")
    (both / "config.yaml").write_text((both / "config.yaml").read_text().replace("seeds:\n  - 0\n", "seeds:\n  - 0\n  - 3\n"))
    for stage, metric in (("narrow", 31.5), ("finetune", 61.25), ("scratch", 51.75)):
        shutil.copytree(run / ("finetune" if stage == "scratch" else stage), both / "seed-3" / stage)
        done = both / "seed-3" / stage / "done.json"
        done.write_text(json.dumps({**json.loads(done.read_text()), "metric": metric}))
    told = wtn_pretrain.export(both, "hf", seed=3, out=tmp_path / "finetune", samples=16)
    assert told["hf"]["network"]["seed"] == 3
    card = (tmp_path / "finetune" / "hf" / "README.md").read_text()
    assert "| narrow | 31.50 |" in card and "| finetune | 61.25 |" in card and "scratch |" not in card
    wtn_pretrain.export(both, "hf", stage="scratch", seed=3, out=tmp_path / "scratch", samples=16)
    card = (tmp_path / "scratch" / "hf" / "README.md").read_text()
    assert "| scratch | 51.75 |" in card and "| wide |" not in card and "| finetune |" not in card
    assert "Go Wide, Then Narrow" not in card.partition("## How")[0]


def test_the_help_names_every_key(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        export_run("Export.", ["--help"])
    told = capsys.readouterr().out
    assert all(f"--export.{key}=" in told for key in ExportSection.model_fields)
    doc = (ROOT / "tools" / "export.py").read_text().partition('"""')[2].partition('"""')[0]
    assert all(name in doc for name in FORMATS)


def test_what_is_no_run_has_no_stages(run: Path) -> None:
    with pytest.raises(UserError, match=r"stage 'wide': .*finetune is not the folder of a run"):
        wtn_pretrain.load(run / "finetune", stage="wide")


def test_what_cannot_be_exported(run: Path, tmp_path: Path) -> None:
    assert "holds no run (no config.yaml)" in refused(tmp_path)
    assert "--to gguf: no such format; there are hf, onnx" in refused(run, "--to", "gguf")
    assert "--to '': no such format; there are hf, onnx" in refused(run, "--to", "")
    with pytest.raises(UserError, match="no such format"):
        wtn_pretrain.export(run, [])
    assert "--seed 7: the run has the seeds 0" in refused(run, "--seed", "7")
    assert "give the folder of a run" in refused()
    assert "unknown; there are RUN, --to" in refused(run, "--verbose")
    assert "did you mean export.opset?" in refused(run, "--export.opsets=3")
    assert "export.shard: " in refused(run, "--export.shard=lots")
    assert "invalid choice: 'middle'" in refused(run, "--stage", "middle")
    half = shutil.copytree(run, tmp_path / "half")
    for name in ("narrow", "finetune"):
        (half / name / "model.json").unlink()
    assert "not yet merged, and no plain network; let stage 2 finish" in refused(half, "--stage", "narrow")
    assert "has not finished; let it, or export a checkpoint" in refused(half)
    shutil.rmtree(half / "finetune")
    assert "holds no finished network" in refused(half)
