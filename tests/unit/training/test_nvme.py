"""Offload to NVMe before DeepSpeed starts: folders that no two processes share, buffers that are large enough, disks that can be used."""

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from wtn_pretrain.errors import UserError
from wtn_pretrain.training import offload
from wtn_pretrain.training.nvme import OwnFolder
from wtn_pretrain.training.offload import check_buffers, check_offload


class Engine:
    """Stands for what the folders go with."""


def section(path: Path) -> dict[str, Any]:
    return {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": str(path)}}


def test_two_starts_share_no_folder_and_leave_none(tmp_path: Path) -> None:
    one, other = section(tmp_path), section(tmp_path)
    engines = [Engine(), Engine()]
    OwnFolder(one).go_with(engines[0])
    OwnFolder(other).go_with(engines[1])
    folders = [Path(zero["offload_optimizer"]["nvme_path"]) for zero in (one, other)]
    assert folders[0] != folders[1]
    assert all(folder.parent == tmp_path and folder.is_dir() for folder in folders)
    for folder in folders:
        (folder / "weights.swp").write_bytes(bytes(100))
    engines.pop()
    gc.collect()
    assert [folder.exists() for folder in folders] == [True, False]
    engines.pop()
    gc.collect()
    assert not any(tmp_path.iterdir())


def test_what_a_killed_process_leaves_is_removed_by_the_next_start(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from wtn_pretrain.training.nvme import OwnFolder\n"
        "place = {'device': 'nvme', 'nvme_path': sys.argv[1]}\n"
        "held = OwnFolder({'offload_optimizer': place})\n"
        "print(place['nvme_path'], flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    left = Path(process.stdout.readline().strip())
    (left / "weights.swp").write_bytes(bytes(100))
    engine = Engine()
    OwnFolder(section(tmp_path)).go_with(engine)
    # it lives
    assert left.exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert left.exists()
    OwnFolder(section(tmp_path)).go_with(engine)
    assert not left.exists()


def test_nothing_on_nvme_makes_no_folder(tmp_path: Path) -> None:
    zero: dict[str, Any] = {"stage": 3, "offload_optimizer": {"device": "cpu", "nvme_path": str(tmp_path)}, "offload_param": None}
    OwnFolder(zero).go_with(Engine())
    assert not any(tmp_path.iterdir())


def test_too_few_buffers_are_refused(tmp_path: Path) -> None:
    zero = section(tmp_path)
    check_buffers(zero, 2, "mine.json")
    zero["offload_optimizer"]["buffer_count"] = 3
    with pytest.raises(UserError, match=r"mine.json: offload_optimizer.buffer_count 3 has no room for .* 2 states; make it 4"):
        check_buffers(zero, 2, "mine.json")
    check_buffers(zero, 1, "mine.json")
    # in host memory nothing passes through them
    zero["offload_optimizer"]["device"] = "cpu"
    check_buffers(zero, 2, "mine.json")


def test_a_disk_without_direct_io_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refuse(path: str, flags: int, *more: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return opened(path, flags, *more)

    monkeypatch.setattr(offload.os, "open", refuse)
    with pytest.raises(
        UserError, match=r"mine.json: offload_optimizer: .* takes no direct I/O \(Invalid argument\); name a folder on a local"
    ):
        check_offload(section(tmp_path), "mine.json")
