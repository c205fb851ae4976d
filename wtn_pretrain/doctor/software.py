"""Versions and sources, and whether all ranks have the same."""

import platform
from collections.abc import Mapping, Sequence
from importlib import metadata

from wtn_pretrain.doctor.finding import Finding
from wtn_pretrain.parallel.alike import difference
from wtn_pretrain.version import __version__

PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "triton")


def versions() -> dict[str, str]:
    """What this process would import, without importing it."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return {**found, "wtn_pretrain": __version__}


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
