"""Which teacher block a student block answers to, and the maps that are refused."""

import pytest

from wtn_pretrain.errors import UserError
from wtn_pretrain.imitation.pairing import pair
from wtn_pretrain.models import BertConfig, ResNetConfig


def bert(layers: int, hidden: int = 8) -> BertConfig:
    return BertConfig(vocab_size=11, hidden_size=hidden, heads=2, layers=layers, max_positions=8)


def resnet(*depths: int, channels: tuple[int, ...] = (8, 16)) -> ResNetConfig:
    return ResNetConfig(
        block="basic", stem="cifar", stem_channels=8, channels=channels, depths=depths, image_channels=1, image_size=8, classes=3
    )


def test_equal_depths_pair_block_by_block() -> None:
    assert pair(bert(3), bert(3)).teacher == (0, 1, 2, 3)


def test_a_24_layer_teacher_answers_a_12_layer_student_with_every_second_block() -> None:
    pairing = pair(bert(12), bert(24, hidden=16))
    assert pairing.teacher == tuple(range(0, 25, 2))
    assert pairing.units == 12


def test_uneven_depths_spread_and_end_at_the_top() -> None:
    assert pair(bert(3), bert(4)).teacher == (0, 1, 3, 4)
    pairing = pair(resnet(3, 4), resnet(3, 23))
    assert pairing.student == tuple(range(8))
    assert pairing.teacher == (0, 1, 2, 3, 9, 15, 20, 26)


def test_stages_pair_as_wholes() -> None:
    pairing = pair(resnet(3, 4), resnet(3, 23), unit="stage")
    assert pairing == ((0, 3, 7), (0, 3, 26))


def test_a_given_map_is_taken() -> None:
    assert pair(bert(3), bert(6), depth_map=(1, 2, 6)).teacher == (0, 1, 2, 6)


@pytest.mark.parametrize(
    ("depth_map", "words"),
    [
        ((2, 1, 6), "goes from teacher block 2 to 1; it must rise"),
        ((2, 2, 6), "goes from teacher block 2 to 2"),
        ((2, 4), "has 2 numbers for 3 student units; give one a unit, none skipped"),
        ((2, 4, 5), "skips the teacher's top blocks 6 to 6"),
        ((2, 4, 7), "leaves the teacher's blocks 1 to 6"),
        ((0, 4, 6), "leaves the teacher's blocks 1 to 6"),
    ],
)
def test_maps_that_skip_reverse_or_leave_are_refused(depth_map: tuple[int, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        pair(bert(3), bert(6), depth_map=depth_map)


def test_a_teacher_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="a stage of 4 student blocks has a teacher of 3"):
        pair(bert(4), bert(3))
    with pytest.raises(UserError, match="the student is wider"):
        pair(bert(2, hidden=16), bert(2, hidden=8))
    with pytest.raises(UserError, match=r"student block 1 and teacher block 3 have shapes \[8, 8, 8\] and \[16, 4, 4\]"):
        pair(resnet(1, 1), resnet(2, 2), depth_map=(3, 4))
    with pytest.raises(UserError, match="the student has 2 stages and the teacher 1"):
        pair(resnet(2, 2), resnet(4, channels=(8,)))
