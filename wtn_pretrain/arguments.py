"""What command lines share that take options of their own and keys of the recipe beside them."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from wtn_pretrain.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are the project's."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def assignments_of(rest: Sequence[str]) -> list[str]:
    """`section.key=value` for `--section.key=value` and `--section.key value` among the arguments that are no options.

    Raises:
        UserError: an argument is neither, or a key has no value.
    """
    found, waiting = [], list(rest)
    while waiting:
        argument = waiting.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or "." not in name:
            raise UserError(f"argument {argument!r}: unknown; there are --section.key=value and what --help lists")
        if not equals:
            if not waiting or waiting[0].startswith("--"):
                raise UserError(f"argument --{name}: has no value")
            value = waiting.pop(0)
        found.append(f"{name}={value}")
    return found


def count(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def amount(text: str) -> float:
    """An argument that is a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value
