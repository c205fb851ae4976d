"""Training throughput of the ResNet against Hugging Face's and timm's.

    python benchmarks/resnet_throughput.py [--model NAME] [--size PIXELS] [--batch N] [--steps N] [--repeats N] [--precision fp32|bf16]
                                           [--threads N] [--preset ci|full] [--json FILE]

Every arm trains the same architecture from the same weights on the same batch, which lies on the device already, with torch's SGD
with momentum, by forward pass, cross-entropy, backward pass and update; where the precision is bf16, all under the same autocast:
  ours            our network through DeepSpeed's engine, as stages 1 and 3 run it, memory allocator included (`keep_freed_memory`);
  ours, compiled  the same with `compile: true` (not at --preset ci);
  ours, plain     our network in the loop that the others have;
  hugging face    ResNetForImageClassification as it comes: its own loss, its layout (rows of each channel together);
  hugging face, channels-last    the same with weights and images put channels-last by hand, which its users can do;
  timm            timm's network of the same name, likewise as it comes and channels-last. It is left out, with the reason, where it
                  cannot be imported: it needs torchvision.
Timm starts from weights of its own. Arms with DeepSpeed's engine live in one process and those without in another, so that a stage's
settings of its process reach no other. The arms of a repeat run one after the other in rotating order, `--steps` steps each after
one that is not timed, since an arm comes back to memory and caches that others have used; a ratio is the median over repeats of two
rates of the same repeat. FLOPs are the network's own count, three times a forward pass; MFU is their rate over the device's peak
where that is known.

JSON keys: `ratio_over_hf` (ours against Hugging Face as it comes), `ratio_compiled_over_hf`, `ratio_over_hf_channels_last`,
`ratio_over_timm`, `mfu` (ours) and `arms`; null where there is no such figure. Claims: ratio_over_hf at least 1.15 on a CPU; on a GPU
with ResNet-50 at 224 pixels in bf16 an MFU of at least 0.25.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from common import parser, positive, run, table
from torch import Tensor, nn

from wtn_pretrain.config import validate
from wtn_pretrain.data.images import ImageData
from wtn_pretrain.device import device, peak_flops, to_device
from wtn_pretrain.errors import UserError
from wtn_pretrain.models import ResNetConfig
from wtn_pretrain.models.base import expand_preset, flops
from wtn_pretrain.models.hf import to_hf
from wtn_pretrain.models.resnet.model import ResNetNetwork
from wtn_pretrain.parallel.launch import start_ranks, stop_ranks
from wtn_pretrain.tasks.base import TaskModule
from wtn_pretrain.tasks.classify import ClassifySection, ClassifyTask
from wtn_pretrain.training.config import OptimizerSection, TrainSection
from wtn_pretrain.training.engine import start_engine

MODELS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
OPTIMIZER = OptimizerSection(name="sgd", lr=0.01, momentum=0.9, weight_decay=1e-4)
TINY: dict[str, Any] = {"block": "basic", "depths": (1, 1), "channels": (8, 16), "stem_channels": 8}
BOUNDS = {"ratio_over_hf": 1.15, "mfu": 0.25}

Step = Callable[[], Tensor]
"""A whole optimizer step; the loss before it."""


class Sizes(NamedTuple):
    """What is measured."""

    size: int
    batch: int
    steps: int
    repeats: int
    precision: str


def sizes(options: argparse.Namespace) -> Sizes:
    """The preset's sizes for this device, and what was asked for instead."""
    if options.preset == "ci":
        usual = Sizes(32, 4, 1, 2, "fp32")
    elif device().type == "cpu":
        # bf16 is slower than fp32 on CPUs without units for it
        usual = Sizes(128, 16, 2, 7, "fp32")
    else:
        usual = Sizes(224, 256, 20, 7, "bf16")
    return Sizes(*(getattr(options, name) or value for name, value in usual._asdict().items()))


def engine_arms(task: ClassifyTask, network: ResNetNetwork, batch: dict[str, Tensor], chosen: Sizes, model: str) -> dict[str, Step]:
    """The arms that run as stages do, by name."""
    made = {"ours": _engine(TaskModule(copy.deepcopy(network), task).to(device()), batch, chosen)}
    if model in MODELS:
        made["ours, compiled"] = _engine(TaskModule(copy.deepcopy(network), task).to(device()), batch, chosen, compiled=True)
    return made


def loop_arms(
    task: ClassifyTask, network: ResNetNetwork, batch: dict[str, Tensor], chosen: Sizes, model: str
) -> tuple[dict[str, Step], str]:
    """The arms of a plain loop by name, and why there is none of timm ("" where there is)."""
    module = TaskModule(copy.deepcopy(network), task).to(device())
    made = {"ours, plain": _plain(module, lambda: module(batch)["loss"], chosen)}

    def add(name: str, peer: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor]) -> None:
        for suffix, layout in (("", torch.contiguous_format), (", channels-last", torch.channels_last)):
            copied = copy.deepcopy(peer).to(device()).train()
            copied = copied.to(memory_format=layout) if suffix else copied  # type: ignore[call-overload]
            pixels = batch["pixels"].contiguous(memory_format=layout)
            made[name + suffix] = _plain(copied, lambda copied=copied, pixels=pixels: loss(copied, pixels), chosen)  # type: ignore[misc]

    add("hugging face", to_hf(network), lambda peer, pixels: peer(pixel_values=pixels, labels=batch["labels"]).loss)
    try:
        import timm  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except (ImportError, RuntimeError, OSError) as error:
        return made, f"timm is left out: {type(error).__name__}: {str(error).splitlines()[0]}"
    if model not in MODELS:
        return made, "timm is left out: it has no such tiny network"
    peer = timm.create_model(model, num_classes=network.config.classes)
    add("timm", peer, lambda peer, pixels: F.cross_entropy(peer(pixels).float(), batch["labels"]))
    return made, ""


def _engine(module: TaskModule, batch: dict[str, Tensor], chosen: Sizes, compiled: bool = False) -> Step:
    tree = {"batch_size": chosen.batch, "optimizer": OPTIMIZER, "precision": chosen.precision, "clip": 0.0, "compile": compiled}
    engine = start_engine(module, TrainSection.model_validate(tree), "wide", 1, 1)
    engine.train()

    def step() -> Tensor:
        loss = engine(batch)["loss"]
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


def _plain(network: nn.Module, forward: Callable[[], Tensor], chosen: Sizes) -> Step:
    optimizer = torch.optim.SGD(network.parameters(), lr=OPTIMIZER.lr, momentum=OPTIMIZER.momentum, weight_decay=OPTIMIZER.weight_decay)

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device().type, torch.bfloat16, enabled=chosen.precision == "bf16"):
            loss = forward()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def timed(step: Step, steps: int) -> float:
    """Seconds of some steps, until the device has done them."""
    began = time.perf_counter()
    for _ in range(steps):
        loss = step()
    float(loss)
    return time.perf_counter() - began


class Built(NamedTuple):
    """What a process has built."""

    losses: dict[str, float]
    """Of the first step, by arm."""
    flops: int
    """Of a forward pass of one image."""
    missing: str
    """Why an arm is not there; "" where all are."""


_arms: dict[str, Step] = {}
"""Those of this process."""


def build(engines: bool, chosen: Sizes, model: str, threads: int) -> Built:
    """Builds the arms with or without engines, and takes the steps that pay for allocation, the choice of kernels and compilation.

    Raises:
        UserError: there are fewer images than a batch takes.
    """
    torch.set_num_threads(threads)
    if engines:
        start_ranks()
    task = ClassifyTask(ClassifySection(), ImageData(size=chosen.size, channels=3))
    if chosen.batch > len(task.train):
        raise UserError(f"--batch {chosen.batch}: there are {len(task.train)} images; give fewer")
    batch = to_device(task.train.fetch(np.arange(chosen.batch), None))
    tree = TINY if model == "tiny" else {**expand_preset({"preset": model}), "image_channels": 0, "image_size": 0, "classes": 0}
    config = task.complete(validate(ResNetConfig, tree))
    torch.manual_seed(0)
    network = config.build()
    assert isinstance(network, ResNetNetwork)
    missing = ""
    if engines:
        _arms.update(engine_arms(task, network, batch, chosen, model))
    else:
        made, missing = loop_arms(task, network, batch, chosen, model)
        _arms.update(made)
    losses = {name: float(step()) for name, step in _arms.items()}
    for name in _arms:
        again(name, 1)
    return Built(losses, flops(config).total, missing)


def again(name: str, steps: int) -> float:
    """Seconds of some more steps of an arm of this process, after one that is not timed."""
    float(_arms[name]())
    return timed(_arms[name], steps)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of the benchmark."""
    chosen, model = sizes(options), "tiny" if options.preset == "ci" else options.model
    with ExitStack() as stack:
        homes: dict[str, ProcessPoolExecutor] = {}
        built: list[Built] = []
        for engines in (True, False):
            home = stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
            built.append(home.submit(build, engines, chosen, model, options.threads).result())
            homes.update(dict.fromkeys(built[-1].losses, home))
        seconds: dict[str, list[float]] = {name: [] for name in homes}
        names = list(homes)
        for repeat in range(chosen.repeats):
            turn = repeat % len(names)
            for name in names[turn:] + names[:turn]:
                seconds[name].append(homes[name].submit(again, name, chosen.steps).result())
        homes["ours"].submit(stop_ranks).result()
    first = built[0].losses | built[1].losses
    work = 3 * built[0].flops
    peak = peak_flops(chosen.precision)
    rows: dict[str, dict[str, Any]] = {}
    for name, taken in seconds.items():
        rates = [chosen.steps * chosen.batch / value for value in taken]
        ratios = [other / own for own, other in zip(seconds["ours"], taken, strict=True)]
        rows[name] = {
            "images_per_second": median(rates),
            "all_images_per_second": rates,
            "flops_per_second": median(rates) * work,
            "mfu": median(rates) * work / peak if peak else None,
            "ours_over": median(ratios),
            "ours_over_range": [min(ratios), max(ratios)],
            "first_loss": first[name],
        }
    ratio = {name: row["ours_over"] for name, row in rows.items()}
    return {
        "model": model,
        **chosen._asdict(),
        "ratio_over_hf": ratio["hugging face"],
        "ratio_compiled_over_hf": _over(seconds, "ours, compiled", "hugging face"),
        "ratio_over_hf_channels_last": ratio["hugging face, channels-last"],
        "ratio_over_timm": ratio.get("timm"),
        "mfu": rows["ours"]["mfu"],
        "missing": built[1].missing,
        "arms": rows,
    }


def _over(seconds: dict[str, list[float]], fast: str, slow: str) -> float | None:
    """How much faster an arm is than another; None where it did not run."""
    if fast not in seconds:
        return None
    return median(other / own for own, other in zip(seconds[fast], seconds[slow], strict=True))


def show(figures: dict[str, Any]) -> str:
    """The table, and whether the claims hold."""
    rows = []
    for name, row in figures["arms"].items():
        low, high = row["ours_over_range"]
        rows.append(
            [
                name,
                f"{row['images_per_second']:.2f}",
                f"{row['flops_per_second'] / 1e9:.1f}",
                "" if row["mfu"] is None else f"{row['mfu']:.3f}",
                f"{row['ours_over']:.3f}",
                f"{low:.3f} to {high:.3f}",
            ]
        )
    what = "{model} at {size} pixels, batches of {batch}, {precision}, {repeats} repeats of {steps} steps".format(**figures)
    lines = [what, "", table(["", "images/s", "GFLOP/s", "MFU", "ours / it", "range"], rows), ""]
    for key in ("ratio_over_hf", "ratio_compiled_over_hf", "ratio_over_hf_channels_last", "ratio_over_timm", "mfu"):
        if figures[key] is None:
            continue
        claimed = key in BOUNDS and figures["preset"] == "full" and (key == "mfu") == (device().type != "cpu")
        holds = f" (claim: at least {BOUNDS[key]}; {'holds' if figures[key] >= BOUNDS[key] else 'falls short'})" if claimed else ""
        lines.append(f"{key} {figures[key]:.3f}{holds}")
    return "\n".join([*lines, *([figures["missing"]] if figures["missing"] else [])])


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--model", choices=MODELS, default="resnet50", help="which architecture (default resnet50; ci takes a tiny one)")
    arguments.add_argument("--size", type=positive, metavar="PIXELS", help="side of the images (default 128 on a CPU, else 224; ci 32)")
    arguments.add_argument("--batch", type=positive, metavar="N", help="images a step (default 16 on a CPU, else 256; ci 4)")
    arguments.add_argument("--steps", type=positive, metavar="N", help="steps of an arm in a repeat (default 2 on a CPU, else 20; ci 1)")
    arguments.add_argument("--repeats", type=positive, metavar="N", help="runs of every arm (default 7; ci 2)")
    arguments.add_argument("--precision", choices=("fp32", "bf16"), help="default fp32 on a CPU, else bf16")
    return run(measure, arguments, show)


if __name__ == "__main__":
    sys.exit(main())
