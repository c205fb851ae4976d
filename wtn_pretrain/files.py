"""Writing files so that a reader finds the old one or the new one, never a part."""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from wtn_pretrain.errors import UserError


def draft_of(path: Path) -> Path:
    """A name beside `path` for what is not finished, of this call alone: containers on several nodes number their processes alike."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def write_text(path: Path, text: str) -> None:
    """Writes `text` (UTF-8) beside `path`, makes it durable and switches it in; the folder is made if it is missing.

    Raises:
        UserError: the place cannot be written; what was there before is untouched.
    """
    write_file(path, lambda file: file.write(text.encode()))


def write_beside(path: Path, write: Callable[[Path], object]) -> None:
    """Like `write_text`, for a writer that wants a path of its own. It may put another file there, as safetensors does from version 0.8 on,
    and name others beside it: they are in a folder of their own."""
    folder = draft_of(path)
    part = folder / path.name
    with _told(path):
        make_folder(path.parent)
        folder.mkdir(exist_ok=True)
        try:
            try:
                write(part)
            except OSError:
                raise
            except Exception as error:  # libraries have errors of their own for a full disk
                raise RuntimeError(str(error)) from error
            make_durable(part)
            os.replace(part, path)
            sync_folder(path.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Like `write_text`, for a file that `write` fills; it must not be replaced meanwhile."""
    part = draft_of(path)
    with _told(path):
        make_folder(path.parent)
        try:
            with part.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
            sync_folder(path.parent)
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turns what goes wrong in writing a file into what a user hears."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch says RuntimeError when a disk is full
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be written ({reason}); free the place or choose another folder") from None


def make_durable(path: Path) -> None:
    """Makes a file that some library has written durable, or all below a folder, and lets those read them that may read other files here.

    Raises:
        OSError: the disk does not take them.
    """
    for found in [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]:
        # from a temporary file they have that one's mode, which is this user's alone
        with contextlib.suppress(OSError):
            found.chmod(found.stat().st_mode | _usual_mode())
        with found.open("rb+") as file:
            os.fsync(file.fileno())
    for below in path.rglob("*"):
        if below.is_dir():
            sync_folder(below)


def _usual_mode() -> int:
    """What new files may be read and written by; asked without setting it, which would be for all threads."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("Umask:"):
                return 0o666 & ~int(line.split()[1], 8)
    return 0o644


def switch_folder(draft: Path, path: Path) -> None:
    """Switches the folder `draft`, whose files are durable, in as `path`; what stands there goes.

    Raises:
        OSError: the place refuses; one of the two is left, whole.
    """
    sync_folder(draft)
    if path.exists():
        # a folder that holds something cannot be replaced in one step
        gone = draft_of(path)
        os.rename(path, gone)
        os.rename(draft, path)
        shutil.rmtree(gone, ignore_errors=True)
    else:
        os.rename(draft, path)
    sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, if they are missing, and their names durable: what is in it is found by them."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        # one may be let to write where it may not read
        with contextlib.suppress(PermissionError):
            sync_folder(folder.parent)


def sync_folder(path: Path) -> None:
    """Makes durable which names stand in a folder: without this, a file that was switched in may be gone after a power cut."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        # some file systems have nothing to do here, and say so
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(folder)
