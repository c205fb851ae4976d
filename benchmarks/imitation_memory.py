"""Peak activation memory of a step of block-wise imitation, for networks of 4, 12 and 48 blocks.

    python benchmarks/imitation_memory.py [--model bert|resnet|both] [--[no-]resident] [--preset ci|full] [--json FILE]

A step of the engine (`Imitator.step`: teacher and student, forward and backward of every block) runs under a dispatch mode that
follows every storage an operator makes, from its making until it is freed: activations of both networks, what autograd keeps,
temporaries. What is there before the step (parameters, gradients, which a first step has allocated, batch) is not counted;
no optimizer has state yet. Schedules: parallel (teacher-fed), student-fed (the second phase of hybrid) and, for contrast, joint,
which backpropagates end to end.

JSON keys: `peak_activation_bytes` {schedule: {blocks: bytes}} of the first model, `flatness`, the largest over models of
max / min over the depths for parallel and student-fed (claim: at most 1.10), `joint_growth`, the smallest over models of 48
against 4 blocks; `models` holds the figures of each. `--resident` (on in preset full) measures 4 and 48 blocks a second way, as
the growth of the resident set over the same step in a fresh process (Linux): `resident_growth_bytes`.
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from common import parser, run, table
from pairs import MODELS, SHAPES, Pair

from wtn_pretrain.device import to_device
from wtn_pretrain.errors import UserError
from wtn_pretrain.imitation.config import ImitateSection
from wtn_pretrain.imitation.imitator import Entry, Imitator
from wtn_pretrain.imitation.schedules import Phase, phases
from wtn_pretrain.parallel.launch import start_ranks, stop_ranks
from wtn_pretrain.planning.footprint import LiveStorages

DEPTHS = (4, 12, 48)
ENDS = (DEPTHS[0], DEPTHS[-1])
SCHEDULES = {"parallel": "parallel", "student-fed": "hybrid", "joint": "joint"}
"""Name -> the schedule whose last phase it is."""
FLAT = ("parallel", "student-fed")
STAGES = 2
"""Stages of the ResNet: every depth is a multiple."""


def ready(pair: Pair, schedule: str) -> tuple[Imitator, Phase, Entry]:
    """An engine that has taken a first step, so that gradients exist, with the phase and batch of the next."""
    section = ImitateSection.model_validate({"schedule": SCHEDULES[schedule], "batch_size": pair.batch_size})
    imitator = pair.imitator(section)
    phase = phases(section, len(imitator.units) - 1, learns_stem=False)[-1]
    imitator.begin(phase)
    batch = to_device(pair.stream().micro_batch(0, 0))
    entry = Entry(batch, batch)
    imitator.step(phase, entry)
    return imitator, phase, entry


def peak_bytes(pair: Pair, schedule: str) -> int:
    """Most bytes at once of what a step makes."""
    imitator, phase, entry = ready(pair, schedule)
    with LiveStorages() as storages:
        losses = imitator.step(phase, entry)
    if len(losses) != len(imitator.units) - 1:
        raise RuntimeError(f"{len(losses)} losses of {len(imitator.units) - 1} blocks: the step did not train them all")
    return storages.peak


def resident_growth(model: str, blocks: int, schedule: str, preset: str, threads: int) -> int:
    """Bytes by which a step raises the peak resident set of this process over what it held before."""
    torch.set_num_threads(threads)
    start_ranks()
    imitator, phase, entry = ready(Pair(model, blocks, SHAPES[model][preset]._replace(stages=STAGES)), schedule)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again from here
    before = _status("VmRSS")
    imitator.step(phase, entry)
    return _status("VmHWM") - before


def in_fresh_process(*arguments: Any) -> int:
    """`resident_growth` in a process of its own, whose allocator hands freed tensors back to the system at once."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(64 * 1024)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(resident_growth, *arguments).result()


def measure_model(model: str, options: argparse.Namespace, resident: bool) -> dict[str, Any]:
    """The figures of one pair."""
    pairs = {blocks: Pair(model, blocks, SHAPES[model][options.preset]._replace(stages=STAGES)) for blocks in DEPTHS}
    peaks = {schedule: {blocks: peak_bytes(pairs[blocks], schedule) for blocks in DEPTHS} for schedule in SCHEDULES}
    by_schedule = {schedule: max(peak.values()) / min(peak.values()) for schedule, peak in peaks.items()}
    figures: dict[str, Any] = {
        "peak_activation_bytes": peaks,
        "flatness": max(by_schedule[schedule] for schedule in FLAT),
        "flatness_by_schedule": by_schedule,
        "joint_growth": peaks["joint"][ENDS[1]] / peaks["joint"][ENDS[0]],
    }
    if resident:
        figures["resident_growth_bytes"] = {
            schedule: {blocks: in_fresh_process(model, blocks, schedule, options.preset, options.threads) for blocks in ENDS}
            for schedule in SCHEDULES
        }
    return figures


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of the benchmark."""
    resident = options.preset == "full" if options.resident is None else options.resident
    if resident and not Path("/proc/self/clear_refs").exists():
        raise UserError("--resident: needs Linux's /proc/self/clear_refs; leave it out with --no-resident")
    chosen = MODELS if options.model == "both" else (options.model,)
    start_ranks()
    models = {model: measure_model(model, options, resident) for model in chosen}
    stop_ranks()
    return {
        "peak_activation_bytes": models[chosen[0]]["peak_activation_bytes"],
        "flatness": max(figures["flatness"] for figures in models.values()),
        "joint_growth": min(figures["joint_growth"] for figures in models.values()),
        "models": models,
    }


def show(figures: dict[str, Any]) -> str:
    """The table, and whether the claim holds."""
    rows = []
    for model, of_model in figures["models"].items():
        resident = of_model.get("resident_growth_bytes", {})
        for schedule, peaks in of_model["peak_activation_bytes"].items():
            checked = [_mebibytes(resident[schedule][blocks]) if resident else "-" for blocks in ENDS]
            cells = [_mebibytes(peaks[blocks]) for blocks in DEPTHS]
            rows.append([f"{model} {schedule}", *cells, f"{of_model['flatness_by_schedule'][schedule]:.3f}", *checked])
    head = ["peak MiB of a step", *(f"{blocks} blocks" for blocks in DEPTHS), "max / min", *(f"resident {blocks}" for blocks in ENDS)]
    verdict = f"flatness {figures['flatness']:.3f} (claim: at most 1.10; {'holds' if figures['flatness'] <= 1.1 else 'falls short'})"
    return "\n".join([table(head, rows), "", verdict, f"joint_growth {figures['joint_growth']:.1f}"])


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.2f}"


def _status(field: str) -> int:
    """Bytes of a field of this process's /proc status."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--model", choices=(*MODELS, "both"), default="both", help="which pair (default both)")
    arguments.add_argument("--resident", action=argparse.BooleanOptionalAction, help="the resident set too (default: in preset full)")
    return run(measure, arguments, show)


if __name__ == "__main__":
    sys.exit(main())
