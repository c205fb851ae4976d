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
    # one corpus of pairs between sentences, and one of pairs cut anywhere
    preprocess_command([*common, "--valid-fraction", "0", "--out", str(tmp_path / "two"), str(tmp_path / "other.txt")])
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
    config = write_recipe(tmp_path / "recipe.yaml", recipe(BERT, changes))
    started = [
        forge.start("train_wide.py", config, f"--run.name=on{ranks}", f"--wide.micro_batch_size={rows}", ranks=ranks)
        for ranks, rows in ((1, 0), (2, 4))
    ]
    for ranks in started:
        ranks.succeed(240)
    one, two = (losses(tmp_path / "runs" / name / "wide") for name in ("on1", "on2"))
    assert len(one) == 20 and all(map(math.isfinite, one))
    # the loss falls, from guessing among 512 entries and two orders
    assert one[0] == pytest.approx(math.log(512) + math.log(2), abs=0.4) and min(one[-3:]) < one[0] - 0.5
    # the same samples, of which the four micro-batches hide different numbers of tokens: what is left is the round-off of their sums
    assert max(abs(mine - theirs) for mine, theirs in zip(one, two, strict=True)) < 1e-5
