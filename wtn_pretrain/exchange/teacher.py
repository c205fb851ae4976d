"""A network from elsewhere in the place of stage 1's: whether it fits the thin one and the data, and its way into the run."""

import json
from typing import Any

from wtn_pretrain.data.tokenizer import load_tokenizer
from wtn_pretrain.errors import UserError
from wtn_pretrain.exchange.foreign import Foreign, open_foreign
from wtn_pretrain.models.base import BlockConfig
from wtn_pretrain.models.bert.config import BertConfig
from wtn_pretrain.models.resnet.config import ResNetConfig
from wtn_pretrain.tasks.base import Task

PADDED = 1024
"""Rows that an embedding may have beyond its words: Megatron pads to 128 times the tensor-parallel ranks."""
CLOSE = 1e-3
"""Difference of means and standard deviations of pixels in [0, 1] up to which they count as the same (published ones are rounded)."""


def wide_shape(thin: BlockConfig, path: str, pickles: bool, heads: int = 0) -> BlockConfig:
    """The teacher's shape, with the images' side of the thin network, which no format tells.

    Raises:
        UserError: it is no teacher for such a network.
    """
    return require_kin(thin, open_foreign(path, pickles, heads=heads).config, path)


def require_kin(thin: BlockConfig, wide: BlockConfig, path: str) -> BlockConfig:
    """`wide`, completed by `thin`; refuses a teacher whose stem or head the thin network could not start from."""
    if wide.family != thin.family:
        raise UserError(f"wide.teacher {path}: is a {wide.family} and model.family is {thin.family}; give a teacher of that family")
    keys: tuple[str, ...] = ()
    if isinstance(thin, BertConfig):
        keys = ("vocab_size", "max_positions", "token_types", "norm")
    elif isinstance(thin, ResNetConfig):
        keys = ("stem", "image_channels", "classes")
        wide = wide.model_copy(update={"image_size": thin.image_size})
    for key in keys:
        mine, theirs = getattr(thin, key), getattr(wide, key)
        if mine != theirs and mine != 0:
            free = ", or 0 to take the teacher's" if key == "vocab_size" else ""
            raise UserError(
                f"model.{key}: is {mine} and that of wide.teacher {path} {theirs}; set it to {theirs}{free}, or give another teacher"
            )
    return wide


def adapted(thin: BlockConfig, wide: BlockConfig) -> BlockConfig:
    """The thin network as the recipe has it, with the teacher's vocabulary where it leaves that open."""
    if isinstance(thin, BertConfig) and isinstance(wide, BertConfig) and thin.vocab_size == 0:
        return thin.model_copy(update={"vocab_size": wide.vocab_size})
    return thin


def require_same_inputs(foreign: Foreign, task: Task, path: str) -> None:
    """Refuses a teacher that was trained on other token ids, or on pixels of another normalisation, than the task gives it."""
    tokenizer: Any = getattr(task, "tokenizer", None)
    if tokenizer is not None:
        _require_vocabulary(foreign, tokenizer, path)
    splits: Any = getattr(task, "splits", None)
    if foreign.labels is not None and splits is not None:
        _require_classes(foreign.labels, splits.classes, path)
    if foreign.pixels is not None and splits is not None:
        for name, theirs, mine in zip(("mean", "std"), foreign.pixels, (splits.mean, splits.std), strict=True):
            if len(theirs) != len(mine) or any(abs(a - b) > CLOSE for a, b in zip(theirs, mine, strict=True)):
                given = f"--data.mean='{list(foreign.pixels[0])}' --data.std='{list(foreign.pixels[1])}'"
                raise UserError(
                    f"wide.teacher {path}: its images had {name} {[round(v, 4) for v in theirs]} and the data's have "
                    f"{[round(v, 4) for v in mine]}; give {given}"
                )


def _require_classes(theirs: tuple[str, ...], mine: tuple[str, ...], path: str) -> None:
    """Refuses the same names in another order; of other names nothing can be said, for the same class has many."""
    if theirs != mine and sorted(theirs) == sorted(mine):
        place = next(number for number, (other, own) in enumerate(zip(theirs, mine, strict=True)) if other != own)
        raise UserError(
            f"wide.teacher {path}: has the data's classes in another order ({theirs[place]!r} is number {place} there and "
            f"{mine[place]!r} here); give data whose classes are numbered alike"
        )


def _require_vocabulary(foreign: Foreign, tokenizer: Any, path: str) -> None:
    assert isinstance(foreign.config, BertConfig)
    rows, words = foreign.config.vocab_size, len(tokenizer)
    if foreign.tokenizer is None:
        # nothing but the count can be compared
        if not 0 <= rows - words < PADDED:
            raise UserError(
                f"wide.teacher {path}: has {rows} rows of words and the tokenizer {words} tokens: it was trained with another vocabulary; "
                "set data.tokenizer to its own"
            )
        return
    other = load_tokenizer(foreign.tokenizer)
    theirs = {token: number for token, number in other.get_vocab().items() if number < rows}
    mine = tokenizer.get_vocab()
    if theirs != mine:
        differing = [token for token in mine if mine[token] != theirs.get(token)] or [token for token in theirs if token not in mine]
        token = min(differing, key=lambda token: mine.get(token, theirs.get(token, 0)))
        raise UserError(
            f"wide.teacher {path}: has another vocabulary of {len(theirs)} words for {len(mine)} ({token!r} is number {theirs.get(token)} "
            f"there and {mine.get(token)} here); set data.tokenizer to {foreign.tokenizer}"
        )
    # the same words, and yet other ids: cased or not, with accents or without
    for part in ("normalizer", "pre_tokenizer"):
        there, here = (json.loads(tool.backend_tokenizer.to_str())[part] for tool in (other, tokenizer))
        if there != here:
            keys = [key for key in {**(there or {}), **(here or {})} if (there or {}).get(key) != (here or {}).get(key)]
            raise UserError(
                f"wide.teacher {path}: its tokenizer has the same words and another {part} (another {', '.join(keys)}), so that texts get "
                f"other ids; set data.tokenizer to {foreign.tokenizer}"
            )
