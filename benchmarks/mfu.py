"""How much of what the device promises stage 1 turns into training: MFU, samples and tokens a second, and memory at ZeRO 0 to 3.

    python benchmarks/mfu.py [--model bert|resnet ...] [--batch N] [--micro-batch N] [--steps N] [--repeats N] [--ranks N]
                             [--precision fp32|bf16|bf16_weights|fp16] [--kernels auto|torch|triton|apex] [--compile]
                             [--checkpoint-activations N] [--zero NAME] [--memory NAME ...] [--threads N] [--preset ci|full] [--json FILE]

On an accelerator the preset full trains BERT-Large at 128 tokens and ResNet-50 at 224 pixels, in bf16; on a CPU smaller ones in fp32.
Both go through `wtn_pretrain.training.loop.train` itself: DeepSpeed's engine, fused kernels as `run.kernels` chooses them, channels-last
images, batches fetched and copied to the device two steps ahead. What is left out is reading: rows are random words, masked as ever,
and images are noise that lies normalised in (page-locked) host memory; `image_loader.py` and `bert_throughput.py` say what reading costs.

MFU (Chowdhery et al. 2022) is the model's FLOPs over the time, over what the device promises. FLOPs are three times the network's own
count of a forward pass with the head at predicted positions alone; what checkpointing computes anew counts once. Where no data sheet is
known for the device, as on CPUs, the rate of a large square product of the same dtype stands for what it promises, measured in the same
process; `promise` says which. Time is taken from the beginning of one step to that of another, `--steps` later, the device waited for at
both; the first steps, which compile and allocate, come before. A figure is the median of repeats, with its range.

Memory is the most that a rank has held from before the network is made to the end, taken in ranks of their own for each ZeRO stage: of
the device, or on the CPU of the resident set. It is BERT's at few rows, so that weights, gradients and the optimizer's state decide;
`--memory` takes names of ds_configs/ without `.json`, none leaves it out.

JSON keys: `mfu_bert` and `mfu_resnet` (goals on a GPU: 0.50 and 0.25), null for what was not asked for; `arms` {model: figures},
`memory` {name of the DeepSpeed file: {bytes, all_bytes by rank, samples_per_second}}, `memory_ranks`, `memory_rows`.
"""

import argparse
import os
import sys
from statistics import median
from typing import Any, NamedTuple

import torch
from common import parser, positive, run, table
from peaks import require_peak
from ranks import Crew
from stage_one import OPTIMIZERS, Work, trained

from wtn_pretrain.config import validate
from wtn_pretrain.errors import UserError
from wtn_pretrain.models import BertConfig, ResNetConfig
from wtn_pretrain.models.base import BlockConfig, expand_preset

GOALS = {"mfu_bert": 0.50, "mfu_resnet": 0.25}
STAGES = ("zero0", "zero1", "zero2", "zero3")
FILES = (*STAGES, "zero1_offload", "zero2_offload", "zero3_offload")


class Shape(NamedTuple):
    """A network and what it is given."""

    model: dict[str, Any]
    size: int
    """Tokens of a row, or side of an image."""
    batch: int
    """Samples a step and rank."""


SHAPES: dict[str, dict[str, Shape]] = {
    "ci": {
        "bert": Shape({"layers": 2, "hidden_size": 32, "heads": 2, "vocab_size": 512, "max_positions": 32}, 32, 8),
        "resnet": Shape({"block": "basic", "depths": (1, 1), "channels": (8, 16), "stem_channels": 8, "classes": 10}, 32, 4),
    },
    "full": {"bert": Shape({"preset": "bert-mini"}, 128, 16), "resnet": Shape({"preset": "resnet50"}, 128, 8)},
    "accelerator": {"bert": Shape({"preset": "bert-large"}, 128, 256), "resnet": Shape({"preset": "resnet50"}, 224, 256)},
}
MEMORY_ROWS = {"ci": 2, "full": 2, "accelerator": 16}
"""Rows of text a rank has where memory is measured."""
MEMORY_STEPS = 3


def kind(options: argparse.Namespace) -> str:
    """Which of the shapes."""
    return "ci" if options.preset == "ci" else "accelerator" if torch.accelerator.is_available() else "full"


def shape_of(model: str, shape: Shape) -> BlockConfig:
    """The network's configuration."""
    tree = expand_preset(shape.model)
    if model == "bert":
        return validate(BertConfig, tree)
    return validate(ResNetConfig, {**tree, "image_channels": 3, "image_size": shape.size})


def section_of(options: argparse.Namespace, model: str, batch: int, file: str) -> dict[str, Any]:
    """What is asked for, as keys of a training stage."""
    return {
        "batch_size": batch,
        "micro_batch_size": options.micro_batch or 0,
        "optimizer": OPTIMIZERS[model],
        "precision": options.precision or ("bf16" if torch.accelerator.is_available() else "fp32"),
        "deepspeed": f"ds_configs/{file}.json",
        "compile": options.compile,
        "checkpoint_activations": options.checkpoint_activations or False,
    }


def on_ranks(count: int, work: Work) -> list[dict[str, Any]]:
    """What each of so many fresh ranks has measured.

    Raises:
        UserError: it was refused.
    """
    # freed tensors go back to the system at once, so that a resident set says what is held
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(64 * 1024)
    with Crew(count, pinned=False) as crew:
        found = crew.call(trained, work)
    for one in found:
        if "refused" in one:
            raise UserError(one["refused"])
    return found


def arm(options: argparse.Namespace, model: str, ranks: int) -> dict[str, Any]:
    """The figures of one network."""
    small, shape = options.preset == "ci", SHAPES[kind(options)][model]
    batch = options.batch or shape.batch * ranks
    config = shape_of(model, shape)
    work = Work(
        config,
        shape.size if model == "bert" else 0,
        section_of(options, model, batch, options.zero),
        warm=2 if small else 5,
        steps=options.steps or (1 if small else 20 if torch.accelerator.is_available() else 4),
        repeats=options.repeats or (2 if small else 5),
        kernels=options.kernels,
        threads=options.threads,
        small=small,
    )
    found = on_ranks(ranks, work)
    first = found[0]
    rates = first["samples_per_second"]
    promised = first["peak_flops"] or first["product_rate"]
    shares = [rate * first["flops_per_sample"] / ranks / promised for rate in rates]
    return {
        "model": shape.model,
        "size": shape.size,
        "batch": batch,
        "steps": work.steps,
        "mfu": median(shares),
        "mfu_range": [min(shares), max(shares)],
        "of_products": median(rates) * first["flops_per_sample"] / ranks / first["product_rate"],
        "promised_flops": promised,
        "promise": "data sheet" if first["peak_flops"] else "measured product",
        "samples_per_second": median(rates),
        "tokens_per_second": median(rates) * shape.size if model == "bert" else None,
        "flops_per_second": median(rates) * first["flops_per_sample"],
        "memory": max(one["memory"] for one in found),
        **{key: first[key] for key in ("flops_per_sample", "product_rate", "parameters", "loss", "kernels")},
    }


def memory(options: argparse.Namespace, ranks: int) -> dict[str, dict[str, Any]]:
    """BERT's at each of the DeepSpeed files that were asked for."""
    shape, rows = SHAPES[kind(options)]["bert"], MEMORY_ROWS[kind(options)]
    found = {}
    for file in options.memory:
        section = {**section_of(options, "bert", rows * ranks, file), "micro_batch_size": 0, "compile": False}
        config = shape_of("bert", shape)
        work = Work(config, shape.size, section, 1, MEMORY_STEPS, 1, options.kernels, options.threads, True)
        by_rank = on_ranks(ranks, work)
        found[file] = {
            "bytes": max(one["memory"] for one in by_rank),
            "all_bytes": [one["memory"] for one in by_rank],
            "samples_per_second": by_rank[0]["samples_per_second"][0],
        }
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of the benchmark."""
    require_peak()
    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if devices and (options.ranks or 1) > devices:
        raise UserError(f"--ranks {options.ranks}: there are {devices} devices here; give fewer")
    ranks = options.ranks or devices or 1
    arms = {model: arm(options, model, ranks) for model in options.model}
    memory_ranks = options.ranks or devices or 2
    return {
        "ranks": ranks,
        "precision": section_of(options, "bert", 1, options.zero)["precision"],
        "deepspeed": options.zero,
        "compile": options.compile,
        "checkpoint_activations": options.checkpoint_activations,
        "micro_batch": options.micro_batch,
        **{f"mfu_{model}": arms[model]["mfu"] if model in arms else None for model in ("bert", "resnet")},
        "arms": arms,
        "memory_ranks": memory_ranks,
        "memory_rows": MEMORY_ROWS[kind(options)],
        "memory": memory(options, memory_ranks),
    }


def show(figures: dict[str, Any]) -> str:
    """The tables, and whether the goals are met."""
    lines = []
    rows = []
    for name, one in figures["arms"].items():
        low, high = one["mfu_range"]
        rows.append(
            [
                f"{name} {one['model'].get('preset', 'tiny')}, {one['size']} {'tokens' if name == 'bert' else 'pixels'}",
                str(one["batch"]),
                f"{one['samples_per_second']:.1f}",
                f"{one['tokens_per_second']:.0f}" if one["tokens_per_second"] else "",
                f"{one['flops_per_second'] / 1e12:.4g}",
                f"{one['mfu']:.3f}",
                f"{low:.3f} to {high:.3f}",
                f"{one['of_products']:.3f}",
                f"{one['memory'] / 2**30:.2f}",
            ]
        )
    if rows:
        head = ["", "batch", "samples/s", "tokens/s", "TFLOP/s", "MFU", "range", "of products", "GiB a rank"]
        settings = "{ranks} ranks, {precision}, {deepspeed}, compile {compile}".format(**figures)
        lines += [next(iter(figures["arms"].values()))["kernels"], settings, "", table(head, rows), ""]
    for name, one in figures["arms"].items():
        key, promise = f"mfu_{name}", f"{one['promised_flops'] / 1e12:.4g} TFLOP/s a rank by {one['promise']}"
        claimed = figures["preset"] == "full" and one["promise"] == "data sheet"
        met = f" (goal: at least {GOALS[key]:.2f}; {'met' if figures[key] >= GOALS[key] else 'missed'})" if claimed else ""
        lines.append(f"{key} {figures[key]:.3f} of {promise}{met}")
    if figures["memory"]:
        peaks = [[file, f"{one['bytes'] / 2**20:.0f}", f"{one['samples_per_second']:.1f}"] for file, one in figures["memory"].items()]
        lines += ["", f"peak memory of bert on {figures['memory_ranks']} ranks, {figures['memory_rows']} rows each"]
        lines += ["", table(["", "MiB a rank", "samples/s"], peaks)]
    return "\n".join(lines)


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--model", nargs="+", choices=("bert", "resnet"), default=("bert", "resnet"), help="default: both")
    arguments.add_argument("--batch", type=positive, metavar="N", help="samples a step over all ranks (default 256 a GPU)")
    arguments.add_argument("--micro-batch", type=positive, metavar="N", help="samples of a pass on a rank (default: no accumulation)")
    arguments.add_argument("--steps", type=positive, metavar="N", help="steps of a repeat (default 20 on an accelerator, else 4; ci 1)")
    arguments.add_argument("--repeats", type=positive, metavar="N", help="repeats after one warm-up (default 5; ci 2)")
    arguments.add_argument("--ranks", type=positive, metavar="N", help="default: all accelerators; on a CPU 1, and 2 for memory")
    arguments.add_argument(
        "--precision", choices=("fp32", "bf16", "bf16_weights", "fp16"), help="default bf16 on an accelerator, else fp32"
    )
    arguments.add_argument("--kernels", choices=("auto", "torch", "triton", "apex"), default="auto", help="as run.kernels (default auto)")
    arguments.add_argument("--compile", action="store_true", help="torch.compile of the blocks")
    arguments.add_argument("--checkpoint-activations", type=positive, metavar="N", help="in every N-th block (default: none)")
    arguments.add_argument("--zero", choices=FILES, default="zero0", help="DeepSpeed file of the timed arms (default zero0)")
    arguments.add_argument("--memory", nargs="*", choices=FILES, default=STAGES, help="DeepSpeed files of the memory table")
    return run(measure, arguments, show)


if __name__ == "__main__":
    sys.exit(main())
