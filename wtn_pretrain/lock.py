"""One process at a time in a folder."""

import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from wtn_pretrain.errors import UserError

LOCK = ".lock"


class Lock:
    """Keeps other processes from a folder until it is let go or this process ends. Needs a file system with locks, as runs do."""

    def __init__(self, folder: Path, refusal: str) -> None:
        """`refusal`: what a UserError says behind the name of the process that holds the folder."""
        self._file: IO[str] = (folder / LOCK).open("a+", encoding="utf-8")
        try:
            # of POSIX, so that a worker that was forked does not hold it; closed, it would be gone
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise UserError(f"{folder}: {holder} {refusal}") from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def let_go(self) -> None:
        self._file.close()
