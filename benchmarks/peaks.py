"""What a device can do at most, measured, and the most memory that this process has held on it."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch

from wtn_pretrain.device import device, peak_memory
from wtn_pretrain.errors import UserError

_CLEAR = Path("/proc/self/clear_refs")


def synchronize() -> None:
    """Returns when the device has done all that it was given."""
    if device().type != "cpu":
        torch.accelerator.synchronize()


def timed(call: Callable[[], object], times: int) -> float:
    """Seconds of a call, of so many one after the other."""
    synchronize()
    began = time.perf_counter()
    for _ in range(times):
        call()
    synchronize()
    return (time.perf_counter() - began) / times


def enough(call: Callable[[], object], seconds: float) -> int:
    """How many calls take about `seconds`."""
    call()
    return max(1, min(1000, int(seconds / max(timed(call, 1), 1e-7))))


def rates(seconds: float, dtype: torch.dtype, small: bool) -> tuple[float, float]:
    """Bytes a second of a copy, both ways counted, and FLOP/s of a square product."""
    here = device()
    size = 2**20 if small else 2**25 if here.type == "cpu" else 2**29
    source = torch.zeros(size, dtype=torch.uint8, device=here)
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    bandwidth = 2 * size / median(timed(copy, enough(copy, seconds)) for _ in range(5))
    side = 256 if small else 1024 if here.type == "cpu" else 8192
    matrix = torch.empty(side, side, device=here, dtype=dtype).normal_()
    product = partial(torch.mm, matrix, matrix)
    return bandwidth, 2 * side**3 / median(timed(product, enough(product, seconds)) for _ in range(5))


def require_peak() -> None:
    """Refuses a system that does not tell its largest resident set since some moment.

    Raises:
        UserError: there is neither an accelerator nor Linux's /proc.
    """
    if device().type == "cpu" and not _CLEAR.exists():
        raise UserError(f"the resident set is read from Linux's {_CLEAR}; run it on Linux, or with an accelerator")


def start_of_peak() -> int:
    """Bytes that are held now, from which the peak starts; on the CPU the resident set."""
    if device().type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        return torch.accelerator.memory_allocated()
    _CLEAR.write_text("5", encoding="ascii")
    return status("VmRSS")


def peak() -> int:
    """Bytes: the most that was held since `start_of_peak`."""
    return status("VmHWM") if device().type == "cpu" else peak_memory()


def status(field: str) -> int:
    """Bytes of a field of this process's /proc status."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
