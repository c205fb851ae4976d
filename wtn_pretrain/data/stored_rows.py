"""Which tokens a row holds, found once: by the first rank, into files that every rank and every later start memory-maps."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from wtn_pretrain.data.token_store import build_once

_NOTE = "made.json"


def stored_rows(cache: Path, key: str, build: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays that `build` returns, memory-mapped from `cache`/rows/`key`, where they are written if they are not there yet.

    Under torch.distributed every rank must call this, `cache` must be a folder that all share, and the first rank alone builds.

    Args:
        key: names all that the arrays follow from; a part of a file name.
    """
    folder = cache / "rows" / key

    def whole() -> str | None:
        try:
            note = json.loads((folder / _NOTE).read_text(encoding="utf-8"))
            fits = all((folder / f"{name}.npy").stat().st_size == size for name, size in note["files"].items())
            return note["key"] if fits else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def write() -> dict[str, object]:
        files = {}
        for name, values in build().items():
            # the note comes last and switches them in
            np.save(folder / f"{name}.npy", values)
            files[name] = (folder / f"{name}.npy").stat().st_size
        return {"files": files}

    build_once(folder, key, write, name=_NOTE, read=whole)
    names = json.loads((folder / _NOTE).read_text(encoding="utf-8"))["files"]
    return {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in names}
