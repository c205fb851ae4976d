"""How fast, how large and how hungry a network is in the engines that serve it, against Hugging Face eager of the same shape."""

import itertools
import math
import multiprocessing
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from wtn_pretrain.config import validate
from wtn_pretrain.exchange.formats import open_hf, write_hf
from wtn_pretrain.exchange.onnx import FILE, fuse, open_onnx, write_onnx
from wtn_pretrain.exchange.parity import Call
from wtn_pretrain.exchange.probes import Inputs
from wtn_pretrain.models.base import BlockConfig, BlockNetwork, expand_preset, families
from wtn_pretrain.models.hf import why_not_hf
from wtn_pretrain.models.store import save_network
from wtn_pretrain.report.latency import measure_latency

ARMS = (
    "thin, ONNX Runtime",
    "thin, Hugging Face eager",
    "thin, torch eager",
    "thin, torch.compile",
    "wide, ONNX Runtime",
    "wide, torch eager",
)
ORT, HF = ARMS[:2]
ROUNDS = 3
"""Times that every arm has its turn; a figure is the median over them."""


class Pair(NamedTuple):
    """A thin and a wide network, and the shapes that they are measured at."""

    thin: BlockConfig
    wide: BlockConfig
    shapes: tuple[tuple[int, int], ...]
    """Batch, and length of sequences or side of images."""


def _shape(**keys: Any) -> BlockConfig:
    tree = expand_preset(keys)
    return validate(families()[tree["family"]], tree)


def pairs(preset: str) -> dict[str, Pair]:
    """What a preset measures: `ci` takes seconds, `benchmark` minutes on a CPU core, `full` the published sizes."""
    if preset == "ci":
        bert = _shape(family="bert", hidden_size=32, layers=2, heads=2, vocab_size=200, max_positions=32)
        resnet = _shape(family="resnet", block="basic", stem_channels=8, channels=(8, 16), depths=(1, 1), **_IMAGES)
        wide = resnet.widen(2, 1, None)
        return {"bert": Pair(bert, bert.widen(2, 1, None), ((1, 16), (2, 16))), "resnet": Pair(resnet, wide, ((1, 32),))}
    if preset == "benchmark":
        bert, resnet = _shape(preset="bert-mini"), _shape(preset="resnet18")
        lengths, batches, side, wide = (16, 128, 512), (1, 32), 128, resnet.widen(2, 1, None)
    else:
        bert, resnet = _shape(preset="bert-base"), _shape(preset="resnet50")
        lengths, batches, side, wide = (16, 128, 512), (1, 32), 224, _shape(preset="wide-resnet50-2")
    wide_bert = bert.widen(2, 1, None) if preset == "benchmark" else _shape(preset="bert-large")
    return {
        "bert": Pair(bert, wide_bert, tuple(itertools.product(batches, lengths))),
        "resnet": Pair(resnet, wide, tuple((batch, side) for batch in batches)),
    }


_IMAGES = {"image_channels": 3, "image_size": 32, "classes": 10}


def measure(model: Pair, arms: tuple[str, ...], threads: int, seconds: float) -> dict[str, Any]:
    """Latency of every arm at every shape, in turns, and size on disk and peak memory of each.

    Args:
        threads: that each engine may use.
        seconds: that a turn of an arm at a shape takes, at most, beyond two calls.
    """
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        arms = tuple(arm for arm in arms if arm != HF or why_not_hf(model.thin) is None)
        sizes = {arm: _write(model, arm, folder / _file(arm)) for arm in arms}
        peaks = {arm: _peak(model, arm, folder / _file(arm), threads) for arm in arms}
        calls = {arm: _open(model, arm, folder / _file(arm), threads) for arm in arms}
        rows: list[dict[str, Any]] = []
        for batch, length in model.shapes:
            taken: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
            inputs = _inputs(model.thin, batch, length)
            repeats = {arm: _repeats(calls[arm], inputs, seconds / ROUNDS) for arm in arms}
            for turn in range(ROUNDS):
                for arm in (*arms[turn % len(arms) :], *arms[: turn % len(arms)]):
                    taken[arm].append(measure_latency(_bound(calls[arm], inputs), repeats=repeats[arm], warmup=1))
            for arm in arms:
                figures: dict[str, float] = {key: median(turn[key] for turn in taken[arm]) for key in ("p50_ms", "p99_ms")}
                if arm == ORT and HF in arms:
                    turns = zip(taken[HF], taken[ORT], strict=True)
                    figures["ort_over_hf_eager"] = median(theirs["p50_ms"] / ours["p50_ms"] for theirs, ours in turns)
                rows.append({"arm": arm, "batch": batch, "length": length, **figures, "calls": ROUNDS * repeats[arm]})
    ratios: list[float] = [row["ort_over_hf_eager"] for row in rows if row["batch"] == 1 and "ort_over_hf_eager" in row]
    ratio = math.prod(ratios) ** (1 / len(ratios)) if ratios else None
    shapes = {"thin": model.thin.model_dump(mode="json"), "wide": model.wide.model_dump(mode="json")}
    return {"rows": rows, "bytes": sizes, "peak_memory": peaks, "ort_over_hf_eager": ratio, **shapes}


def least(found: dict[str, dict[str, Any]]) -> float | None:
    """The smaller of the models' ratios at batch 1."""
    ratios = [figures["ort_over_hf_eager"] for figures in found.values() if figures["ort_over_hf_eager"] is not None]
    return min(ratios) if ratios else None


def plot(found: dict[str, dict[str, Any]], file: Path) -> None:
    """Bars of the p50 at each shape, with the p99 as their tips."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(7 * len(found), 4.5), squeeze=False)
    for axis, (name, figures) in zip(axes[0], found.items(), strict=True):
        rows = figures["rows"]
        arms = list(dict.fromkeys(row["arm"] for row in rows))
        shapes = list(dict.fromkeys((row["batch"], row["length"]) for row in rows))
        width = 0.8 / len(arms)
        for number, arm in enumerate(arms):
            own = [row for row in rows if row["arm"] == arm]
            places = [shape + (number - len(arms) / 2 + 0.5) * width for shape in range(len(shapes))]
            tips = [max(0.0, row["p99_ms"] - row["p50_ms"]) for row in own]
            axis.bar(places, [row["p50_ms"] for row in own], width, label=arm, yerr=[[0.0] * len(own), tips], error_kw={"linewidth": 0.7})
        axis.set_xticks(range(len(shapes)), [f"{batch} x {length}" for batch, length in shapes])
        axis.set(title=name, xlabel="batch x length or side", ylabel="ms (p50, tip p99)", yscale="log")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _file(arm: str) -> str:
    return arm.replace(", ", "-").replace(" ", "_")


def _network(config: BlockConfig) -> BlockNetwork:
    torch.manual_seed(0)
    return config.build().eval()


def _inputs(config: BlockConfig, batch: int, length: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    if config.family == "resnet":
        channels: int = config.image_channels  # type: ignore[attr-defined]
        return {"pixels": torch.randn(batch, channels, length, length, generator=generator)}
    ids = torch.randint(5, 100, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def _write(model: Pair, arm: str, folder: Path) -> int:
    """Writes what an arm loads; its bytes."""
    network = _network(model.thin if arm.startswith("thin") else model.wide)
    if arm.endswith("ONNX Runtime"):
        write_onnx(network, folder, _inputs(network.config, 2, model.shapes[0][1]), whole_attention=network.config.family == "bert")
        fuse(network, folder)
    elif arm == HF:
        write_hf(network, folder)
    else:
        save_network(folder, network.config, network.state_dict())
    return sum(path.stat().st_size for path in folder.iterdir())


def _open(model: Pair, arm: str, folder: Path, threads: int) -> Call:
    config = model.thin if arm.startswith("thin") else model.wide
    if arm.endswith("ONNX Runtime"):
        assert (folder / FILE).exists()
        return open_onnx(folder, threads)
    from wtn_pretrain.models.store import load_network

    if arm == HF:
        with torch.device("meta"):
            shape = config.build()
        return open_hf(shape, folder)
    network = load_network(folder)
    return torch.compile(network, dynamic=True) if arm.endswith("compile") else network


def _bound(call: Call, inputs: Inputs) -> Callable[[], object]:
    def once() -> object:
        with torch.inference_mode():
            return call(inputs)

    return once


def _repeats(call: Call, inputs: Inputs, seconds: float) -> int:
    """Calls that fit into `seconds`: 2 to 200."""
    once = _bound(call, inputs)
    once()
    began = time.perf_counter()
    once()
    return max(2, min(200, int(seconds / (time.perf_counter() - began))))


def _peak(model: Pair, arm: str, folder: Path, threads: int) -> int:
    """Bytes by which a process of its own grows at most when it loads an arm and runs it at the largest shape."""
    # a server that has imported everything and run nothing, of which every process is a fork
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["onnxruntime", "transformers", "wtn_pretrain.exchange.latency"])
    with context.Pool(1) as pool:
        found = pool.apply(_grown, (model, arm, str(folder), threads))
        pool.close()
        pool.join()
    return found


def _grown(model: Pair, arm: str, folder: str, threads: int) -> int:
    torch.set_num_threads(threads)
    before = _resident()
    call = _open(model, arm, Path(folder), threads)
    batch, length = max(model.shapes)
    _bound(call, _inputs(model.thin, batch, length))()
    return max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize()


def has_compiler() -> bool:
    """Whether torch.compile can work here: on CPUs it writes C++."""
    return shutil.which("c++") is not None or shutil.which("g++") is not None
