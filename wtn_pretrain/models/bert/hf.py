"""BERT in Hugging Face's names: post-LN is its `bert`, pre-LN its `megatron-bert`."""

from typing import TYPE_CHECKING

from wtn_pretrain.errors import UserError
from wtn_pretrain.models.bert.config import BertConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL_TYPES = ("bert", "megatron-bert")


def why_not(config: BertConfig) -> str | None:
    """None where Hugging Face has this architecture, else what it lacks."""
    if config.heads * config.head_size != config.hidden_size:
        return (
            f"its BERT has no inner-widened attention ({config.heads} heads of {config.head_size} on a hidden size of {config.hidden_size})"
        )
    return None


def empty(config: BertConfig) -> "PreTrainedModel":
    """A Hugging Face model of this shape, weights not yet loaded."""
    from transformers import BertConfig as HfBert
    from transformers import BertForMaskedLM, BertForPreTraining, MegatronBertConfig, MegatronBertForMaskedLM, MegatronBertForPreTraining

    post = config.norm == "post"
    hf_config = (HfBert if post else MegatronBertConfig)(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_positions,
        type_vocab_size=config.token_types,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.attention_dropout,
        layer_norm_eps=config.layer_norm_eps,
        initializer_range=config.initializer_range,
        hidden_act="gelu",
    )
    if config.pair_head != "none":
        return (BertForPreTraining if post else MegatronBertForPreTraining)(hf_config)
    return (BertForMaskedLM if post else MegatronBertForMaskedLM)(hf_config)


def shape(model: "PreTrainedModel") -> BertConfig:
    """The shape of a Hugging Face model."""
    hf = model.config
    if hf.hidden_act != "gelu":
        raise UserError(f"teacher: hidden_act {hf.hidden_act!r} is not supported, only 'gelu'")
    if "ForMaskedLM" not in type(model).__name__ and "ForPreTraining" not in type(model).__name__:
        raise UserError(
            f"teacher: {type(model).__name__} has no masked-language-model head; load it as a ForMaskedLM or ForPreTraining model"
        )
    return BertConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        layers=hf.num_hidden_layers,
        heads=hf.num_attention_heads,
        intermediate_size=hf.intermediate_size,
        max_positions=hf.max_position_embeddings,
        token_types=hf.type_vocab_size,
        norm="post" if hf.model_type == "bert" else "pre",
        dropout=hf.hidden_dropout_prob,
        attention_dropout=hf.attention_probs_dropout_prob,
        layer_norm_eps=hf.layer_norm_eps,
        initializer_range=hf.initializer_range,
        pair_head="nsp" if "ForPreTraining" in type(model).__name__ else "none",
    )


def names(config: BertConfig) -> dict[str, str]:
    """Hugging Face's name of every tensor -> ours."""
    post = config.norm == "post"
    pairs = [
        ("bert.embeddings.word_embeddings.weight", "stem.word.weight"),
        ("bert.embeddings.position_embeddings.weight", "stem.position.weight"),
        ("bert.embeddings.token_type_embeddings.weight", "stem.token_type.weight"),
        ("cls.predictions.bias", "head.bias"),
        *_both("cls.predictions.transform.dense", "head.transform"),
        *_both("cls.predictions.transform.LayerNorm", "head.norm"),
    ]
    pairs += _both("bert.embeddings.LayerNorm", "stem.norm") if post else _both("bert.encoder.ln", "head.final_norm")
    if config.pair_head != "none":
        pairs += _both("bert.pooler.dense", "head.pair.pooler") + _both("cls.seq_relationship", "head.pair.classifier")
    for index in range(config.layers):
        theirs, ours = f"bert.encoder.layer.{index}", f"blocks.{index}"
        for part in ("query", "key", "value"):
            pairs += _both(f"{theirs}.attention.self.{part}", f"{ours}.{part}")
        pairs += _both(f"{theirs}.attention.output.dense", f"{ours}.attention_output")
        pairs += _both(f"{theirs}.attention.output.LayerNorm" if post else f"{theirs}.attention.ln", f"{ours}.attention_norm")
        pairs += _both(f"{theirs}.intermediate.dense", f"{ours}.intermediate")
        pairs += _both(f"{theirs}.output.dense", f"{ours}.output")
        pairs += _both(f"{theirs}.output.LayerNorm" if post else f"{theirs}.ln", f"{ours}.output_norm")
    return dict(pairs)


def _both(theirs: str, ours: str) -> list[tuple[str, str]]:
    return [(f"{theirs}.weight", f"{ours}.weight"), (f"{theirs}.bias", f"{ours}.bias")]
