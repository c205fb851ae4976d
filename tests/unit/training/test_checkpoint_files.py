"""Checkpoints on disk: every kind of damage is found, what is found whole is whole, and what cannot be written leaves the old one."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.running import ROOT, no_room
from wtn_pretrain.checkpoint.files import MANIFEST, DamagedError, part_of, sealed
from wtn_pretrain.checkpoint.keeping import Keep
from wtn_pretrain.errors import UserError
from wtn_pretrain.parallel.launch import Place
from wtn_pretrain.training.checkpoint.contents import contents, shown
from wtn_pretrain.training.checkpoint.manifest import (
    FORMAT,
    Layout,
    Manifest,
    Other,
    Parameter,
    check_parts,
    checkpoints_in,
    read_manifest,
)
from wtn_pretrain.training.checkpoint.writer import Writer
from wtn_pretrain.verify import find

PART = "part-00000.safetensors"


def described(step: int, seed: int = 0) -> tuple[Manifest, dict[str, torch.Tensor]]:
    """A checkpoint of one rank, as a writer takes it."""
    generator = torch.Generator().manual_seed(seed)
    kept = Parameter(part=PART, shape=(8, 4), states=("exp_avg",), updates=step)
    tensors = {key: torch.randn(8, 4, generator=generator) for key in kept.keys("layer.weight")}
    tensors["buffers/seen"] = torch.tensor(step)
    manifest = Manifest(
        format=FORMAT,
        identity={"stage": "wide", "seed": seed},
        step=step,
        seconds=1.5,
        layout=Layout(ranks=1, tensor=1, zero=0, weights="float32"),
        versions={"torch": "2"},
        counters={"skipped_steps": 0},
        parameters={"layer.weight": kept},
        others={"buffers/seen": Other(part=PART, shape=(), dtype="int64")},
        parts={},
    )
    return manifest, tensors


def write(folder: Path, *steps: int, seed: int = 0, keep: int = 2, every: int = 0) -> Path:
    """Writes checkpoints one after the other; the last one."""
    writer = Writer(folder, Place(0, 1), Keep(keep, every))
    for step in steps:
        writer.start(*described(step, seed))
    writer.close()
    return folder / f"step{steps[-1]}"


def problem(folder: Path) -> str:
    """How a checkpoint is damaged."""
    with pytest.raises(DamagedError) as error:
        manifest = read_manifest(folder)
        check_parts(folder, manifest, manifest.parts)
    assert str(folder) in str(error.value)
    return str(error.value)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    manifest, kinds = contents(folder)
    expected, tensors = described(3)
    assert manifest.model_copy(update={"parts": {}}) == expected
    assert [kind.name for kind in kinds] == ["weights", "exp_avg", "buffers"]
    assert sum(kind.bytes for kind in kinds) == sum(value.nbytes for value in tensors.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step3"]
    assert (tmp_path / "latest").read_text() == "step3\n"


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3, 4, keep=3)
    assert [step for step, _ in checkpoints_in(tmp_path)] == [4, 3, 2]
    write(tmp_path / "some", 3, 5, 6, 9, 11, 12, 13, keep=1, every=3)
    assert [step for step, _ in checkpoints_in(tmp_path / "some")] == [13, 12, 9, 6, 3]
    # of a damaged one, that was skipped, nothing counts
    writer = Writer(tmp_path, Place(0, 1), Keep(2))
    writer.continues(3)
    for step in (4, 5):
        writer.start(*described(step, seed=9))
        writer.wait()
        assert read_manifest(tmp_path / f"step{step}").identity["seed"] == 9
    assert [step for step, _ in checkpoints_in(tmp_path)] == [5, 4]
    assert not list(tmp_path.glob(".*"))


def test_every_byte_of_a_manifest_counts(tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    path = folder / MANIFEST
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DamagedError):
            read_manifest(folder)
    for cut in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert "manifest.json: is not as it was written" in problem(folder)
    path.write_bytes(whole + b"\n")
    problem(folder)
    path.unlink()
    assert "manifest.json: cannot be read (No such file" in problem(folder)


@pytest.mark.parametrize("place", [0, 9, 200, -60, -1], ids=["length", "header", "header's end", "tensor", "last"])
def test_a_flipped_bit_in_a_part_is_found(place: int, tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    content = bytearray((folder / PART).read_bytes())
    content[place] ^= 0x10
    (folder / PART).write_bytes(content)
    assert problem(folder).endswith(f"{PART}: is not as it was written")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "bytes of"),
        (grow, "bytes of"),
        (lambda path: path.write_bytes(b""), "holds 0 bytes of"),
        (lambda path: path.unlink(), "cannot be read (No such file"),
        (lambda path: (path.unlink(), path.mkdir()), "bytes of"),
    ],
    ids=["cut", "longer", "emptied", "missing", "a folder"],
)
def test_other_damage_to_a_part(damage: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    damage(folder / PART)
    assert said in problem(folder)


def test_a_part_of_another_run_is_found(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", 3)
    other = write(tmp_path / "other", 3, seed=1)
    assert (other / PART).stat().st_size == (folder / PART).stat().st_size
    shutil.copy(other / PART, folder / PART)
    assert problem(folder).endswith("is not as it was written")


def rendered(folder: Path, change: Callable[[dict], object]) -> None:
    """Changes a manifest as somebody would who knows how its checksum is made."""
    body = json.loads((folder / MANIFEST).read_text())["manifest"]
    change(body)
    (folder / MANIFEST).write_text(sealed(body))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda body: body.update(format=FORMAT + 1), f"has format {FORMAT + 1}, this version reads {FORMAT}"),
        (lambda body: body["parts"].update({"../../etc/passwd": {"bytes": 1, "xxh3_128": ""}}), "names a part '../../etc/passwd'"),
        (lambda body: body["parts"].clear(), f"names a part '{PART}'"),
        (lambda body: body.pop("step"), "Field required"),
        (lambda body: body.update(step="3"), "valid integer"),
    ],
)
def test_a_manifest_that_says_what_it_must_not(change: Callable[[dict], object], said: str, tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    rendered(folder, change)
    assert said in problem(folder)


def test_tensors_that_are_not_what_the_manifest_says(tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    rendered(folder, lambda body: body["others"]["buffers/seen"].update(dtype="float32"))
    with pytest.raises(DamagedError, match=r"buffers/seen is \[\] torch.int64, not \[\] torch.float32"):
        contents(folder)
    rendered(folder, lambda body: body["others"]["buffers/seen"].update(dtype="nn"))
    with pytest.raises(DamagedError, match="'nn' is no data type"):
        contents(folder)
    rendered(folder, lambda body: body["others"].update({"buffers/gone": body["others"].pop("buffers/seen") | {"dtype": "int64"}}))
    with pytest.raises(DamagedError, match="buffers/gone cannot be read"):
        contents(folder)


def test_a_pickle_in_place_of_a_part_is_not_run(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "harm",))  # type: ignore[return-value]

    folder = write(tmp_path, 3)
    torch.save(Harm(), folder / PART)
    rendered(folder, lambda body: body["parts"].update({PART: part_of(folder / PART).model_dump()}))
    with pytest.raises(DamagedError, match="cannot be read"):
        contents(folder)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("size", [0, 300, 700], ids=["nothing", "half a part", "the part, not the manifest"])
def test_a_full_disk_leaves_the_old_one(size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = Writer(tmp_path, Place(0, 1), Keep(1))
    writer.start(*described(3))
    writer.wait()
    before = contents(tmp_path / "step3")
    assert 300 < (tmp_path / "step3" / PART).stat().st_size < 700 < (tmp_path / "step3" / MANIFEST).stat().st_size
    with no_room(size):
        writer.start(*described(4))
        writer.wait()
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be written (" in line and line.endswith(
        "; the checkpoint before it is kept, and the training goes on to the next one (the first)"
    )
    assert [step for step, _ in checkpoints_in(tmp_path)] == [3]
    assert contents(tmp_path / "step3") == before
    assert (tmp_path / "latest").read_text() == "step3\n"
    # once there is room it goes on
    writer.start(*described(5))
    writer.wait()
    assert [step for step, _ in checkpoints_in(tmp_path)] == [5]
    # the last one has to succeed
    with no_room(size):
        writer.start(*described(6))
        with pytest.raises(UserError, match=r"cannot be written \(.*the checkpoint before it is kept"):
            writer.close()
    assert [step for step, _ in checkpoints_in(tmp_path)] == [5]
    assert not list(tmp_path.glob(".*"))


def test_what_failed_does_not_count_among_the_last_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = Writer(tmp_path, Place(0, 1), Keep(2))
    for step, room in ((1, None), (2, None), (3, 0), (4, 0), (5, None)):
        with no_room(room) if room is not None else nullcontext():
            writer.start(*described(step))
            writer.wait()
    writer.close()
    assert [step for step, _ in checkpoints_in(tmp_path)] == [5, 2]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    writer = Writer(tmp_path / "checkpoints", Place(0, 1), Keep(1))
    writer.start(*described(1))
    with pytest.raises(UserError, match="checkpoints.*cannot be written"):
        writer.close()


def verified(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "verify_checkpoint.py"), str(path)], capture_output=True, text=True, cwd=ROOT
    )


def test_the_tool_says_what_is_there(tmp_path: Path) -> None:
    folder = write(tmp_path / "run" / "wide" / "checkpoints", 3, 4)
    # starting a process takes seconds, and it does little more than this
    assert [path for path, _ in find(tmp_path)] == [folder, folder.with_name("step3")]
    assert [path for path, _ in find(folder)] == [folder]
    assert [path for path, _ in find(folder.parent)] == [folder, folder.with_name("step3")]
    table = shown(folder, *contents(folder))
    assert "seed 0, stage wide" in table
    assert "1 ranks, tensor parallel 1, ZeRO 0, weights float32" in table
    assert any(line.split() == ["weights", "1", "32", "128", "0"] for line in table.splitlines())
    with pytest.raises(UserError, match="holds no checkpoint and no finished stage"):
        find(tmp_path / "nothing")
    manifest, tensors = described(3)
    tensors["weights/layer.weight"][0, 0] = torch.nan
    folder.with_name("step3").joinpath(PART).unlink()
    save_file(tensors, folder.with_name("step3") / PART)
    done = verified(tmp_path / "run")
    assert done.returncode == 1, done.stderr
    assert f"{folder}: whole" in done.stdout
    assert "step3/part-00000.safetensors: is not as it was written; the checkpoint is damaged" in done.stderr
    assert manifest.step == 3
