"""Versions and sources, and whether all ranks have the same."""

import platform
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from wtn_pretrain.doctor.finding import Finding
from wtn_pretrain.parallel.alike import difference
from wtn_pretrain.version import __version__

PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "triton")
NCCL = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")
"""The packages by which torch's wheels bring NCCL."""
DRIVER = Path("/proc/driver/nvidia/version")


def versions(driver: Path = DRIVER) -> dict[str, str]:
    """What this process would import, without importing it, and the driver below it."""
    found = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    found["nccl"] = next((version for name in NCCL if (version := _version(name)) != "none"), "none")
    return {**found, "driver": _driver(driver), "wtn_pretrain": __version__}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _driver(file: Path) -> str:
    """The version in the line that NVIDIA's kernel module shows: `NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue ...`."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", file.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return "none"
    return found[1] if found else "unknown"


def check_versions(own: Mapping[str, str]) -> list[Finding]:
    """What is there, held against what this package is pinned to."""
    text = ", ".join(f"{name} {value}" for name, value in own.items() if value != "none")
    missing = [name for name in ("torch", "deepspeed", "transformers") if own[name] == "none"]
    if missing:
        return [
            Finding(
                "versions", "fault", f"{text}; no {' and no '.join(missing)}", "install this package in this environment: pip install ."
            )
        ]
    found = [Finding("versions", "ok", text)]
    for name, wanted in _pinned().items():
        # +cpu and +cu130 are builds of the same version
        if name in own and own[name].split("+")[0] != wanted:
            text = f"{name} {own[name]}, and this package is tested with {wanted}"
            found.append(Finding("versions", "warning", text, f"pip install {name}=={wanted}, or run the tests with yours"))
    return found


def compare_versions(ranks: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> list[Finding]:
    """Whether all ranks have what rank 0 has."""
    found = []
    for name in ranks[0]:
        others: dict[str, list[int]] = {}
        for rank, theirs in enumerate(ranks):
            if theirs[name] != ranks[0][name]:
                others.setdefault(theirs[name], []).append(rank)
        for value, members in others.items():
            text = f"{name} {value} on {hosts[members[0]]}, and {ranks[0][name]} on rank 0's {hosts[0]}"
            remedy = "start all ranks in one environment: the same virtual environment, container or modules on every node"
            if name == "driver":
                remedy = "have the driver of that node brought to the version of the others, or leave the node out"
            found.append(Finding("versions", "fault", text, remedy, tuple(members)))
    return found or [Finding("versions", "ok", f"the same on {len(ranks)} ranks")]


def compare_code(ranks: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> list[Finding]:
    """Whether all ranks have rank 0's code, given the `identity` of each."""
    others: dict[str, list[int]] = {}
    first = _code(ranks[0])
    for rank, theirs in enumerate(ranks):
        if told := difference(_code(theirs), first):
            others.setdefault(told, []).append(rank)
    found = []
    for told, members in others.items():
        what, _, remedy = told.partition("; ")
        found.append(Finding("versions", "fault", f"{hosts[members[0]]} {what}, held against rank 0's {hosts[0]}", remedy, tuple(members)))
    return found


def _code(identity: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in identity.items() if name.endswith(".py")}


def _pinned() -> dict[str, str]:
    """Exact versions that the installed package asks for."""
    try:
        wanted = metadata.requires("wtn_pretrain") or []
    except metadata.PackageNotFoundError:
        return {}
    pairs = (requirement.split(";")[0].strip().split("==") for requirement in wanted if "extra" not in requirement)
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}
