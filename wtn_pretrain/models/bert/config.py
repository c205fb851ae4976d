"""The shape of a BERT encoder."""

from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from wtn_pretrain.errors import UserError
from wtn_pretrain.models.base import BlockConfig, preset, register, whole

if TYPE_CHECKING:
    from wtn_pretrain.models.bert.model import BertNetwork


@register
class BertConfig(BlockConfig):
    """BERT (Devlin et al. 2019), with the heads' width free of the hidden size so that it can be widened inside."""

    family: Literal["bert"] = "bert"
    """Model family."""
    vocab_size: int = 0
    """Rows of the embedding; 0 takes the tokenizer's size. Larger than the tokenizer, up to a multiple of 64 or 128, is padding for tensor
    cores: no target is ever among the rows beyond it, so that training takes probability from them as from any word that does not occur."""
    hidden_size: int = 768
    """Carried width D."""
    layers: int = 12
    """Encoder layers (blocks)."""
    heads: int = 12
    """Attention heads."""
    head_size: int = 0
    """Width of one head; 0 means hidden_size / heads."""
    intermediate_size: int = 0
    """Width of the feed-forward layer; 0 means 4 x hidden_size."""
    max_positions: int = 512
    """Longest sequence."""
    token_types: int = 2
    """Segments that a token can belong to."""
    norm: Literal["post", "pre"] = "post"
    """post: LayerNorm after each residual, as in the original; pre: before each sublayer and once at the top, as in Megatron."""
    dropout: float = 0.1
    """Dropout of embeddings and sublayer outputs."""
    attention_dropout: float = 0.1
    """Dropout of attention weights."""
    layer_norm_eps: float = 1e-12
    """Added to the variance in LayerNorm."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights (normal, cut at two)."""
    pair_head: Literal["none", "nsp", "sop"] = "none"
    """Second head on [CLS]: next-sentence (nsp) or sentence-order (sop) prediction."""

    dynamic_axes: ClassVar[dict[str, dict[int, str]]] = {
        name: {0: "batch", 1: "sequence"} for name in ("input_ids", "attention_mask", "token_type_ids")
    }

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, tree: object) -> object:
        if isinstance(tree, dict):
            hidden, heads = tree.get("hidden_size", 768), tree.get("heads", 12)
            if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
                if not tree.get("head_size"):
                    if hidden % heads:
                        raise ValueError(f"hidden_size {hidden} is not a multiple of heads {heads}; set head_size or change one of them")
                    tree = {**tree, "head_size": hidden // heads}
                if not tree.get("intermediate_size"):
                    tree = {**tree, "intermediate_size": 4 * hidden}
        return tree

    @model_validator(mode="after")
    def _positive(self) -> Self:
        for name in ("hidden_size", "layers", "heads", "head_size", "intermediate_size", "max_positions", "token_types"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in [0, 1)")
        return self

    def widen(self, inner: float, outer: float, blocks: tuple[int, ...] | None) -> Self:
        if blocks is not None and len(blocks) != 1:
            raise UserError(f"widen.blocks: BERT has one stage, so one number of layers, not {list(blocks)}")
        heads = self.heads * outer * inner
        if abs(heads - round(heads)) > 1e-6:
            raise UserError(
                f"widen: inner {inner:g} x outer {outer:g} gives {heads:g} heads from {self.heads}, which is not a whole number; "
                f"choose factors whose product is a multiple of 1/{self.heads}"
            )
        return self.model_copy(
            update={
                "hidden_size": whole(self.hidden_size * outer, "hidden_size", "widen.outer"),
                "heads": round(heads),
                "intermediate_size": whole(self.intermediate_size * outer * inner, "intermediate_size", "widen.inner"),
                "layers": blocks[0] if blocks else self.layers,
            }
        )

    @property
    def stages(self) -> tuple[int, ...]:
        return (self.layers,)

    def why_not_divisible(self, ranks: int, length: int | None = None) -> str | None:
        for name in ("heads", "intermediate_size", "vocab_size"):
            value = getattr(self, name)
            if value % ranks:
                higher = -(-value // ranks) * ranks
                return f"{ranks} ranks do not divide model.{name} {value}; use a divisor, or {name} {higher}"
        if length is not None and length % ranks:
            return f"{ranks} ranks do not divide sequences of {length} tokens; use a divisor, or no sequence parallelism"
        return None

    def build(self) -> "BertNetwork":
        from wtn_pretrain.models.bert.model import BertNetwork

        return BertNetwork(self)

    def example_inputs(self, batch: int, device: torch.device | str, length: int | None = None) -> dict[str, Tensor]:
        if length is not None and length > self.max_positions:
            raise UserError(
                f"data.sequence_length: {length} is longer than model.max_positions {self.max_positions}; raise that or shorten this"
            )
        return {"input_ids": torch.zeros(batch, length or self.max_positions, dtype=torch.long, device=device)}


def _shape(layers: int, hidden: int, heads: int) -> dict[str, object]:
    return {"family": "bert", "layers": layers, "hidden_size": hidden, "heads": heads, "vocab_size": 30528}


# 30522 word pieces, padded to a multiple of 64
preset("bert-base", **_shape(12, 768, 12))
preset("bert-large", **_shape(24, 1024, 16))
preset("bert-tiny", **_shape(2, 128, 2))
preset("bert-mini", **_shape(4, 256, 4))
preset("bert-small", **_shape(4, 512, 8))
preset("bert-medium", **_shape(8, 512, 8))
