"""Every fault that the doctor is for is planted for real, and must be named with a remedy."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import spawn

from tests.running import environment, free_port
from wtn_pretrain.doctor.compilers import check_compilers
from wtn_pretrain.doctor.disk import check_disk
from wtn_pretrain.doctor.finding import Finding, merged, page
from wtn_pretrain.doctor.machine import _computes, check_devices
from wtn_pretrain.doctor.network import check_links, check_peer, check_port, compare_hosts
from wtn_pretrain.doctor.software import compare_versions, versions
from wtn_pretrain.planning.cluster import Link

ROOT = Path(__file__).parents[3]


def doctor(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, str(ROOT / "tools/doctor.py"), "--folder", str(folder), "--port", str(free_port()), *arguments]
    return subprocess.run(call, capture_output=True, text=True, env={**environment(), **env}, timeout=120)


def faults(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Check -> text of what a run with --json calls a fault."""
    told = json.loads(done.stdout)
    found = {one["check"]: one["text"] for one in told["findings"] if one["verdict"] == "fault"}
    assert all(one["remedy"] for one in told["findings"] if one["verdict"] == "fault")
    assert told["exit"] == done.returncode == bool(found)
    return found


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 MB of its own."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_page_that_is_well(tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("this machine has no compiler, and the doctor would say so")
    # as deepspeed's launcher calls it
    done = doctor(tmp_path, "--local_rank=0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no faults" in done.stdout
    for check in ("versions", "devices", "memory", "compilers", "kernels", "disk", "network"):
        assert f"\n{check}" in done.stdout
    assert len(done.stdout.splitlines()) < 40


def test_no_compiler_and_a_wrong_apex(tmp_path: Path) -> None:
    # as pip lays the package of that name from PyPI out
    planted = tmp_path / "site"
    (planted / "apex").mkdir(parents=True)
    (planted / "apex" / "__init__.py").write_text("")
    (planted / "apex-0.9.10.dev0.dist-info").mkdir()
    about = "Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10.dev0\nSummary: Pyramid auth toolkit\n"
    (planted / "apex-0.9.10.dev0.dist-info" / "METADATA").write_text(about)
    empty = tmp_path / "bin"
    empty.mkdir()
    found = faults(doctor(tmp_path, "--json", PATH=str(empty), PYTHONPATH=f"{ROOT}{os.pathsep}{planted}"))
    assert found.keys() == {"compilers", "kernels"}
    assert "a wrong apex (version 0.9.10.dev0: Pyramid auth toolkit)" in found["kernels"]
    ignored = doctor(tmp_path, "--ignore", "compilers", "--ignore", "kernels", PATH=str(empty), PYTHONPATH=f"{ROOT}{os.pathsep}{planted}")
    assert ignored.returncode == 0
    assert "no C++ compiler on the path" in ignored.stdout


def test_a_compiler_that_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'cc1plus: not found' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CXX", raising=False)
    first = check_compilers("cpu")[0]
    assert first.verdict == "fault"
    assert "cc1plus: not found" in first.text


def test_full_disk(small_disk: Path) -> None:
    (first,) = check_disk(small_disk / "runs", need=1e6)
    assert first.verdict == "warning"
    assert "MB/s written" in first.text
    assert "1 GB are needed" in check_disk(small_disk)[0].text
    with pytest.raises(OSError), (small_disk / "filling").open("wb") as file:
        while True:
            file.write(bytes(1 << 20))
            file.flush()
    found = faults(doctor(small_disk / "runs", "--json"))
    assert "the disk is full" in found["disk"]
    assert [path.name for path in small_disk.iterdir()] == ["filling"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    (first,) = check_disk(tmp_path / "runs")
    assert first.verdict == "fault"
    assert "cannot be written" in first.text
    # what cannot even be looked for
    (first,) = check_disk(tmp_path / ("long" * 100))
    assert first.verdict == "fault" and "cannot be written (File name too long)" in first.text


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        found = faults(doctor(tmp_path, "--json", "--port", str(port)))
        assert f"port {port} is taken" in found["network"]
        # another launch would meet there
        assert check_peer("127.0.0.1", port, 5)[0].verdict == "ok"
    assert check_port(free_port())[0].verdict == "ok"
    for arguments in (["--port", "99999"], ["--peer", "127.0.0.1:99999"]):
        done = doctor(tmp_path, *arguments)
        assert done.returncode == 2 and "'99999' is no port" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("peer", "why"),
    [
        # of a network that is kept for documentation (RFC 5737): either nothing comes back, or there is no route
        ("192.0.2.1:29500", r"192.0.2.1:29500 is not reached in 2 s"),
        ("no-such-host.invalid", r"no-such-host.invalid:22 is not reached in 2 s: no such name"),
        ("127.0.0.1:PORT", "connection refused"),
    ],
)
def test_a_peer_that_does_not_answer(peer: str, why: str, tmp_path: Path) -> None:
    found = faults(doctor(tmp_path, "--json", "--peer", peer.replace("PORT", str(free_port())), "--timeout", "2"))
    assert why in found["network"]


def test_a_rank_whose_first_rank_is_not_there(tmp_path: Path) -> None:
    place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = doctor(tmp_path, "--timeout", "2", **place)
    assert done.returncode == 1
    assert "rank 1 by itself" in done.stdout
    assert f"has not reached rank 0 at 127.0.0.1:{place['MASTER_PORT']} within 2 s" in done.stdout


def test_a_first_rank_that_nobody_joins(tmp_path: Path) -> None:
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    found = faults(doctor(tmp_path, "--json", "--timeout", "2", **place))
    assert "not all of the 2 ranks have come" in found["network"]


def ranks(folder: Path, paths: Sequence[Sequence[Path]], *arguments: str) -> list[subprocess.CompletedProcess[str]]:
    """The doctor on as many ranks as there are lists of further folders to import from."""
    port, done = str(free_port()), [None] * len(paths)

    def one(rank: int, more: Sequence[Path]) -> None:
        env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(paths)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done[rank] = doctor(folder, *arguments, PYTHONPATH=os.pathsep.join(map(str, [*more, ROOT])), **env)  # type: ignore[call-overload]

    threads = [threading.Thread(target=one, args=(rank, more)) for rank, more in enumerate(paths)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done  # type: ignore[return-value]


def test_ranks_with_other_versions_and_other_code(tmp_path: Path) -> None:
    planted = tmp_path / "site"
    (planted / "transformers-9.9.9.dist-info").mkdir(parents=True)
    (planted / "transformers-9.9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 9.9.9\n")
    shutil.copytree(ROOT / "wtn_pretrain", planted / "wtn_pretrain", ignore=shutil.ignore_patterns("__pycache__"))
    with (planted / "wtn_pretrain" / "narrow.py").open("a") as file:
        file.write("\n# changed on this node alone\n")
    first, second = ranks(tmp_path, [[], [planted]], "--json")
    assert first.returncode == second.returncode == 1, first.stderr + second.stderr
    assert not second.stdout
    told = json.loads(first.stdout)
    differing = [one for one in told["findings"] if one["check"] == "versions" and one["verdict"] == "fault"]
    texts = [one["text"] for one in differing]
    assert len(texts) == 2 and any(text.startswith("transformers 9.9.9 on ") for text in texts)
    assert any("has another wtn_pretrain/narrow.py, held against rank 0's" in text for text in texts)
    assert all(one["ranks"] == [1] for one in differing)
    assert {one["remedy"].split(":")[0] for one in differing} == {"start all ranks in one environment", "give every host the same checkout"}
    checks = {one["check"]: one for one in told["findings"]}
    assert "GB/s" in checks["links"]["text"]
    assert checks["clocks"]["verdict"] == "ok"


def _links(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=4)
    found = check_links(["a", "a", "b", "b"])
    Path(folder, str(rank)).write_text("\n".join(finding.text for finding in found))
    dist.destroy_process_group()


def test_links_within_a_host_and_between_hosts(tmp_path: Path) -> None:
    """Ranks 0 and 1 are often on one host, whose links say nothing of the network."""
    spawn(_links, args=(str(tmp_path),), nprocs=4)
    inside, between = (tmp_path / "0").read_text().splitlines()
    assert re.match(r"gloo between rank 0 and 1 of one host: \S+ GB/s, \S+ us; an all-reduce over 4 ranks reaches \d+% of what", inside)
    assert re.match(r"gloo (from a to 1 other host, slowest b|between a and b): \S+ GB/s, \S+ us$", between)
    # the figures are rank 0's for all
    assert all((tmp_path / str(rank)).read_text() == f"{inside}\n{between}" for rank in range(4))


def test_a_host_with_a_slow_link_is_named() -> None:
    fast, slow = Link(40e9, 1e-5), Link(1e9, 5e-5)
    ranks = {"b": 8, "c": 16, "d": 24}
    (found,) = compare_hosts("nccl", "a", dict.fromkeys(ranks, fast), ranks)
    assert found.verdict == "ok" and "from a to 3 other hosts, slowest b: 40 GB/s, 10 us" in found.text
    first, second = compare_hosts("nccl", "a", {"b": fast, "c": slow, "d": fast}, ranks)
    assert first.verdict == "ok"
    assert (second.verdict, second.ranks) == ("warning", (16,))
    assert "from a to c: 1 GB/s, 50 us, where the middle of all is 40 GB/s" in second.text
    # where all are slow, the network is, and not a host
    (found,) = compare_hosts("nccl", "a", dict.fromkeys(ranks, slow), ranks)
    assert found.verdict == "warning" and "each of 3 other hosts is slow" in found.text and "NCCL_IB_HCA" in found.remedy
    (found,) = compare_hosts("nccl", "a", {"b": slow}, ranks)
    assert found.verdict == "warning" and "nccl between a and b: 1 GB/s" in found.text


def test_a_device_that_does_not_compute() -> None:
    """torch's meta device takes tensors and gives no numbers, as a driver does that has lost its card."""
    assert check_devices()[0].verdict == check_devices(3)[0].verdict == "ok"
    (found,) = _computes(torch.device("meta", 3))
    assert found.verdict == "fault" and found.text.startswith("device 3, ") and "does not compute (" in found.text


def test_versions_below_torch(tmp_path: Path) -> None:
    """The two forms of the line in /proc/driver/nvidia/version, of the closed module and of the open one."""
    shown = tmp_path / "version"
    for line in (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version:  gcc version 12.3.0\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.104.05  Release Build  (root@host)\n",
    ):
        shown.write_text(line)
        assert versions(shown)["driver"] == "535.104.05"
    older, without = {**versions(shown), "driver": "470.1.2"}, versions(tmp_path / "none")
    found = compare_versions([versions(shown), older, without], ["a", "b", "c"])
    assert [(one.verdict, one.ranks) for one in found] == [("fault", (1,)), ("fault", (2,))]
    assert found[0].text == "driver 470.1.2 on b, and 535.104.05 on rank 0's a"


def test_equal_findings_stand_once() -> None:
    same, own = Finding("disk", "ok", "fast"), Finding("disk", "fault", "full", "free space")
    found = merged([[same], [same, own]])
    assert found == [same, own._replace(ranks=(1,))]
    text = page(found, "two ranks")
    assert "rank 1: full" in text
    assert "1 fault, no warnings" in text
    many = [Finding("disk", "ok", f"{rank} GB free", ranks=(rank,)) for rank in range(9)]
    text = page([*many, own._replace(ranks=(9,))], "ten ranks")
    assert text.count("GB free") == 4
    assert "and so on 5 more ranks" in text
    assert "rank 9: full" in text
