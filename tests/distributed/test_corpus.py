"""The whole path of text: raw Wikipedia to a trained tokenizer, to token files, to training on ranks."""

import lzma
import math
from pathlib import Path

import pytest

from tests.running import BERT, Forge, losses, recipe, write_recipe
from wtn_pretrain.data.prepare.command import preprocess_command, train_tokenizer_command

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "wiki-en-2014"


def test_raw_text_to_a_trained_network(forge: Forge, tmp_path: Path) -> None:
    if not SHARED.exists():
        pytest.skip("real data shared/data/wiki-en-2014 is not beside the repository")
    with lzma.open(SHARED / "valid.txt.xz") as stream:
        text = stream.read(500_000).rsplit(b"</doc>", 1)[0] + b"</doc>\n"
    (tmp_path / "wiki.txt.xz").write_bytes(lzma.compress(text))
    source, tokenizer = str(tmp_path / "wiki.txt.xz"), str(tmp_path / "tok")
    train_tokenizer_command(["--out", tokenizer, "--vocab-size", "500", "--limit-mb", "0.2", source])
    common = ["--tokenizer", tokenizer, "--quiet", "--workers", "1"]
    said = preprocess_command(
        [*common, "--sentences", "--deduplicate", "--out", str(tmp_path / "one"), "--licence", "CC BY-SA 3.0", source]
    )
    assert f"{text.count(b'</doc>')} documents read" in said
    (tmp_path / "other.txt").write_bytes(text[: len(text) // 3])
    preprocess_command([*common, "--sentences", "--valid-fraction", "0", "--out", str(tmp_path / "two"), str(tmp_path / "other.txt")])
    changes = {
        "model.max_positions": 48,
        "model.pair_head": "sop",
        "task.span": 5,
        "data": {
            "kind": "text",
            "source": "corpus",
            "paths": [str(tmp_path / "one"), str(tmp_path / "two")],
            "weights": [3, 1],
            "sequence_length": 48,
            "lengths": [[0.5, 24]],
        },
    }
    ran = {}
    for ranks in (1, 2):
        folder = tmp_path / f"on-{ranks}"
        folder.mkdir()
        forge.start("train_wide.py", write_recipe(folder / "recipe.yaml", recipe(BERT, changes)), ranks=ranks).succeed(240)
        ran[ranks] = losses(folder / "runs" / "bert" / "wide")
    assert len(ran[1]) == 20 and all(map(math.isfinite, ran[1]))
    # the loss falls, from guessing among 512 entries and two orders
    assert ran[1][0] == pytest.approx(math.log(512) + math.log(2), abs=0.4) and min(ran[1][-3:]) < ran[1][0] - 0.5
    # the same samples: means over halves of a batch weigh halves alike, though they may hide different numbers of tokens (see MlmTask)
    assert max(abs(one - two) for one, two in zip(ran[1], ran[2], strict=True)) < 0.05
