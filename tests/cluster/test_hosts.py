"""Several hosts (namespaces with their own addresses, names and processes, see `hosts.py`) under `deepspeed --hostfile` and torchrun."""

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.hosts import Host, hosts, why_not
from tests.running import BERT, ROOT, Forge, environment, equal_bits, losses, recipe, steps_logged, weights, write_recipe
from wtn_pretrain.again import AGAIN

SSHD = "/usr/sbin/sshd"


def why_no_hosts() -> str:
    """Why these tests cannot run here; empty: they can."""
    if not Path(SSHD).exists() or shutil.which("pdsh") is None:
        return why_not() or "openssh-server or pdsh is not installed; bash scripts/cluster_tests.sh installs them"
    return why_not()


pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_no_hosts()), reason=why_no_hosts() or "hosts are here")]

SILENCE = 30.0
"""Seconds after which a host that is not heard of counts as lost (`training.loop.SILENCE`)."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Host]]:
    """`login`, `a` and `b`, each with sshd, open to root by a key."""
    folder = tmp_path_factory.mktemp("hosts")
    ssh = folder / "ssh"
    ssh.mkdir(mode=0o700)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / name)], check=True)
    (ssh / "sshd_config").write_text(
        f"HostKey {ssh}/host\nAuthorizedKeysFile {ssh}/user.pub\nStrictModes no\n"
        "PermitRootLogin prohibit-password\nUsePAM no\nPidFile none\n"
    )
    (ssh / "ssh_config").write_text(
        f"Host *\n  IdentityFile {ssh}/user\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    setup = f"mkdir -p /run/sshd; mount --bind {ssh} /etc/ssh; {SSHD} -f {ssh}/sshd_config;"
    # torchrun asks its rendezvous for as long as TCP tries to reach it: a quarter of an hour, unless told otherwise
    setup += " echo 7 > /proc/sys/net/ipv4/tcp_retries2;"
    with hosts(("login", "a", "b"), folder, setup) as three:
        yield three


def settings(**more: str) -> dict[str, str]:
    return {**environment(), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", **more}


def deepspeed(folder: Path, hostfile: str, *arguments: str) -> list[str]:
    """`deepspeed --hostfile` of stage 1; what its ranks need of the environment is in `.deepspeed_env`, as its manual says."""
    (folder / "hostfile").write_text(hostfile)
    (folder / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\nHF_HUB_OFFLINE=1\n")
    return ["deepspeed", "--hostfile", "hostfile", *arguments, str(ROOT / "scripts/train_wide.py"), "--config", "recipe.yaml"]


def torchrun(number: int, *arguments: str) -> list[str]:
    """The command of one of two hosts."""
    call = ["torchrun", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=a:29400", "--rdzv-id=1"]
    own = f"--local-addr={'ab'[number]}"
    return [*call, own, *arguments, str(ROOT / "scripts/train_wide.py"), "--config", "recipe.yaml"]


def by_hand(rank: int) -> dict[str, str]:
    return settings(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="a", MASTER_PORT="29555")


def start_pair(made: dict[str, Host], folder: Path, how: str) -> "list[subprocess.Popen[str]]":
    """A rank on each of two hosts, by torchrun or with RANK set."""
    started = []
    for number, name in enumerate("ab"):
        call, env = torchrun(number), settings()
        if how == "hand":
            call, env = ["python", str(ROOT / "scripts/train_wide.py"), "--config", "recipe.yaml"], by_hand(number)
        started.append(made[name].start(*call, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    return started


def wait(started: "list[subprocess.Popen[str]]", timeout: float) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each."""
    deadline = time.monotonic() + timeout
    ended = []
    try:
        for process in started:
            out, err = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            # torch warns where names cannot be found by address
            kept = [line for line in err.splitlines(keepends=True) if "[c10d]" not in line]
            ended.append((process.returncode, out, "".join(kept)))
    finally:
        for process in started:
            process.kill()
    return ended


def prepared(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    write_recipe(folder / "recipe.yaml", recipe(BERT, changes))
    return folder / "runs/bert/wide"


@pytest.fixture(scope="module")
def alone(forge: Forge, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1 by two plain processes of one host."""
    folder = tmp_path_factory.mktemp("alone")
    stage = prepared(folder)
    forge.start("train_wide.py", folder / "recipe.yaml", ranks=2).succeed()
    return stage


@pytest.mark.parametrize("how", ["deepspeed", "torchrun", "hand"])
def test_every_launcher_gives_the_same_loss_curve(how: str, made: dict[str, Host], alone: Path, tmp_path: Path) -> None:
    stage = prepared(tmp_path)
    if how == "deepspeed":
        done = made["login"].run(*deepspeed(tmp_path, "a slots=1\nb slots=1\n"), cwd=tmp_path, env=settings())
        ended = [(done.returncode, done.stdout, done.stderr)]
    else:
        ended = wait(start_pair(made, tmp_path, how), 240)
    assert not any(code for code, _, _ in ended), ended
    who = r"by hand \(RANK is set\)" if how == "hand" else f"by {how}"
    said = "\n".join(out for _, out, _ in ended)
    assert re.search(rf"2 ranks on 2 hosts, started {who}; rank 0 at \S+:\d+; gloo$", said, re.MULTILINE), said
    assert losses(stage) == losses(alone)
    assert equal_bits(weights(stage), weights(alone))


@pytest.mark.parametrize("how", ["deepspeed", "torchrun"])
def test_a_cut_link_ends_the_run_and_it_continues(how: str, made: dict[str, Host], tmp_path: Path) -> None:
    stage = prepared(tmp_path, {"wide.steps": 1500, "wide.checkpoint_every": 20})
    if how == "deepspeed":
        call = deepspeed(tmp_path, "a slots=1\nb slots=1\n")
        # else pdsh waits for the host that is gone
        env = settings(PDSH_SSH_ARGS_APPEND="-o ServerAliveInterval=5 -o ServerAliveCountMax=3")
        started = [made["login"].start(*call, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)]
    else:
        started = start_pair(made, tmp_path, how)
    deadline = time.monotonic() + 120
    while max(steps_logged(stage), default=0) < 30:
        assert all(process.poll() is None for process in started) and time.monotonic() < deadline
        time.sleep(0.05)
    made["b"].cut()
    try:
        began = time.monotonic()
        ended = wait(started, SILENCE + 90)
        assert all(code != 0 for code, _, _ in ended), ended
        said = "\n".join(out + err for _, out, err in ended)
        lines = re.findall(
            r"error: (rank 1 on b has not answered for \d+ s: it has died, is stopped or has lost its link; .*)$", said, re.MULTILINE
        )
        assert len(lines) == 1 and lines[0].endswith("the same command continues from the newest checkpoint"), said[-6000:]
        # on both sides of the cut
        assert all(made[name].empty("train_wide.py", began + SILENCE + 60 - time.monotonic()) for name in "ab")
    finally:
        made["b"].mend()
    reached = max(steps_logged(stage))
    # it goes on from its newest checkpoint; a signal ends it once that is seen
    again = start_pair(made, tmp_path, "hand")
    deadline = time.monotonic() + 120
    while max(steps_logged(stage)) <= reached + 5:
        assert all(process.poll() is None for process in again) and time.monotonic() < deadline
        time.sleep(0.05)
    for pid in made["b"].processes("train_wide.py"):
        subprocess.run(["kill", "-USR1", str(pid)], check=False)
    ended = wait(again, 60)
    assert [code for code, _, _ in ended] == [AGAIN, AGAIN], ended
    # named where a launcher would have given another code
    assert "left after step" in (tmp_path / "runs/bert/preempted").read_text()
    steps = steps_logged(stage)
    assert steps == list(range(1, len(steps) + 1))


def test_hosts_with_different_code(made: dict[str, Host], tmp_path: Path) -> None:
    """The second host has a checkout of its own in which one file was changed."""
    prepared(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(ROOT / "wtn_pretrain", other / "wtn_pretrain", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "scripts", other / "scripts")
    shutil.copytree(ROOT / "ds_configs", other / "ds_configs")
    with (other / "wtn_pretrain/training/schedules.py").open("a") as file:
        file.write("\n# another\n")
    started = []
    for rank, (name, root) in enumerate((("a", ROOT), ("b", other))):
        call = ["python", str(root / "scripts/train_wide.py"), "--config", "recipe.yaml"]
        env = {**by_hand(rank), "PYTHONPATH": str(root)}
        started.append(made[name].start(*call, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    ended = wait(started, 120)
    assert [code for code, _, _ in ended] == [2, 2], ended
    errors = "".join(err for _, _, err in ended)
    assert errors == (
        "error: ranks disagree: rank 1 on b has another wtn_pretrain/training/schedules.py; give every host the same checkout\n"
    ), errors


def test_a_port_in_use_and_a_host_that_is_not_there(made: dict[str, Host], tmp_path: Path) -> None:
    prepared(tmp_path)
    call = ["python", str(ROOT / "scripts/train_wide.py"), "--config", "recipe.yaml"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    listener = made["a"].start("python", "-c", "import socket, time; s = socket.create_server(('', 29555)); time.sleep(600)")
    try:
        deadline = time.monotonic() + 20
        while not made["a"].run("ss", "-ltnH", "sport = :29555").stdout:
            assert time.monotonic() < deadline
        env = {"WTN_JOIN_SECONDS": "8"}
        ended = wait([made["ab"[rank]].start(*call, cwd=tmp_path, env={**by_hand(rank), **env}, **pipes) for rank in (0, 1)], 90)
    finally:
        for pid in made["a"].processes("29555"):
            subprocess.run(["kill", str(pid)], check=False)
        listener.wait()
    assert [code for code, _, _ in ended] == [2, 2], ended
    assert ended[0][2] == (
        "error: port 29555 of a, where the ranks are to meet, is taken by another process; give another: "
        "--master_port (deepspeed), --master-port (torchrun), MASTER_PORT (srun)\n"
    )
    # nobody there at all, and a name that nobody knows
    for address in ("b", "nobody"):
        env = {"WTN_JOIN_SECONDS": "3", "MASTER_ADDR": address}
        (code, _, err), *_ = wait([made["a"].start(*call, cwd=tmp_path, env={**by_hand(1), **env}, **pipes)], 60)
        assert code == 2 and err.count("\n") == 1, err
        assert err.startswith(f"error: rank 1 on a has not reached rank 0 at {address}:29555 within 3 s ("), err


@pytest.mark.parametrize(
    ("hostfile", "said"),
    [("nobody slots=1\nb slots=1\n", r"host=nobody was not reachable via ssh"), ("a slots=1\nnobody slots=1\n", r"nobody")],
    ids=["first", "second"],
)
def test_a_hostfile_with_an_unknown_host(hostfile: str, said: str, made: dict[str, Host], tmp_path: Path) -> None:
    """DeepSpeed's launcher says it, before or beside our code; nothing is left running."""
    prepared(tmp_path)
    call = deepspeed(tmp_path, hostfile)
    with (tmp_path / ".deepspeed_env").open("a") as file:
        file.write("WTN_JOIN_SECONDS=5\n")
    done = made["login"].run(*call, cwd=tmp_path, env=settings(), timeout=120)
    assert done.returncode != 0
    assert re.search(said, done.stdout + done.stderr), done.stderr
    if hostfile.startswith("a"):
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "error: " in line and line.startswith("a:")]
        assert len(lines) == 1 and "not all of the 2 ranks have come to" in lines[0], done.stderr
    assert all(made[name].empty("train_wide.py", 20) for name in "ab")
