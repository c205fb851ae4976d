"""Presets, widening and counts against published or closed-form figures."""

import pytest
import torch

from wtn_pretrain.config import validate
from wtn_pretrain.errors import UserError
from wtn_pretrain.models import BertConfig, BlockConfig, ResNetConfig
from wtn_pretrain.models.base import expand_preset, families, flops, parameter_count, preset_names


def shape(name: str) -> BlockConfig:
    tree = expand_preset({"preset": name})
    return validate(families()[tree["family"]], tree)


def parameters(config: BlockConfig) -> int:
    with torch.device("meta"):
        return parameter_count(config.build())


# torchvision's documentation: parameters, and GFLOPs counted as multiply-adds
TORCHVISION = {
    "resnet18": (11_689_512, 1.81),
    "resnet34": (21_797_672, 3.66),
    "resnet50": (25_557_032, 4.09),
    "resnet101": (44_549_160, 7.80),
    "resnet152": (60_192_808, 11.51),
    "wide-resnet50-2": (68_883_240, 11.40),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_resnet_counts_are_the_published_ones(name: str) -> None:
    count, gigas = TORCHVISION[name]
    assert parameters(shape(name)) == count
    assert flops(shape(name)).total / 2e9 == pytest.approx(gigas, abs=0.01)


def test_inner_widening_of_resnet50_is_the_wide_resnet50_2() -> None:
    assert shape("resnet50").widen(2, 1, None) == shape("wide-resnet50-2")
    assert shape("resnet50").widen(4, 1, None) == shape("wide-resnet50-4")


def test_bert_large_is_bert_base_widened_and_deepened() -> None:
    assert shape("bert-base").widen(1, 4 / 3, (24,)) == shape("bert-large")
    # 340M and 110M in Devlin et al. count the pooler and a vocabulary of 30522 rows
    assert parameters(shape("bert-base")) == pytest.approx(110e6, rel=0.01)
    assert parameters(shape("bert-large")) == pytest.approx(340e6, rel=0.02)


def test_bert_flops_equal_the_closed_form() -> None:
    config = BertConfig(vocab_size=1000, hidden_size=64, layers=3, heads=4, head_size=32, intermediate_size=192, max_positions=128)
    length, hidden, inner = 128, 64, 4 * 32
    layer = 2 * length * (4 * hidden * inner + 2 * hidden * 192) + 2 * 2 * length * length * inner
    counted = flops(config)
    assert counted.blocks == (layer,) * 3
    assert counted.head == 2 * length * (hidden * hidden + hidden * 1000)
    positions = torch.zeros(1, 20, dtype=torch.long, device="meta")
    assert flops(config, positions=positions).head == 2 * 20 * (hidden * hidden + hidden * 1000)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_builds_and_widens(name: str) -> None:
    config = shape(name)
    if config.family == "resnet" and not config.image_size:
        config = config.model_copy(update={"image_size": 32, "image_channels": 3, "classes": 10})
    for wide in (config.widen(2, 1, None), config.widen(1, 2, None), config.widen(2, 2, None)):
        assert parameters(wide) > parameters(config)
        assert type(wide).model_validate(wide.model_dump()) == wide


def test_factors_that_do_not_fit_are_refused() -> None:
    bert = BertConfig(vocab_size=10, hidden_size=24, heads=3)
    assert bert.widen(4 / 3, 1, None).heads == 4
    with pytest.raises(UserError, match=r"gives 4.5 heads from 3, which is not a whole number"):
        bert.widen(1.5, 1, None)
    with pytest.raises(UserError, match=r"widen.blocks: BERT has one stage"):
        bert.widen(1, 1, (2, 2))
    resnet = ResNetConfig(block="basic", channels=(6, 10), depths=(1, 1), stem_channels=6)
    with pytest.raises(UserError, match=r"widen.inner: gives inner_channels = 7.5"):
        resnet.widen(1.25, 1, None)
    with pytest.raises(UserError, match=r"widen.blocks: 3 numbers for 2 stages"):
        resnet.widen(1, 1, (1, 1, 1))


def test_impossible_shapes_are_refused() -> None:
    for tree, words in (
        ({"hidden_size": 10, "heads": 3}, "not a multiple of heads 3"),
        ({"layers": 0}, "layers is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ):
        with pytest.raises(UserError, match=words):
            validate(BertConfig, tree)
    for tree, words in (
        ({"depths": [1, 2]}, "one number a stage"),
        ({"channels": [6, 8], "depths": [1, 1]}, "multiples of 4"),
        ({"depths": [0, 1], "channels": [8, 8]}, "at least 1"),
    ):
        with pytest.raises(UserError, match=words):
            validate(ResNetConfig, tree)


def test_resnet_v15_puts_the_stride_in_the_3x3_convolution() -> None:
    first = shape("resnet50").model_copy(update={"depths": (1, 1, 1, 1)}).build().blocks[1]
    assert [conv.stride for conv in first.convs] == [(1, 1), (2, 2), (1, 1)]


def test_flops_follow_the_length_of_the_sequence() -> None:
    config = BertConfig(vocab_size=100, hidden_size=64, layers=1, heads=4, max_positions=512)

    def layer(length: int) -> int:
        return 2 * length * (4 * 64 * 64 + 2 * 64 * 256) + 4 * length * length * 64

    assert flops(config).blocks == (layer(512),)
    assert flops(config, 64).blocks == (layer(64),)
