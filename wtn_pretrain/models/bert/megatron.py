"""BERT in the checkpoints of Megatron-LM before its core models: nested dictionaries, and query, key and value in one matrix.

The layout and its three orders of query, key and value are those that Hugging Face's conversion of Megatron BERT documents.
"""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from wtn_pretrain.errors import UserError
from wtn_pretrain.models.bert.config import BertConfig
from wtn_pretrain.models.conversion import told

_NAMES = {
    "input_layernorm": "attention_norm",
    "attention.dense": "attention_output",
    "post_attention_layernorm": "output_norm",
    "mlp.dense_h_to_4h": "intermediate",
    "mlp.dense_4h_to_h": "output",
}


def recognises(checkpoint: Any) -> bool:
    """Whether this is such a checkpoint."""
    return isinstance(checkpoint, Mapping) and isinstance(checkpoint.get("model"), Mapping) and "language_model" in checkpoint["model"]


def shape(checkpoint: Mapping[str, Any], source: str, heads: int = 0) -> BertConfig:
    """The shape that the arguments stored with the weights tell.

    Args:
        heads: of attention, where there are no arguments to tell; 0: not known.

    Raises:
        UserError: nothing tells the heads, or the arguments tell of something that our pre-LN BERT is not.
    """
    arguments = checkpoint.get("args")
    values: dict[str, Any] = {}
    if isinstance(arguments, Mapping | Namespace):
        values = dict(arguments if isinstance(arguments, Mapping) else vars(arguments))
    stored = values.get("num_attention_heads")
    if stored and heads and stored != heads:
        raise UserError(f"{source}: its args say {stored} heads and wide.teacher_heads {heads}; leave that out")
    heads = stored or heads
    if not heads:
        raise UserError(f"{source}: holds no args with num_attention_heads, which the weights do not show; set wide.teacher_heads")
    if (
        values.get("tensor_model_parallel_size", values.get("model_parallel_size", 1)) != 1
        or values.get("pipeline_model_parallel_size", 1) != 1
    ):
        raise UserError(f"{source}: is one rank's part of a divided network; merge it to one rank with Megatron's own tools")
    for key in ("openai_gelu", "apply_residual_connection_post_layernorm", "swiglu", "squared_relu"):
        if values.get(key):
            raise UserError(f"{source}: was trained with {key}, which this BERT does not have")
    tensors = flat(checkpoint)
    numbers = (name.split(".")[1] for name in tensors if name.startswith("layers."))
    layers = 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)
    need = ("word_embeddings.weight", "position_embeddings.weight", "tokentype_embeddings.weight", "layers.0.mlp.dense_h_to_4h.weight")
    gone = [name for name in need if name not in tensors]
    if gone:
        raise UserError(f"{source}: the shape of a BERT cannot be read from its keys: missing {', '.join(gone)}")
    odd = [f"{name} {list(tensors[name].shape)}" for name in need if tensors[name].dim() != 2]
    if odd:
        raise UserError(f"{source}: its keys do not fit a bert: of another shape {', '.join(odd)}")
    word = tensors["word_embeddings.weight"]
    found = {
        "vocab_size": word.shape[0],
        "hidden_size": word.shape[1],
        "layers": layers,
        "heads": heads,
        "intermediate_size": tensors["layers.0.mlp.dense_h_to_4h.weight"].shape[0],
        "max_positions": tensors["position_embeddings.weight"].shape[0],
        "token_types": tensors["tokentype_embeddings.weight"].shape[0],
        "norm": "pre",
        "layer_norm_eps": values.get("layernorm_epsilon", 1e-5),
        "pair_head": "nsp" if "binary_head.weight" in tensors else "none",
    }
    return told(BertConfig, source, found)


def flat(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor of the model by its name within its part (`layers.0...`, `word_embeddings.weight`, `lm_head.bias`)."""
    model = checkpoint["model"]
    language = model["language_model"]
    parts: list[tuple[str, Any]] = [("", language.get("embedding", {})), ("", language.get("transformer", language.get("encoder", {})))]
    parts += [
        ("pooler.", language.get("pooler", {})),
        ("lm_head.", model.get("lm_head", {})),
        ("binary_head.", model.get("binary_head", {})),
    ]
    # what a part is not known for stands out as an unexpected key
    known = {"embedding", "transformer", "encoder", "pooler"}
    parts += [(f"language_model.{name}.", part) for name, part in language.items() if name not in known]
    parts += [(f"{name}.", part) for name, part in model.items() if name not in ("language_model", "lm_head", "binary_head")]
    found: dict[str, Tensor] = {}
    for prefix, part in parts:
        found |= {name.replace("self_attention.", "attention."): value for name, value in _walk(part, prefix)}
    return found


def divided(checkpoint: Mapping[str, Any], config: BertConfig, source: str) -> dict[str, Tensor]:
    """The tensors of `flat` with query, key and value apart (`layers.0.query.weight`)."""
    version = checkpoint.get("checkpoint_version", 0.0)
    if not isinstance(version, int | float):
        raise UserError(f"{source}: has checkpoint_version {version!r}; known are 0 to 3")
    result = {}
    for name, value in flat(checkpoint).items():
        if ".attention.query_key_value." not in name:
            result[name] = value
            continue
        if value.shape[0] != 3 * config.heads * config.head_size:
            raise UserError(f"{source}: of another shape {name} {list(value.shape)} for {config.heads} heads of {config.head_size}")
        layer, _, kind = name.partition(".attention.query_key_value.")
        for part, tensor in zip(("query", "key", "value"), _apart(value, config, version), strict=True):
            result[f"{layer}.{part}.{kind}"] = tensor
    return result


def names(config: BertConfig) -> dict[str, str]:
    """The name of every tensor of `divided` -> ours."""
    pairs = [
        ("word_embeddings.weight", "stem.word.weight"),
        ("position_embeddings.weight", "stem.position.weight"),
        ("tokentype_embeddings.weight", "stem.token_type.weight"),
        ("lm_head.bias", "head.bias"),
        *_both("final_layernorm", "head.final_norm"),
        *_both("lm_head.dense", "head.transform"),
        *_both("lm_head.layernorm", "head.norm"),
    ]
    if config.pair_head != "none":
        pairs += _both("pooler.dense", "head.pair.pooler") + _both("binary_head", "head.pair.classifier")
    for index in range(config.layers):
        for part in ("query", "key", "value"):
            pairs += _both(f"layers.{index}.{part}", f"blocks.{index}.{part}")
        for theirs, ours in _NAMES.items():
            pairs += _both(f"layers.{index}.{theirs}", f"blocks.{index}.{ours}")
    return dict(pairs)


def _apart(value: Tensor, config: BertConfig, version: float) -> tuple[Tensor, ...]:
    """Query, key and value [heads x head size, ...] of what holds all three."""
    rest = value.shape[1:]
    if version >= 2:
        by_part = value.view(config.heads, 3, config.head_size, *rest).transpose(0, 1)
    elif version >= 1:
        by_part = value.view(config.heads, config.head_size, 3, *rest).movedim(2, 0)
    else:
        by_part = value.view(3, config.heads, config.head_size, *rest)
    return tuple(part.reshape(-1, *rest).clone(memory_format=torch.contiguous_format) for part in by_part)


def _walk(part: Any, prefix: str) -> list[tuple[str, Tensor]]:
    if isinstance(part, Tensor):
        return [(prefix.rstrip("."), part)]
    if not isinstance(part, Mapping):
        return []
    return [found for key, value in part.items() for found in _walk(value, f"{prefix}{key}.")]


def _both(theirs: str, ours: str) -> list[tuple[str, str]]:
    return [(f"{theirs}.weight", f"{ours}.weight"), (f"{theirs}.bias", f"{ours}.bias")]
