"""Whether the stages of a run fit a number of ranks, known before any of them is started."""

from collections.abc import Sequence

from wtn_pretrain.errors import UserError
from wtn_pretrain.imitation.pairing import Pairing
from wtn_pretrain.imitation.plan import Plan
from wtn_pretrain.models.base import BlockConfig, Flops
from wtn_pretrain.planning.choose import choose_plan
from wtn_pretrain.recipe import Recipe
from wtn_pretrain.training.config import TrainSection

STAGES = ("wide", "narrow", "finetune")


def require_fit(
    recipe: Recipe,
    thin: BlockConfig,
    wide: BlockConfig,
    pairing: Pairing,
    counts: tuple[Flops, Flops],
    length: int | None,
    ranks: int,
    stages: Sequence[str] = STAGES,
) -> Plan | None:
    """Refuses `ranks` ranks that one of `stages` cannot use; the plan of stage 2, if that is among them.

    Raises:
        UserError: names the key, what does not fit and the remedy.
    """
    plan = None
    if "wide" in stages and not recipe.wide.teacher:
        _require_divisible("wide", recipe.wide, ranks)
    if "narrow" in stages:
        plan = choose_plan(recipe.narrow, thin, wide, pairing, counts, ranks, length)
    if "finetune" in stages:
        _require_divisible("finetune", recipe.finetune, ranks)
    return plan


def _require_divisible(name: str, section: TrainSection, ranks: int) -> None:
    tensor = section.tensor_parallel
    if ranks % tensor:
        raise UserError(f"{name}.tensor_parallel: {tensor} does not divide {ranks} ranks; give a divisor of them or other ranks")
    if not _divides(section, ranks):
        fewer = next((count for count in range(ranks - 1, 0, -1) if count % tensor == 0 and _divides(section, count)), None)
        micro = f" of {section.micro_batch_size}" if section.micro_batch_size else ""
        raise UserError(
            f"{name}.batch_size: {section.batch_size} cannot be split into equal micro-batches{micro} over {ranks // tensor} data ranks; "
            + (f"{fewer} ranks would fit" if fewer else f"lower {name}.micro_batch_size")
        )


def _divides(section: TrainSection, ranks: int) -> bool:
    return section.batch_size % (ranks // section.tensor_parallel * max(1, section.micro_batch_size)) == 0
