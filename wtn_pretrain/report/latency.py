"""How long one call takes."""

import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from wtn_pretrain.errors import UserError


def measure_latency(call: Callable[[], Any], *, repeats: int, warmup: int) -> dict[str, float]:
    """Milliseconds of one `call()`: `p50_ms`, `p99_ms` and `min_ms` over `repeats` calls, after `warmup` untimed ones.

    Only wall-clock time is taken: a call that works on an accelerator must wait for it before it returns, and the
    caller decides on threads, gradients and modes. Raises `UserError` for fewer than one repeat.
    """
    if repeats < 1 or warmup < 0:
        raise UserError(f"latency: {repeats} repeats after {warmup} warm-up calls; give at least 1 and 0")
    for _ in range(warmup):
        call()
    taken = np.empty(repeats, dtype=np.int64)
    collecting = gc.isenabled()
    gc.disable()  # as timeit does: a collection is not the network's time
    try:
        for index in range(repeats):
            begin = time.perf_counter_ns()
            call()
            taken[index] = time.perf_counter_ns() - begin
    finally:
        if collecting:
            gc.enable()
    p50, p99 = np.percentile(taken, [50, 99])
    return {"p50_ms": float(p50) / 1e6, "p99_ms": float(p99) / 1e6, "min_ms": float(taken.min()) / 1e6}
