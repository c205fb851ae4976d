"""A network on disk: `model.json` (its shape) and `model.safetensors` (its weights, tied ones once)."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wtn_pretrain.config import validate
from wtn_pretrain.errors import UserError
from wtn_pretrain.files import write_beside, write_text
from wtn_pretrain.models.base import BlockConfig, BlockNetwork, families


def save_network(folder: Path, config: BlockConfig, state: dict[str, Tensor]) -> None:
    """Writes both files beside what is there and then switches them in, weights first."""
    folder.mkdir(parents=True, exist_ok=True)
    seen: dict[int, str] = {}
    unique = {}
    for name, value in _reference_order(config, state):
        if seen.setdefault(id(value), name) == name:
            unique[name] = value.detach().cpu().contiguous()
    weights, shape = folder / "model.safetensors", folder / "model.json"
    write_beside(weights, lambda part: save_file(unique, part))
    write_text(shape, json.dumps(config.model_dump(mode="json"), indent=2) + "\n")


def load_shape(folder: Path) -> BlockConfig:
    """The shape of the network in `folder`."""
    path = folder / "model.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{folder}: holds no finished network (no model.json); run the stage that writes it first") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{path}: not valid JSON; the file is damaged, run the stage again") from None
    family = tree.get("family") if isinstance(tree, dict) else None
    if not isinstance(family, str) or family not in families():
        raise UserError(f"{path}: unknown model family {family!r}; there are {', '.join(families())}")
    return validate(families()[family], tree)


def load_network(folder: Path) -> BlockNetwork:
    """The network in `folder`, on the CPU, in eval mode; every weight comes from the file or the load is refused."""
    config = load_shape(folder)
    path = folder / "model.safetensors"
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); the file is missing or damaged, run the stage again") from None
    network = config.build()
    load_state(network, state, str(path))
    return network.eval()


def load_part(folder: Path, parts: Iterable[str]) -> BlockNetwork:
    """The network in `folder` of which only `parts` (`stem`, `head`, `blocks.3`) are real, on the CPU, in eval mode.

    The rest has shapes alone (meta tensors), and so has a tensor that a part shares with one that was not asked for.
    """
    parts = list(parts)
    with torch.device("meta"):
        network = load_shape(folder).build().eval()
    for part, state in zip(parts, read_parts(folder, network, parts), strict=True):
        network.get_submodule(part).load_state_dict(state, assign=True, strict=False)
    return network


def read_parts(
    folder: Path, network: BlockNetwork, parts: Iterable[str], take: Callable[[torch.Size, torch.dtype], Tensor] | None = None
) -> list[dict[str, Tensor]]:
    """The tensors of `parts` in `folder`, by their names in the part; those that are stored under another part's name are left out.

    Args:
        network: one of the folder's shape; meta tensors will do.
        take: gives the memory of each, None: new.

    Raises:
        UserError: a tensor is missing, of another shape, or the file cannot be read.
    """
    path = folder / "model.safetensors"
    take = take or (lambda shape, dtype: torch.empty(shape, dtype=dtype))
    everything = network.state_dict(keep_vars=True)
    states: list[dict[str, Tensor]] = []
    try:
        with safe_open(path, framework="pt") as file:
            stored = set(file.keys())
            for part in parts:
                states.append({})
                for name, value in network.get_submodule(part).state_dict(keep_vars=True).items():
                    full = f"{part}.{name}"
                    if full in stored:
                        found = file.get_tensor(full)
                        if found.shape != value.shape:
                            wrong = f"{list(found.shape)} for {list(value.shape)}"
                            raise UserError(f"{path}: {full} has shape {wrong}; run the stage again")
                        states[-1][name] = take(found.shape, found.dtype).copy_(found)
                    elif sum(value is other for other in everything.values()) < 2:
                        raise UserError(f"{path}: holds no {full}; the file is damaged, run the stage again")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); the file is missing or damaged, run the stage again") from None
    return states


def load_state(network: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copies `state` into `network`: every tensor given once (tied ones under any name), none left over, all shapes equal."""
    own = network.state_dict(keep_vars=True)
    given = {id(own[name]) for name in state if name in own}
    missing = [name for name, value in own.items() if id(value) not in given]
    extra = [name for name in state if name not in own]
    wrong = [
        f"{name} {list(state[name].shape)} for {list(own[name].shape)}"
        for name in state
        if name in own and state[name].shape != own[name].shape
    ]
    if missing or extra or wrong:
        raise UserError(f"{source}: weights do not fit the network: missing {missing[:4]}, unexpected {extra[:4]}, wrong shape {wrong[:4]}")
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)


def _reference_order(config: BlockConfig, state: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """`state` with tied names pointing to one tensor again (gathering from ranks makes copies of them)."""
    with torch.device("meta"):
        reference = config.build().state_dict(keep_vars=True)
    first: dict[int, str] = {}
    return [(name, state[first.setdefault(id(reference[name]), name)]) for name in state]
