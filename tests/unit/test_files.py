"""Files that are switched in: what stands under its name afterwards is what was made durable, whoever wrote it."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.running import no_room
from wtn_pretrain.errors import UserError
from wtn_pretrain.files import make_durable, write_beside, write_text


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Inode and size of everything that has been made durable."""
    found: list[tuple[int, int]] = []
    plain = os.fsync

    def spied(file: int) -> None:
        status = os.fstat(file)
        found.append((status.st_ino, status.st_size))
        plain(file)

    monkeypatch.setattr(os, "fsync", spied)
    return found


def told(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, path.stat().st_size


def test_what_is_switched_in_is_durable_and_for_all_who_may_read(tmp_path: Path, synced: list[tuple[int, int]]) -> None:
    """safetensors puts another file where it is to write, which is this user's alone."""
    weights, text = tmp_path / "new" / "folder" / "model.safetensors", tmp_path / "new" / "text"
    write_beside(weights, lambda part: save_file({"a": torch.ones(1000)}, part))
    write_text(text, "a line\n")
    assert told(weights) in synced and told(text) in synced
    assert torch.equal(load_file(weights)["a"], torch.ones(1000))
    assert stat.S_IMODE(weights.stat().st_mode) == stat.S_IMODE(text.stat().st_mode)
    # the folders by whose names they are found, too
    assert {folder.stat().st_ino for folder in (tmp_path, tmp_path / "new", weights.parent)} <= {inode for inode, _ in synced}
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "model.safetensors", "new", "text"]


def test_a_folder_that_a_library_has_filled(tmp_path: Path, synced: list[tuple[int, int]]) -> None:
    (tmp_path / "draft" / "below").mkdir(parents=True)
    for name in ("model.safetensors", "below/model.safetensors"):
        save_file({"a": torch.ones(10)}, tmp_path / "draft" / name)
    make_durable(tmp_path / "draft")
    files = [path for path in (tmp_path / "draft").rglob("*") if path.is_file()]
    assert len(files) == 2 and all(told(path) in synced for path in files)
    (tmp_path / "other").touch()
    assert {path.stat().st_mode for path in files} == {(tmp_path / "other").stat().st_mode}


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_beside(path, lambda part: save_file({"a": torch.ones(10)}, part))
    before = path.read_bytes()
    with no_room(300), pytest.raises(UserError, match=r"model.safetensors: cannot be written \(.*free the place"):
        write_beside(path, lambda part: save_file({"a": torch.ones(1000)}, part))
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["model.safetensors"]
