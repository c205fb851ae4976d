"""Hosts on one machine: a network, process, mount and host-name namespace each, joined by a bridge in the first one's network.

What runs on a host sees its own address, name, processes and `/etc/hosts`; files are shared, as on a cluster. A host's first process
ends with this one, and all others on it end with that. Needs root and iproute2.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

NEEDS = ("ip", "unshare", "nsenter", "mount")
NETWORK = "10.77.0"


def why_not() -> str:
    """Why there are to be no hosts here; empty: there can be."""
    if not os.environ.get("WTN_CLUSTER"):
        return "takes minutes and root: bash scripts/cluster_tests.sh runs it"
    missing = [name for name in NEEDS if shutil.which(name) is None]
    if missing:
        return f"{missing[0]} is not installed"
    if os.geteuid():
        return "hosts need root"
    if subprocess.run(["unshare", "--net", "--uts", "--pid", "--mount", "--fork", "true"], capture_output=True, check=False).returncode:
        return "namespaces are not allowed here"
    return ""


class Host:
    """One of `Hosts`."""

    def __init__(self, name: str, address: str, folder: Path, setup: str) -> None:
        self.name, self.address = name, address
        script = f"hostname {name}; mount --bind {folder}/hosts /etc/hosts; ip link set lo up; {setup} echo ready; "
        # bash buries whatever is left to it
        script += "while :; do read -t 3600; done"
        self._process = subprocess.Popen(
            ["unshare", "--net", "--uts", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child", "bash", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None and self._process.stdout.readline() == "ready\n"
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text(encoding="ascii").split()
        self.pid = int(children[0])
        """The host's first process, as this machine counts."""

    def command(self, *call: str) -> list[str]:
        """`call` on this host."""
        return ["nsenter", f"--target={self.pid}", "--net", "--uts", "--pid", "--mount", f"--wdns={os.getcwd()}", "--", *call]

    def network(self, *call: str) -> None:
        """`ip call` in this host's network; processes are numbered as this machine counts."""
        subprocess.run(["nsenter", f"--net=/proc/{self.pid}/ns/net", "ip", *call], check=True)

    def run(self, *call: str, timeout: float = 240, **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end; all of it is killed when the time is over."""
        with self.start(*call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                out, err = process.communicate()
                raise AssertionError(f"{call} did not end in {timeout} s\n{out[-3000:]}\n{err[-3000:]}") from None
        return subprocess.CompletedProcess(list(call), process.returncode, out, err)

    def start(self, *call: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, **options: Any) -> "subprocess.Popen[str]":
        """Starts a command."""
        inner = call if cwd is None else ("env", "-C", str(cwd), *call)
        return subprocess.Popen(self.command(*inner), env=dict(env) if env else None, text=True, start_new_session=True, **options)

    def processes(self, word: str) -> list[int]:
        """The processes of this host, as this machine counts, with `word` in their command line."""
        found = []
        space = os.readlink(f"/proc/{self.pid}/ns/pid")
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    if os.readlink(entry / "ns/pid") == space and word.encode() in (entry / "cmdline").read_bytes():
                        found.append(int(entry.name))
        return found

    def empty(self, word: str, timeout: float = 60) -> bool:
        """Whether within `timeout` seconds no process with `word` in its command line is left."""
        deadline = time.monotonic() + timeout
        while self.processes(word) and time.monotonic() < deadline:
            time.sleep(0.1)
        return not self.processes(word)

    def cut(self) -> None:
        """Takes the host's link down."""
        self.network("link", "set", "eth0", "down")

    def mend(self) -> None:
        self.network("link", "set", "eth0", "up")

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


@contextlib.contextmanager
def hosts(names: Sequence[str], folder: Path, setup: str = "") -> Iterator[dict[str, Host]]:
    """Hosts of these names, that reach one another by name; `setup`: shell commands, each ended by `;`, that each runs as it starts."""
    addresses = {name: f"{NETWORK}.{number}" for number, name in enumerate(names, 1)}
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
    (folder / "hosts").write_text("\n".join(lines) + "\n", encoding="ascii")
    made: dict[str, Host] = {}
    try:
        for name, address in addresses.items():
            made[name] = Host(name, address, folder, setup)
        hub = made[names[0]]
        hub.network("link", "add", "bridge", "type", "bridge")
        hub.network("addr", "add", f"{hub.address}/24", "dev", "bridge")
        hub.network("link", "set", "bridge", "up")
        for number, host in enumerate(list(made.values())[1:]):
            hub.network("link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0", "netns", str(host.pid))
            hub.network("link", "set", f"port{number}", "master", "bridge", "up")
            host.network("addr", "add", f"{host.address}/24", "dev", "eth0")
            host.network("link", "set", "eth0", "up")
        yield made
    finally:
        for host in made.values():
            host.close()
