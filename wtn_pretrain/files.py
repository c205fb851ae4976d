"""Writing files so that a reader finds the old one or the new one, never a part."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from wtn_pretrain.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Writes `text` (UTF-8) beside `path`, makes it durable and switches it in; the folder is made if it is missing.

    Raises:
        UserError: the place cannot be written; what was there before is untouched.
    """
    write_file(path, lambda file: file.write(text.encode()))


def write_beside(path: Path, write: Callable[[Path], object]) -> None:
    """Like `write_text`, for a writer that wants a path of its own."""

    def through(file: BinaryIO) -> None:
        try:
            write(Path(file.name))
        except OSError:
            raise
        except Exception as error:  # libraries have errors of their own for a full disk
            raise RuntimeError(str(error)) from error

    write_file(path, through)


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Like `write_text`, for a file that `write` fills."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        # torch says RuntimeError when a disk is full
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be written ({reason}); free the place or choose another folder") from None
