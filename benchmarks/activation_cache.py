"""Reading a teacher's activations back from the activation cache, against computing them again.

    python benchmarks/activation_cache.py [--model bert|resnet|both] [--blocks N] [--batches N] [--repeats N] [--bf16] [--folder DIR]
                                          [--preset ci|full] [--json FILE]

The cache of a teacher of four times the inner width holds its outputs after the stem and after every block for `--batches`
micro-batches. The arms of a repeat, one after the other, all over the same batches:
  recompute   the teacher from stem to top;
  plain       the cache's data files, each from its start to its end, 1 MiB at a time into one piece of memory: what the disk gives;
  read        the cache's stream of batches at all boundaries at once: checksums verified, read ahead by a thread, on the device
              and in the dtype that the teacher computed.
plain and read run cold, after the page cache was told to drop the files, and warm. What `cold` means depends on the machine:
`dropped` is the share of probed pages that really left the page cache (0 on a file system in memory), and a virtual machine's host
may keep what its guest dropped. Ratios are medians over repeats of two arms of the same repeat; the smallest over models makes
the JSON keys `recompute_over_read_cold`, `recompute_over_read_warm` and `read_over_plain_read` (cold; `..._warm` beside it; 1: at
the disk's speed); `models` holds the figures of each, `bytes_per_sample` and the rate of writing (durable) included.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import parser, positive, run, table
from pairs import MODELS, Pair

from wtn_pretrain.device import device, to_device
from wtn_pretrain.errors import UserError
from wtn_pretrain.imitation.cache import ActivationCache
from wtn_pretrain.imitation.cache_key import Key
from wtn_pretrain.imitation.cache_layout import lay_out
from wtn_pretrain.models.base import Carry

ARMS = ("recompute", "plain cold", "read cold", "plain warm", "read warm")
RATIOS = {
    "recompute_over_read_cold": ("recompute", "read cold"),
    "recompute_over_read_warm": ("recompute", "read warm"),
    "read_over_plain_read": ("plain cold", "read cold"),
    "read_over_plain_read_warm": ("plain warm", "read warm"),
}
"""Name -> the arms whose seconds are divided."""


class Cached:
    """A pair's teacher and the cache of its activations."""

    def __init__(self, pair: Pair, batches: int, stored: str, folder: Path) -> None:
        self.pair, self.stream, self.batches = pair, pair.stream(), batches
        boundaries = tuple(range(len(pair.teacher.blocks) + 1))
        layout = lay_out(pair.wide, boundaries, self.stream.micro_batch(0, 0), batches, stored=stored)
        self.cache = ActivationCache(folder, Key({}, 0, {}, boundaries, "fp32"), layout)
        self.bytes = 0

    @torch.no_grad()
    def teach(self, batch: int) -> list[Carry]:
        """The teacher's output at every boundary."""
        carries: list[Carry] = [self.pair.teacher.stem(to_device(self.stream.micro_batch(batch, 0)))]
        for block in self.pair.teacher.blocks:
            carries.append(block(carries[-1]))
        return carries

    def fill(self) -> float:
        """Seconds of writing, until everything is durable."""
        self.cache.prepare()
        seconds = 0.0
        with self.cache.writer() as writer:
            for batch in range(self.batches):
                carries = self.teach(batch)
                wait()
                began = time.perf_counter()
                for boundary, carry in enumerate(carries):
                    writer.write(boundary, batch, 0, carry)
                seconds += time.perf_counter() - began
            began = time.perf_counter()
        self.cache.finish()
        self.bytes = sum(file.stat().st_size for file in self.data_files())
        return seconds + time.perf_counter() - began

    def data_files(self) -> list[Path]:
        return sorted(self.cache.folder.glob("*.data"))

    def recompute(self) -> None:
        for batch in range(self.batches):
            self.teach(batch)

    def read(self) -> None:
        layout, here = self.cache.layout, device()
        for carries in self.cache.reader().stream(list(layout.hidden), range(self.batches)):
            for boundary, carry in carries.items():
                layout.restore(boundary, carry, here)

    def plain(self) -> None:
        memory = bytearray(1 << 20)
        for path in self.data_files():
            with path.open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                while file.readinto(memory):
                    pass

    def drop(self) -> float:
        """Asks the page cache to drop the data; the share of pages, probed all over it, that are gone."""
        gone = []
        for path in self.data_files():
            with path.open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                gone += list(_absent(file.fileno(), path.stat().st_size))
        return sum(gone) / len(gone)

    def compare(self) -> None:
        """Holds what is read against what the teacher computes: figures of wrong activations are worth nothing."""
        for batch in (0, self.batches - 1):
            read = self.cache.reader().read(list(self.cache.layout.hidden), batch)
            for boundary, carry in enumerate(self.teach(batch)):
                found = read[boundary].hidden
                if not torch.allclose(found.float(), carry.hidden.to(found.dtype).float().cpu(), rtol=1e-4, atol=1e-5):
                    raise RuntimeError(f"batch {batch}, boundary {boundary}: what is read is not what the teacher computes")


def _absent(file: int, size: int) -> Iterator[bool]:
    """Whether each of some pages of a file is not in the page cache."""
    for offset in range(0, size, max(4096, size // 64)):
        try:
            os.preadv(file, [bytearray(1)], offset, os.RWF_NOWAIT)
            yield False
        except BlockingIOError:
            yield True
        except OSError:  # a file system that cannot tell
            yield False


def wait() -> None:
    """Until the device has done what it was given."""
    if device().type != "cpu":
        torch.accelerator.synchronize()


def timed(work: Callable[[], None]) -> float:
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def measure_model(model: str, options: argparse.Namespace, batches: int, repeats: int) -> dict[str, Any]:
    """The figures of one pair."""
    pair = Pair(model, options.blocks, options.preset)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="activation-cache-") as folder:
        cached = Cached(pair, batches, "bf16" if options.bf16 else "as computed", Path(folder) / "cache")
        writing = cached.fill()
        cached.compare()
        os.sync()  # what the page cache has still to write it cannot drop
        seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
        dropped = []
        for _ in range(repeats):
            seconds["recompute"].append(timed(cached.recompute))
            for name, work in (("plain", cached.plain), ("read", cached.read)):
                dropped.append(cached.drop())
                seconds[f"{name} cold"].append(timed(work))
            for name, work in (("plain", cached.plain), ("read", cached.read)):
                seconds[f"{name} warm"].append(timed(work))
    ratios = {
        name: median(slow / fast for slow, fast in zip(seconds[above], seconds[below], strict=True))
        for name, (above, below) in RATIOS.items()
    }
    return {
        **ratios,
        "bytes_per_sample": cached.bytes / (batches * pair.batch_size),
        "bytes": cached.bytes,
        "dropped": min(dropped),
        "write_bytes_per_second": cached.bytes / writing,
        "read_bytes_per_second": {arm: cached.bytes / median(taken) for arm, taken in seconds.items() if arm != "recompute"},
        "seconds": seconds,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of the benchmark."""
    ci = options.preset == "ci"
    if options.folder and not options.folder.is_dir():
        raise UserError(f"--folder {options.folder}: no such folder; create it or name another one")
    batches, repeats = options.batches or (8 if ci else 64), options.repeats or (1 if ci else 5)
    chosen = MODELS if options.model == "both" else (options.model,)
    models = {model: measure_model(model, options, batches, repeats) for model in chosen}
    least = {name: min(figures[name] for figures in models.values()) for name in RATIOS}
    return {"blocks": options.blocks, "batches": batches, "repeats": repeats, "bf16": options.bf16, **least, "models": models}


def show(figures: dict[str, Any]) -> str:
    """The table."""
    head = ["", "MiB", "KiB a sample", "recompute s", "read s", "recompute / read", "read GiB/s", "plain GiB/s", "read / plain", "dropped"]
    rows = []
    for model, found in figures["models"].items():
        for state in ("cold", "warm"):
            rates = found["read_bytes_per_second"]
            rows.append(
                [
                    f"{model} {state}",
                    f"{found['bytes'] / 2**20:.0f}",
                    f"{found['bytes_per_sample'] / 2**10:.1f}",
                    f"{median(found['seconds']['recompute']):.3f}",
                    f"{median(found['seconds'][f'read {state}']):.3f}",
                    f"{found[f'recompute_over_read_{state}']:.2f}",
                    f"{rates[f'read {state}'] / 2**30:.2f}",
                    f"{rates[f'plain {state}'] / 2**30:.2f}",
                    f"{found['read_over_plain_read' + ('' if state == 'cold' else '_warm')]:.2f}",
                    f"{found['dropped']:.0%}" if state == "cold" else "",
                ]
            )
    written = ", ".join(f"{model} {found['write_bytes_per_second'] / 2**30:.2f}" for model, found in figures["models"].items())
    parts = [table(head, rows), "", f"{figures['blocks']} blocks, {figures['batches']} batches, median of {figures['repeats']} repeats"]
    parts += [f"written at {written} GiB/s, durable", *(f"{name} {figures[name]:.2f}" for name in RATIOS)]
    return "\n".join(parts)


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--model", choices=(*MODELS, "both"), default="both", help="which pair (default both)")
    arguments.add_argument("--blocks", type=positive, default=12, metavar="N", help="blocks of the teacher (default 12)")
    arguments.add_argument("--batches", type=positive, metavar="N", help="micro-batches in the cache (default 64; ci 8)")
    arguments.add_argument("--repeats", type=positive, metavar="N", help="runs of every arm (default 5; ci 1)")
    arguments.add_argument("--bf16", action="store_true", help="store the hidden states in bfloat16")
    arguments.add_argument("--folder", type=Path, metavar="DIR", help="on the disk to measure (default: the system's temporary folder)")
    return run(measure, arguments, show)


if __name__ == "__main__":
    sys.exit(main())
