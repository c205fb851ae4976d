"""Masked language modelling on rows of whole documents: its loss, its counts, what it refuses; rows of the embedding beyond the words."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from wtn_pretrain.data.hashing import hash_keys
from wtn_pretrain.data.packing import PackedText
from wtn_pretrain.data.stream import BatchStream
from wtn_pretrain.data.text import TextData
from wtn_pretrain.errors import UserError
from wtn_pretrain.models import BertConfig
from wtn_pretrain.models.base import flops
from wtn_pretrain.tasks.base import evaluate
from wtn_pretrain.tasks.mlm import MlmSection, MlmTask

# most topics inside Python are longer than a row
TEXT = TextData(source="pydoc", vocab_size=200, sequence_length=64, limit_mb=0.05)
SHAPE = {"hidden_size": 16, "heads": 2, "layers": 2, "max_positions": 64, "dropout": 0, "attention_dropout": 0}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def mlm(cache: Path, packing: str, **shape: object) -> tuple[MlmTask, BertConfig]:
    config = BertConfig.model_validate({**SHAPE, **shape})
    task = MlmTask(MlmSection(), TEXT.model_copy(update={"packing": packing}), config, cache)
    completed = task.complete(config)
    assert isinstance(completed, BertConfig)
    return task, completed


@pytest.mark.parametrize("packing", ["documents", "padded"])
def test_the_loss_is_the_mean_over_masked_tokens(packing: str, cache: Path) -> None:
    task, config = mlm(cache, packing)
    network = config.build()
    text = task.train.text
    assert isinstance(text, PackedText)
    emptiest = np.argsort(text.layout.words())[:8]
    batch = task.train.fetch(emptiest, hash_keys(0, emptiest))
    assert (batch["targets"] == -100).any(), "some slots are unused"
    used = batch["targets"] != -100
    labels = torch.full_like(batch["input_ids"], -100)
    rows = torch.arange(8)[:, None].expand_as(used)
    labels[rows[used], batch["positions"][used]] = batch["targets"][used]
    whole = network(batch)
    torch.testing.assert_close(task.loss(network, batch)["loss"], F.cross_entropy(whole.flatten(0, 1), labels.flatten()))
    assert task.tally(network, batch)["count"] == used.sum()


def test_one_loss_for_packed_and_padded_rows(cache: Path) -> None:
    """The whole validation text, nothing hidden and all tokens scored: per token the same, whatever the rows."""
    totals = []
    torch.manual_seed(0)
    network = mlm(cache, "documents", initializer_range=0.2)[1].build().double().eval()
    for packing in ("documents", "padded"):
        text = mlm(cache, packing)[0].valid.text
        assert isinstance(text, PackedText)
        batch = text.fetch(torch.arange(len(text)).numpy(), None)
        kept = batch["segments" if packing == "documents" else "attention_mask"] > 0
        with torch.no_grad():
            totals.append(F.cross_entropy(network(batch)[kept], batch["input_ids"][kept], reduction="sum") / kept.sum())
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-10, atol=0)


@pytest.mark.parametrize("packing", ["documents", "padded"])
def test_flops_are_those_of_the_documents(packing: str, cache: Path) -> None:
    task, config = mlm(cache, packing)
    text = task.train.text
    assert isinstance(text, PackedText)
    lengths = [int(length) + 2 for length in text.layout.lengths]
    alone = {length: flops(config, length).blocks for length in set(lengths)}
    counted = task.forward_flops(config)
    for number, block in enumerate(counted.blocks):
        assert block == pytest.approx(sum(alone[length][number] for length in lengths) / len(text), abs=1)
    predicted = task.train.masker.budgets(text.layout.words()).mean()
    positions = torch.zeros(1, 1, dtype=torch.long, device="meta")
    assert counted.head == pytest.approx(predicted * flops(config, 64, positions=positions).head, abs=1)
    assert counted.total < mlm(cache, "none")[0].forward_flops(config).total, "less than a full row of one document"


def test_how_full_rows_are_is_said(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task, _ = mlm(cache, "documents")
    said = capsys.readouterr().err
    text = task.train.text
    assert isinstance(text, PackedText)
    assert said == (
        f"data: {len(text.layout.starts)} documents or pieces of them in {len(text)} rows of 64 tokens, {text.padding():.1%} padding\n"
    )
    mlm(cache, "none")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("packing", ["documents", "padded"])
def test_what_does_not_go_together_is_refused(packing: str, cache: Path) -> None:
    for pair_head in ("nsp", "sop"):
        with pytest.raises(
            UserError, match=rf"data\.packing: {packing} has no pairs .* model\.pair_head {pair_head}; set one of them to none"
        ):
            mlm(cache, packing, pair_head=pair_head)
    with pytest.raises(UserError, match=r"data\.sequence_length: 64 is longer than model\.max_positions 32"):
        mlm(cache, packing, max_positions=32)
    with pytest.raises(UserError, match=r"data\.sequence_length: 65 is longer than model\.max_positions 64"):
        BertConfig.model_validate(SHAPE).example_inputs(1, "meta", 65)


@pytest.mark.parametrize("packing", ["none", "documents", "padded"])
def test_probes_are_documents_as_an_export_takes_them(packing: str, cache: Path) -> None:
    task, config = mlm(cache, packing)
    network = config.build().eval()
    for probe in task.probes():
        kept = probe["attention_mask"].bool()
        assert kept[:, 0].all() and (probe["input_ids"][~kept] == task.tokenizer.pad_token_id).all()
        if packing != "none":
            assert ((probe["input_ids"] == task.tokenizer.cls_token_id).sum(1) == 1).all()
        with torch.no_grad():
            assert network(probe)[kept].isfinite().all()


def test_rows_beyond_the_vocabulary_lose_their_probability(cache: Path) -> None:
    """A padded vocabulary costs log(rows / words) at the start, and nothing once trained: no target is ever among those rows."""
    task, config = mlm(cache, "documents")
    words = config.vocab_size
    torch.manual_seed(0)
    network = task.complete(config.model_copy(update={"vocab_size": 256})).build()
    stream = BatchStream(task.train, 32, seed=0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)

    def beyond() -> float:
        batch = stream.micro_batch(0, 0)
        with torch.no_grad():
            return float(network(batch, positions=batch["positions"]).softmax(-1)[..., words:].sum(-1).mean())

    assert beyond() == pytest.approx(1 - words / 256, rel=0.05)
    first = float(task.loss(network, stream.micro_batch(0, 0))["loss"].detach())
    assert first == pytest.approx(math.log(256), rel=0.02)
    for step in range(100):
        optimizer.zero_grad()
        task.loss(network, stream.micro_batch(step, 0))["loss"].backward()
        optimizer.step()
    assert beyond() < 0.01
    assert evaluate(network, task)["loss"] < 0.9 * first
    for step in range(3):
        batch = stream.micro_batch(step, 0)
        assert batch["input_ids"].max() < words and batch["targets"].max() < words, "nor are they drawn as random words"
