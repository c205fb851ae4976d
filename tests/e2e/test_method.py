"""The whole method by `scripts/run.py` on small networks: what it leaves behind opens in the tools of those who deploy."""

import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from tests.running import BERT, RESNET, contents, equal_bits, recipe, succeed, weights, write_recipe
from wtn_pretrain.data.image_files import centre_box
from wtn_pretrain.models.base import parameter_count
from wtn_pretrain.models.store import load_network
from wtn_pretrain.report.summary import read_summary

pytestmark = pytest.mark.slow

STAGES = ("wide", "narrow", "finetune", "scratch")
ARM = {"mean", "spread", "values", "parameters", "flops", "latency_ms", "training"}
# trained long enough to hold more than the initial weights
RECIPES = {"resnet": recipe(RESNET), "bert": recipe(BERT, {"data.limit_mb": 0.1})}


class Finished(NamedTuple):
    """A run of the whole method."""

    config: Path
    folder: Path
    seconds: float
    said: str


Runs = Callable[[str], Finished]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The run of a recipe, made once."""
    made: dict[str, Finished] = {}

    def find(name: str) -> Finished:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            config = write_recipe(folder / "recipe.yaml", RECIPES[name])
            began = time.monotonic()
            done = succeed("run.py", config)
            made[name] = Finished(config, folder / "runs" / name, time.monotonic() - began, done.stdout)
        return made[name]

    return find


both = pytest.mark.parametrize("name", RECIPES)


@both
def test_summary(name: str, finished: Runs) -> None:
    run = finished(name)
    tree = json.loads((run.folder / "summary.json").read_text())
    assert tree.keys() == {
        "model", "name", "metric", "date", "commit", "hardware", "wide", "thin_scratch", "thin_win", "gain", "export", "curves",
    }  # fmt: skip
    assert tree["wide"].keys() == tree["thin_scratch"].keys() == ARM
    assert tree["thin_win"].keys() == {*ARM, "imitation_error"}
    assert tree["metric"].keys() == {"name", "unit", "higher_is_better"}
    assert tree["gain"].keys() == {"mean", "standard_error", "within_spread"}
    summary = read_summary(run.folder / "summary.json")
    assert summary.model == summary.name == name
    scratch, win = summary.thin_scratch, summary.thin_win
    assert scratch is not None
    assert win.parameters == scratch.parameters < summary.wide.parameters
    assert all(math.isfinite(value) for arm in summary.arms().values() for value in [arm.mean, arm.flops, arm.latency_ms])
    # the baseline sees as many samples as imitation and fine-tuning together
    assert win.training is not None
    assert scratch.training is not None
    assert win.training.steps == scratch.training.steps == 40
    assert len(win.imitation_error) == 4
    assert all(error is not None and 0 <= error < 2 for error in win.imitation_error)
    for text in ("wide", "thin from scratch", "thin by WIN", "export onnx: logits within", "report.html"):
        assert text in run.said


@both
def test_onnx_at_another_batch_size(name: str, finished: Runs) -> None:
    run = finished(name)
    network = load_network(run.folder / "finetune")
    session = onnxruntime.InferenceSession(str(run.folder / "export" / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    noise = torch.Generator().manual_seed(0)
    if name == "resnet":
        inputs = {"pixels": torch.randn(13, 1, 8, 8, generator=noise)}
    else:
        ids = torch.randint(5, 200, (5, 17), generator=noise)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    (logits,) = session.run(["logits"], {key: value.numpy() for key, value in inputs.items()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), network(inputs), atol=1e-5, rtol=1e-4)
    certificate = json.loads((run.folder / "export" / "onnx" / "parity.json").read_text())
    assert certificate["max_difference"] <= certificate["tolerance"]
    assert certificate["top1_agreement"] == 1.0


def test_bert_in_hugging_face(finished: Runs) -> None:
    from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

    run = finished("bert")
    folder = run.folder / "export" / "hf"
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    network = load_network(run.folder / "finetune")
    assert sum(weight.numel() for weight in model.parameters()) == parameter_count(network)
    inputs = tokenizer(["the value of the [MASK] is a string", "an object"], return_tensors="pt", padding=True)
    kept = inputs["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits[kept], network(dict(inputs))[kept], atol=1e-5, rtol=1e-4)
    answers = pipeline("fill-mask", model=str(folder), tokenizer=str(folder), device="cpu")(f"the value of the {tokenizer.mask_token} is")
    assert len(answers) == 5
    assert all(0 < answer["score"] < 1 and answer["token_str"] for answer in answers)


def test_what_hugging_face_lacks_is_said(finished: Runs) -> None:
    run = finished("resnet")
    assert "no CIFAR stem" in read_summary(run.folder / "summary.json").export["hf"]["refused"]
    assert "export hf: not written" in run.said
    assert not (run.folder / "export" / "hf").exists()


@both
def test_report_needs_nothing_from_elsewhere(name: str, finished: Runs) -> None:
    page = (finished(name).folder / "report.html").read_text(encoding="utf-8")
    assert "thin by WIN" in page
    assert not re.search(r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//""", page)
    assert "@import" not in page
    assert "url(http" not in page


@both
def test_second_start_trains_nothing(name: str, finished: Runs) -> None:
    run = finished(name)
    trained = {path: path.stat().st_mtime_ns for stage in STAGES for path in (run.folder / stage).rglob("*") if path.is_file()}
    figures = read_summary(run.folder / "summary.json")
    began = time.monotonic()
    again = succeed("run.py", run.config)
    print(f"{name}: first start {run.seconds:.1f} s, second {time.monotonic() - began:.1f} s")
    assert trained == {path: path.stat().st_mtime_ns for stage in STAGES for path in (run.folder / stage).rglob("*") if path.is_file()}
    assert not re.search(r"^(wide|narrow|finetune|scratch) \d+/", again.stderr, re.MULTILINE)
    assert [arm.mean for arm in read_summary(run.folder / "summary.json").arms().values()] == [arm.mean for arm in figures.arms().values()]


@both
def test_saved_configuration_repeats_the_run(name: str, finished: Runs) -> None:
    run = finished(name)
    before = contents(run.folder)
    succeed("run.py", run.folder / "config.yaml", "--run.name=again", cwd=run.config.parent)
    for stage in STAGES:
        assert equal_bits(weights(run.folder / stage), weights(run.folder.with_name("again") / stage)), stage
    assert contents(run.folder) == before


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of PNG files of stripes: 48 x 40 pixels, so that both crop and resize matter."""
    root = tmp_path_factory.mktemp("photographs") / "images"
    noise = np.random.default_rng(0)
    row, column = np.mgrid[:40, :48]
    for split, count in (("train", 24), ("valid", 8)):
        for label, phase in (("across", row), ("down", column), ("slanted", row + column)):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                wave = np.sin(phase * noise.uniform(0.3, 0.6) + noise.uniform(0, 6))[..., None] * noise.uniform(40, 90, 3)
                pixels = np.clip(128 + wave + noise.normal(0, 8, (40, 48, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{number}.png")
    return root


@pytest.mark.parametrize("crop_fraction", [1.0, 0.8])
def test_resnet_in_hugging_face(crop_fraction: float, tmp_path: Path, photographs: Path) -> None:
    """Logits of a validation image read by Hugging Face's processor, against ours.

    The processor resizes the whole image and then cuts, we cut and resize at once: equal where the resized sides are whole (a square
    image; 48 x 40 cut to four fifths of 40, which is 32). 48 x 40 shrunk to 32 rows is 38.4 columns wide, which the processor rounds:
    there logits may differ by a hundredth of their spread.
    """
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    changes: dict[str, Any] = {
        "model": {"family": "resnet", "block": "bottleneck", "stem_channels": 8, "channels": [16, 32], "depths": [1, 2]},
        "data": {"kind": "images", "source": "folder", "path": str(photographs), "size": 32, "crop_fraction": crop_fraction},
        "compare.scratch": False,
        "export.formats": ["hf"],
    }
    succeed("run.py", write_recipe(tmp_path / "recipe.yaml", recipe(RESNET, changes)))
    run = tmp_path / "runs" / "resnet"
    assert read_summary(run / "summary.json").thin_scratch is None
    model = AutoModelForImageClassification.from_pretrained(run / "export" / "hf").eval()
    processor = AutoImageProcessor.from_pretrained(run / "export" / "hf")
    network = load_network(run / "finetune")
    whole = Image.open(photographs / "valid" / "slanted" / "3.png")
    images = {"oblong": whole, "square": whole.crop((0, 0, 40, 40))}
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for shape, image in images.items():
        theirs = processor(image, return_tensors="pt")["pixel_values"]
        cut = image.resize((32, 32), Image.Resampling.BILINEAR, box=centre_box(*image.size, crop_fraction))
        ours = ((torch.from_numpy(np.asarray(cut).transpose(2, 0, 1).copy()).float() / 255 - mean) / std)[None]
        with torch.no_grad():
            logits, expected = model(theirs).logits, network({"pixels": ours})
            torch.testing.assert_close(logits, network({"pixels": theirs}), atol=1e-5, rtol=1e-5)
        rounded = shape == "oblong" and crop_fraction == 1.0
        tolerance = 0.01 * float(expected.std()) if rounded else 1e-5
        difference = float((logits - expected).abs().max())
        print(f"crop {crop_fraction}, {shape}: logits {difference:.1e} of spread {float(expected.std()):.1f}")
        assert difference <= tolerance, shape
