"""The Triton kernels, forward and backward: run in Triton's interpreter on the CPU, and compiled for a GPU that need not be there."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.kernels.comparing import CASES, TOLERANCE

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed (pip install --target FOLDER triton, and FOLDER on PYTHONPATH)",
)
ROOT = Path(__file__).resolve().parents[3]


def output(module: str, **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", f"tests.unit.kernels.{module}"], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    return output("interpreted", TRITON_INTERPRET="1")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_against_fp64(case: str, dtype: str, interpreted: dict[str, Any]) -> None:
    errors = interpreted["results"][case][dtype]
    assert errors
    assert max(errors.values()) <= TOLERANCE[dtype], errors


def test_kernels_were_live_and_masks_are_as_defined(interpreted: dict[str, Any]) -> None:
    assert set(interpreted["live"].values()) == {"triton"}
    assert interpreted["described"].startswith("kernels triton on cpu: bias_gelu triton, dropout_add_norm triton, attention sdpa")
    assert interpreted["masks"] == [True] * 3


def test_kernels_compile_for_hopper() -> None:
    """Down to machine code: what the interpreter accepts, the compiler may not."""
    assert output("compiled") == dict.fromkeys(("bias_gelu", "dropout_add_norm", "linear_cross_entropy", "bridge_energy"), True)
