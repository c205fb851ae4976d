"""The work of tools/inspect_data.py: a batch of a recipe, shown as training gets it."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from wtn_pretrain.arguments import Parser
from wtn_pretrain.data.hashing import hash_keys
from wtn_pretrain.data.show import as_bytes, as_html, as_terminal, contact_sheet, tokens_of
from wtn_pretrain.data.stream import Batch
from wtn_pretrain.errors import UserError
from wtn_pretrain.files import write_beside, write_text
from wtn_pretrain.recipe import Recipe, load_recipe
from wtn_pretrain.stages import open_task
from wtn_pretrain.tasks.base import Task
from wtn_pretrain.tasks.classify import ClassifyTask
from wtn_pretrain.tasks.mlm import MlmTask


def run(doc: str, arguments: Sequence[str]) -> str:
    """Shows a batch and writes what is asked for; what is printed."""
    parser = Parser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, epilog="Any --section.key=value goes, as in training."
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the recipe")
    parser.add_argument(
        "--split", choices=("train", "valid"), default="train", help="default train, as augmented and masked as in training"
    )
    parser.add_argument("--step", type=int, default=0, metavar="N", help="which step's batch of the first stage that trains (default 0)")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="how many samples of it (default 8)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write text as a page")
    parser.add_argument("--png", type=Path, metavar="FILE", help="write images as a contact sheet")
    parser.add_argument("--plain", action="store_true", help="no colours")
    options, rest = parser.parse_known_args(arguments)
    if wrong := [argument for argument in rest if not (argument.startswith("--") and "." in argument and "=" in argument)]:
        raise UserError(f"argument {wrong[0]}: unknown; see --help, keys of the recipe are --section.key=value")
    if options.step < 0 or options.samples < 1:
        raise UserError("--step, --samples: must be at least 0 and 1")
    recipe = load_recipe(options.config, [argument[2:] for argument in rest])
    with tempfile.TemporaryDirectory(prefix="inspect-") as cache:
        # of a run that exists the data that is there, and never a change to it
        ready = recipe.place() / "data"
        task = open_task(recipe, ready if (ready / "tokens.json").exists() else Path(cache))
        indices, batch = _batch(recipe, task, options.split, options.step, options.samples)
        if isinstance(task, MlmTask):
            return _text(task, batch, indices, options)
        assert isinstance(task, ClassifyTask)
        return _images(task, batch, indices, options)


def _batch(recipe: Recipe, task: Task, split: str, step: int, count: int) -> tuple[np.ndarray, Batch]:
    """The first samples of a batch: their numbers in the set, and they themselves."""
    if split == "valid":
        first = step * count % len(task.valid)
        indices = np.arange(first, min(first + count, len(task.valid)))
        return indices, task.valid.fetch(indices, hash_keys(0, indices))
    # a global batch of the first stage that trains, on one rank; images are mixed in pairs, so an even number of it is taken
    section, seed = (recipe.finetune, recipe.compare.seeds[0]) if recipe.wide.teacher else (recipe.wide, recipe.run.seed)
    stream = task.stream(max(section.batch_size, count), steps=max(section.steps, step + 1), seed=seed)
    whole = stream.micro_batch(step, 0)
    return stream.sample_ids(step)[0][:count], {name: value[:count] for name, value in whole.items()}


def _text(task: MlmTask, batch: Batch, indices: np.ndarray, options: argparse.Namespace) -> str:
    if options.png is not None:
        raise UserError("--png: the recipe's data is text; use --html")
    rows = [tokens_of(batch, row, task.tokenizer) for row in range(len(indices))]
    heads = [f"row {index}" for index in indices]
    if "pair_label" in batch:
        heads = [f"{head}, pair {label}" for head, label in zip(heads, batch["pair_label"].tolist(), strict=True)]
    colour = not options.plain and sys.stdout.isatty()
    lines = [f"{head}: {as_terminal(row, colour)}" for head, row in zip(heads, rows, strict=True)]
    lines.append("[hidden] {seen<was: replaced at random} (to be predicted, but shown)")
    if options.html is not None:
        write_text(options.html, as_html(rows, heads))
        lines.append(f"written: {options.html}")
    return "\n\n".join(lines)


def _images(task: ClassifyTask, batch: Batch, indices: np.ndarray, options: argparse.Namespace) -> str:
    if options.html is not None:
        raise UserError("--html: the recipe's data is images; use --png")
    names, splits = task.splits.classes, task.splits
    captions = [names[label] for label in batch["labels"].tolist()]
    if "own_share" in batch:
        pairs = zip(batch["own_share"].tolist(), captions, batch["partner_labels"].tolist(), strict=True)
        captions = [f"{share:.2f} {own} {1 - share:.2f} {names[other]}" for share, own, other in pairs]
    pixels = as_bytes(batch["pixels"], splits.mean, splits.std)
    what = f"{len(pixels)} images of {pixels.shape[2]} x {pixels.shape[1]} pixels, values {pixels.min()} to {pixels.max()}"
    lines = [what, *(f"image {index}: {caption}" for index, caption in zip(indices, captions, strict=True))]
    if options.png is not None:
        sheet = contact_sheet(pixels, captions)
        write_beside(options.png, lambda place: sheet.save(place, "PNG"))
        lines.append(f"written: {options.png}")
    return "\n".join(lines)
