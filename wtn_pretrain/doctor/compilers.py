"""What compiles at first use: DeepSpeed's ops, torch.compile and Triton."""

import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from wtn_pretrain.doctor.finding import Finding

NEEDED = "DeepSpeed's ops (an offloaded CPUAdam, NVMe), torch.compile and Triton's kernels are compiled at first use"


def check_compilers(device: str) -> list[Finding]:
    """Looks for a C++ compiler that works, ninja, Python's headers, and on a GPU nvcc."""
    compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    found, remedy = [], "apt-get install build-essential, or load a compiler's module"
    if compiler is None:
        found.append(Finding("compilers", "fault", f"no C++ compiler on the path; {NEEDED}", remedy))
    elif problem := _compiles(compiler):
        found.append(Finding("compilers", "fault", f"{compiler} compiles nothing here ({problem}); {NEEDED}", remedy))
    else:
        found.append(Finding("compilers", "ok", f"{compiler} compiles"))
    if shutil.which("ninja") is None:
        text = "no ninja on the path, by which DeepSpeed builds its ops"
        found.append(
            Finding("compilers", "fault", text, "pip install ninja, and put the environment's bin folder on the path (activate it)")
        )
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        text = "Python's headers are missing, which torch.compile and Triton include"
        found.append(Finding("compilers", "warning", text, "apt-get install python3-dev, or a Python that brings them"))
    if (
        device != "cpu"
        and shutil.which("nvcc") is None
        and not (Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin/nvcc").is_file()
    ):
        text = "no nvcc: DeepSpeed's CUDA ops cannot be built (nothing here uses them unless asked; Triton needs none)"
        found.append(Finding("compilers", "warning", text, "load the CUDA toolkit's module, or set CUDA_HOME"))
    return found


def _compiles(compiler: str) -> str:
    """Empty where a program compiles and links, else the first words against it."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <vector>\nint main() { return std::vector<int>(1).size() - 1; }\n")
        try:
            call = [compiler, str(source), "-o", str(source.with_suffix(""))]
            done = subprocess.run(call, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            return type(error).__name__
    return "" if done.returncode == 0 else " ".join(done.stderr.split())[:100] or f"it exits with {done.returncode}"
