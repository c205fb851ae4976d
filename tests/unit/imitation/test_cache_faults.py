"""The activation cache under real faults: each is found before anything is used, and an interrupted fill is continued."""

import errno
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.running import environment
from tests.unit.imitation.cache_samples import (
    KEY,
    LAYOUT,
    LONG,
    MAPS,
    MASK,
    NAMES,
    SHORT,
    carry,
    check_all,
    files,
    fill,
    fill_slowly,
    fork,
    refusal,
    write_all,
)
from wtn_pretrain.imitation import cache_file
from wtn_pretrain.imitation.cache import ActivationCache

# interruptions


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_fill_is_never_complete_and_is_continued(tmp_path: Path, seed: int) -> None:
    moment, cache, interrupted, kept = random.Random(seed), ActivationCache(tmp_path / "cache", KEY, LONG), 0, 0
    for _ in range(5):
        here, there = fork.Pipe()
        run = fork.Process(target=fill_slowly, args=(tmp_path / "cache", 0.001, there))
        run.start()
        # from before the first byte on; twice the longest wait is not enough for all batches
        if moment.random() < 0.8:
            assert here.poll(60)
        time.sleep(moment.uniform(0, 0.07))
        run.kill()
        run.join()
        if cache.complete():
            break
        interrupted += 1
        assert "is not complete" in refusal(cache.reader)
        found = cache.prepare()
        assert found >= kept
        kept = found
        cache.release()
    assert interrupted >= 2
    kept = cache.prepare()
    if kept < LONG.batches:
        write_all(cache, kept)
    cache.release() if cache.complete() else cache.finish()
    check_all(cache)
    assert sum(files(cache.folder).values()) == cache.size


def fill_and_die(folder: Path, steps: int) -> None:
    """Fills the cache and is killed in place of the call number `steps` that makes something durable, moves or removes a file."""
    count = itertools.count()

    def mortal(call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **named: Any) -> Any:
            if next(count) == steps:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        return step

    for name in ("fsync", "replace", "ftruncate", "pwrite"):
        setattr(os, name, mortal(getattr(os, name)))
    cache = ActivationCache(folder, KEY, SHORT)
    write_all(cache, cache.prepare())
    cache.finish()


def test_there_is_no_wrong_moment_to_be_killed(tmp_path: Path) -> None:
    moments = 0
    for steps in itertools.count():
        cache = ActivationCache(tmp_path / str(steps), KEY, SHORT)
        run = fork.Process(target=fill_and_die, args=(cache.folder, steps))
        run.start()
        run.join(60)
        if run.exitcode == 0:
            break
        assert run.exitcode == -signal.SIGKILL
        moments += 1
        if cache.complete():  # only the last marker's own durability was outstanding
            check_all(cache)
        kept = cache.prepare()
        if not cache.complete():
            write_all(cache, kept)
            cache.finish()
        check_all(cache)
        assert sum(files(cache.folder).values()) == cache.size
    # key, three files reserved, written, flushed twice and marked
    assert moments > 30
    check_all(cache)


def test_checksums_that_outlive_their_data_are_not_believed(tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path / "cache", KEY, LAYOUT)
    cache.prepare()
    write_all(cache)
    cache.release()
    # a power failure: the checksums have reached the disk, a page of one boundary's batch 2 has not
    with (tmp_path / "cache" / "boundary-001.data").open("r+b") as file:
        file.seek((2 * LAYOUT.rows + 1) * MAPS.row_bytes)
        file.write(bytes(100))
    assert cache.prepare() == 2
    write_all(cache, 2)
    cache.finish()
    check_all(cache)


def test_what_comes_after_a_torn_batch_has_to_be_written_again(tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path / "cache", KEY, LAYOUT)
    cache.prepare()
    write_all(cache)
    cache.release()
    (tmp_path / "cache" / "context-0.data").write_bytes(bytes(LAYOUT.batches * LAYOUT.rows * MASK.row_bytes))
    assert cache.prepare() == 0
    with cache.writer() as writer:
        for boundary in LAYOUT.hidden:
            writer.write(boundary, 0, 0, carry(LAYOUT, boundary, 0))
    assert "boundary-000.data lacks rows of batch 1" in refusal(cache.finish)


def test_files_that_changed_places_in_an_unfinished_fill_are_not_kept(tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path / "cache", KEY, LAYOUT)
    cache.prepare()
    write_all(cache)
    cache.release()
    for suffix in ("data", "sums"):
        one, other = (cache.folder / f"boundary-00{boundary}.{suffix}" for boundary in (0, 1))
        one.rename(tmp_path / "aside")
        other.rename(one)
        (tmp_path / "aside").rename(other)
    assert cache.prepare() == 0


def test_what_another_run_finished_meanwhile_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ActivationCache(tmp_path / "cache", KEY, LAYOUT)
    lock = cache._locked

    def late(kind: int) -> Any:
        fill(tmp_path / "cache")
        return lock(kind)

    monkeypatch.setattr(cache, "_locked", late)
    assert cache.prepare() == LAYOUT.batches
    assert cache.complete()
    check_all(cache)


def test_a_file_lost_before_the_end_is_made_again(tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path / "cache", KEY, LAYOUT)
    cache.prepare()
    write_all(cache)
    cache.release()
    (cache.folder / "boundary-002.data").unlink()
    (cache.folder / ".key.json.1.part").write_text("half")
    assert cache.prepare() == 0
    write_all(cache)
    cache.finish()
    check_all(cache)
    assert sum(files(cache.folder).values()) == cache.size


# damage of a complete cache


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "cache"
    fill(folder)
    return folder


@pytest.fixture
def spoiled(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "cache")
    return tmp_path / "cache"


def use(folder: Path) -> None:
    """What a run does with a cache: all of it or a refusal."""
    cache = ActivationCache(folder, KEY, LAYOUT)
    assert cache.prepare() == LAYOUT.batches
    check_all(cache)


@pytest.mark.parametrize("name", [f"{name}.{suffix}" for name in NAMES for suffix in ("data", "sums", "json")] + ["key.json"])
def test_a_flipped_bit_is_found(spoiled: Path, name: str) -> None:
    path = spoiled / name
    good = path.read_bytes()
    small = len(good) < 1000
    chosen = random.Random(name)
    for position in range(len(good)) if small else chosen.sample(range(len(good)), 40):
        bad = bytearray(good)
        bad[position] ^= 1 << chosen.randrange(8)
        path.write_bytes(bad)
        text = refusal(lambda: use(spoiled))
        if path.suffix == ".data":
            row_bytes = LAYOUT.fields()[path.stem].row_bytes
            assert f"{path} batch {position // row_bytes // LAYOUT.rows} is not as it was written" in text
        else:
            assert str(path.with_suffix("")) in text
        assert text.endswith(f"remove {spoiled} to have it filled again")
    path.write_bytes(good)
    use(spoiled)


@pytest.mark.parametrize("name", [f"boundary-001.{suffix}" for suffix in ("data", "sums", "json")] + ["key.json"])
def test_a_truncated_or_emptied_file_is_found(spoiled: Path, name: str) -> None:
    path = spoiled / name
    good = path.read_bytes()
    for size in (0, 1, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        assert str(path) in refusal(lambda: use(spoiled))
    path.write_bytes(good + b"\n")
    assert str(path) in refusal(lambda: use(spoiled))


@pytest.mark.parametrize("suffixes", [("data",), ("sums",), ("json",), ("data", "sums"), ("data", "sums", "json")], ids="+".join)
def test_boundaries_that_changed_places_are_found(spoiled: Path, suffixes: tuple[str, ...]) -> None:
    for suffix in suffixes:
        one, other = (spoiled / f"boundary-00{boundary}.{suffix}" for boundary in (0, 1))
        one.rename(spoiled / "aside")
        other.rename(one)
        (spoiled / "aside").rename(other)
    assert f"{spoiled / 'boundary-000'}" in refusal(lambda: use(spoiled))


def test_files_of_another_teacher_under_this_key_are_found(spoiled: Path, tmp_path: Path) -> None:
    fill(tmp_path / "other", KEY._replace(teacher={"weights": "00", "shape": "cd"}))
    for suffix in ("data", "sums", "json"):
        shutil.copy(tmp_path / "other" / f"boundary-000.{suffix}", spoiled)
    assert "boundary-000.json does not belong" in refusal(lambda: use(spoiled))


def test_batches_that_changed_places_are_found(spoiled: Path) -> None:
    path, size = spoiled / "boundary-002.data", LAYOUT.hidden[2].row_bytes * LAYOUT.rows
    good = path.read_bytes()
    path.write_bytes(good[:size] + good[2 * size : 3 * size] + good[size : 2 * size] + good[3 * size :])
    assert f"{path} batch 1 is not as it was written" in refusal(lambda: use(spoiled))


def test_a_folder_that_is_none_of_ours_is_left_alone(spoiled: Path, tmp_path: Path) -> None:
    (spoiled / "key.json").unlink()
    before = files(spoiled)
    assert "holds other files (boundary-000.data)" in refusal(lambda: use(spoiled))
    assert files(spoiled) == before
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refusal(lambda: use(tmp_path / "file"))


@pytest.mark.parametrize(
    ("key", "layout", "named"),
    [
        ({"teacher": {"weights": "ef" * 16, "shape": "cd" * 16}}, {}, 'teacher.weights: "abababababa... there, "efefefefefe... here'),
        ({"teacher": {"weights": "ab" * 16, "shape": "ef" * 16}}, {}, "teacher.shape"),
        ({"seed": 4}, {}, "seed: 3 there, 4 here"),
        ({"precision": "bf16"}, {}, 'precision: "fp32" there, "bf16" here'),
        ({"units": (0, 2, 3)}, {}, "units: [0, 1, 2] there, [0, 2, 3] here"),
        ({"data": {**KEY.data, "contents": "2f" * 16}}, {}, "data.contents"),
        ({"data": {**KEY.data, "data": {"source": "digits", "shift": 2}}}, {}, "data.data.shift: 1 there, 2 here"),
        ({"data": {**KEY.data, "data": {"source": "digits"}}}, {}, "data.data.shift: 1 there, null here"),
        ({}, {"rows": 6}, "layout.rows: 5 there, 6 here"),
        ({}, {"batches": 3}, "layout.batches: 4 there, 3 here"),
        ({}, {"hidden": {**LAYOUT.hidden, 1: MAPS._replace(stored="bfloat16")}}, 'boundary-001.stored: "float32" there, "bfloat16" here'),
        ({}, {"context": ()}, "layout.context-0"),
    ],
)
def test_other_activations_are_refused_by_name(whole: Path, key: dict[str, Any], layout: dict[str, Any], named: str) -> None:
    before = files(whole)
    cache = ActivationCache(whole, KEY._replace(**key), LAYOUT._replace(**layout))
    for call in (cache.complete, cache.prepare, cache.writer, cache.reader):
        text = refusal(call)
        assert f"narrow.cache: {whole} holds other activations (" in text and named in text
    assert files(whole) == before


# disks


def test_a_file_that_shrinks_under_the_reader_is_found(spoiled: Path) -> None:
    reader = ActivationCache(spoiled, KEY, LAYOUT).reader()
    reader.read([0, 1, 2], 0)
    os.truncate(spoiled / "boundary-001.data", MAPS.row_bytes * (LAYOUT.rows + 2))
    assert f"{spoiled / 'boundary-001.data'} ends within batch 1" in refusal(lambda: reader.read([0, 1, 2], 1))


def test_what_the_disk_cannot_read_is_one_line(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    assert "boundary-002.data cannot be read at batch 3 (Input/output error)" in refusal(
        lambda: ActivationCache(whole, KEY, LAYOUT).reader()._tensor("boundary-002", 3 * LAYOUT.rows, 1)
    )


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_what_the_disk_cannot_write_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    cache = ActivationCache(tmp_path / "cache", KEY, LAYOUT)
    cache.prepare()

    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, broken)
        assert "cannot be written (Input/output error)" in refusal(lambda: write_all(cache))
    assert not cache.complete()


def test_a_file_that_may_not_grow_is_refused_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the length is not reserved, as on a file system that cannot
    monkeypatch.setattr(cache_file, "allocate", lambda file, size: None)
    cache = ActivationCache(tmp_path / "cache", KEY, LAYOUT)
    cache.prepare()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MAPS.row_bytes * LAYOUT.rows + 10, hard))
    try:
        assert "boundary-000.data cannot be written (File too large)" in refusal(lambda: write_all(cache))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not cache.complete()
    monkeypatch.undo()
    cache.release()
    assert cache.prepare() == 0  # files of the wrong length are made again
    write_all(cache)
    cache.finish()
    check_all(cache)


def test_a_prediction_beyond_the_disk_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    huge = LAYOUT._replace(batches=shutil.disk_usage(tmp_path).free // (LAYOUT.rows * MAPS.row_bytes))
    text = refusal(ActivationCache(tmp_path / "cache", KEY, huge).prepare)
    assert f"the activations of {huge.batches} batches at 3 boundaries take" in text and "GiB are free" in text
    assert list(files(tmp_path / "cache")) == ["lock"]
    fill(tmp_path / "cache")


def on_a_full_disk(folder: Path) -> None:
    """Runs on a file system of 1 MiB of its own."""
    layout = LAYOUT._replace(batches=40, rows=8)
    cache, ballast = ActivationCache(folder / "cache", KEY, layout), folder / "ballast"
    assert 400_000 < cache.size < 600_000
    ballast.write_bytes(bytes(800_000))
    assert "GiB are free" in refusal(cache.prepare) and list(files(cache.folder)) == ["lock"]
    # the disk fills up between the look at it and the reservation
    cache._require_room = lambda taken: None  # type: ignore[method-assign]
    assert "No space left on device" in refusal(cache.prepare) and list(files(cache.folder)) == ["lock"]
    # nothing can be reserved, and it fills up in the middle
    allocate, cache_file.allocate = cache_file.allocate, os.ftruncate
    assert cache.prepare() == 0
    assert "No space left on device" in refusal(lambda: write_all(cache))
    assert not cache.complete()
    cache.release()
    cache_file.allocate = allocate
    ballast.unlink()
    kept = cache.prepare()
    assert 0 < kept < layout.batches
    write_all(cache, kept)
    # and before the last marker
    ballast.write_bytes(bytes(shutil.disk_usage(folder).free))
    assert "No space left on device" in refusal(cache.finish)
    assert not cache.complete()
    ballast.unlink()
    assert cache.prepare() == layout.batches and not cache.complete()
    cache.finish()
    check_all(cache)


def on_a_disk_of_no_size(folder: Path) -> None:
    """Runs on a file system that neither knows its size nor reserves."""
    with (folder / "probe").open("wb") as file:
        cache_file.allocate(file.fileno(), 1 << 40)
        assert os.fstat(file.fileno()).st_size == 1 << 40 and os.fstat(file.fileno()).st_blocks == 0
    assert shutil.disk_usage(folder).total == 0
    check_all(fill(folder / "cache"))


def on_a_read_only_disk(folder: Path) -> None:
    """Runs on a file system that can be made read-only."""
    fill(folder / "cache")
    (folder / "begun").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    use(folder / "cache")
    assert "Read-only file system" in refusal(lambda: use(folder / "begun"))
    assert "Read-only file system" in refusal(lambda: use(folder / "none"))


DISKS = {on_a_full_disk: "tmpfs", on_a_disk_of_no_size: "ramfs", on_a_read_only_disk: "tmpfs"}


@pytest.mark.parametrize(("check", "kind"), DISKS.items(), ids=[check.__name__ for check in DISKS])
def test_a_disk_of_its_own(check: Callable[[Path], None], kind: str, tmp_path: Path) -> None:
    mount = f'mount -t {kind} -o size=1m {kind} "$1"'
    private = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    try:
        subprocess.run([*private, mount, "-", tmp_path], check=True, capture_output=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("file systems cannot be mounted here")
    call = f"from pathlib import Path; import tests.unit.imitation.test_cache_faults as here; here.{check.__name__}(Path.cwd())"
    done = subprocess.run(
        [*private, f'{mount} && cd "$1" && exec "$2" -c "$3"', "-", tmp_path, sys.executable, call],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
