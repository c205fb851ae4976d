"""Token ids on disk: flat memory-mapped arrays, the bounds of documents in them, and a key that says what they were made from."""

import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from wtn_pretrain.data.tokenizer import encode
from wtn_pretrain.errors import UserError
from wtn_pretrain.files import draft_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BLOCKS_AT_ONCE = 512
_PARTS = ("train", "valid")


def tokens_file(cache: Path, part: str) -> Path:
    """Where the ids of a part of the text (train or valid) are kept."""
    return cache / f"{part}.npy"


def documents_file(cache: Path, part: str) -> Path:
    """Where the bounds of its documents are kept."""
    return cache / f"{part}.documents.npy"


def write_part(cache: Path, part: str, texts: Iterable[tuple[bool, str]], tokenizer: "PreTrainedTokenizerBase") -> int:
    """Writes the ids of `texts`, one after the other without special tokens, as a 1-D .npy of uint16 (uint32 where the vocabulary
    is larger), and beside it where documents begin, and the end: int64, strictly ascending. Returns the number of ids.

    Args:
        texts: each with whether a document begins with it. One that gives no ids is no document.
    """
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    count = 0
    bounds = array("q")
    path = tokens_file(cache, part)
    partial = draft_of(path)
    with open(partial, "wb") as stream:

        def header() -> None:
            description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
            stream.seek(0)
            np.lib.format.write_array_header_1_0(stream, description)  # leaves room for the length to grow

        header()
        start = stream.tell()
        remaining = iter(texts)
        while some := list(islice(remaining, _BLOCKS_AT_ONCE)):
            for (begins, _), ids in zip(some, encode(tokenizer, [text for _, text in some]), strict=True):
                if begins and (not bounds or bounds[-1] < count):
                    bounds.append(count)
                np.asarray(ids, dtype).tofile(stream)
                count += len(ids)
        stream.flush()
        header()
        assert stream.tell() == start
    os.replace(partial, path)
    if not bounds or bounds[-1] < count:
        bounds.append(count)
    with open(partial, "wb") as stream:
        np.save(stream, np.array(bounds, np.int64))
    os.replace(partial, documents_file(cache, part))
    return count


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Saves into `folder`, which is replaced as a whole."""
    partial = draft_of(folder)
    tokenizer.save_pretrained(str(partial))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def read_key(cache: Path) -> str | None:
    """The key of the complete store in `cache`, or None."""
    try:
        key = json.loads((cache / "tokens.json").read_text())["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    complete = (cache / "tokenizer").is_dir() and all(
        file(cache, part).is_file() for file in (tokens_file, documents_file) for part in _PARTS
    )
    return key if complete else None


def build_once(
    cache: Path,
    key: str,
    build: Callable[[], Mapping[str, Any]],
    *,
    name: str = "tokens.json",
    read: Callable[[], str | None] | None = None,
) -> None:
    """Makes sure that `cache` holds the store of `key`: rank 0 calls `build` where it does not, the others wait.

    `build` returns what to note beside the key in the file `name`; `read` returns the key of a complete store or None (`read_key` if
    not given). A UserError of rank 0 is raised on every rank.
    """
    read = read or (lambda: read_key(cache))
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    problem: str | None = None
    if not distributed or torch.distributed.get_rank() == 0:
        try:
            if read() != key:
                cache.mkdir(parents=True, exist_ok=True)
                (cache / name).unlink(missing_ok=True)  # comes last, so that a broken-off build does not count
                note = {"key": key, **build()}
                partial = draft_of(cache / name)
                partial.write_text(json.dumps(note, indent=1))
                os.replace(partial, cache / name)
        except (UserError, OSError) as error:
            problem = (
                str(error) if isinstance(error, UserError) else f"{cache}: cannot be written ({error}); free space or choose another folder"
            )
    if distributed:
        told = [problem]
        torch.distributed.broadcast_object_list(told, src=0)
        problem = told[0]
    if problem is not None:
        raise UserError(problem)
    if read() != key:
        raise UserError(f"{cache}: does not hold what rank 0 wrote; the folder must be one that all nodes share")


def open_tokens(path: Path, vocab_size: int) -> np.ndarray:
    """The ids in `path`, memory-mapped, 1-D. Raises a UserError where the file is damaged or made with another vocabulary."""
    try:
        tokens = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove its folder to have it made again") from None
    if len(tokens) and int(tokens[:: max(1, len(tokens) // 100_000)].max()) >= vocab_size:
        raise UserError(f"{path}: token ids beyond the vocabulary of {vocab_size}; remove its folder to have it made again")
    return tokens


def open_documents(path: Path, tokens: int) -> np.ndarray:
    """Where each of the documents in a store of so many ids begins, and the end: int64 [documents + 1], strictly ascending.

    Raises a UserError where the file is damaged or belongs to other ids.
    """
    try:
        bounds = np.load(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove its folder to have it made again") from None
    whole = bounds.ndim == 1 and bounds.dtype == np.int64 and len(bounds) and bounds[-1] == tokens and (len(bounds) == 1 or bounds[0] == 0)
    if not whole or (np.diff(bounds) <= 0).any():
        raise UserError(f"{path}: does not fit the {tokens} token ids beside it; remove its folder to have it made again")
    return bounds
