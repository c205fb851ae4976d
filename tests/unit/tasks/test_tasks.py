"""Tasks: what they fill in, what they refuse, and their losses against torch's on the whole output."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from wtn_pretrain.data.images import ImageData
from wtn_pretrain.data.stream import BatchStream, batches
from wtn_pretrain.data.text import TextData
from wtn_pretrain.errors import UserError
from wtn_pretrain.models import BertConfig, ResNetConfig
from wtn_pretrain.tasks.base import evaluate
from wtn_pretrain.tasks.classify import ClassifySection, ClassifyTask
from wtn_pretrain.tasks.mlm import MlmSection, MlmTask

TEXT = TextData(source="pydoc", vocab_size=200, sequence_length=16, limit_mb=0.05)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def mlm(cache: Path, **shape: object) -> tuple[MlmTask, BertConfig]:
    config = BertConfig(hidden_size=16, heads=2, layers=2, max_positions=16, dropout=0, attention_dropout=0, **shape)
    task = MlmTask(MlmSection(), TEXT, config, cache)
    completed = task.complete(config)
    assert isinstance(completed, BertConfig)
    return task, completed


def test_masked_loss_equals_that_of_the_whole_output(cache: Path) -> None:
    task, config = mlm(cache)
    network = config.build()
    batch = BatchStream(task.train, 4, seed=0).micro_batch(0, 0)
    labels = torch.full_like(batch["input_ids"], -100).scatter(1, batch["positions"], batch["targets"])
    whole = network(batch)
    torch.testing.assert_close(task.loss(network, batch)["loss"], F.cross_entropy(whole.flatten(0, 1), labels.flatten()))
    tally = task.tally(network, batch)
    kept = labels != -100
    assert tally["count"] == kept.sum()
    assert tally["right"] == (whole.argmax(-1)[kept] == labels[kept]).sum()


@pytest.mark.parametrize("kind", ["nsp", "sop"])
def test_the_pair_head_is_trained_beside_the_masked_tokens(kind: str, cache: Path) -> None:
    task, config = mlm(cache, pair_head=kind, initializer_range=0.1)
    torch.manual_seed(0)
    network = config.build()
    stream = BatchStream(task.train, 32, seed=0)
    losses = task.loss(network, stream.micro_batch(0, 0))
    torch.testing.assert_close(losses["loss"], losses["masked"] + losses["pair"])
    labels = torch.cat([stream.micro_batch(step, 0)["pair_label"] for step in range(20)]).float()
    assert 0.4 < labels.mean() < 0.6, "both kinds of pair occur"
    # one batch is learned by heart: gradients reach the pair head and what is below it
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    batch = stream.micro_batch(0, 0)
    for _ in range(60):
        optimizer.zero_grad()
        after = task.loss(network, batch)
        after["loss"].backward()
        optimizer.step()
    assert after["pair"] < 0.5 * losses["pair"]


def test_vocabulary_and_length_must_fit(cache: Path) -> None:
    task, config = mlm(cache)
    words = len(task.tokenizer)
    assert config.vocab_size == words
    assert task.complete(config.model_copy(update={"vocab_size": words + 8})).vocab_size == words + 8
    with pytest.raises(UserError, match=f"model.vocab_size: the embedding has {words - 1} rows and the tokenizer {words} tokens"):
        task.complete(config.model_copy(update={"vocab_size": words - 1}))
    with pytest.raises(UserError, match=r"data.sequence_length: 16 is longer than model.max_positions 8"):
        task.complete(config.model_copy(update={"max_positions": 8}))


def test_the_images_decide_channels_size_and_classes() -> None:
    task = ClassifyTask(ClassifySection(label_smoothing=0.1), ImageData(source="digits"))
    config = ResNetConfig(block="basic", stem="cifar", channels=(4, 8), depths=(1, 1), stem_channels=4)
    completed = task.complete(config)
    assert (completed.image_channels, completed.image_size, completed.classes) == (1, 8, 10)
    with pytest.raises(UserError, match=r"model.classes: is 7 and the data has 10; set it to 10, or 0"):
        task.complete(config.model_copy(update={"classes": 7}))
    network = completed.build()
    batch = BatchStream(task.train, 8, seed=0).micro_batch(0, 0)
    expected = F.cross_entropy(network(batch), batch["labels"], label_smoothing=0.1)
    torch.testing.assert_close(task.loss(network, batch)["loss"], expected)


def test_evaluation_counts_every_sample_once() -> None:
    task = ClassifyTask(ClassifySection(), ImageData(source="digits"))
    config = task.complete(ResNetConfig(block="basic", stem="cifar", channels=(4,), depths=(1,), stem_channels=4))
    network = config.build().eval()
    with torch.no_grad():
        right = sum(int((network(batch).argmax(-1) == batch["labels"]).sum()) for batch in batches(task.valid, 7))
    assert evaluate(network, task)["metric"] == pytest.approx(100 * right / len(task.valid))
