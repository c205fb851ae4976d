"""The work of tools/submit.py: a run's configuration in, jobs of Slurm out."""

import argparse
import hashlib
import itertools
import math
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from wtn_pretrain.arguments import Parser, amount, assignments_of, count
from wtn_pretrain.errors import UserError
from wtn_pretrain.files import write_text
from wtn_pretrain.imitation.learner import zero_stage
from wtn_pretrain.imitation.plan import Plan, fingerprint, parse, read
from wtn_pretrain.planning.cluster import usual
from wtn_pretrain.planning.command import Job, read_job
from wtn_pretrain.planning.costs import declared, here
from wtn_pretrain.planning.fit import STAGES, require_fit
from wtn_pretrain.planning.predict import predict
from wtn_pretrain.planning.search import fed_by
from wtn_pretrain.planning.spans import flow
from wtn_pretrain.planning.training.devices import ACCELERATORS
from wtn_pretrain.recipe import Recipe
from wtn_pretrain.slurm.jobs import cancel, follow, submit
from wtn_pretrain.slurm.needs import Need, needs, settled
from wtn_pretrain.slurm.script import ENTRY, FOLDER, ROOT, SCRIPTS, SWEEP, Size, fill, minutes

ASKS = {"wide": ("wide",), "imitate": ("narrow",), "finetune": ("finetune",), "method": STAGES}
"""Stage to submit -> the stages of a run that it works on."""
PER_NODE = 8
"""Ranks on a node, where nothing is said."""
LIMIT_MARGIN = 15.0
"""Minutes of a job beyond run.time_limit, or beyond what is planned: to start, and to save."""
SPARE = 1.5
"""Of the time that is planned, what a job asks for: the plan knows nothing of validation, checkpoints and a busy file system."""


class Script(NamedTuple):
    """A batch script that has been filled in, and what is given to it."""

    stage: str
    path: Path
    text: str
    arguments: list[str]
    sweep: Path
    """Where a sweep's lines go; named after them, since jobs in the queue still read those of an earlier sweep."""
    lines: list[str]
    """Of a sweep, the options of every element."""


def parser(doc: str) -> Parser:
    """The options of tools/submit.py; all others are assignments to keys of the recipe."""
    made = Parser(
        description=doc, allow_abbrev=False, epilog="Any --section.key=value goes, as in training. --chain, --vary: not together."
    )
    made.add_argument("config", metavar="CONFIG", help="a run's YAML file")
    made.add_argument("--stage", choices=tuple(SCRIPTS), default="method", help="what to run (method: all stages in one job)")
    made.add_argument("--chain", action="store_true", help="a job for each stage, each after the one before, then the baseline and report")
    made.add_argument("--vary", action="append", default=[], metavar="KEY=V1,V2", help="an array of jobs, one for each value; repeatable")
    made.add_argument("--nodes", type=count, help="nodes (default: as many as narrow.plan needs, or 1)")
    made.add_argument("--ranks-per-node", type=count, help=f"ranks on each (default {PER_NODE}, or fewer where narrow.plan says so)")
    made.add_argument("--gpus-per-node", type=_natural, help="GPUs of each node (default: one a rank; 0: none)")
    made.add_argument("--cpus-per-rank", type=count, help="cores of each rank (default: one, and one for each of data.workers)")
    made.add_argument("--memory", help="of each node, such as 64G (default: all it has; of stage 2 on CPUs, as planned)")
    made.add_argument(
        "--time",
        type=amount,
        metavar="MINUTES",
        help="limit (default: run.time_limit and a quarter of an hour; else, with --device, half as long again as planned; else a day)",
    )
    made.add_argument(
        "--device", metavar="NAME", help=f"plan time and memory on these, and refuse what does not fit: {', '.join(ACCELERATORS)}"
    )
    made.add_argument(
        "--option", action="append", default=[], metavar="NAME[=VALUE]", help="any option of sbatch, as partition=gpu; repeatable"
    )
    made.add_argument("--dry-run", action="store_true", help="show what would be submitted, and submit nothing")
    made.add_argument("--no-follow", action="store_true", help="submit and leave")
    return made


def run(doc: str, argv: Sequence[str]) -> int:
    """Submits and follows; the exit code, 0 where every job has succeeded.

    Raises:
        UserError: one line that names the argument or key, what is wrong and the remedy; nothing has been submitted.
    """
    options, rest = parser(doc).parse_known_args(argv)
    assignments = assignments_of(rest)
    if options.chain and options.vary:
        raise UserError("--chain, --vary: a chain is of one run; submit one chain for each value")
    job = read_job(options.config, assignments)
    stages = list(SCRIPTS) if options.chain else [options.stage]
    if options.chain and job.recipe.wide.teacher:
        stages.remove("wide")
    scripts = [_script(job, stage, options, assignments) for stage in stages]
    if options.dry_run:
        print("\n".join(_shown(script) for script in scripts))
        return 0
    before: int | None = None
    jobs: list[int] = []
    for script in scripts:
        _write(script)
        try:
            before = submit(script.path, script.arguments, after=before)
        except UserError as error:
            if not jobs:
                raise
            cancel(jobs)
            raise UserError(f"{script.stage}: {error}; the jobs before it are cancelled again") from None
        jobs.append(before)
        after = f" after {jobs[-2]}" if len(jobs) > 1 else ""
        _say(f"{script.stage}: job {before}{after}, {script.path}")
    if options.no_follow:
        return 0
    try:
        succeeded = [follow(number, Path.cwd(), _say) for number in jobs]
        return 0 if all(succeeded) else 1
    except KeyboardInterrupt:
        _say(f"no longer followed; end it with: scancel {' '.join(map(str, jobs))}")
        return 0


def _script(job: Job, stage: str, options: argparse.Namespace, assignments: list[str]) -> Script:
    size, plan = _size(job, stage, options)
    recipe = job.recipe
    name = f"{recipe.run.name}-{stage}"
    comments = [f"narrow.plan {plan} on {plan.ranks} ranks"] if plan is not None else []
    lines = _elements(options.vary, recipe.run.name)
    # a job has as long as its longest element
    runs = [_element(line, stage, options, assignments, size) for line in lines] or [_needs(job, plan, stage, options, size)]
    found = max(runs, key=lambda run: sum(need.seconds for need in run))
    planned = 0.0
    if found:
        comments.append(f"planned on {options.device}: {'; '.join(map(str, found))}")
        planned = SPARE * sum(need.seconds for need in found) / 60 + LIMIT_MARGIN
    limit = options.time or (recipe.run.time_limit and recipe.run.time_limit + LIMIT_MARGIN) or planned
    head: dict[str, str | None] = {"job-name": name, **size.options()}
    if limit:
        head["time"] = minutes(limit)
    if lines:
        head["array"] = f"0-{len(lines) - 1}"
    for option in options.option:
        key, equals, value = option.removeprefix("--").partition("=")
        if not re.fullmatch(r"[a-z][a-z0-9-]+", key) or (equals and not value):
            raise UserError(f"--option {option!r}: write NAME=VALUE, such as partition=gpu, or NAME alone, such as exclusive")
        head[key] = value
    folder = recipe.place() / "slurm"
    sweep = folder / f"sweep-{hashlib.sha256(chr(10).join(lines).encode()).hexdigest()[:8]}.txt"
    variables = {"WTN_ROOT": str(ROOT)}
    if lines:
        variables |= {"WTN_SWEEP": str(sweep.absolute()), "WTN_SCRIPT": ENTRY[stage]}
    text = fill((FOLDER / (SWEEP if lines else SCRIPTS[stage])).read_text(encoding="utf-8"), head, variables, comments)
    given = ["--config", options.config, *(f"--{assignment}" for assignment in assignments)]
    return Script(stage, folder / f"{stage}.sbatch", text, given, sweep, lines)


def _needs(job: Job, plan: Plan | None, stage: str, options: argparse.Namespace, size: Size) -> list[Need]:
    """What is planned of a job's stages; nothing where no device is named, or none of them trains.

    Raises:
        UserError: the device is not known, or does not do what a stage asks of it.
    """
    if not options.device:
        return []
    return needs(job, _works_on(stage, options.chain, job.recipe), plan, size.ranks, size.per_node, options.device)


def _works_on(stage: str, chained: bool, recipe: Recipe) -> tuple[str, ...]:
    """The stages that a job trains; the last one of a chain has only the baseline left."""
    if stage != "method":
        return ASKS[stage]
    return (*(() if chained else STAGES), *(("scratch",) if recipe.compare.scratch else ()))


def _size(job: Job, stage: str, options: argparse.Namespace) -> tuple[Size, Plan | None]:
    """What a stage asks for, and the plan of stage 2 where it is part of it.

    Raises:
        UserError: the ranks do not fit the plan or a batch.
    """
    nodes, per_node = options.nodes, options.ranks_per_node
    fixed = _planned_ranks(job) if "narrow" in ASKS[stage] else None
    if fixed is not None and nodes is None:
        # as few nodes as there can be, all filled alike; what cannot be is refused below
        per_node = per_node or next(most for most in range(min(PER_NODE, fixed), 0, -1) if fixed % most == 0)
        nodes = max(1, fixed // per_node)
    elif fixed is not None and per_node is None:
        per_node = max(1, fixed // nodes)
    nodes, per_node = nodes or 1, per_node or PER_NODE
    plan = _fitting(job, stage, options, nodes * per_node)
    gpus = per_node if options.gpus_per_node is None else options.gpus_per_node
    memory = options.memory
    if memory is None:
        memory = _memory(job, plan, per_node) if plan is not None and not gpus else "0"
    return Size(nodes, per_node, gpus, options.cpus_per_rank or 1 + job.recipe.data.workers, memory), plan


def _fitting(job: Job, stage: str, options: argparse.Namespace, ranks: int) -> Plan | None:
    """The plan of stage 2, if it is part of the job: on the named device's kind, or else on this one.

    Raises:
        UserError: the ranks do not fit the plan or a batch.
    """
    if options.device and "narrow" in ASKS[stage]:
        job = settled(job, ranks, options.device)
    return require_fit(job.recipe, job.thin, job.wide, job.pairing, job.counts, job.length, ranks, ASKS[stage])


def _planned_ranks(job: Job) -> int | None:
    """The ranks that the run's plan is for; None: any."""
    asked = job.recipe.narrow.plan
    if asked == "auto":
        return None
    return (read(Path(asked), fingerprint(job.thin, job.wide, job.pairing)) if asked.endswith(".json") else parse(asked)).ranks


def _memory(job: Job, plan: Plan, per_node: int) -> str:
    """What the ranks of the fullest node hold in stage 2, as planned, and a quarter."""
    section = job.recipe.narrow
    moving = flow(section, fed_by(section), zero_stage(section))
    costs = declared(job.thin, job.wide, job.pairing, job.counts, section, moving.rows, target=here(), fed=moving.fed, length=job.length)
    stages = predict(plan, costs, usual(plan.ranks), moving).stages
    ranks = [float(stage.memory.total) for stage in stages for _ in stage.ranks]
    fullest = max(sum(ranks[first : first + per_node]) for first in range(0, len(ranks), per_node))
    return f"{math.ceil(1.25 * fullest / 2**20)}M"


def _elements(vary: Sequence[str], name: str) -> list[str]:
    """The options of every element of a sweep: all combinations of the values. A list in brackets is one value."""
    keys, choices = [], []
    for part in vary:
        key, equals, text = part.removeprefix("--").partition("=")
        values = re.split(r",(?![^\[]*\])", text)
        # the batch script divides a line at spaces
        if "." not in key or not equals or not all(values) or re.search(r"\s", part):
            raise UserError(f"--vary {part!r}: write SECTION.KEY=VALUE,VALUE without spaces, such as wide.optimizer.lr=1e-3,2e-3")
        keys.append(key)
        choices.append(values)
    lines: dict[str, str] = {}
    for combination in itertools.product(*choices) if keys else ():
        pairs = list(zip(keys, combination, strict=True))
        # it becomes the name of a folder
        own = "-".join(f"{key.rpartition('.')[2]}-{_plain(value)}" for key, value in pairs)
        if own in lines:
            raise UserError(f"--vary: two runs would be called {name}-{own}; give values that differ in letters or digits")
        lines[own] = " ".join([f"--run.name={name}-{own}", *(f"--{key}={value}" for key, value in pairs)])
    return list(lines.values())


def _plain(value: str) -> str:
    """What may stand in a name."""
    return re.sub(r"[^\w.+-]+", "_", value).strip("_")


def _element(line: str, stage: str, options: argparse.Namespace, assignments: list[str], size: Size) -> list[Need]:
    """What is planned of an element of a sweep, whose configuration must be right and fit the ranks that all of them are given.

    Raises:
        UserError: as for a run of its own, and which element it is.
    """
    try:
        job = read_job(options.config, [*assignments, *assignments_of(line.split())])
        return _needs(job, _fitting(job, stage, options, size.ranks), stage, options, size)
    except UserError as error:
        raise UserError(f"--vary ({line.partition(' ')[2]}): {error}") from None


def _shown(script: Script) -> str:
    parts = [f"# {script.path}", script.text.rstrip(), f"# sbatch {script.path} {shlex.join(script.arguments)}"]
    return "\n".join([*parts, *(f"# element {number}: {line}" for number, line in enumerate(script.lines)), ""])


def _write(script: Script) -> None:
    write_text(script.path, script.text)
    if script.lines:
        write_text(script.sweep, "\n".join(script.lines) + "\n")


def _say(line: str) -> None:
    print(line, flush=True, file=sys.stdout)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)
