"""BERT in Hugging Face's names: post-LN is its `bert`, pre-LN its `megatron-bert`."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wtn_pretrain.errors import UserError
from wtn_pretrain.models.bert.config import BertConfig
from wtn_pretrain.models.conversion import told

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


def shape(hf: Any, keys: Collection[str], source: str) -> BertConfig:
    """The shape that a Hugging Face configuration tells, with the heads that the keys of the weights show.

    Args:
        source: what a refusal calls it.

    Raises:
        UserError: it tells of something that our BERT is not, or there is no masked-language-model head.
    """
    for key, wanted in (("hidden_act", "gelu"), ("position_embedding_type", "absolute"), ("is_decoder", False)):
        if getattr(hf, key, wanted) != wanted:
            raise UserError(f"{source}: {key} {getattr(hf, key)!r} is not supported, only {wanted!r}")
    if not any(name.startswith("cls.predictions.transform.") for name in keys):
        raise UserError(f"{source}: has no masked-language-model head (cls.predictions...); give a ForMaskedLM or ForPreTraining model")
    shape = {
        "vocab_size": hf.vocab_size,
        "hidden_size": hf.hidden_size,
        "layers": hf.num_hidden_layers,
        "heads": hf.num_attention_heads,
        "intermediate_size": hf.intermediate_size,
        "max_positions": hf.max_position_embeddings,
        "token_types": hf.type_vocab_size,
        "norm": "post" if hf.model_type == "bert" else "pre",
        "dropout": hf.hidden_dropout_prob,
        "attention_dropout": hf.attention_probs_dropout_prob,
        "layer_norm_eps": hf.layer_norm_eps,
        "initializer_range": hf.initializer_range,
        "pair_head": "nsp" if "cls.seq_relationship.weight" in keys else "none",
    }
    return told(BertConfig, source, shape)


def canonical(theirs: Mapping[str, Tensor], config: BertConfig, source: str) -> dict[str, Tensor]:
    """The weights without what they say twice (a tied decoder, positions counted up) and with the names of today for old ones.

    Raises:
        UserError: the decoder differs from the word embedding: this BERT ties them.
    """
    result = {
        name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): theirs[name] for name in theirs
    }
    ties = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    for copy, name in ties.items():
        tensor = result.pop(copy, None)
        if tensor is not None and name not in result:
            result[name] = tensor
        elif tensor is not None and not torch.equal(tensor, result[name]):
            raise UserError(f"{source}: {copy} is not {name}, and this BERT ties them; tie them in the model that you give")
    counted = result.get("bert.embeddings.position_ids")
    if counted is not None and torch.equal(counted.flatten(), torch.arange(config.max_positions)):
        del result["bert.embeddings.position_ids"]
    return result


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
