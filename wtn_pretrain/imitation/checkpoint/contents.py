"""What is in a checkpoint of stage 2, once all of it has been read and found as it was written."""

from pathlib import Path

from wtn_pretrain.checkpoint.contents import Kind, Wanted, described, tallied
from wtn_pretrain.checkpoint.files import dtype_of
from wtn_pretrain.imitation.checkpoint.manifest import Manifest, Stored, unit_key


def contents(folder: Path) -> tuple[Manifest, list[Kind]]:
    """Reads a checkpoint whole: its tensors counted by unit, and by the optimizer that has them.

    Raises:
        DamagedError: something in it is not as it was written.
    """
    stored = Stored(folder)
    stored.check()
    manifest = stored.manifest
    wanted = {
        key: Wanted(kept.part, kept.shape, dtype_of(kept.dtype), key.partition("/")[0]) for key, kept in sorted(manifest.tensors.items())
    }
    kinds = tallied(folder, wanted)
    for name in manifest.optimizers:
        stored.optimizer(name)
    return manifest, sorted(kinds, key=lambda kind: (not kind.name.startswith("unit"), kind.name))


def shown(folder: Path, manifest: Manifest, kinds: list[Kind]) -> str:
    """A table for people."""
    units = {key.partition("/")[0] for key in manifest.tensors} & {unit_key(index) for index in range(len(manifest.tensors))}
    facts = {
        "run": ", ".join(f"{name} {value}" for name, value in manifest.identity.items()),
        "step": f"{manifest.done}: {manifest.step} of phase {manifest.phase}, after {manifest.spent.seconds:.1f} s",
        "written by": f"plan {manifest.plan}, ZeRO {manifest.zero}",
        "versions": ", ".join(f"{name} {value}" for name, value in manifest.versions.items()),
        "holds": f"{len(units)} units, the state of {len(manifest.optimizers)} optimizers",
        "files": f"{len(manifest.parts)} parts, {sum(part.bytes for part in manifest.parts.values()):,} bytes",
    }
    return described(folder, facts, kinds)
