"""The plan that a run follows: the one its configuration names, or the planner's own."""

from pathlib import Path

from wtn_pretrain.errors import UserError
from wtn_pretrain.imitation.config import ImitateSection
from wtn_pretrain.imitation.pairing import Pairing
from wtn_pretrain.imitation.plan import Plan, check, fingerprint, parse, read
from wtn_pretrain.models.base import BlockConfig, Flops
from wtn_pretrain.planning.search import automatic


def choose_plan(
    section: ImitateSection,
    thin: BlockConfig,
    wide: BlockConfig,
    pairing: Pairing,
    counts: tuple[Flops, Flops],
    ranks: int,
    length: int | None = None,
) -> Plan:
    """Which rank holds which units; the same answer on every rank. `length` is that of sequences (None: the longest).

    Raises:
        UserError: the plan that the section names does not fit the networks or the ranks.
    """
    if section.plan == "auto":
        plan = automatic(thin, wide, pairing, counts, section, ranks, length)
    elif Path(section.plan).suffix == ".json":
        plan = read(Path(section.plan), fingerprint(thin, wide, pairing))
    else:
        plan = parse(section.plan)
    check(plan, pairing.units + 1, ranks)
    rows = section.micro_batch_size or section.batch_size
    most = max(span.replicas for span in plan.spans)
    if most > rows:
        raise UserError(f"narrow.plan: {plan} splits {rows} samples over {most} ranks; raise narrow.micro_batch_size or use fewer ranks")
    return plan
