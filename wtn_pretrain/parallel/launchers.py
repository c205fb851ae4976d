"""What started this process, and what it says of the process's place: `deepspeed`, `torchrun`, `srun`, `mpirun` or plain `python`.

Reads the environment alone. What it finds is put into the variables that torch and DeepSpeed read: RANK, LOCAL_RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT, which win where they are set. Slurm's variables are those of srun(1), OUTPUT ENVIRONMENT VARIABLES; those of
mpirun are Open MPI's, or Hydra's in MPICH and Intel MPI.
"""

import os
import re
import socket
import subprocess
from collections.abc import Iterator, MutableMapping
from typing import NamedTuple

from wtn_pretrain.errors import UserError

SPECIAL_STEP = 0xFFFFFFF0
"""Slurm's own steps have numbers from here on: the batch script, the shell of salloc."""


class Start(NamedTuple):
    """How a process was started, and where it stands by that."""

    launcher: str
    """deepspeed, torchrun, srun, mpirun, python, or hand: whoever has set RANK."""
    rank: int
    local_rank: int
    world_size: int
    address: str
    port: int

    @property
    def master(self) -> str:
        return f"{self.address}:{self.port}"


def find_start(environ: MutableMapping[str, str] | None = None) -> Start:
    """This process's place, which `environ` (this process's own if None) says from then on in torch's variables.

    A set RANK wins over Slurm's variables. A process in a job of Slurm that srun has not started, as in a batch script, is a rank alone.

    Raises:
        UserError: the variables contradict one another or one is missing.
    """
    environ = os.environ if environ is None else environ
    if "RANK" in environ:
        found = _given(environ)
    elif (names := _mpi(environ)) is not None:
        found = _mpirun(environ, *names)
    elif started_by_srun(environ):
        found = _slurm(environ)
    elif environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise UserError(f"WORLD_SIZE is {environ['WORLD_SIZE']} and RANK is not set; set both, or neither for one rank")
    else:
        found = Start("python", 0, 0, 1, "127.0.0.1", _free_port())
    environ.update(
        RANK=str(found.rank),
        LOCAL_RANK=str(found.local_rank),
        WORLD_SIZE=str(found.world_size),
        MASTER_ADDR=found.address,
        MASTER_PORT=str(found.port),
    )
    return found


def host_name(environ: MutableMapping[str, str] | None = None) -> str:
    """What this host is called: by Slurm within its jobs, else by itself."""
    environ = os.environ if environ is None else environ
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def started_by_srun(environ: MutableMapping[str, str]) -> bool:
    """Whether this process is a task of a step that srun has started, and not the script or shell of a job."""
    step = environ.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < SPECIAL_STEP and "SLURM_PROCID" in environ


def expand_hosts(nodes: str) -> Iterator[str]:
    """The names in a list as Slurm writes it: `n[01-03,7],login` is n01, n02, n03, n7, login. What `scontrol show hostnames` does."""
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        yield from _expand(part)


def _expand(part: str) -> Iterator[str]:
    opened = re.match(r"([^\[]*)\[([^\]]*)\](.*)", part)
    if opened is None:
        yield part
        return
    before, ranges, after = opened.groups()
    for piece in ranges.split(","):
        first, _, last = piece.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()):
            raise UserError(f"SLURM_STEP_NODELIST: {part!r} is no list of hosts as Slurm writes it; set MASTER_ADDR")
        for number in range(int(first), int(last or first) + 1):
            yield from (f"{before}{number:0{len(first)}}{rest}" for rest in _expand(after))


def device_index(start: Start, devices: int, environ: MutableMapping[str, str] | None = None) -> int:
    """Which of the host's `devices` is this rank's; Slurm may show a task its own alone, which is then the first.

    Raises:
        UserError: the host has more ranks than devices.
    """
    environ = os.environ if environ is None else environ
    bound = any(name in environ for name in ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_GPU_BIND"))
    if start.local_rank < devices:
        return start.local_rank
    if devices == 1 and start.launcher == "srun" and bound:
        return 0
    raise UserError(
        f"rank {start.rank} is number {start.local_rank + 1} on {host_name(environ)}, which shows {devices} devices; start as many ranks "
        "a host as it has (slots in the hostfile, --nproc-per-node, --ntasks-per-node), or see CUDA_VISIBLE_DEVICES"
    )


def _given(environ: MutableMapping[str, str]) -> Start:
    """What the variables that torch reads say, completed by Slurm's where these are."""
    rank, world_size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    if rank >= world_size:
        raise UserError(f"RANK is {rank} of WORLD_SIZE {world_size}; ranks are numbered from 0 to {world_size - 1}")
    address, port = environ.get("MASTER_ADDR", ""), environ.get("MASTER_PORT", "")
    in_slurm = started_by_srun(environ)
    if not address and (world_size == 1 or in_slurm):
        address = _first_host(environ) if in_slurm and world_size > 1 else "127.0.0.1"
    if not port and (world_size == 1 or in_slurm):
        port = str(_slurm_port(environ) if in_slurm and world_size > 1 else _free_port())
    missing = [name for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)) if not value]
    if missing:
        raise UserError(f"RANK is set and {missing[0]} is not; set it to rank 0's {'host' if missing[0] == 'MASTER_ADDR' else 'port'}")
    if not (port.isdecimal() and 0 < int(port) < 65536):
        raise UserError(f"MASTER_PORT: {port!r} is no port; give a number from 1 to 65535")
    signs = {"TORCHELASTIC_RUN_ID": "torchrun", "CROSS_RANK": "deepspeed"}
    launcher = next((name for sign, name in signs.items() if sign in environ), "hand")
    local = next((_number(environ, name) for name in ("LOCAL_RANK", "SLURM_LOCALID") if environ.get(name)), rank)
    return Start(launcher, rank, local, world_size, address, int(port))


MPI = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"))
"""How Open MPI and Hydra call a rank, its number on its host, and how many there are."""


def _mpi(environ: MutableMapping[str, str]) -> tuple[str, str, str] | None:
    """The names of `MPI` that mpirun has set; it may itself have come by srun, which sets PMI_RANK for what it starts, too."""
    return next((names for names in MPI if all(name in environ for name in names)), None)


def _mpirun(environ: MutableMapping[str, str], rank: str, local_rank: str, size: str) -> Start:
    world_size = _number(environ, size)
    if world_size == 1:
        return Start("mpirun", 0, 0, 1, "127.0.0.1", _free_port())
    if not environ.get("MASTER_ADDR") or not environ.get("MASTER_PORT"):
        raise UserError(
            f"mpirun has started {world_size} ranks and says nothing of rank 0's host; pass MASTER_ADDR and MASTER_PORT on "
            "(-x MASTER_ADDR=HOST -x MASTER_PORT=29500, with MPICH -genv NAME VALUE)"
        )
    address, port = environ["MASTER_ADDR"], _number(environ, "MASTER_PORT")
    return Start("mpirun", _number(environ, rank), _number(environ, local_rank), world_size, address, port)


def _slurm(environ: MutableMapping[str, str]) -> Start:
    # those of the step, which may be smaller than the job
    world_size = _number(environ, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS")
    rank, local_rank = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_LOCALID")
    if world_size == 1:
        return Start("srun", 0, 0, 1, "127.0.0.1", _free_port())
    address = environ.get("MASTER_ADDR") or _first_host(environ)
    port = _number(environ, "MASTER_PORT") if environ.get("MASTER_PORT") else _slurm_port(environ)
    return Start("srun", rank, local_rank, world_size, address, port)


def _first_host(environ: MutableMapping[str, str]) -> str:
    """Where rank 0 of the step runs; the node's address where its name means nothing to others."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST", "")
    first = next(expand_hosts(nodes), "")
    if not first:
        raise UserError("SLURM_STEP_NODELIST is empty; set MASTER_ADDR to the host of rank 0")
    try:
        socket.getaddrinfo(first, None)
        return first
    except socket.gaierror:
        address = _node_address(first)
    if address is None:
        raise UserError(f"{first}, the first host of SLURM_STEP_NODELIST, is unknown on {host_name(environ)}; set MASTER_ADDR")
    return address


def _node_address(node: str) -> str | None:
    """Where Slurm itself finds a node."""
    try:
        told = subprocess.run(["scontrol", "-o", "show", "node", node], capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"\bNodeAddr=(\S+)", told)
    return found[1] if found else None


def _slurm_port(environ: MutableMapping[str, str]) -> int:
    """The same on every rank of a step, another for other jobs and steps on the host, and below those of outgoing connections."""
    job = int(environ.get("SLURM_JOB_ID") or environ.get("SLURM_JOBID") or "0")
    return 12_000 + (16 * job + int(environ["SLURM_STEP_ID"])) % 20_000


def _number(environ: MutableMapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not text.isdecimal():
        raise UserError(f"{name}: {text!r} is not a number; launchers set it to one, so unset it or set it with RANK and WORLD_SIZE")
    return int(text)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
