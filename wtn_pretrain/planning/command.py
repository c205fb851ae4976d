"""The work of tools/plan.py: a recipe and a cluster in, a plan and what it will do out."""

import argparse
from pathlib import Path
from typing import NamedTuple

from wtn_pretrain.arguments import Parser, amount, assignments_of, count
from wtn_pretrain.errors import UserError
from wtn_pretrain.exchange.teacher import adapted, wide_shape
from wtn_pretrain.imitation.learner import zero_stage
from wtn_pretrain.imitation.pairing import Pairing, pair
from wtn_pretrain.imitation.plan import Plan, check, fingerprint, parse, read, single, write
from wtn_pretrain.models.base import BlockConfig, Flops, flops
from wtn_pretrain.models.bert.config import BertConfig
from wtn_pretrain.models.resnet.config import ResNetConfig
from wtn_pretrain.planning.choose import choose_plan
from wtn_pretrain.planning.cluster import Cluster, Link, data_centre, usual
from wtn_pretrain.planning.costs import DATA_CENTRE, UnitCost, declared, here
from wtn_pretrain.planning.duration import streams
from wtn_pretrain.planning.predict import predict
from wtn_pretrain.planning.profile import profile
from wtn_pretrain.planning.search import fed_by, fewest, search
from wtn_pretrain.planning.show import describe, seconds
from wtn_pretrain.planning.spans import Flow, flow
from wtn_pretrain.recipe import Recipe, load_recipe

WORDS = 30522
"""Word pieces of BERT's own vocabulary, assumed where the data decides and is not looked at."""


EPILOG = f"""Left out, a rank is a data-centre GPU: {DATA_CENTRE.flops:g} FLOP/s, {DATA_CENTRE.bandwidth:g} bytes/s of memory,
{DATA_CENTRE.overhead:g} s a unit, 8 on a node, 200e9 bytes/s and 5e-6 s within and 25e9 bytes/s between nodes, 80e9 bytes. With --profile,
links are those of this kind of device (cores of one machine: 1e9 bytes/s, 1e-4 s, no limit of memory)."""


class Shapes(NamedTuple):
    """What a recipe trains."""

    recipe: Recipe
    thin: BlockConfig
    wide: BlockConfig
    length: int | None
    """Of sequences; None for images."""
    assumed: list[str]
    """Keys of the shape that the data decides, with what was taken instead."""


class Job(NamedTuple):
    """What there is to plan."""

    recipe: Recipe
    thin: BlockConfig
    wide: BlockConfig
    pairing: Pairing
    counts: tuple[Flops, Flops]
    length: int | None
    assumed: list[str]
    """Keys of the shape that the data decides, with what was taken instead."""


def parser(doc: str) -> Parser:
    """The options of tools/plan.py; all others are assignments to keys of the recipe."""
    made = Parser(description=doc, epilog=EPILOG, allow_abbrev=False)
    made.add_argument("--config", required=True, metavar="RECIPE", help="a run's YAML file; --section.key=value overrides it")
    stages = ("wide", "narrow", "finetune", "scratch")
    made.add_argument("--stage", choices=stages, default="narrow", help="narrow unless given; the others have a --help of their own")
    made.add_argument("--ranks", required=True, type=count, help="ranks to plan for")
    made.add_argument("--ranks-per-node", type=count, help="ranks on one machine")
    made.add_argument("--flops", type=amount, help="FLOP/s that a rank reaches in matrix products and convolutions")
    made.add_argument("--memory-bandwidth", type=amount, help="bytes/s to and from a rank's memory")
    made.add_argument("--overhead", type=amount, help="seconds to start a unit, however few its rows")
    made.add_argument("--bandwidth", type=amount, help="bytes/s of a rank's link to other nodes")
    made.add_argument("--node-bandwidth", type=amount, help="bytes/s of its link within a node")
    made.add_argument("--latency", type=amount, help="seconds of a message within a node; twice that to others")
    made.add_argument("--memory", type=amount, help="bytes a rank may hold")
    made.add_argument("--profile", action="store_true", help="time the units on this device instead of counting FLOPs")
    made.add_argument("--compare", metavar="PLAN", help="another plan, as 0-3,4-6x2 or a file, to show beside the best")
    made.add_argument("--out", type=Path, metavar="FILE", help="write the plan to FILE, for narrow.plan")
    return made


def run(doc: str, argv: list[str]) -> str:
    """What the command prints.

    Raises:
        UserError: one line that names the argument or key, what is wrong and the remedy.
    """
    options, rest = parser(doc).parse_known_args(argv)
    job = read_job(options.config, assignments_of(rest))
    if options.out and job.assumed:
        raise UserError(
            f"--out: a plan file is for one shape, and the data decides {job.assumed[0].split(' = ')[0]}; set it on the command line"
        )
    section = job.recipe.narrow
    moving = flow(section, fed_by(section), zero_stage(section))
    cluster = _cluster(options)
    other = _other(options.compare, job) if options.compare else None
    costs, base = _costs(job, moving, options)
    cluster = cluster._replace(base=base or cluster.base)
    plan = search(costs, cluster, moving) if streams(section) else single(len(costs), options.ranks)
    parts = [_heading(job, plan, cluster, options), describe(plan, costs, cluster, moving, section)]
    best = predict(plan, costs, cluster, moving).micro_batch
    # the search adds the same seconds in another order
    enough = fewest(costs, cluster, moving, best * (1 + 1e-9)) if streams(section) else plan.ranks
    if enough < plan.ranks:
        parts.append(f"a plan of {enough} ranks would be as fast")
    if other:
        theirs = predict(other, costs, cluster, moving).micro_batch
        parts.append(f"--compare {other}")
        parts.append(describe(other, costs, cluster, moving, section))
        parts.append(f"a micro-batch takes {seconds(theirs)} under it: {theirs / best:.3g} times the {seconds(best)} of the best plan")
    if options.out:
        write(options.out, plan, fingerprint(job.thin, job.wide, job.pairing))
        parts.append(f"{options.out} written; run it with --narrow.plan={options.out}")
    return "\n\n".join(parts)


def dry_run(config: str, assignments: list[str], ranks: int) -> str:
    """What a run of a recipe on `ranks` ranks would do in stage 2, from declared costs; its data need not be there."""
    job = read_job(config, assignments)
    section = job.recipe.narrow
    plan = choose_plan(section, job.thin, job.wide, job.pairing, job.counts, ranks, job.length)
    moving = flow(section, fed_by(section), zero_stage(section))
    costs = declared(job.thin, job.wide, job.pairing, job.counts, section, moving.rows, target=here(), fed=moving.fed, length=job.length)
    lines = [f"{job.recipe.run.name}: stage 2 on {ranks} {'rank' if ranks == 1 else 'ranks'} under plan {plan}; nothing is started"]
    if job.assumed:
        lines.append(f"assumed, since the data decides: {', '.join(job.assumed)}")
    return "\n\n".join(["\n".join(lines), describe(plan, costs, usual(ranks), moving, section)])


def read_job(config: str, assignments: list[str]) -> Job:
    """The networks of a recipe, paired; its data need not be there."""
    recipe, thin, wide, length, assumed = read_shapes(config, assignments)
    pairing = pair(thin, wide, unit=recipe.narrow.unit, depth_map=recipe.narrow.depth_map)
    return Job(recipe, thin, wide, pairing, (flops(thin, length), flops(wide, length)), length, assumed)


def read_shapes(config: str, assignments: list[str]) -> Shapes:
    """The networks of a recipe; its data need not be there."""
    recipe = load_recipe(config, assignments)
    assumed: list[str] = []
    if recipe.wide.teacher:
        recipe = recipe.model_copy(update={"model": adapted(recipe.model, recipe.wide_model())})
    thin, length = _completed(recipe, assumed)
    if recipe.wide.teacher:
        wide = wide_shape(thin, recipe.wide.teacher, recipe.wide.teacher_pickle, recipe.wide.teacher_heads)
    else:
        wide = thin.widen(recipe.widen.inner, recipe.widen.outer, recipe.widen.blocks or None)
    return Shapes(recipe, thin, wide, length, assumed)


def _completed(recipe: Recipe, assumed: list[str]) -> tuple[BlockConfig, int | None]:
    """The thin network's shape and the length of its sequences, with what only the data knows assumed."""
    model, data = recipe.model, recipe.data
    guesses: dict[str, int] = {}
    length = None
    if isinstance(model, BertConfig) and data.kind == "text":
        length = data.sequence_length
        guesses = {"vocab_size": WORDS if data.tokenizer else data.vocab_size}
        if data.source == "files" and not data.tokenizer and data.vocab_size == type(data).model_fields["vocab_size"].default:
            guesses = {"vocab_size": WORDS}
    elif isinstance(model, ResNetConfig) and data.kind == "images":
        size, channels, classes = {"digits": (8, 1, 10), "idx": (28, 1, 10), "cifar": (32, 3, 10)}.get(data.source, (224, 3, 1000))
        guesses = {"image_size": data.size or size, "image_channels": data.channels or channels, "classes": data.classes or classes}
    update = {key: value for key, value in guesses.items() if not getattr(model, key)}
    assumed += [f"model.{key} = {value}" for key, value in update.items()]
    return model.model_copy(update=update), length


def _costs(job: Job, moving: Flow, options: argparse.Namespace) -> tuple[list[UnitCost], int]:
    """Costs of every unit, and the bytes of a process where they were measured."""
    pieces = job.thin, job.wide, job.pairing, job.counts, job.recipe.narrow, moving.rows
    if options.profile:
        from wtn_pretrain.parallel.launch import start_ranks

        # what every rank of a run holds before it builds a network; DeepSpeed cannot begin twice in a process, so nothing is stopped
        start_ranks()
        measured = profile(*pieces, fed=moving.fed, length=job.length)
        return measured.costs, measured.base
    given = {"flops": options.flops, "bandwidth": options.memory_bandwidth, "overhead": options.overhead}
    target = DATA_CENTRE._replace(**{key: value for key, value in given.items() if value})
    return declared(*pieces, target=target, fed=moving.fed, length=job.length), 0


def _cluster(options: argparse.Namespace) -> Cluster:
    """What was declared, and the usual for the rest."""
    if options.profile:
        for name in ("flops", "memory_bandwidth", "overhead"):
            if getattr(options, name):
                raise UserError(f"--{name.replace('_', '-')}: is measured with --profile; leave one of them out")
    common = (usual if options.profile else data_centre)(options.ranks)
    latency = options.latency or common.inside.latency
    return common._replace(
        per_node=options.ranks_per_node or common.per_node,
        inside=Link(options.node_bandwidth or common.inside.bandwidth, latency),
        between=Link(options.bandwidth or common.between.bandwidth, 2 * latency),
        memory=options.memory or common.memory,
    )


def _heading(job: Job, plan: Plan, cluster: Cluster, options: argparse.Namespace) -> str:
    source = "measured here" if options.profile else f"declared at {options.flops or DATA_CENTRE.flops:.3g} FLOP/s"
    lines = [
        f"{job.recipe.run.name}: {plan.units} units (0 is the stem) on {plan.ranks} ranks, {cluster.per_node} a node; costs {source}",
        f"plan: {plan}" if len(str(plan)) < 130 else f"plan: {len(plan.spans)} spans",
    ]
    if job.assumed:
        lines.append(f"assumed, since the data decides: {', '.join(job.assumed)}")
    return "\n".join(lines)


def _other(text: str, job: Job) -> Plan:
    """The plan to compare with, from its text or a file."""
    plan = read(Path(text), fingerprint(job.thin, job.wide, job.pairing)) if text.endswith(".json") else parse(text)
    return check(plan, job.pairing.units + 1)
