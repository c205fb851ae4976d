"""The work of tools/plan.py for stages 1 and 3: a recipe and devices in, a layout and what it will do out."""

import argparse
import re
from collections.abc import Callable

from wtn_pretrain.arguments import Parser, amount, assignments_of, count
from wtn_pretrain.device import device as own_device
from wtn_pretrain.device import total_memory
from wtn_pretrain.errors import UserError
from wtn_pretrain.models.bert.config import BertConfig
from wtn_pretrain.parallel.launch import start_ranks
from wtn_pretrain.planning.cluster import Cluster, Link, usual
from wtn_pretrain.planning.command import Job, Shapes, read_shapes
from wtn_pretrain.planning.fit import require_divisible
from wtn_pretrain.planning.profile import RUNTIME, resident
from wtn_pretrain.planning.show import seconds
from wtn_pretrain.planning.training.devices import ACCELERATORS, ROOM, USE, Rates, accelerator, cluster, rates
from wtn_pretrain.planning.training.layout import Layout, layout_of
from wtn_pretrain.planning.training.pace import Passes, declared
from wtn_pretrain.planning.training.search import Answer, answer, best, choices, counts, smallest
from wtn_pretrain.planning.training.show import ROWS, describe, table, total
from wtn_pretrain.planning.training.work import Work

EPILOG = f"""Layouts are searched over ZeRO 0 to 3, tensor parallelism within a node, recomputation, micro-batch and, with --offload, host
memory. Left out, the device is an h100 and {USE["text"]:g} of its peak is reached with text, {USE["images"]:g} with images;
--profile measures the network's parts on this device instead. Devices: {", ".join(ACCELERATORS)}.
All figures are of a stage as the recipe has it: other --STAGE.key=value may follow."""
UNITS = {"m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def parser(doc: str) -> Parser:
    """The options; all others are assignments to keys of the recipe."""
    made = Parser(description=doc, epilog=EPILOG, allow_abbrev=False)
    made.add_argument("--config", required=True, metavar="RECIPE", help="a run's YAML file; --section.key=value overrides it")
    made.add_argument("--stage", required=True, choices=("wide", "finetune", "scratch"), help="what is trained")
    made.add_argument("--ranks", type=count, help="devices to plan for; left out, as many as --within needs")
    made.add_argument("--within", type=_duration, metavar="TIME", help="find the fewest devices that are done in it: 24h, 90min, 3d")
    made.add_argument("--most", type=count, default=1024, help="devices that are looked at with --within (default 1024)")
    made.add_argument("--device", metavar="NAME", help=f"kind of device: {', '.join(ACCELERATORS)}")
    made.add_argument("--use", type=amount, metavar="SHARE", help="share of its peak that training reaches (model FLOPs utilisation)")
    made.add_argument("--flops", type=amount, help="FLOP/s that it reaches, instead of a share of its peak")
    made.add_argument("--memory", type=amount, help="bytes a rank may hold")
    made.add_argument("--bandwidth", type=amount, help="bytes/s of a rank's link to other nodes")
    made.add_argument("--node-bandwidth", type=amount, help="bytes/s of its link within a node")
    made.add_argument("--ranks-per-node", type=count, help="devices of a node (default 8)")
    made.add_argument("--price", type=amount, default=0.0, metavar="MONEY", help="of a device hour")
    made.add_argument("--offload", action="store_true", help="look at what ZeRO keeps in host memory, too")
    made.add_argument("--profile", action="store_true", help="time the network's parts on this device instead of counting FLOPs")
    return made


def run(doc: str, argv: list[str]) -> str:
    """What the command prints.

    Raises:
        UserError: one line that names the argument or key, what is wrong and the remedy.
    """
    options, rest = parser(doc).parse_known_args(argv)
    if not options.ranks and not options.within:
        raise UserError("argument --ranks: how many devices? or --within 24h, to find out how many are needed")
    assignments = assignments_of(rest)
    stage: str = options.stage
    work, name, assumed = read_work(options.config, assignments, stage)
    machines, reached, kind = _machines(options, work)
    timed = _profiled(machines) if options.profile else _counted(reached)
    limit, steps, price = machines.memory, work.section.steps, options.price
    shape = f"{work.parameters() / 1e6:,.0f} million parameters, {3 * work.flops().total / 1e9:,.4g} GFLOP a sample"
    amount_of = f"{steps:,} steps of {work.section.batch_size:,} samples" + (f" of {work.length} tokens" if work.length else "")
    source = "passes measured here" if options.profile else f"{reached.flops:.3g} FLOP/s reached"
    lines = [f"{name}, stage {stage}: {shape}; {amount_of}", f"device: {kind}, {source}, {machines.per_node} a node"]
    if assumed:
        lines.append(f"assumed, since the data decides: {', '.join(assumed)}")
    parts = ["\n".join(lines)]
    on = own_device().type if options.profile else "gpu"
    if options.ranks:
        parts += _fixed(work, stage, options, timed, machines.sized(options.ranks), on)
    if options.within:
        tried = smallest(
            work,
            options.within,
            [options.ranks] if options.ranks else counts(machines.per_node, options.most, work.section.batch_size),
            timed,
            machines,
            on,
            options.offload,
        )
        parts.append(_enough(tried, options.within, steps, limit, price, stage))
    return "\n\n".join(parts)


def read_work(config: str, assignments: list[str], stage: str) -> tuple[Work, str, list[str]]:
    """A stage of a recipe, its name, and what the data would decide; the data need not be there.

    Raises:
        UserError: the recipe is refused, or has no such stage.
    """
    shapes = read_shapes(config, assignments)
    if stage == "wide" and shapes.recipe.wide.teacher:
        raise UserError("wide.teacher: the wide network comes from elsewhere, so stage 1 trains nothing; plan --stage finetune")
    return work_of(shapes, stage), shapes.recipe.run.name, shapes.assumed


def work_of(shapes: Shapes | Job, stage: str) -> Work:
    """What a stage (wide, finetune or scratch) trains."""
    shape = shapes.wide if stage == "wide" else shapes.thin
    section = shapes.recipe.scratch() if stage == "scratch" else getattr(shapes.recipe, stage)
    length, share = (shapes.length or 0), getattr(shapes.recipe.task, "mask_probability", 0.0)
    masked = max(1, round(share * (length - 2))) if isinstance(shape, BertConfig) else 0
    return Work(shape, section, length, masked)


def _machines(options: argparse.Namespace, work: Work) -> tuple[Cluster, Rates, str]:
    """The devices, what they reach, and their name."""
    per_node = options.ranks_per_node or 8
    if options.profile:
        if options.device or options.flops or options.use:
            raise UserError("--profile: measures this device; leave --device, --flops and --use out")
        found = usual(options.ranks or 1)._replace(per_node=per_node)
        if own_device().type == "cpu":
            start_ranks()
            found = found._replace(base=resident() + RUNTIME)
        return _declared(found, options, ROOM * total_memory()), Rates(1.0, 1.0), f"this {own_device().type}"
    use = options.use or USE["text" if work.length else "images"]
    if use > 1:
        raise UserError(f"--use {use:g}: is a share of the peak; give a number up to 1")
    chosen = accelerator(options.device or "h100")
    reached = rates(chosen, work.section.products, use)
    if options.flops:
        reached = reached._replace(flops=options.flops)
    found = cluster(chosen, options.ranks or 1, per_node)
    return _declared(found, options, ROOM * chosen.memory), reached, chosen.name


def _declared(found: Cluster, options: argparse.Namespace, memory: float) -> Cluster:
    inside = Link(options.node_bandwidth, found.inside.latency) if options.node_bandwidth else found.inside
    between = Link(options.bandwidth, found.between.latency) if options.bandwidth else found.between
    return found._replace(inside=inside, between=between, memory=options.memory or memory)


def _counted(reached: Rates) -> Callable[[Work, Layout], Passes]:
    return lambda work, layout: declared(work, layout, reached)


def _profiled(machines: Cluster) -> Callable[[Work, Layout], Passes]:
    """Passes measured here, each kind of them once."""
    from wtn_pretrain.planning.training.measured import measured

    start_ranks()
    known: dict[Layout, Passes] = {}

    def timed(work: Work, layout: Layout) -> Passes:
        key = layout._replace(ranks=layout.tensor, accumulation=1)
        if key not in known:
            known[key] = measured(work, layout, repeats=3)
        return known[key]

    return timed


def _fixed(
    work: Work, stage: str, options: argparse.Namespace, timed: Callable[[Work, Layout], Passes], machines: Cluster, on: str
) -> list[str]:
    """The recipe's own layout and, without --profile, the others on as many ranks."""
    steps, limit, price = work.section.steps, machines.memory, options.price
    if not options.profile and next(choices(work, options.ranks, machines.per_node, options.offload), None) is None:
        # whatever the recipe says of layers and micro-batches
        require_divisible(stage, work.section.model_copy(update={"tensor_parallel": 1, "micro_batch_size": 0}), options.ranks)
    try:
        own = answer(work, layout_of(work.section, stage, options.ranks), timed, machines, on)
        parts = [f"as the recipe has it: {describe(own, steps, limit, price)}"]
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        parts = [f"as the recipe has it: cannot run ({error})"]
    if options.profile:
        return parts
    found = best(work, options.ranks, timed, machines, on, options.offload)
    if found:
        first = found[0]
        parts.append(f"best of {len(found)} layouts that fit:\n{describe(first, steps, limit, price)}\n{_keys(first, stage)}")
    every = [
        answer(work, layout._replace(micro=micro, accumulation=layout.accumulation // micro), timed, machines, on, exact=False)
        for layout in choices(work, options.ranks, machines.per_node, options.offload)
        # what recomputation saves there matters where nothing fits without
        if not (found and layout.tensor > 1 and layout.checkpoint)
        for micro in [_same_rows(layout, first.layout.micro * first.layout.data if found else layout.accumulation)]
    ]
    parts.append(f"each layout with equal rows, whether it fits or not:\n{table(every[: 3 * ROWS], steps, limit, price)}")
    return parts


def _same_rows(layout: Layout, rows: int) -> int:
    """The micro-batch nearest to so many rows over all data ranks."""
    divisors = [value for value in range(1, layout.accumulation + 1) if layout.accumulation % value == 0]
    return min(divisors, key=lambda value: abs(value * layout.data - rows))


def _enough(tried: list[tuple[int, Answer | None]], within: float, steps: int, limit: float, price: float, stage: str) -> str:
    """How many devices are enough."""
    good = [found for _, found in tried if found is not None and found.seconds(steps) <= within]
    shown = [found for _, found in tried if found is not None]
    if not shown:
        return f"within {seconds(within)}: no layout fits into {limit / 1e9:.3g} GB on up to {tried[-1][0]} devices; try --offload"
    few = shown if len(shown) <= ROWS else [*shown[:4], *shown[4 - ROWS :]]
    lines = [table(few, steps, limit, price), ""]
    if good:
        first = good[0]
        verdict = f"within {seconds(within)}: {first.layout.ranks} devices, {total(first, steps, price)}"
        lines += [verdict, describe(first, steps, limit, price), _keys(first, stage)]
    else:
        fastest = min(shown, key=lambda found: found.pace.step)
        lines.append(
            f"within {seconds(within)}: not on up to {tried[-1][0]} devices; {fastest.layout.ranks} take {total(fastest, steps, price)}. "
            "A larger batch lets more of them work, fewer steps take less"
        )
    return "\n".join(lines)


def _keys(found: Answer, stage: str) -> str:
    """What to write on the command line."""
    layout = found.layout
    keys = [f"--{stage}.deepspeed={layout.file()}", f"--{stage}.micro_batch_size={layout.micro}"]
    if layout.tensor > 1:
        keys.append(f"--{stage}.tensor_parallel={layout.tensor}")
    if layout.checkpoint:
        keys.append(f"--{stage}.checkpoint_activations=true")
    return "run it with " + " ".join(keys)


def _duration(text: str) -> float:
    found = re.fullmatch(r"([0-9.]+)(m|min|h|d)", text)
    try:
        value = float(found.group(1)) * UNITS[found.group(2)] if found else 0.0
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 24h, 90min or 3d")
    return value
