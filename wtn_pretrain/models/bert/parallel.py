"""BERT over the ranks of a tensor group: heads, feed-forward and vocabulary are divided; names of tensors stay as they are."""

from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from wtn_pretrain.kernels.bias_gelu import bias_gelu
from wtn_pretrain.kernels.dropout_add_norm import dropout_add_norm
from wtn_pretrain.kernels.live import live
from wtn_pretrain.models.base import Carry, Taps
from wtn_pretrain.models.bert.model import BertBlock, BertHead, BertNetwork, rate
from wtn_pretrain.parallel.columns import columns
from wtn_pretrain.parallel.tensor import (
    ColumnLinear,
    PartDropout,
    Ranks,
    RowLinear,
    SharedNorm,
    VocabularyEmbedding,
    mark,
)
from wtn_pretrain.parallel.vocabulary import vocabulary_cross_entropy


def divide(network: BertNetwork, ranks: Ranks) -> None:
    """Leaves of `network` this rank's part, in place. Its config must allow it (`BertConfig.why_not_divisible`)."""
    stem = network.stem
    stem.word = VocabularyEmbedding(stem.word, ranks)
    stem.norm = _Divided(stem.norm, ranks) if isinstance(stem.norm, nn.LayerNorm) else _Divide(ranks)
    stem.dropout = PartDropout(stem.dropout, ranks)
    network.blocks = nn.ModuleList(_Block(block, ranks) for block in network.blocks if isinstance(block, BertBlock))
    network.head = _Head(network.head, stem.word.weight, ranks)


class _Block(BertBlock):
    """An encoder layer with this rank's heads and its part of the feed-forward layer."""

    def __init__(self, whole: BertBlock, ranks: Ranks) -> None:
        nn.Module.__init__(self)
        self._ranks = ranks
        self.pre_norm = whole.pre_norm
        self.heads, self.head_size = whole.heads // ranks.count, whole.head_size
        for name in ("query", "key", "value", "intermediate"):
            setattr(self, name, ColumnLinear(getattr(whole, name), ranks))
        for name in ("attention_output", "output"):
            setattr(self, name, RowLinear(getattr(whole, name), ranks))
        self.attention_norm = SharedNorm(whole.attention_norm, ranks)
        self.output_norm = SharedNorm(whole.output_norm, ranks)
        self.attention_dropout = whole.attention_dropout
        self.dropout = PartDropout(whole.dropout, ranks)

    def _projected(self, x_BSD: Tensor) -> tuple[Tensor, ...]:
        return columns(x_BSD, [(part.weight, part.bias) for part in (self.query, self.key, self.value)], self._ranks)

    def _attend(self, x_BSD: Tensor, mask: Tensor | None, taps: Taps | None) -> Tensor:
        if not (self.training and self.attention_dropout.p):
            return super()._attend(x_BSD, mask, taps)
        with self._ranks.own_randomness():
            return super()._attend(x_BSD, mask, taps)

    def _feed_forward(self, x_BSD: Tensor) -> Tensor:
        part = self.intermediate
        if live("bias_gelu", x_BSD) == "triton":
            (made,) = columns(x_BSD, [(part.weight, None)], self._ranks)
            return self.output(bias_gelu(made, part.bias))
        (made,) = columns(x_BSD, [(part.weight, part.bias)], self._ranks)
        return self.output(F.gelu(made))

    def _join(self, x_BSD: Tensor, added_BSD: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
        assert isinstance(norm, SharedNorm)
        ranks, p = self._ranks, rate(self.dropout)
        # drawn alike where the hidden state is whole, by each rank for itself where it has a part of the positions
        with ranks.own_randomness() if ranks.sequence and p else nullcontext():
            weight, bias = ranks.shared(norm.weight), ranks.shared(norm.bias)
            return dropout_add_norm(added_BSD, None, x_BSD, weight, bias, norm.eps, p, training=True)


class _Divided(SharedNorm):
    """The stem's norm, which begins the first region where each rank has a part of the positions."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self._ranks.divide(x))


class _Divide(nn.Module):
    """The same where the stem has no norm."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self._ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        return self._ranks.divide(x)


class _Head(BertHead):
    """The head with this rank's rows of the decoder; what comes before it is done alike on all ranks."""

    def __init__(self, whole: BertHead, embedding: nn.Parameter, ranks: Ranks) -> None:
        nn.Module.__init__(self)
        self._ranks = ranks
        self.final_norm, self.transform, self.norm, self.pair = whole.final_norm, whole.transform, whole.norm, whole.pair
        self.decoder = embedding
        self.bias = nn.Parameter(ranks.part(whole.bias.detach(), 0).clone())
        mark(self.bias, 0, ranks)

    def forward(
        self, carry: Carry, positions: Tensor | None = None, targets: Tensor | None = None, ignore: int = -100
    ) -> Tensor | tuple[Tensor, Tensor]:
        if targets is not None:
            predicted = self.predicted(self._collected(carry), positions).flatten(0, 1)
            return vocabulary_cross_entropy(predicted, self.decoder, self.bias, targets.flatten(), self._ranks, ignore)
        # for measuring alone: no gradient passes here
        own = F.linear(self.predicted(self._collected(carry), positions), self.decoder, self.bias)
        parts = [torch.empty_like(own) for _ in range(self._ranks.count)]
        dist.all_gather(parts, own.detach().contiguous(), group=self._ranks.group)
        return torch.cat(parts, -1)

    def pair_logits(self, carry: Carry) -> Tensor:
        return super().pair_logits(self._collected(carry))

    def _collected(self, carry: Carry) -> Carry:
        return Carry(self._ranks.collect(carry.hidden), carry.context)
