"""Compiles every Triton kernel for a GPU, with Triton's own compiler and assembler, on a machine that needs none.

Prints {operation: done} as JSON.
"""

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from wtn_pretrain.kernels import bias_gelu, bridge_energy, dropout_add_norm, linear_cross_entropy

HOPPER = GPUTarget("cuda", 90, 32)


def compiles(kernel: Any, types: dict[str, str], **constants: Any) -> bool:
    """`types`: of the arguments that are given at launch, in Triton's notation; pointers that are not named are to fp32."""
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    made = triton.compile(ASTSource(kernel, signature, places), target=HOPPER)
    return len(made.asm["cubin"]) > 0


def main() -> None:
    sizes = dict.fromkeys(("rows", "columns", "share"), "i32") | {"seed": "i64", "p": "fp32", "eps": "fp32", "smoothing": "fp32"}
    done: dict[str, bool] = {}
    for half in ("*bf16", "*fp16", "*fp32"):
        tile = {"ROWS": 16, "COLUMNS": 128}
        data = sizes | dict.fromkeys(("x", "y", "bias", "grad", "of_x"), half)
        ok = compiles(bias_gelu._forward, data, **tile) and compiles(bias_gelu._backward, data, **tile, GROUP=256)
        done["bias_gelu"] = done.get("bias_gelu", True) and ok
        data = sizes | dict.fromkeys(("x", "bias", "residual", "total", "normed", "of_normed", "of_total", "of_x", "of_residual"), half)
        norm = dropout_add_norm
        ok = all(
            compiles(norm._forward, data, HAS_BIAS=drops, DROPS=drops, BLOCK=1024)
            and compiles(norm._backward, data, HAS_TOTAL=drops, HAS_BIAS=drops, DROPS=drops, TWO=drops, BLOCK=1024)
            for drops in (True, False)
        )
        done["dropout_add_norm"] = done.get("dropout_add_norm", True) and ok
        data = sizes | {"logits": half, "targets": "*i64", "kept": "*i8"}
        ok = all(compiles(linear_cross_entropy._rows, data, GRADIENT=on, SMOOTHED=on, BLOCK=4096) for on in (True, False))
        done["linear_cross_entropy"] = done.get("linear_cross_entropy", True) and ok
        data = sizes | {"answer": half, "of_answer": half, "target": half, "mask": "*i8"}
        ok = all(compiles(bridge_energy._rows, data, MASKED=on, GRADIENT=on, BLOCK=2048) for on in (True, False))
        done["bridge_energy"] = done.get("bridge_energy", True) and ok
    json.dump(done, sys.stdout)


if __name__ == "__main__":
    main()
