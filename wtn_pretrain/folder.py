"""The run's folder: its configuration, one folder a stage, and what says that a stage is done."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from wtn_pretrain.config import read_yaml
from wtn_pretrain.errors import UserError
from wtn_pretrain.files import write_text
from wtn_pretrain.lock import Lock

NETWORK, CHECKSUM = "model.safetensors", "model_sha256"


class RunFolder:
    """`FOLDER/NAME` of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: Lock | None = None

    def check(self, config: str) -> None:
        """Refuses if the folder holds a run that this configuration would not continue."""
        existing = self.path / "config.yaml"
        if existing.exists():
            difference = next(_differences(read_yaml(existing), yaml.safe_load(config)), None)
            if difference:
                raise UserError(
                    f"{self.path}: holds a run with another configuration ({difference}); choose another --run.name or remove the folder"
                )

    def claim(self, config: str) -> None:
        """Makes the folder this configuration's own, once everything in it has been found to fit."""
        existing = self.path / "config.yaml"
        if not existing.exists() or existing.read_text(encoding="utf-8") != config:
            self.lock()
            write_text(existing, config)

    def lock(self) -> None:
        """Refuses if another process works on this run, and keeps others from it until this one ends. Needs a file system with locks.

        Raises:
            UserError: names the other process.
        """
        if self._lock is None:
            self._lock = Lock(self.path, "works on this run; wait for it, or choose another --run.name")

    def stage(self, name: str, seed: int | None = None) -> Path:
        """The folder of a stage."""
        return self.path / name if seed is None else self.path / f"seed-{seed}" / name

    @staticmethod
    def result(stage: Path) -> dict[str, Any] | None:
        """What a finished stage reported, or None if it has not finished."""
        path = stage / "done.json"
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise UserError(f"{path}: damaged; remove it to run the stage again from its last checkpoint") from None

    @staticmethod
    def finish(stage: Path, result: dict[str, Any]) -> dict[str, Any]:
        """Says that a stage is done, what it reports, and what its network looks like to the byte."""
        result = {**result, CHECKSUM: _sha256(stage / NETWORK)}
        write_text(stage / "done.json", json.dumps(result, indent=2) + "\n")
        return result

    @staticmethod
    def check_network(stage: Path) -> str | None:
        """Reads the network of a finished stage whole; its checksum, or None if the stage has told none.

        Raises:
            UserError: it is not as the stage has left it.
        """
        told = (RunFolder.result(stage) or {}).get(CHECKSUM)
        if told is None:
            return None
        if _sha256(stage / NETWORK) != told:
            raise UserError(
                f"{stage / NETWORK}: is not as the stage left it (its sha256 differs from that in done.json); put the file back, or remove "
                f"{stage / 'done.json'} and run the stage again, which goes on from its last checkpoint"
            )
        return told


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); run the stage again") from None


# where a run lies, how it looks, saves, is laid out over ranks and exported may change from one start to the next; what it computes may not
_FREE = re.compile(
    r"run\.(folder|kernels|time_limit)|export\..*|data\.workers"
    r"|.*\.(log_every|checkpoint_every|checkpoint_keep|checkpoint_keep_every|evaluate_every|patience|max_skipped)"
    r"|(wide|finetune)\.(deepspeed|micro_batch_size|tensor_parallel|sequence_parallel|checkpoint_activations|compile)"
    r"|narrow\.(plan|in_flight|trace|offload|offload_batches)"
)


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if _FREE.fullmatch(path):
        return
    if path == "compare.seeds" and isinstance(old, list) and isinstance(new, list) and new[: len(old)] == old:
        return  # more seeds are more work, not other work
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif old != new:
        yield f"{path} was {json.dumps(old)} and is now {json.dumps(new)}"
