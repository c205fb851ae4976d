"""Exporting a run's network on its own, after the run or while it goes on."""

import argparse
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wtn_pretrain.arguments import Parser
from wtn_pretrain.config import Section, dump_yaml
from wtn_pretrain.config import describe as describe_keys
from wtn_pretrain.errors import UserError
from wtn_pretrain.exchange.card import Origin
from wtn_pretrain.exchange.config import ExportSection
from wtn_pretrain.exchange.files import digest
from wtn_pretrain.exchange.formats import FORMATS
from wtn_pretrain.exchange.teacher import adapted
from wtn_pretrain.exchange.write import export_network
from wtn_pretrain.folder import RunFolder
from wtn_pretrain.models.base import BlockConfig, BlockNetwork
from wtn_pretrain.models.store import load_network, load_shape, load_state
from wtn_pretrain.recipe import Recipe, load_recipe
from wtn_pretrain.stages import open_task
from wtn_pretrain.tasks.base import Task
from wtn_pretrain.training.checkpoint.manifest import BUFFERS, WEIGHTS, DamagedError, Parts, check_parts, read_manifest
from wtn_pretrain.training.int8 import without_ranges

STAGES = ("finetune", "narrow", "wide", "scratch")


class _Keys(Section):
    """The recipe's keys that say how exports are written, under their full names."""

    export: ExportSection = ExportSection()


def parser(doc: str) -> Parser:
    """The options of tools/export.py; all others are assignments to keys of the recipe."""
    made = Parser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog=f"keys of the recipe [default]:\n{describe_keys(_Keys)}",
    )
    made.add_argument("run", nargs="?", type=Path, metavar="RUN", help="folder of a run, such as runs/NAME")
    made.add_argument("--config", type=Path, metavar="FILE", help="instead of RUN: its config.yaml, or the recipe that it was started with")
    made.add_argument("--to", metavar="FORMATS", help=f"formats, joined by commas, of: {', '.join(FORMATS)} (default: the recipe's)")
    made.add_argument("--stage", choices=STAGES, default="finetune", help="whose network (default finetune)")
    made.add_argument(
        "--checkpoint", type=Path, metavar="FOLDER", help="the network in a checkpoint stepN of wide, finetune or scratch instead"
    )
    made.add_argument("--seed", type=int, help="of the comparison (default: its first)")
    made.add_argument("--out", type=Path, metavar="FOLDER", help="where to (default RUN/export; of other stages and checkpoints, below it)")
    return made


def export_run(doc: str, argv: Sequence[str]) -> str:
    """What the command prints: each format's standing.

    Raises:
        UserError: one line that names the argument, what is wrong and the remedy; also where no format can hold the network.
    """
    options, rest = parser(doc).parse_known_args(argv)
    assignments = []
    for argument in rest:
        if not argument.startswith("--") or "." not in argument.partition("=")[0] or "=" not in argument:
            raise UserError(f"argument {argument!r}: unknown; there are RUN, --to, --stage and --export.key=value; see --help")
        assignments.append(argument[2:])
    if (options.run is None) == (options.config is None):
        raise UserError("export: give the folder of a run, or its config.yaml as --config")
    run = options.run if options.run is not None else _run_of(options.config, assignments)
    names = None if options.to is None else tuple(name.strip() for name in options.to.split(","))
    written = export_from(
        run, names, stage=options.stage, seed=options.seed, checkpoint=options.checkpoint, out=options.out, assignments=assignments
    )
    if all("refused" in result for result in written.values()):
        raise UserError("export: " + "; ".join(str(result["refused"]) for result in written.values()))
    return "\n".join(standing(name, result) for name, result in written.items())


def export_from(
    run: Path,
    formats: Sequence[str] | None = None,
    *,
    stage: str = "finetune",
    seed: int | None = None,
    checkpoint: Path | None = None,
    out: Path | None = None,
    assignments: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
    """Exports a network of the run in folder `run`; see `export_network` for what comes of it.

    Raises:
        UserError: there is no such run, its stage has not finished, or an export misses its tolerance.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: holds no run (no config.yaml); give the folder of one, such as runs/NAME")
    recipe = load_recipe(run / "config.yaml", list(assignments))
    formats = recipe.export.formats if formats is None else formats
    for name in formats or ("",):
        if name not in FORMATS:
            raise UserError(f"--to {name or repr(name)}: no such format; there are {', '.join(FORMATS)}")
    seeds = recipe.compare.seeds
    if seed is not None and seed not in seeds:
        raise UserError(f"--seed {seed}: the run has the seeds {', '.join(map(str, seeds))}")
    folder = _stage_folder(run, recipe, stage, seed)
    step = None
    if checkpoint is None:
        network, files = _finished(folder, stage)
    task = open_task(recipe, run / "data")
    if checkpoint is not None:
        network, files, step = _from_checkpoint(checkpoint, folder, _shape(recipe, task, run, folder, stage), stage)
    origin = describe(recipe, run, stage, task, {path.name: digest(path) for path in files}, seed, step)
    place = out or run / "export"
    if out is None and (checkpoint is not None or stage != "finetune" or seed not in (None, seeds[0])):
        place = place / "-".join([stage, *([f"seed{seed}"] if seed is not None else []), *([checkpoint.name] if checkpoint else [])])
    return export_network(network, task, formats, place, recipe.export, origin)


def _stage_folder(run: Path, recipe: Recipe, stage: str, seed: int | None) -> Path:
    """Where a stage of a seed (None: the first) of a run stands."""
    return RunFolder(run).stage(stage, None if stage == "wide" or seed in (None, recipe.compare.seeds[0]) else seed)


def _shape(recipe: Recipe, task: Task, run: Path, folder: Path, stage: str) -> BlockConfig:
    """The shape of the network in a stage that has not finished."""
    if stage == "wide":
        return task.complete(recipe.wide_model())
    # what has finished says it; the data, and a teacher that may be gone, complete that of the recipe
    for place in (folder.parent / "narrow", run / "narrow"):
        if (place / "model.json").exists():
            return load_shape(place)
    taught = recipe.wide.teacher and getattr(recipe.model, "vocab_size", None) == 0
    wide = run / "wide"
    if taught:
        return task.complete(adapted(recipe.model, load_shape(wide) if (wide / "model.json").exists() else recipe.wide_model()))
    return task.complete(recipe.model)


_BEFORE = {"wide": ("wide",), "narrow": ("wide", "narrow"), "finetune": ("wide", "narrow", "finetune"), "scratch": ("scratch",)}


def describe(
    recipe: Recipe, run: Path, stage: str, task: Task, weights: dict[str, str], seed: int | None = None, step: int | None = None
) -> Origin:
    """Where a network of a run comes from, for its model card and its certificate.

    Args:
        seed: of the comparison; None is its first.
        step: of a checkpoint of the stage; None is its end.
    """
    seed = recipe.run.seed if stage == "wide" else recipe.compare.seeds[0] if seed is None else seed
    results = {}
    for name in _BEFORE[stage]:
        result = RunFolder.result(_stage_folder(run, recipe, name, None if stage == "wide" else seed))
        if result and (name != stage or step is None):
            results[name] = result
    # what a teacher's folder is called where it was taken in is nobody's business elsewhere
    teacher = recipe.wide.model_copy(update={"teacher": Path(recipe.wide.teacher).name if recipe.wide.teacher else ""})
    recipe = recipe.model_copy(update={"wide": teacher})
    told = recipe.data.model_dump(mode="json")
    data = ", ".join(f"{key} {told[key]}" for key in ("kind", "source", "path", "paths") if told.get(key))
    metric = f"{task.metric.name} ({task.metric.unit})"
    return Origin(recipe.run.name, stage, metric, results, dump_yaml(recipe), commit(), weights, data, seed, step)


def standing(name: str, result: dict[str, Any]) -> str:
    """One line on a format: how near its logits are, or why it was refused."""
    if "refused" in result:
        return f"export {name}: not written: {result['refused']}"
    line = f"export {name}: logits within {result['max_difference']:.1e} of the original, top-1 agreement {result['top1_agreement']:.4f}"
    if result.get("tolerance") is None and result.get("metric_after") is not None:
        line += f", {result['metric']} {result['metric_before']:.2f} to {result['metric_after']:.2f}"
    return line


def brief(result: dict[str, Any]) -> dict[str, Any]:
    """What a summary keeps of a certificate, which stands whole beside the export."""
    long = ("shapes", "files", "versions", "network", "operators")
    return {key: value for key, value in result.items() if key not in long}


def commit() -> str | None:
    """The commit of the code that runs, if it runs from a checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        answer = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def _run_of(config: Path, assignments: Sequence[str]) -> Path:
    """The folder of the run that a configuration belongs to."""
    recipe = load_recipe(config, list(assignments))
    return config.parent if (config.parent / "data").is_dir() or (config.parent / "finetune").is_dir() else recipe.place()


def _finished(folder: Path, stage: str) -> tuple[BlockNetwork, list[Path]]:
    """The network that a finished stage has left."""
    if not (folder / "model.json").exists() and (folder / "checkpoints").exists():
        if stage == "narrow":
            raise UserError(
                f"{folder}: holds blocks that are still learning, bridged or not yet merged, and no plain network; let stage 2 finish"
            )
        raise UserError(f"{folder}: has not finished; let it, or export a checkpoint of it with --checkpoint {folder}/checkpoints/stepN")
    RunFolder.check_network(folder)
    return load_network(folder), [folder / "model.safetensors"]


def _from_checkpoint(checkpoint: Path, folder: Path, shape: BlockConfig, stage: str) -> tuple[BlockNetwork, list[Path], int]:
    """The network in a checkpoint of a training stage, whatever ranks, ZeRO stage and tensor parallelism wrote it; its files and step.

    Of a stage that averages its weights, the average: that is what it evaluates and keeps.
    """
    place = checkpoint if checkpoint.exists() else folder / "checkpoints" / checkpoint
    try:
        manifest = read_manifest(place)
        told = str(manifest.identity.get("stage", stage))
        if told != stage:
            raise UserError(f"--checkpoint {place}: is of stage {told} and not of {stage}; give --stage {told}")
        check_parts(place, manifest, sorted(manifest.parts))
        parts = Parts(place)
        state = {name: parts.read(held.part, f"{WEIGHTS}/{name}") for name, held in manifest.parameters.items()}
        for prefix in (f"{BUFFERS}/", "average/average."):
            own = {key: other for key, other in manifest.others.items() if key.startswith(prefix)}
            state |= {key.removeprefix(prefix): parts.read(other.part, key) for key, other in own.items()}
    except DamagedError as error:
        raise UserError(f"--checkpoint {place}: {error}; give a whole folder stepN of wide, finetune or scratch") from None
    network = shape.build()
    load_state(network, without_ranges(state), f"--checkpoint {place}")
    return network.eval(), [place / name for name in sorted(manifest.parts)], manifest.step
