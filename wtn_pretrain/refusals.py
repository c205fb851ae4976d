"""What a recipe asks for that cannot be done, as far as it is known before the data are: reading them may take hours."""

import torch

from wtn_pretrain.data.text import TextData
from wtn_pretrain.errors import UserError
from wtn_pretrain.models.base import BlockConfig
from wtn_pretrain.models.bert.config import BertConfig
from wtn_pretrain.recipe import Recipe
from wtn_pretrain.training.config import TrainSection
from wtn_pretrain.training.engine import check_training


def check_before_data(recipe: Recipe, thin: BlockConfig, wide: BlockConfig) -> None:
    """Refuses sequences longer than the position table, and what `check_stage` refuses of the stages that train.

    Args:
        thin, wide: the shapes of the networks, in which what the data decide may still be 0.

    Raises:
        UserError: names the key, what is wrong and the remedy.
    """
    data = recipe.data
    lengths: tuple[int, ...] = ()
    if isinstance(data, TextData):
        lengths = (data.sequence_length, *(length for _, length in data.lengths))
        places = min(shape.max_positions for shape in (thin, wide) if isinstance(shape, BertConfig))
        if data.sequence_length > places:
            raise UserError(
                f"data.sequence_length: {data.sequence_length} is longer than model.max_positions {places}; raise that or shorten this"
            )
    for name, shape in to_train(recipe, thin, wide).items():
        check_stage(getattr(recipe, name), name, shape, lengths)


def to_train(recipe: Recipe, thin: BlockConfig, wide: BlockConfig) -> dict[str, BlockConfig]:
    """The shapes of the networks that stages train on the data, by stage; a teacher from elsewhere is not trained."""
    return {"finetune": thin} if recipe.wide.teacher else {"wide": wide, "finetune": thin}


def check_stage(section: TrainSection, name: str, shape: BlockConfig, lengths: tuple[int, ...]) -> None:
    """Refuses what a training stage cannot do with a network of `shape` on any number of ranks. `lengths`: of sequences, if there are any.

    Raises:
        UserError: names the key, what is wrong and the remedy.
    """
    if section.tensor_parallel > 1:
        for length in (lengths if section.sequence_parallel else ()) or (None,):
            reason = shape.why_not_divisible(section.tensor_parallel, length)
            if reason:
                raise UserError(f"{name}.tensor_parallel: {reason}")
    with torch.device("meta"):
        check_training(section, name, _stand_in(shape).build())


def _stand_in(shape: BlockConfig) -> BlockConfig:
    """`shape` with something in the place of what only the data can tell, so that it can be built."""
    unknown = {"vocab_size": 2, "classes": 2, "image_channels": 3, "image_size": 32}
    return shape.model_copy(update={key: value for key, value in unknown.items() if getattr(shape, key, None) == 0})
