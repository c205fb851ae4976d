"""Versions and sources, and whether all ranks have the same."""

import hashlib
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from wtn_pretrain.doctor.finding import Finding
from wtn_pretrain.version import __version__

PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "triton")
PACKAGE = Path(__file__).resolve().parents[1]


def source_hash(package: Path = PACKAGE) -> str:
    """SHA-256, as hex, of all Python files of a package with their paths; it differs where any line of code does."""
    made = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        made.update(f"{path.relative_to(package).as_posix()}\0".encode())
        made.update(path.read_bytes() + b"\0")
    return made.hexdigest()


def versions() -> dict[str, str]:
    """What this process would import, without importing it."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return {**found, "wtn_pretrain": __version__, "source": source_hash()[:12]}


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
            what = "code of wtn_pretrain" if name == "source" else name
            text = f"{what} {value} on {hosts[members[0]]}, and {ranks[0][name]} on rank 0's {hosts[0]}"
            remedy = "start all ranks in one environment: the same virtual environment, container or modules on every node"
            found.append(Finding("versions", "fault", text, remedy, tuple(members)))
    return found or [Finding("versions", "ok", f"the same on {len(ranks)} ranks")]


def _pinned() -> dict[str, str]:
    """Exact versions that the installed package asks for."""
    try:
        wanted = metadata.requires("wtn_pretrain") or []
    except metadata.PackageNotFoundError:
        return {}
    pairs = (requirement.split(";")[0].strip().split("==") for requirement in wanted if "extra" not in requirement)
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}
