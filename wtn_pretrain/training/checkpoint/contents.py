"""What is in a checkpoint, once all of it has been read and found as it was written."""

from pathlib import Path

import torch

from wtn_pretrain.checkpoint.contents import Kind, Wanted, described, tallied
from wtn_pretrain.checkpoint.files import dtype_of
from wtn_pretrain.training.checkpoint.manifest import Manifest, check_parts, read_manifest


def contents(folder: Path) -> tuple[Manifest, list[Kind]]:
    """Reads a checkpoint whole.

    Raises:
        DamagedError: something in it is not as it was written.
    """
    manifest = read_manifest(folder)
    check_parts(folder, manifest, sorted(manifest.parts))
    wanted = {
        key: Wanted(parameter.part, parameter.shape, torch.float32, key.partition("/")[0])
        for name, parameter in manifest.parameters.items()
        for key in parameter.keys(name)
    }
    wanted |= {key: Wanted(other.part, other.shape, dtype_of(other.dtype), key.partition("/")[0]) for key, other in manifest.others.items()}
    return manifest, tallied(folder, wanted)


def shown(folder: Path, manifest: Manifest, kinds: list[Kind]) -> str:
    """A table for people."""
    layout = manifest.layout
    updates = sorted({parameter.updates for parameter in manifest.parameters.values() if parameter.updates is not None})
    facts = {
        "run": ", ".join(f"{name} {value}" for name, value in manifest.identity.items()),
        "step": f"{manifest.step}, after {manifest.seconds:.1f} s",
        "written by": f"{layout.ranks} ranks, tensor parallel {layout.tensor}, ZeRO {layout.zero}, weights {layout.weights}",
        "versions": ", ".join(f"{name} {value}" for name, value in manifest.versions.items()),
        "updates": ", ".join(map(str, updates)) or "not counted",
        "counters": ", ".join(f"{name} {value:g}" for name, value in manifest.counters.items()),
        "files": f"{len(manifest.parts)} parts, {sum(part.bytes for part in manifest.parts.values()):,} bytes",
    }
    return described(folder, facts, kinds)
