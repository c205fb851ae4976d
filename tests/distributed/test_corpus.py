"""The whole path of text: raw Wikipedia to a trained tokenizer, to token files, to training on ranks; and the documents' own commands."""

import json
import lzma
import math
import shlex
import time
from pathlib import Path

import pytest

from tests.running import BERT, ROOT, Forge, losses, recipe, steps_logged, write_recipe
from wtn_pretrain.data.corpus import PydocTopics, blocks
from wtn_pretrain.data.prepare.command import preprocess_command, train_tokenizer_command
from wtn_pretrain.inspection import run as inspect

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


def test_killed_and_continued_on_other_ranks(forge: Forge, tmp_path: Path) -> None:
    texts = list(blocks(PydocTopics(), 200_000))

    def prepare(name: str, some: list[str]) -> None:
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
        train = ["--vocab-size", "300", "--out", str(tmp_path / "tok"), str(tmp_path / "all.jsonl")]
        if name == "all":
            train_tokenizer_command(["--quiet", *train])
        arguments = ["--tokenizer", str(tmp_path / "tok"), "--out", str(tmp_path / "corpus"), "--quiet", "--workers", "0"]
        preprocess_command([*arguments, str(tmp_path / f"{name}.jsonl")])

    prepare("all", texts)
    changes = {
        "data": {"kind": "text", "source": "corpus", "paths": [str(tmp_path / "corpus")], "sequence_length": 24, "packing": "documents"},
        "wide.steps": 400,
        "wide.checkpoint_every": 7,
    }
    config = write_recipe(tmp_path / "recipe.yaml", recipe(BERT, changes))
    whole = forge.start("train_wide.py", config, "--run.name=whole", ranks=1)
    stage = tmp_path / "runs" / "broken" / "wide"
    # killed on two ranks, continued on one, killed again and ended on two
    for ranks, step in ((2, 20), (1, 60)):
        started = forge.start("train_wide.py", config, "--run.name=broken", f"--wide.micro_batch_size={16 // ranks}", ranks=ranks)
        while max(steps_logged(stage), default=0) < step:
            assert not started.ended(), started.stderr()[-3000:]
            assert time.monotonic() - started.began < 120
            time.sleep(0.005)
        started.kill()
        assert any(started.codes()) and not (stage / "done.json").exists()
    forge.start("train_wide.py", config, "--run.name=broken", "--wide.micro_batch_size=8", ranks=2).succeed(240)
    whole.succeed(240)
    one, other = losses(tmp_path / "runs" / "whole" / "wide"), losses(stage)
    # a sample lost, repeated or in another place changes a loss by hundredths; sums of two ranks part by round-off, and slowly grow apart
    assert len(one) == 400 and max(abs(mine - theirs) for mine, theirs in zip(one[:100], other[:100], strict=True)) < 1e-4

    # another corpus in the same place is not what the checkpoints were made on
    again = forge.start("train_wide.py", config, "--run.name=remade", ranks=1)
    remade = tmp_path / "runs" / "remade" / "wide"
    while max(steps_logged(remade), default=0) < 20:
        assert not again.ended() and time.monotonic() - again.began < 120
        time.sleep(0.005)
    again.kill()
    again.codes()
    for file in (tmp_path / "corpus").iterdir():
        if file.is_file():
            file.unlink()
    for file in (tmp_path / "corpus" / "tokenizer").iterdir():
        file.unlink()
    (tmp_path / "corpus" / "tokenizer").rmdir()
    prepare("swapped", [*texts[1:], texts[0]])
    refused = forge.start("train_wide.py", config, "--run.name=remade", ranks=1)
    assert refused.codes() == [2] and "belongs to another run (data " in refused.stderr()


SMALL = [
    *("--model.layers=2", "--model.hidden_size=32", "--model.heads=2", "--widen.inner=2", "--export.formats=[hf]"),
    *(f"--{stage}.{key}" for stage in ("wide", "narrow", "finetune") for key in ("steps=2", "batch_size=4")),
    *("--wide.evaluate_every=0", "--finetune.evaluate_every=0"),
]
"""What makes the recipe one of seconds."""


@pytest.mark.parametrize("document", ["README.md", "docs/data.md"])
def test_the_commands_of_the_documents(forge: Forge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, document: str) -> None:
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    texts = [text for text in blocks(PydocTopics(), 250_000) if len(text) > 200]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts[1::3])
    (tmp_path / "wiki").mkdir()
    (tmp_path / "wiki" / "a.txt.xz").write_bytes(lzma.compress("".join(f"<doc>\n{text}\n</doc>\n" for text in texts[::3]).encode()))
    with pyarrow.CompressedOutputStream(str(tmp_path / "books.jsonl.zst"), "zstd") as stream:
        stream.write(rows.encode())
    (tmp_path / "table").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[2::3]}), tmp_path / "table" / "train.parquet")
    place = {"TEXT...": ["wiki", "books.jsonl.zst"], "datasets:NAME": [f"datasets:{tmp_path / 'table'}"]}
    lines = [line for line in (ROOT / document).read_text(encoding="utf-8").splitlines() if line.startswith(("python ", "deepspeed "))]
    ran = set()
    for line in lines:
        _, script, *words = shlex.split(line)
        words = [str(ROOT / word) if word.startswith("configs/") else word for word in words]
        words = [word for given in words for word in place.get(given, [given])]
        if script.endswith("train_tokenizer.py"):
            train_tokenizer_command(["--quiet", *words])
        elif script.endswith("preprocess_corpus.py"):
            preprocess_command([*words, "--workers", "0", "--quiet"])
        elif "bert-corpus" not in line:
            continue
        elif script.endswith("inspect_data.py"):
            said = inspect("", [*words, "--plain"])
            assert said.startswith("row ") and said.count("\nrow ") == 7 and "[CLS]" in said
        else:
            forge.program(ROOT / script, *words, *SMALL, cwd=tmp_path).succeed(240)
        ran.add(Path(script).name)
    assert {"train_tokenizer.py", "preprocess_corpus.py", "inspect_data.py"} < ran and len(ran) == 4
    assert steps_logged(tmp_path / "runs" / "bert-corpus" / "wide")[-1] == 2
