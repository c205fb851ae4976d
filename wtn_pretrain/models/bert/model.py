"""BERT as a block network: embeddings, encoder layers, masked-language-model head tied to the embedding."""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from wtn_pretrain.kernels.attention import attend, same_document
from wtn_pretrain.kernels.bias_gelu import linear_gelu
from wtn_pretrain.kernels.dropout import Dropout
from wtn_pretrain.kernels.dropout_add_norm import dropout_add_norm
from wtn_pretrain.kernels.linear import Linear
from wtn_pretrain.kernels.linear_cross_entropy import linear_cross_entropy
from wtn_pretrain.models.base import BlockNetwork, Carry, Taps
from wtn_pretrain.models.bert.config import BertConfig


class BertStem(nn.Module):
    """Word, position and segment embeddings: inputs -> carry with hidden [B, S, D]."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_positions, config.hidden_size)
        self.token_type = nn.Embedding(config.token_types, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.norm == "post" else nn.Identity()
        self.dropout = Dropout(config.dropout)

    def forward(self, inputs: Mapping[str, Tensor]) -> Carry:
        """`input_ids` [B, S] int64, optional `token_type_ids` [B, S] int64, and one of `attention_mask` [B, S] (1 = token, 0 = padding)
        and `segments` [B, S] int64, for rows of several documents: 1, 2, ... in the order of the row, 0 = padding. Positions then
        begin anew with each document, and none sees another."""
        ids_BS = inputs["input_ids"]
        segments_BS = inputs.get("segments")
        positions = torch.arange(ids_BS.shape[1], device=ids_BS.device)
        if segments_BS is not None:
            positions = restarting(positions, segments_BS)
        types_BS = inputs.get("token_type_ids")
        types_BS = torch.zeros_like(ids_BS) if types_BS is None else types_BS
        hidden_BSD = self.word(ids_BS) + self.token_type(types_BS) + self.position(positions)
        mask_BS = inputs.get("attention_mask")
        context: tuple[Tensor, ...] = ()
        if segments_BS is not None:
            context = (segments_BS,)
        elif mask_BS is not None:
            context = (mask_BS[:, None, None, :].bool(),)
        return Carry(self.dropout(self.norm(hidden_BSD)), context)


def restarting(index_S: Tensor, segments_BS: Tensor) -> Tensor:
    """Positions [B, S] that count from 0 in each run of equal `segments` [B, S]; `index` [S] counts through the row."""
    begins = segments_BS[:, 1:] != segments_BS[:, :-1]
    first = torch.where(begins, index_S[1:], 0).cummax(1).values
    return index_S - F.pad(first, (1, 0))


def rate(dropout: nn.Dropout) -> float:
    """With which probability a dropout drops now: it may be off where the rest of the network trains."""
    return dropout.p if dropout.training else 0.0


class GeluLinear(nn.Linear):
    """A linear layer and the exact GELU of what it gives."""

    def forward(self, x: Tensor) -> Tensor:
        return linear_gelu(x, self.weight, self.bias)


class AddNorm(nn.LayerNorm):
    """A LayerNorm and the residual connection before it."""

    def forward(self, x: Tensor, added: Tensor | None = None, dropout: float = 0.0) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        """The norm of `x`; with `added`, the norm of x + dropout(added), and that sum."""
        if added is None:
            return super().forward(x)
        return dropout_add_norm(added, None, x, self.weight, self.bias, self.eps, dropout, training=True)


class BertBlock(nn.Module):
    """One encoder layer, post-LN or pre-LN."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.heads, self.head_size = config.heads, config.head_size
        inner = config.heads * config.head_size
        self.query = Linear(config.hidden_size, inner)
        self.key = Linear(config.hidden_size, inner)
        self.value = Linear(config.hidden_size, inner)
        self.attention_output = Linear(inner, config.hidden_size)
        self.attention_norm: nn.LayerNorm = AddNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.intermediate = GeluLinear(config.hidden_size, config.intermediate_size)
        self.output = Linear(config.intermediate_size, config.hidden_size)
        self.output_norm: nn.LayerNorm = AddNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention_dropout = Dropout(config.attention_dropout)
        self.dropout = Dropout(config.dropout)

    def forward(self, carry: Carry, taps: Taps | None = None) -> Carry:
        """Carry to carry; with `taps`, also lays open the attention scores [B, H, S, S] before the softmax, scaled; padding is not
        masked in them, other documents of the row are."""
        x_BSD = carry.hidden
        mask = carry.context[0] if carry.context else None
        if self.pre_norm:
            normed_BSD, x_BSD = self._join(x_BSD, self._attend(self.attention_norm(x_BSD), mask, taps), self.output_norm)
            x_BSD = x_BSD + self.dropout(self._feed_forward(normed_BSD))
        else:
            x_BSD, _ = self._join(x_BSD, self._attend(x_BSD, mask, taps), self.attention_norm)
            x_BSD, _ = self._join(x_BSD, self._feed_forward(x_BSD), self.output_norm)
        return Carry(x_BSD, carry.context)

    def _projected(self, x_BSD: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value [B, S, H K]."""
        return self.query(x_BSD), self.key(x_BSD), self.value(x_BSD)

    def _attend(self, x_BSD: Tensor, mask: Tensor | None, taps: Taps | None) -> Tensor:
        made = self._projected(x_BSD)
        # of divided positions x has a part, and what is made of it all
        shape = (*made[0].shape[:2], self.heads, self.head_size)
        q_BHSK, k_BHSK, v_BHSK = (x.view(shape).transpose(1, 2) for x in made)
        if taps is not None:
            taps["attention"] = self._scores(q_BHSK, k_BHSK, mask)
        return self.attention_output(attend(q_BHSK, k_BHSK, v_BHSK, mask, rate(self.attention_dropout)).transpose(1, 2).flatten(2))

    def _scores(self, q_BHSK: Tensor, k_BHSK: Tensor, mask: Tensor | None) -> Tensor:
        scores_BHSS = q_BHSK @ k_BHSK.transpose(-1, -2) * self.head_size**-0.5
        if mask is None or mask.dtype is torch.bool:
            return scores_BHSS
        # finite, in the fp32 of losses too, since they multiply it by the probability of zero that follows
        lowest = max(torch.finfo(scores_BHSS.dtype).min, torch.finfo(torch.float32).min)
        return scores_BHSS.masked_fill(~same_document(mask), lowest)

    def _feed_forward(self, x_BSD: Tensor) -> Tensor:
        return self.output(self.intermediate(x_BSD))

    def _join(self, x_BSD: Tensor, added_BSD: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """The norm of x + dropout(added), and that sum."""
        return norm(x_BSD, added_BSD, rate(self.dropout))


class BertHead(nn.Module):
    """Masked-language-model head (its decoder is the word embedding) and, if configured, the pair head on [CLS]."""

    def __init__(self, config: BertConfig, embedding: nn.Parameter) -> None:
        super().__init__()
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.norm == "pre" else nn.Identity()
        self.transform = GeluLinear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        # the same Parameter object as the stem's: tied, and gathered by ZeRO-3 for this module too
        self.decoder = embedding
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.pair: BertPairHead | None = BertPairHead(config) if config.pair_head != "none" else None

    def forward(
        self, carry: Carry, positions: Tensor | None = None, targets: Tensor | None = None, ignore: int = -100
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Vocabulary logits [B, S, V], or [B, P, V] at `positions` [B, P] only, so that nothing is spent on the rest. With `targets`
        [B, P], `losses`."""
        predicted = self.predicted(carry, positions)
        if targets is None:
            return F.linear(predicted, self.decoder, self.bias)
        return linear_cross_entropy(predicted.flatten(0, 1), self.decoder, self.bias, targets.flatten(), ignore)

    def predicted(self, carry: Carry, positions: Tensor | None) -> Tensor:
        """What the decoder takes, [B, S, D] or [B, P, D] at `positions` [B, P]."""
        hidden = carry.hidden
        if positions is not None:
            hidden = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
        return self.norm(self.transform(self.final_norm(hidden)))

    def losses(self, carry: Carry, positions: Tensor, targets: Tensor, ignore: int = -100) -> tuple[Tensor, Tensor]:
        """The sum of the cross-entropies at `positions` [B, P] against `targets` [B, P] (those equal to `ignore` count for nothing),
        fp32, and how many count. The logits are never whole."""
        # by the module's call: ZeRO 3 brings its parameters together there
        return self(carry, positions, targets, ignore)

    def pair_logits(self, carry: Carry) -> Tensor:
        """Logits [B, 2]: 0 = the second segment follows the first."""
        if self.pair is None:
            raise RuntimeError("this network was built without a pair head")
        return self.pair(self.final_norm(carry.hidden[:, 0]))


class BertPairHead(nn.Module):
    """BERT's pooler and the two-way classifier of next-sentence or sentence-order prediction."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, 2)

    def forward(self, first_BD: Tensor) -> Tensor:
        return self.classifier(torch.tanh(self.pooler(first_BD)))


class BertNetwork(BlockNetwork):
    """BERT for masked language modelling."""

    config: BertConfig
    channel_axis: ClassVar[int] = -1

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = BertStem(config)
        self.blocks = nn.ModuleList(BertBlock(config) for _ in range(config.layers))
        self.head = BertHead(config, self.stem.word.weight)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            std = self.config.initializer_range
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def divide(self, group: ProcessGroup, sequence: bool) -> None:
        from wtn_pretrain.models.bert.parallel import divide
        from wtn_pretrain.parallel.tensor import Ranks

        # a planner's ranks are not there, and know themselves what they do
        divide(self, group if isinstance(group, Ranks) else Ranks(group, sequence))

    @staticmethod
    def counted(carry: Carry) -> Tensor | None:
        if not carry.context:
            return None
        mask = carry.context[0]
        return mask[:, 0, 0] if mask.dtype is torch.bool else mask > 0

    def widths(self) -> list[int]:
        return [self.config.hidden_size] * (self.config.layers + 1)

    def why_not_foldable(self, boundary: int) -> str | None:
        if boundary < self.config.layers:
            return f"the identity skip of encoder layer {boundary + 1} carries the unmerged hidden state past its projections"
        if self.config.norm == "pre":
            return "the final LayerNorm of a pre-LN network stands between the boundary and the head's first linear map"
        return None

    def fold(self, boundary: int, matrix: Tensor) -> None:
        reason = self.why_not_foldable(boundary)
        if reason:
            raise RuntimeError(reason)
        with torch.no_grad():
            self.head.transform.weight.copy_(self.head.transform.weight @ matrix)
            if self.head.pair is not None:
                self.head.pair.pooler.weight.copy_(self.head.pair.pooler.weight @ matrix)

    def start_stem_from(self, wide: BlockNetwork, reduce: Tensor | None) -> None:
        with torch.no_grad():
            for name, mine in self.stem.state_dict(keep_vars=True).items():
                theirs = wide.stem.get_parameter(name)
                if reduce is None:
                    mine.copy_(theirs)
                elif mine.dim() == 2:
                    # pre-LN: the stem is a sum of rows, so this is the wide stem projected; post-LN: up to its norm
                    mine.copy_(theirs @ reduce.T)

    def start_head_from(self, wide: BlockNetwork, expand: Tensor | None, reduce: Tensor | None) -> None:
        mine, theirs = self.head, wide.head
        if expand is None or reduce is None:
            # the decoder is the word embedding: it starts with the stem, not here
            own = {name: value for name, value in theirs.state_dict().items() if name != "decoder" and name in mine.state_dict()}
            mine.load_state_dict(own, strict=False)
            return
        with torch.no_grad():
            mine.transform.weight.copy_(reduce @ theirs.transform.weight @ expand)
            mine.transform.bias.copy_(reduce @ theirs.transform.bias)
            mine.bias.copy_(theirs.bias)
            if mine.pair is not None and theirs.pair is not None:
                mine.pair.pooler.weight.copy_(reduce @ theirs.pair.pooler.weight @ expand)
                mine.pair.pooler.bias.copy_(reduce @ theirs.pair.pooler.bias)
                mine.pair.classifier.weight.copy_(theirs.pair.classifier.weight @ expand)
                mine.pair.classifier.bias.copy_(theirs.pair.classifier.bias)
