"""Tensors in files of other people's making: safetensors, in one piece or in shards, and pickles if the user says so."""

import argparse
import hashlib
import importlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from wtn_pretrain.errors import UserError

PICKLES = (".bin", ".pt", ".pth", ".th", ".ckpt", ".tar")
CONSENT = "wide.teacher_pickle=true, or in Python pickles=True,"
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def _numpy() -> list[Any]:
    """What random states of numpy, which training programs keep beside their weights, are made of: plain arrays of numbers."""
    made: list[Any] = [np.ndarray, np.dtype, *(kind for kind in vars(np.dtypes).values() if isinstance(kind, type))]
    start = importlib.import_module("numpy._core.multiarray")._reconstruct
    # under its names in numpy 2 and before
    return [*made, *((start, f"numpy.{core}.multiarray._reconstruct") for core in ("_core", "core"))]


_WRAPPERS = ("state_dict", "model_state_dict", "state_dict_ema", "model")


def read_folder(folder: Path, pickles: bool) -> tuple[dict[str, Tensor], list[Path]]:
    """The state dict in a folder of Hugging Face's or timm's making, and the files that it was read from.

    Raises:
        UserError: there is none, a shard is missing, a key is in two shards, or there are only pickles and `pickles` is false.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            files = [folder / name]
        elif index.is_file():
            try:
                files = sorted({folder / shard for shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{index}: cannot be read ({error}); fetch the folder again") from None
        else:
            continue
        state: dict[str, Tensor] = {}
        for file in files:
            part = read_state(file, pickles)
            twice = state.keys() & part.keys()
            if twice:
                raise UserError(f"{file}: {min(twice)} is in another shard already; fetch the folder again")
            state |= part
        return state, files
    raise UserError(
        f"{folder}: holds no weights (model.safetensors, pytorch_model.bin or an index of their shards); give a folder that does"
    )


def read_state(file: Path, pickles: bool) -> dict[str, Tensor]:
    """The state dict in one file, out of what it may be wrapped in and without the `module.` of data-parallel training."""
    state = read(file, pickles)
    for name in _WRAPPERS:
        if isinstance(state.get(name), Mapping):
            state = state[name]
            break
    odd = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if odd or not state:
        raise UserError(f"{file}: holds no state dict ({', '.join(odd[:4]) or 'nothing'} in it); give a file of named tensors")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return dict(state)


def read(file: Path, pickles: bool) -> dict[str, Any]:
    """What is in one file, on the CPU; of a pickle, nothing but tensors, plain containers and argparse's Namespace.

    Raises:
        UserError: it cannot be read, is a pickle and `pickles` is false, or holds what such a load does not take.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file; give one that exists")
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: cannot be read ({error}); fetch the file again") from None
    if file.suffix not in PICKLES:
        raise UserError(f"{file}: is neither .safetensors nor one of {', '.join(PICKLES)}; give a state dict")
    if not pickles:
        raise UserError(
            f"{file}: is a pickle, read only if you say so; set {CONSENT} and tensors alone are taken from it, or give safetensors"
        )
    try:
        # Megatron and timm keep the arguments of the training beside the weights, Megatron the states of its random generators too
        with torch.serialization.safe_globals([argparse.Namespace, *_numpy()]):
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or unsafe pickle raises all sorts
        raise UserError(f"{file}: is no pickle of tensors ({_reason(error)}); save its tensors alone where it was made") from None
    if not isinstance(found, Mapping):
        raise UserError(f"{file}: holds a {type(found).__name__} and no state dict; save the model's state_dict()")
    return dict(found)


def _reason(error: Exception) -> str:
    """What torch found, without its colours and its advice to trust the file."""
    text = _ESCAPES.sub("", str(error))
    foreign = re.search(r"GLOBAL ([\w.]+)", text)
    if foreign:
        return f"it holds {foreign[1]}"
    line = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return "".join(letter for letter in line if letter.isprintable())[:160].partition(" In PyTorch")[0]


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
