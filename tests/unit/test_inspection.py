"""tools/inspect_data.py: what it shows is what the batch holds."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.running import BERT, RESNET, recipe, write_recipe
from wtn_pretrain.data.show import as_bytes, as_html, as_terminal, contact_sheet, tokens_of
from wtn_pretrain.errors import UserError
from wtn_pretrain.inspection import run
from wtn_pretrain.recipe import load_recipe
from wtn_pretrain.stages import open_task


def test_marks_stand_where_the_batch_has_them(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", recipe(BERT, {"data.packing": "padded", "run.folder": str(tmp_path)}))
    said = run("", ["--config", str(path), "--samples", "20", "--step", "2", "--html", str(tmp_path / "page.html"), "--plain"])
    task = open_task(load_recipe(path), tmp_path / "cache")
    batch = task.stream(20, steps=20, seed=3).micro_batch(2, 0)
    page = (tmp_path / "page.html").read_text()
    kinds = {"masked": 0, "random": 0, "kept": 0}
    for row in range(20):
        shown = tokens_of(batch, row, task.tokenizer)  # type: ignore[attr-defined]
        assert len(shown) == int(batch["attention_mask"][row].sum())
        original = batch["input_ids"][row].clone()
        used = batch["targets"][row] >= 0
        original[batch["positions"][row][used]] = batch["targets"][row][used]
        names = task.tokenizer.convert_ids_to_tokens(original[: len(shown)].tolist())  # type: ignore[attr-defined]
        assert [token.was for token in shown] == names
        assert sum(token.kind in kinds for token in shown) == int(used.sum())
        for token in shown:
            if token.kind in kinds:
                kinds[token.kind] += 1
                assert (token.kind == "masked") == (token.text == "[MASK]")
        assert as_terminal(shown, colour=False) in said
        assert "\x1b[31m[" in as_terminal(shown) or all(token.kind != "masked" for token in shown)
    # the legend names each kind once
    assert {kind: page.count(f'class="{kind}"') - 1 for kind in kinds} == kinds and kinds["masked"] > 20
    assert not (tmp_path / "bert").exists()  # nothing is left in the run's place
    assert "<script>" not in as_html([[type(shown[0])("<script>", "x", "plain")]], ["<script>"])


def test_pictures_are_the_batchs(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", recipe(RESNET, {"data.mixup": 0.2, "run.folder": str(tmp_path)}))
    said = run("", ["--config", str(path), "--samples", "9", "--png", str(tmp_path / "sheet.png")])
    assert re.search(r"^image \d+: 0\.\d\d \d 0\.\d\d \d$", said, re.MULTILINE) and "9 images of 8 x 8 pixels" in said
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (8 * (64 + 2), 2 * (64 + 12 + 2))
    valid = run("", ["--config", str(path), "--split", "valid", "--samples", "5"])
    task = open_task(load_recipe(path), tmp_path)
    labels = task.valid.fetch(np.arange(5), None)["labels"].tolist()
    assert re.findall(r"^image (\d+): (\d)$", valid, re.MULTILINE) == [(str(i), str(label)) for i, label in enumerate(labels)]


def test_pixels_come_back_as_they_were() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3)).astype(np.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    normalised = torch.from_numpy((pixels / 255 - np.array(mean)) / np.array(std)).float().permute(0, 3, 1, 2)
    assert (as_bytes(normalised, mean, std) == pixels).all()
    sheet = np.asarray(contact_sheet(pixels, list("abcde"), columns=3, least=1))
    assert (sheet[:6, :7] == pixels[0]).all() and (sheet[20:26, 9:16] == pixels[4]).all()


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    text = str(write_recipe(tmp_path / "text.yaml", recipe(BERT, {})))
    images = str(write_recipe(tmp_path / "images.yaml", recipe(RESNET, {})))
    for arguments, message in (
        (["--config", text, "--png", "x.png"], "data is text; use --html"),
        (["--config", images, "--html", "x.html"], "data is images; use --png"),
        (["--config", text, "--wrong"], "argument --wrong: unknown"),
        (["--config", text, "--samples", "0"], "must be at least"),
        ([], "--config"),
    ):
        with pytest.raises(UserError, match=message):
            run("", arguments)
