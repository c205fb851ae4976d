"""Whether all ranks run the same code: the files of this package and the versions of what decides results, compared at the start."""

import hashlib
import importlib.metadata
import sys
from collections.abc import Mapping
from pathlib import Path

import wtn_pretrain

DECIDE = ("torch", "deepspeed", "numpy", "transformers")
"""Packages of which all ranks must have the same version."""


def identity(package: Path | None = None) -> dict[str, str]:
    """What this process runs: name -> version, and path below `package` (None: wtn_pretrain) -> hash of every file of code in it."""
    root = package or Path(wtn_pretrain.__file__).parent
    found = {"python": ".".join(map(str, sys.version_info[:2])), "script": Path(sys.argv[0]).name}
    for name in DECIDE:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    for path in sorted(root.rglob("*.py")):
        found[f"{root.name}/{path.relative_to(root)}"] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return found


def difference(mine: Mapping[str, str], first: Mapping[str, str]) -> str | None:
    """In words, the first thing in which a rank differs from rank 0, and the remedy; None: nothing."""
    for name in [*first, *(name for name in mine if name not in first)]:
        here, there = mine.get(name), first.get(name)
        if here == there:
            continue
        if not name.endswith(".py"):
            remedy = "start the same script everywhere" if name == "script" else "give every host the same environment"
            return f"has {name} {here} where rank 0 has {there}; {remedy}"
        others = sum(mine.get(other) != first.get(other) for other in {*mine, *first} if other.endswith(".py")) - 1
        more = f" ({others} more files differ)" if others else ""
        which = "has another" if here and there else "lacks" if there else "alone has"
        return f"{which} {name}{more}; give every host the same checkout"
    return None
