"""Ours against Hugging Face, both ways: same weights, same logits (fp32, 1e-5: the order of additions in attention differs)."""

from pathlib import Path

import pytest
import torch
import transformers

from wtn_pretrain.models import BertConfig, ResNetConfig
from wtn_pretrain.models.hf import from_hf, to_hf

BERTS = {
    "post": BertConfig(vocab_size=97, hidden_size=32, layers=3, heads=4, max_positions=24, dropout=0.1),
    "pre": BertConfig(vocab_size=97, hidden_size=32, layers=3, heads=4, max_positions=24, norm="pre"),
    "post with pair head": BertConfig(vocab_size=97, hidden_size=32, layers=2, heads=2, intermediate_size=40, pair_head="nsp"),
    "pre with pair head": BertConfig(vocab_size=97, hidden_size=32, layers=2, heads=2, norm="pre", pair_head="sop"),
}
RESNETS = {
    "basic": ResNetConfig(
        block="basic", depths=(2, 1, 2), channels=(8, 16, 24), stem_channels=8, image_channels=3, image_size=48, classes=5
    ),
    "bottleneck": ResNetConfig(depths=(1, 2), channels=(32, 64), stem_channels=8, image_channels=1, image_size=40, classes=7),
    "bottleneck, first stage without projection": ResNetConfig(
        depths=(2, 1), channels=(16, 32), stem_channels=16, image_channels=3, image_size=32, classes=4
    ),
}


def shake(network: torch.nn.Module) -> torch.nn.Module:
    """Moves every tensor off its initial value, so that a swapped bias or statistic shows."""
    torch.manual_seed(0)
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.add_(0.1 * torch.rand_like(value))
    return network.eval()


@pytest.mark.parametrize("name", BERTS)
def test_bert_logits_equal_hugging_face(name: str) -> None:
    network = shake(BERTS[name].build())
    theirs = to_hf(network)
    ids = torch.randint(0, 97, (3, 17))
    mask = torch.ones(3, 17, dtype=torch.long)
    mask[1, 9:] = 0
    types = torch.randint(0, 2, (3, 17))
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    with torch.no_grad():
        expected = theirs(**inputs)
        logits = expected.prediction_logits if "prediction_logits" in expected else expected.logits
        kept = mask.bool()
        torch.testing.assert_close(network(inputs)[kept], logits[kept], atol=1e-5, rtol=1e-5)
        if network.head.pair is not None:
            carry = network.stem(inputs)
            for block in network.blocks:
                carry = block(carry)
            torch.testing.assert_close(network.head.pair_logits(carry), expected.seq_relationship_logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("task", "head", "added"),
    [
        ("ForSequenceClassification", "classifier.", {"num_labels": 3}),
        ("ForTokenClassification", "classifier.", {"num_labels": 9}),
        ("ForQuestionAnswering", "qa_outputs.", {}),
        ("", None, {}),
    ],
)
@pytest.mark.parametrize("name", ["post", "pre", "post with pair head", "pre with pair head"])
def test_other_tasks_take_the_encoder_whole(name: str, task: str, head: str | None, added: dict[str, int], tmp_path: Path) -> None:
    """As pretrained networks are used: everything but the task's own head comes from the file."""
    network = shake(BERTS[name].build())
    to_hf(network).save_pretrained(tmp_path)
    model, report = getattr(transformers, f"AutoModel{task}").from_pretrained(tmp_path, output_loading_info=True, **added)
    # a pooler comes with the pair head alone
    pooler = ("bert.pooler.", "pooler.")
    new = tuple(filter(None, (head, *(() if "pair" in name else pooler))))
    assert [key for key in report["missing_keys"] if not key.startswith(new)] == []
    assert [key for key in report["unexpected_keys"] if not key.startswith(("cls.", *pooler))] == [] and not report["mismatched_keys"]
    ids = torch.randint(0, 97, (2, 11))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        # fp64: what differs then is no round-off
        states = model.eval().double()(**inputs, output_hidden_states=True).hidden_states
        double = network.double()
        expected = double.head.final_norm(double.features(inputs).hidden)
    torch.testing.assert_close(states[-1], expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", RESNETS)
def test_resnet_logits_equal_hugging_face(name: str) -> None:
    config = RESNETS[name]
    network = shake(config.build())
    theirs = to_hf(network)
    pixels = torch.randn(4, config.image_channels, config.image_size, config.image_size)
    for train in (False, True):
        with torch.no_grad():
            ours, expected = network.train(train)({"pixels": pixels}), theirs.train(train)(pixels).logits
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [*BERTS.values(), *RESNETS.values()], ids=[*BERTS, *RESNETS])
def test_round_trip_is_bitwise(config) -> None:
    network = shake(config.build())
    back = from_hf(to_hf(network))
    ours, theirs = network.state_dict(), back.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_head_at_positions_equals_whole_head() -> None:
    network = shake(BERTS["post"].build())
    ids, positions = torch.randint(0, 97, (2, 12)), torch.tensor([[1, 5], [0, 11]])
    with torch.no_grad():
        whole, some = network({"input_ids": ids}), network({"input_ids": ids}, positions=positions)
    torch.testing.assert_close(some, torch.stack([whole[row, positions[row]] for row in range(2)]))
