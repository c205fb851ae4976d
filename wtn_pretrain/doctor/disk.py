"""The folder of runs: whether it can be written, how much fits, and how fast; and shared memory."""

import errno
import os
import shutil
import tempfile
import time
from pathlib import Path

from wtn_pretrain.doctor.finding import Finding

PROBE = 64 << 20
LEAST = 1e9
"""Bytes without which no run should begin."""
FEW = 10e9
"""Bytes that a run of a large network soon fills: a checkpoint holds 12 bytes a parameter."""
SLOW = 50e6
"""Bytes a second below which writing checkpoints holds a run up."""


def check_disk(folder: Path, need: float = LEAST) -> list[Finding]:
    """Writes a file of 64 MB, makes it durable, reads it back and removes it.

    Args:
        need: bytes that must be free.
    """
    place = folder.absolute()
    remedy = "free space, or choose another --run.folder"
    try:
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        nodes = os.statvfs(place)
        if nodes.f_files and not nodes.f_favail:
            return [Finding("disk", "fault", f"{folder}: no file can be made, all inodes are taken", remedy)]
        if free < PROBE:
            return [Finding("disk", "fault", f"{folder}: the disk is full ({free / 1e6:.3g} MB free)", remedy)]
        wrote, read = _speed(place)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full or the quota used up" if full else f"cannot be written ({error.strerror})"
        return [Finding("disk", "fault", f"{folder}: {what}", remedy)]
    text = f"{folder}: {free / 1e9:,.1f} GB free, {wrote / 1e6:,.0f} MB/s written and made durable, {read / 1e6:,.0f} MB/s read"
    if free < need:
        return [Finding("disk", "fault", f"{text}; {need / 1e9:.3g} GB are needed", remedy)]
    found = [Finding("disk", "warning" if free < FEW else "ok", text, remedy if free < FEW else "")]
    if wrote < SLOW:
        text = f"{folder}: slow to write; a checkpoint of a million parameters takes {12e6 / wrote:.2g} s"
        found.append(Finding("disk", "warning", text, "name a faster file system, or save less often (checkpoint_every)"))
    return found


def check_shared_memory(folder: Path = Path("/dev/shm")) -> list[Finding]:
    """Shared memory, through which data workers hand over batches and NCCL its messages within a node."""
    if not folder.is_dir():
        return []
    free = shutil.disk_usage(folder).free
    if free < LEAST:
        text = f"{folder}: {free / 1e6:.3g} MB free; data workers and NCCL need more"
        return [Finding("memory", "warning", text, "give the container more (docker: --shm-size=8g), or set data.workers to 0")]
    return [Finding("memory", "ok", f"{folder}: {free / 1e9:.3g} GB free")]


def _speed(place: Path) -> tuple[float, float]:
    """Bytes a second written and made durable, and read back past the page cache."""
    block = os.urandom(1 << 20)
    with tempfile.NamedTemporaryFile(dir=place, prefix=".doctor-") as file:
        began = time.perf_counter()
        for _ in range(PROBE >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        wrote = time.perf_counter() - began
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began = time.perf_counter()
        while file.read(1 << 20):
            pass
        return PROBE / wrote, PROBE / max(time.perf_counter() - began, 1e-9)
