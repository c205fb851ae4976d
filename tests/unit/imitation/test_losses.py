"""Imitation losses against their formulas, written out plainly."""

import math

import pytest
import torch

from wtn_pretrain.errors import UserError
from wtn_pretrain.imitation import losses
from wtn_pretrain.imitation.config import MobileBertLoss
from wtn_pretrain.imitation.losses import mobilebert as mobilebert_ratio


def energy_mse(student, teacher, mask=None):
    return losses.energy_mse(student, teacher, mask).value()


def mobilebert(*arguments):
    return mobilebert_ratio(*arguments).value()


def test_energy_mse_is_zero_for_a_copy_and_one_for_nothing() -> None:
    teacher = torch.randn(3, 5, 7)
    assert energy_mse(teacher, teacher) == 0
    assert energy_mse(torch.zeros_like(teacher), teacher).item() == pytest.approx(1.0)
    # scale of the teacher does not matter: blocks are comparable
    student = torch.randn(3, 5, 7)
    torch.testing.assert_close(energy_mse(student, teacher), energy_mse(100 * student, 100 * teacher))


def test_energy_mse_counts_only_what_the_mask_keeps() -> None:
    teacher, student = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    kept = energy_mse(student[mask], teacher[mask])
    torch.testing.assert_close(energy_mse(student, teacher, mask), kept)
    torch.testing.assert_close(energy_mse(student * 1e3 * ~mask[..., None] + student * mask[..., None], teacher, mask), kept)


def plain_mobilebert(student, teacher, student_scores, teacher_scores, weights: MobileBertLoss) -> float:
    """The four terms by loops over tokens, in double precision."""

    def normalised(row: list[float]) -> list[float]:
        mean = sum(row) / len(row)
        variance = sum((value - mean) ** 2 for value in row) / len(row)
        return [(value - mean) / math.sqrt(variance + 1e-5) for value in row]

    def softmax(row: list[float]) -> list[float]:
        top = max(row)
        powers = [math.exp(value - top) for value in row]
        return [power / sum(powers) for power in powers]

    total, tokens = 0.0, 0
    batch, length, width = teacher.shape
    heads, wide = student_scores.shape[1], teacher_scores.shape[1]
    for b in range(batch):
        for s in range(length):
            mine, theirs = student[b, s].tolist(), teacher[b, s].tolist()
            hidden = sum((x - y) ** 2 for x, y in zip(normalised(mine), normalised(theirs), strict=True)) / width
            means = [sum(row) / width for row in (mine, theirs)]
            variances = [sum((value - mean) ** 2 for value in row) / width for row, mean in zip((mine, theirs), means, strict=True)]
            attention = 0.0
            for h in range(heads):
                group = [softmax(teacher_scores[b, h * wide // heads + g, s].tolist()) for g in range(wide // heads)]
                target = [sum(column) / len(group) for column in zip(*group, strict=True)]
                own = softmax(student_scores[b, h, s].tolist())
                attention -= sum(p * math.log(q) for p, q in zip(target, own, strict=True)) / heads
            total += weights.hidden * hidden + weights.mean * (means[0] - means[1]) ** 2
            total += weights.variance * abs(variances[0] - variances[1]) + weights.attention * attention
            tokens += 1
    return total / tokens


@pytest.mark.parametrize("wide_heads", [2, 6])
def test_mobilebert_equals_its_terms_written_out(wide_heads: int) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    scores = torch.randn(2, 2, 3, 3), torch.randn(2, wide_heads, 3, 3)
    weights = MobileBertLoss()
    ours = mobilebert(student, teacher, {"attention": scores[0]}, {"attention": scores[1]}, weights)
    expected = plain_mobilebert(student.double(), teacher.double(), scores[0].double(), scores[1].double(), weights)
    assert ours.item() == pytest.approx(expected, rel=1e-5)


def test_mobilebert_ignores_padding() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 4, 5), torch.randn(1, 4, 5)
    mine, theirs = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    mask = torch.tensor([[True, True, True, False]])
    masked = mobilebert(student, teacher, {"attention": mine}, {"attention": theirs}, MobileBertLoss(), mask)
    cut = mobilebert(student[:, :3], teacher[:, :3], {"attention": mine[..., :3, :3]}, {"attention": theirs[..., :3, :3]}, MobileBertLoss())
    torch.testing.assert_close(masked, cut)


def test_heads_that_do_not_divide_are_refused() -> None:
    hidden = torch.randn(1, 4, 5)
    with pytest.raises(UserError, match=r"the teacher's 3 heads do not divide into the student's 2"):
        mobilebert(hidden, hidden, {"attention": torch.randn(1, 2, 4, 4)}, {"attention": torch.randn(1, 3, 4, 4)}, MobileBertLoss())
