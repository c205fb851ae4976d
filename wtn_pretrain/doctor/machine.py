"""Devices and memory of this machine."""

import os
from pathlib import Path

import torch

from wtn_pretrain.device import device, hardware, peak_flops, total_memory
from wtn_pretrain.doctor.finding import Finding


def check_devices(local_rank: int | None = None) -> list[Finding]:
    """What computes here, and whether it does: the device of a rank by its number on the host, or of a process alone (None) all of them."""
    here = device()
    tried = [here]
    if here.type != "cpu":
        count = torch.accelerator.device_count()
        tried = [torch.device(here.type, index) for index in range(count) if local_rank in (None, index)] or tried
    faults = [fault for one in tried for fault in _computes(one)]
    if faults:
        return faults
    if here.type == "cpu":
        return [Finding("devices", "ok", f"no accelerator: {hardware()}, {os.cpu_count()} cores; bf16 is often slower than fp32 on a CPU")]
    peak = peak_flops("bf16")
    more = f", {peak / 1e12:.0f} TFLOP/s in bf16" if peak else ", whose peak is not known (no MFU is told)"
    return [Finding("devices", "ok", f"{torch.accelerator.device_count()} x {hardware()}, {total_memory() / 1e9:.0f} GB each{more}")]


def _computes(one: torch.device) -> list[Finding]:
    """Empty where it does."""
    name = hardware() if one.type == "cpu" else f"device {one.index}, {hardware()}"
    try:
        matrix = torch.ones(64, 64, device=one)
        wrong = float((matrix @ matrix).sum()) != 64.0**3
    except RuntimeError as error:
        text = f"{name}: does not compute ({' '.join(str(error).split())[:120]})"
        remedy = "does the driver fit this build of torch? see nvidia-smi and python -m torch.utils.collect_env"
        return [Finding("devices", "fault", text, remedy)]
    return [Finding("devices", "fault", f"{name}: computes wrongly", "take this device out of service")] if wrong else []


def check_memory(info: Path = Path("/proc/meminfo")) -> list[Finding]:
    """Host memory."""
    if not info.is_file():
        return []
    fields = dict(line.split(":", 1) for line in info.read_text(encoding="ascii").splitlines() if ":" in line)
    free, whole = (int(fields[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    text = f"{free / 1e9:.3g} of {whole / 1e9:.3g} GB of host memory free"
    if free < 2e9:
        return [Finding("memory", "warning", text, "end what takes it; a rank without a network takes half a gigabyte")]
    return [Finding("memory", "ok", text)]
