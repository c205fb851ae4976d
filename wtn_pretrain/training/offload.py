"""What ZeRO keeps in host memory or on NVMe instead of on the device: refused at the start where it cannot work."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wtn_pretrain.errors import UserError

OPTIMIZER, PARAMETERS = "offload_optimizer", "offload_param"


def offloads(zero: Mapping[str, Any], what: str = OPTIMIZER) -> bool:
    """Whether a `zero_optimization` section moves `what` off the device."""
    return (zero.get(what) or {}).get("device", "none") != "none"


def check_offload(zero: Mapping[str, Any], name: str) -> None:
    """Refuses what a `zero_optimization` section of the DeepSpeed file `name` offloads where it cannot.

    Raises:
        UserError: names the file, the key and the remedy.
    """
    level = zero.get("stage", 0)
    for what, least in ((OPTIMIZER, 1), (PARAMETERS, 3)):
        if not offloads(zero, what):
            continue
        place = zero[what].get("device")
        least = 3 if place == "nvme" else least
        if level < least:
            remedy = {1: "zero1_offload.json", 3: "zero3_nvme.json" if place == "nvme" else "zero3_offload.json"}[least]
            raise UserError(f"{name}: {what} to {place} needs ZeRO {least}, and this file is ZeRO {level}; see ds_configs/{remedy}")
        if what == PARAMETERS and place == "nvme":
            # its swapper reads a parameter twice into one buffer, and takes fp32 weights for bfloat16 on a device without fp16
            raise UserError(f"{name}: {what} to nvme fails in DeepSpeed 0.19.8; set {what}.device to cpu, the optimizer may be on nvme")
        if place == "nvme":
            _check_nvme(zero[what], f"{name}: {what}")


def check_buffers(zero: Mapping[str, Any], states: int, name: str) -> None:
    """Refuses fewer buffers in host memory than what lies on NVMe needs as it is stepped.

    Args:
        states: tensors that the optimizer keeps of each weight.
        name: the DeepSpeed file.

    Raises:
        UserError: names the file, the key and what is enough.
    """
    section = zero.get(OPTIMIZER) or {}
    # four are DeepSpeed's own number
    count = section.get("buffer_count", 4)
    if section.get("device") == "nvme" and count < states + 2:
        raise UserError(
            f"{name}: {OPTIMIZER}.buffer_count {count} has no room for weights, gradients and {states} states; make it {states + 2}"
        )


def _check_nvme(section: Mapping[str, Any], where: str) -> None:
    path = section.get("nvme_path")
    if not path:
        raise UserError(f"{where}: to nvme, and nvme_path is missing; name a folder on a local NVMe disk")
    if not Path(path).is_dir():
        raise UserError(f"{where}: no folder {path}; copy the file, and name in its nvme_path a folder on a local NVMe disk")
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{where}: {path} cannot be written; name another folder in nvme_path")
    with tempfile.NamedTemporaryFile(dir=path) as probe:
        try:
            os.close(os.open(probe.name, os.O_RDONLY | os.O_DIRECT))
        except OSError as error:
            raise UserError(f"{where}: {path} takes no direct I/O ({error.strerror}); name a folder on a local NVMe disk") from None
    from deepspeed.ops.op_builder import AsyncIOBuilder

    require_compiler(where)
    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError(f"{where}: to nvme needs libaio, which is not installed here; apt-get install libaio-dev, or offload to the cpu")


def require_compiler(where: str) -> None:
    """Refuses what DeepSpeed compiles at first use on a machine that cannot."""
    missing = [tool for tool in ("ninja", os.environ.get("CXX", "c++")) if shutil.which(tool) is None]
    if missing:
        raise UserError(
            f"{where}: is compiled at first use, and {' and '.join(missing)} is not on the path; install a C++ compiler and ninja"
        )
