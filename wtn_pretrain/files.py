"""Writing files so that a reader finds the old one or the new one, never a part."""

import os
from pathlib import Path

from wtn_pretrain.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Writes `text` (UTF-8) beside `path`, makes it durable and switches it in; the folder is made if it is missing.

    Raises:
        UserError: the place cannot be written; what was there before is untouched.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); free the place or choose another folder") from None
