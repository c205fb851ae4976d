"""Tokens a second of BERT pretraining, against Hugging Face's Trainer and against a plain torch loop.

    python benchmarks/bert_throughput.py [--model mini|large] [--documents articles|paragraphs] [--text PATH ...] [--steps N]
                                         [--repeats N] [--peak TFLOPS] [--preset ci|full] [--json FILE]

Four arms train the same network from the same weights on the same documents, as many tokens an optimizer step:
  ours                `wtn_pretrain.training.loop.train`: DeepSpeed's engine, what run.kernels auto makes live, rows of whole documents
                      (data.packing documents) fetched and masked by `BatchStream`, the head at masked positions alone;
  ours, padded rows   the same with one piece of a document a row, padded to the full length (data.packing padded);
  Trainer             transformers' Trainer on BertForMaskedLM, DataCollatorForLanguageModeling with dynamic padding;
  plain loop          the same model and collator under a torch DataLoader and ten lines of loop.
Documents (Wikipedia articles, or their paragraphs) are cut into pieces of at most S - 2 tokens, [CLS] and [SEP] join each. The pieces
are the same for all arms, tokenised beforehand with one WordPiece vocabulary, which is trained once and kept in the system's folder for
temporary files. Packed rows hold more than a piece, so the other arms take as many more pieces a step, to the nearest whole one. All
hide 15% of the tokens, with dropout of 0.1, AdamW (torch's fused one), gradients clipped to a norm of 1, fp32 on the CPU and bf16
autocast on an accelerator; whatever else the Trainer has stands at its default, but for logging and saving, which are off.

A figure is tokens that are no padding over the wall time from the beginning of one step to that of another, so many steps later, batches
and masking included, start-up and the first two steps excluded. The arms of a repeat run one after the other in rotating order; a ratio
is the median over repeats of ours / arm in the same repeat. JSON keys: `ratio_over_hf_trainer`, `ratio_over_plain_loop`; `arms` holds
each arm's `tokens_per_second` by repeat, `padding`, last `loss`, and `seconds` of a step by what they went to (backward with clipping
and the reduction of gradients; data: fetching, masking, collating; rest: all between). `mfu`, where the peak of the device is given or
known: 3 x `Task.forward_flops` over the time. Claim on the CPU at 4 layers of 256, 128 tokens: at least 3 over the Trainer.
"""

import argparse
import hashlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from bert_arms import ARMS, PHASES, SHAPES, Clock, Work
from common import ROOT, parser, positive, run, table

from wtn_pretrain.data.corpus import Corpus, PydocTopics, TextFiles, find_text_files
from wtn_pretrain.device import peak_flops
from wtn_pretrain.errors import UserError
from wtn_pretrain.files import write_text
from wtn_pretrain.kernels.select import choose
from wtn_pretrain.parallel.launch import start_ranks, stop_ranks

WIKIPEDIA = ROOT.parent / "shared" / "data" / "wiki-en-2014" / "train-00.txt.xz"
GOAL = 3.0


def files_of(options: argparse.Namespace) -> list[str]:
    """The text files; none: Python's own text."""
    if options.text:
        return [str(path) for path in options.text]
    return [str(WIKIPEDIA)] if options.preset == "full" and WIKIPEDIA.exists() else []


def source_of(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Where the text comes from, paragraphs written out as documents of their own if these are asked for."""
    paths = files_of(options)
    if options.documents == "articles":
        return {"source": "files", "paths": paths} if paths else {"source": "pydoc"}
    corpus: Corpus = TextFiles(find_text_files(paths)) if paths else PydocTopics()
    written = folder / f"paragraphs-{hashlib.sha256(str(corpus.fingerprint()).encode()).hexdigest()[:12]}.txt"
    if not written.exists():
        text = (f"<doc >\n{paragraph}\n</doc>\n" for paragraph in corpus.paragraphs() if paragraph is not None)
        write_text(written, "".join(text))
    return {"source": "files", "paths": [str(written)]}


def peak_of(options: argparse.Namespace) -> float | None:
    """FLOP/s that the device could do, if that is known."""
    if options.peak:
        return options.peak * 1e12
    return peak_flops("bf16" if torch.accelerator.is_available() else "fp32")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of the benchmark."""
    if importlib.util.find_spec("accelerate") is None:
        raise UserError("accelerate is not installed, which Hugging Face's Trainer needs; pip install accelerate")
    name = "ci" if options.preset == "ci" else options.model or ("large" if torch.accelerator.is_available() else "mini")
    # a step has as many tokens whatever a document is, but short pieces are padded: on a CPU the other arms take twice as long over them
    short = options.documents == "paragraphs" and not torch.accelerator.is_available()
    steps = options.steps or (2 if options.preset == "ci" or short else 6)
    repeats = options.repeats or (1 if options.preset == "ci" else 3)
    cache = Path(tempfile.gettempdir()) / f"wtn_pretrain-bert_throughput-{os.getuid()}" / f"{name}-{options.documents}"
    cache.mkdir(parents=True, exist_ok=True)
    start_ranks()
    work = Work(SHAPES[name], source_of(options, cache), cache, steps)
    # waiting for an accelerator at every mark would slow it down, so there the time is taken apart in a run of its own
    apart = [False] * repeats + [True] if torch.accelerator.is_available() else [True] * repeats
    taken: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for repeat, fine in enumerate(apart):
        order = list(ARMS)
        for arm in order[repeat % len(order) :] + order[: repeat % len(order)]:
            clock = Clock(steps, fine)
            with clock.steps_watched():
                ARMS[arm](work, clock)
            taken[arm].append({**clock.figures(), "fine": fine})
    stop_ranks()
    arms = {arm: combined(found, repeats) for arm, found in taken.items()}
    mine = arms["ours"]["tokens_per_second"]
    figures: dict[str, Any] = {
        "model": name,
        "shape": work.shape._asdict(),
        "documents": options.documents,
        "text": [Path(path).name for path in files_of(options)] or ["pydoc"],
        "steps": steps,
        "repeats": repeats,
        "kernels": choose("auto").describe(),
        "vocabulary": len(work.tokenizer or ()),
        "pieces_per_step": work.together,
        "padding_packed": work.packed.padding(),
    }
    for key, arm in (
        ("ratio_over_hf_trainer", "Trainer"),
        ("ratio_over_plain_loop", "plain loop"),
        ("ratio_over_padded_rows", "ours, padded rows"),
    ):
        figures[key] = median(fast / slow for fast, slow in zip(mine, arms[arm]["tokens_per_second"], strict=True))
    flops = 3 * work.forward_flops() * work.shape.rows
    figures["flops_per_step"] = flops
    figures["flops_per_second"] = flops / arms["ours"]["seconds_per_step"]
    peak = peak_of(options)
    if peak:
        figures |= {"peak_flops": peak, "mfu": figures["flops_per_second"] / peak}
    return {**figures, "arms": arms}


def combined(found: list[dict[str, Any]], repeats: int) -> dict[str, Any]:
    """One arm over its repeats: the rates of all, the mean of what the time went to."""
    timed, fine = found[:repeats], [one for one in found if one["fine"]]
    return {
        "tokens_per_second": [one["tokens_per_second"] for one in timed],
        "padding": fmean(one["padding"] for one in timed),
        "loss": timed[-1]["loss"],
        "seconds_per_step": median(one["seconds_per_step"] for one in timed),
        "seconds": {name: fmean(one["seconds"][name] for one in fine) for name in PHASES},
    }


def show(figures: dict[str, Any]) -> str:
    """The table, and whether the claim holds."""
    head = ["ms a step", "tokens/s", "padding", "loss", *PHASES, "whole"]
    rows = []
    for arm, row in figures["arms"].items():
        times = [f"{1000 * row['seconds'][name]:.0f}" for name in PHASES]
        cells = [f"{median(row['tokens_per_second']):.0f}", f"{row['padding']:.1%}", f"{row['loss']:.2f}", *times]
        rows.append([arm, *cells, f"{1000 * sum(row['seconds'].values()):.0f}"])
    shape = figures["shape"]
    lines = [
        f"{shape['layers']} layers of {shape['hidden']}, {shape['length']} tokens, vocabulary of {figures['vocabulary']}, "
        f"{figures['documents']} of {', '.join(figures['text'])}",
        f"{shape['rows']} packed rows or {figures['pieces_per_step']} pieces a step, {figures['steps']} steps, "
        f"median of {figures['repeats']} repeats",
    ]
    for key in ("ratio_over_hf_trainer", "ratio_over_plain_loop", "ratio_over_padded_rows"):
        line = f"{key} {figures[key]:.2f}"
        if key == "ratio_over_hf_trainer" and figures["model"] == "mini":
            line += f" (claim on the CPU: at least {GOAL:g}; {'holds' if figures[key] >= GOAL else 'falls short'})"
        lines.append(line)
    mfu = f", MFU {figures['mfu']:.3f}" if "mfu" in figures else ""
    lines.append(f"ours: {figures['flops_per_second'] / 1e9:.4g} GFLOP/s{mfu}")
    return "\n".join([figures["kernels"], "", table(head, rows), "", *lines])


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument(
        "--model", choices=("mini", "large"), help="mini: 4 layers of 256; large: BERT-Large (default with an accelerator)"
    )
    arguments.add_argument(
        "--documents", choices=("articles", "paragraphs"), default="articles", help="what a document is (default articles)"
    )
    arguments.add_argument("--text", nargs="+", type=Path, metavar="PATH", help="text files (default: a Wikipedia shard, or Python's own)")
    arguments.add_argument("--steps", type=positive, metavar="N", help="measured steps of an arm (default 6, a CPU's paragraphs 2; ci 2)")
    arguments.add_argument("--repeats", type=positive, metavar="N", help="runs of every arm (default 3; ci 1)")
    arguments.add_argument("--peak", type=float, metavar="TFLOPS", help="what the device could do, for MFU")
    return run(measure, arguments, show)


if __name__ == "__main__":
    sys.exit(main())
