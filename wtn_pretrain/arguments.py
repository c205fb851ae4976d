"""What the command lines of tools share: how they end, and options of their own beside keys of the recipe."""

import argparse
import math
import os
import select
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from wtn_pretrain.errors import UserError


def command(work: Callable[[], str | int | None], interrupted: str = "interrupted") -> int:
    """Does the work of a command line and prints what it gives, if that is text; the exit status.

    That is what `work` gives, if it is a number, else 0; 2 after a mistake of the user's, which is one line on standard error; 130 where it
    was interrupted. Whoever reads what is printed may leave before the end, as `head` does: nothing is said then, and where there was
    work left the status is 141, as that of a program which the signal for it ends.
    """
    code = 0
    try:
        found = work()
        code = found if isinstance(found, int) else 0
        if isinstance(found, str):
            code = _written(lambda: print(found), code)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        code = 130
    except BrokenPipeError:
        # a worker's pipe breaks too, and that is no reader
        if not _reader_left():
            raise
        code = 141
    finally:
        code = _written(sys.stdout.flush, code)
    return code


def _written(write: Callable[[], object], code: int) -> int:
    """Writes to standard output; the exit status, which is `code` unless there is no place."""
    try:
        write()
    except OSError as error:
        # the interpreter flushes once more when it ends, and would not be silent
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"error: standard output: cannot be written ({error.strerror}); send it elsewhere", file=sys.stderr)
            return 2
    return code


def _reader_left() -> bool:
    """Whether standard output or standard error goes to a pipe that nobody reads any more."""
    look = select.poll()
    for stream in (sys.stdout, sys.stderr):
        look.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in look.poll(0))


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
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value
