"""What the stages of a job take of a kind of accelerator, as tools/plan.py plans them: seconds, and memory of a rank."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from wtn_pretrain.errors import UserError
from wtn_pretrain.imitation.learner import zero_stage
from wtn_pretrain.imitation.plan import Plan
from wtn_pretrain.planning.cluster import data_centre
from wtn_pretrain.planning.command import Job
from wtn_pretrain.planning.costs import DATA_CENTRE, Device
from wtn_pretrain.planning.costs import declared as declared_units
from wtn_pretrain.planning.duration import lasting
from wtn_pretrain.planning.predict import predict
from wtn_pretrain.planning.search import automatic, fed_by
from wtn_pretrain.planning.show import seconds
from wtn_pretrain.planning.spans import flow
from wtn_pretrain.planning.training.command import work_of
from wtn_pretrain.planning.training.devices import ROOM, USE, Accelerator, accelerator, cluster, rates
from wtn_pretrain.planning.training.layout import layout_of
from wtn_pretrain.planning.training.pace import declared
from wtn_pretrain.planning.training.search import answer


class Need(NamedTuple):
    """What a stage takes."""

    stage: str
    seconds: float
    """Of all its students one after the other; validation and checkpoints not among them."""
    memory: float
    """Bytes of the fullest rank."""

    def __str__(self) -> str:
        return f"{self.stage} {seconds(self.seconds)}, {self.memory / 1e9:.3g} GB a rank"


def settled(job: Job, ranks: int, name: str) -> Job:
    """`job` with the plan that `narrow.plan: auto` will be on so many ranks of an accelerator, whatever is here.

    Raises:
        UserError: there is no such accelerator, or no plan fits its memory.
    """
    device = accelerator(name)
    if job.recipe.narrow.plan != "auto":
        return job
    there = data_centre(ranks)._replace(memory=device.memory)
    plan = automatic(job.thin, job.wide, job.pairing, job.counts, job.recipe.narrow, ranks, job.length, DATA_CENTRE, there)
    narrow = job.recipe.narrow.model_copy(update={"plan": str(plan)})
    return job._replace(recipe=job.recipe.model_copy(update={"narrow": narrow}))


def needs(job: Job, stages: Sequence[str], plan: Plan | None, ranks: int, per_node: int, name: str) -> list[Need]:
    """What `stages` take on so many ranks of an accelerator by name; `plan`: that of stage 2, where it is among them.

    Raises:
        UserError: there is no such accelerator, or it has no units for the recipe's precision, or a stage does not fit into its memory.
    """
    device = accelerator(name)
    found = []
    for stage in stages:
        if stage == "wide" and job.recipe.wide.teacher:
            continue
        made = _imitation(job, plan, ranks, per_node, device) if stage == "narrow" else _training(job, stage, ranks, per_node, device)
        if made.memory > ROOM * device.memory:
            shown = f"tools/plan.py --stage {stage} --ranks {ranks}" + (f" --device {name}" if stage != "narrow" else "")
            raise UserError(
                f"{stage}: needs {made.memory / 1e9:.3g} GB a rank on {ranks} ranks as planned, and of the {device.memory / 1e9:.3g} GB of "
                f"--device {name} {ROOM:.0%} can be used; {shown} shows what fits"
            )
        found.append(made)
    return found


def _training(job: Job, stage: str, ranks: int, per_node: int, device: Accelerator) -> Need:
    work = work_of(job, stage)
    reached = rates(device, work.section.products, USE["text" if work.length else "images"])
    machines = cluster(device, ranks, per_node)
    found = answer(work, layout_of(work.section, stage, ranks), partial(declared, rates=reached), machines, "gpu")
    students = 1 if stage == "wide" else len(job.recipe.compare.seeds)
    return Need(stage, students * found.seconds(work.section.steps), found.memory.total)


def _imitation(job: Job, plan: Plan | None, ranks: int, per_node: int, device: Accelerator) -> Need:
    assert plan is not None
    section = job.recipe.narrow
    reached = rates(device, section.precision, USE["text" if job.length else "images"])
    machines = cluster(device, ranks, per_node)
    moving = flow(section, fed_by(section), zero_stage(section))
    target = Device(reached.flops, reached.bandwidth, reached.overhead)
    costs = declared_units(
        job.thin, job.wide, job.pairing, job.counts, section, moving.rows, target=target, fed=moving.fed, length=job.length
    )
    memory = max(float(stage.memory.total) for stage in predict(plan, costs, machines, moving).stages)
    once = sum(phase.seconds for phase in lasting(plan, costs, machines, moving, section))
    return Need("narrow", len(job.recipe.compare.seeds) * once, memory)
