"""What a student block is asked to do: be near the teacher's output."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wtn_pretrain.errors import UserError
from wtn_pretrain.imitation.config import MobileBertLoss
from wtn_pretrain.kernels.bridge_energy import bridge_energy
from wtn_pretrain.models.base import Taps


class Ratio(NamedTuple):
    """A loss as sum over samples and normaliser, so that ranks that hold parts of a batch can each add theirs."""

    top: Tensor
    """Scalar; carries the gradient."""
    bottom: Tensor
    """Scalar; a function of the teacher and the mask alone."""

    def value(self) -> Tensor:
        """The loss of this part as a whole."""
        return self.top / self.bottom


def energy_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None, expand: Tensor | None = None, channel_axis: int = -1) -> Ratio:
    """Mean squared error over the teacher's mean square: 0 is a perfect copy, 1 what an output of zeros scores.

    What E gives is never stored whole, and no gradient goes to the teacher.

    Args:
        student, teacher: hidden states, of one shape unless `expand` is given.
        mask: bool, broadcastable to [B, S] for sequences [B, S, D]: positions that count.
        expand: E [D, d] of the bridge between them.
        channel_axis: the axis of their widths.
    """
    top, bottom = bridge_energy(student, expand, teacher, mask, channel_axis)
    return Ratio(top.float(), bottom.float().clamp_min(torch.finfo(torch.float32).tiny))


def mobilebert(
    student: Tensor, teacher: Tensor, student_taps: Taps, teacher_taps: Taps, weights: MobileBertLoss, mask: Tensor | None = None
) -> Ratio:
    """MobileBERT's per-layer loss, weighted sum of four terms; hidden states [B, S, D], attention scores [B, H, S, S].

    Its division by the layer's number, which balances a sum over layers, is left out: units learn from their own losses.
    """
    student, teacher = student.float(), teacher.float()
    width = teacher.shape[-1:]
    hidden = (F.layer_norm(student, width) - F.layer_norm(teacher, width)).square().mean(-1)
    mean = (student.mean(-1) - teacher.mean(-1)).square()
    variance = (student.var(-1, correction=0) - teacher.var(-1, correction=0)).abs()
    tokens = weights.hidden * hidden + weights.mean * mean + weights.variance * variance
    if weights.attention:
        tokens = tokens + weights.attention * _attention(student_taps["attention"], teacher_taps["attention"], mask)
    if mask is None:
        return Ratio(tokens.sum(), tokens.new_tensor(tokens.numel()))
    return Ratio((tokens * mask).sum(), mask.sum().to(tokens.dtype))


def _attention(student_BHSS: Tensor, teacher_BHSS: Tensor, mask_BS: Tensor | None) -> Tensor:
    """Cross-entropy of attention [B, S], mean over heads."""
    heads, wide = student_BHSS.shape[1], teacher_BHSS.shape[1]
    if wide % heads:
        raise UserError(f"narrow.mobilebert.attention: the teacher's {wide} heads do not divide into the student's {heads}; set it to 0")
    if mask_BS is not None:
        hidden = ~mask_BS[:, None, None, :]
        lowest = torch.finfo(torch.float32).min
        student_BHSS, teacher_BHSS = (scores.float().masked_fill(hidden, lowest) for scores in (student_BHSS, teacher_BHSS))
    target = teacher_BHSS.float().softmax(-1).unflatten(1, (heads, wide // heads)).mean(2)
    return -(target * student_BHSS.float().log_softmax(-1)).sum(-1).mean(1)
