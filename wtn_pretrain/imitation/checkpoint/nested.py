"""Optimizer states as JSON: what is nested stays so, its tensors lie elsewhere under names."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from wtn_pretrain.checkpoint.files import DamagedError

_PLAIN = (bool, int, float, str)


def flatten(value: Any, name: str, keep: Callable[[str, Tensor], object]) -> Any:
    """`value` as JSON can say it and `restore` undoes it; `keep` is given every tensor in it, with a name that begins with `name`.

    Takes dictionaries of strings and whole numbers, lists, tuples, numbers, strings, None and tensors.
    """
    if isinstance(value, Tensor):
        keep(name, value)
        return {"tensor": name}
    if value is None or isinstance(value, _PLAIN):
        return value
    if isinstance(value, dict):
        assert all(isinstance(key, int | str) for key in value), f"{name}: a key that is neither a number nor a string"
        return {"dict": [[key, flatten(one, f"{name}/{key}", keep)] for key, one in value.items()]}
    assert isinstance(value, list | tuple), f"{name}: {type(value).__name__} has no place in a checkpoint"
    found = [flatten(one, f"{name}/{number}", keep) for number, one in enumerate(value)]
    return {"tuple" if isinstance(value, tuple) else "list": found}


def restore(tree: Any, read: Callable[[str], Tensor]) -> Any:
    """What `flatten` was given; `read` gives its tensors by name.

    Raises:
        DamagedError: `tree` is nothing that `flatten` makes.
    """
    if tree is None or isinstance(tree, _PLAIN):
        return tree
    if isinstance(tree, dict) and len(tree) == 1:
        ((kind, value),) = tree.items()
        if kind == "tensor" and isinstance(value, str):
            return read(value)
        if kind == "dict" and isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
            return {key: restore(one, read) for key, one in value}
        if kind in ("list", "tuple") and isinstance(value, list):
            found = [restore(one, read) for one in value]
            return tuple(found) if kind == "tuple" else found
    raise DamagedError(f"{str(tree)[:60]!r} is no state of an optimizer")
