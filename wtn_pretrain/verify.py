"""Looks through what stages have left, checkpoints and networks: whether it is as it was written, and what is in it."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from wtn_pretrain.checkpoint.contents import described, tally
from wtn_pretrain.checkpoint.files import DamagedError, Parts
from wtn_pretrain.errors import UserError
from wtn_pretrain.folder import NETWORK, RunFolder
from wtn_pretrain.imitation.checkpoint import contents as imitation
from wtn_pretrain.imitation.checkpoint import manifest as imitated
from wtn_pretrain.models.store import load_shape
from wtn_pretrain.training.checkpoint import contents as training
from wtn_pretrain.training.checkpoint import manifest as trained


def find(path: Path) -> list[tuple[Path, Callable[[Path], str]]]:
    """The checkpoint or finished stage at `path`, or those in the folders below it, and what says of each what is in it.

    Newest checkpoints of a folder come first.

    Raises:
        UserError: there is none.
    """
    if path.is_dir() and (kind := _kind(path)):
        return [(path, kind)]
    folders = [path, *sorted(folder for folder in path.rglob("checkpoints") if folder.is_dir() and folder != path)]
    found: list[tuple[Path, Callable[[Path], str]]] = []
    for folder in folders:
        found += [(one, _checkpoint_of_training) for _, one in trained.checkpoints_in(folder)]
        found += [(one, _checkpoint_of_imitation) for _, one in imitated.checkpoints_in(folder)]
    found += [(done.parent, _network) for done in sorted(path.rglob("done.json"))]
    if not found:
        raise UserError(f"{path}: holds no checkpoint and no finished stage; give one of them, or a folder above such, such as runs/NAME")
    return found


def main(arguments: Sequence[str], usage: str) -> int:
    """What is at or below the one path in `arguments`, on standard output; exit code 0: all is whole, 1: something is not, 2: there is
    nothing."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(usage)
        return 0 if list(arguments) in (["-h"], ["--help"]) else 2
    try:
        found = find(Path(arguments[0]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    code = 0
    for folder, look in found:
        try:
            print(look(folder), flush=True)
        except DamagedError as error:
            print(f"error: {error}; the checkpoint is damaged", file=sys.stderr)
            code = 1
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            code = 1
    return code


def _kind(folder: Path) -> Callable[[Path], str] | None:
    """What says what is in a checkpoint; None: the folder is none by its name."""
    if trained.step_of(folder.name) is not None:
        return _checkpoint_of_training
    return None if imitated.order_of(folder.name) is None else _checkpoint_of_imitation


def _checkpoint_of_training(folder: Path) -> str:
    return training.shown(folder, *training.contents(folder))


def _checkpoint_of_imitation(folder: Path) -> str:
    return imitation.shown(folder, *imitation.contents(folder))


def _network(stage: Path) -> str:
    """The network that a finished stage has left."""
    told = RunFolder.check_network(stage)
    shape, parts = load_shape(stage), Parts(stage)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for key in sorted(parts.keys(NETWORK)):
            yield "weights", parts.read(NETWORK, key)

    result = RunFolder.result(stage) or {}
    facts = {
        "network": f"{shape.family}, of a stage that has finished",
        "steps": str(result.get("steps", "not told")),
        "sha256": told or f"not told by done.json, so that nothing vouches for {NETWORK}",
    }
    return described(stage, facts, tally(tensors()))
