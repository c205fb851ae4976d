"""Triton where it is installed. Kernels are defined through `jit`, which leaves them alone where it is not."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch

triton: Any = None
tl: Any = SimpleNamespace(constexpr=int)
"""Triton's language; without Triton only what the signatures of kernels need."""
BROKEN = ""
"""Why an installed Triton could not be imported."""
if find_spec("triton") is not None:
    try:
        import triton  # type: ignore[import-not-found,no-redef]
        import triton.language as tl  # type: ignore[import-not-found,no-redef]
    except (ImportError, OSError, RuntimeError) as error:
        triton, BROKEN = None, str(error)
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, on the CPU; decided when this is imported."""


def jit(kernel: Callable[..., Any]) -> Any:
    """`triton.jit`, or the function as it is where there is no Triton to run it."""
    return kernel if triton is None else triton.jit(kernel)


def blocks(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // block)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << max(0, size - 1).bit_length()


@jit
def _copy(source, target, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < size), mask=at < size)


def why_not(device: torch.device) -> str | None:
    """None where Triton's kernels run on `device`, tried out on one of them, else what stands against it."""
    if triton is None:
        return f"Triton cannot be imported ({BROKEN})" if BROKEN else "Triton is not installed"
    if device.type == "cpu" and not INTERPRETED:
        return "Triton has no CPU backend"
    source = torch.arange(5.0, device=device)
    target = torch.zeros_like(source)
    try:
        _copy[(1,)](source, target, 5, BLOCK=8)
    except Exception as error:  # a missing compiler, an old device, a driver: each has errors of its own
        return f"Triton does not run here ({' '.join(str(error).split())[:160]})"
    return None if torch.equal(source, target) else "Triton computes wrongly here"
