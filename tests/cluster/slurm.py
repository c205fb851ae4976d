"""A real Slurm on hosts of this machine: munged, slurmctld on `login`, slurmd on each of the others, all in a folder of their own."""

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.cluster.hosts import Host, hosts, why_not
from tests.running import environment, steps_logged

NEEDS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
NODES = ("n1", "n2")
CPUS = 4
"""What each node claims to have, for tests with more ranks than cores."""


def why_no_slurm() -> str:
    """Why there can be no Slurm here; empty: there can."""
    missing = [name for name in NEEDS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    return why_not() or (f"{missing[0]} is not installed; bash scripts/cluster_tests.sh installs it" if missing else "")


CONFIG = """
ClusterName=tests
SlurmctldHost=login(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=0,bf_interval=1
SlurmdTimeout=300
KillWait=30
ReturnToService=2
NodeName=n[1-2] CPUs={cpus} RealMemory=8000 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9
"""


class Slurm:
    """What a user has on the login node."""

    def __init__(self, folder: Path, made: Mapping[str, Host]) -> None:
        self.folder, self.hosts, self.login = folder, made, made["login"]
        self.environment = {**environment(), "SLURM_CONF": str(folder / "slurm.conf"), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}

    def run(self, *call: str, cwd: Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """A command on the login node."""
        return self.login.run(*call, cwd=cwd, env=self.environment, timeout=timeout)

    def succeed(self, *call: str, cwd: Path, timeout: float = 240) -> str:
        done = self.run(*call, cwd=cwd, timeout=timeout)
        assert done.returncode == 0, f"{call}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def submit(self, *call: str, cwd: Path) -> int:
        """The number of the job that `sbatch call` makes."""
        return int(self.succeed("sbatch", "--parsable", *call, cwd=cwd).split(";")[0])

    def facts(self, job: int | str) -> dict[str, str]:
        """What `scontrol show job` says; of an array, of the element."""
        return dict(re.findall(r"(\w+)=(\S*)", self.succeed("scontrol", "-o", "show", "job", str(job), cwd=self.folder)))

    def wait(self, job: int | str, *states: str, timeout: float = 240, hurry: bool = True) -> dict[str, str]:
        """Waits until a job is in one of `states` (none given: until it has ended); a requeued job need not wait its two minutes."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "DEADLINE")
        deadline = time.monotonic() + timeout
        requeued: float | None = None
        while True:
            facts = self.facts(job)
            if facts["JobState"] in (states or ended):
                return facts
            assert not (states and facts["JobState"] in ended), f"{facts}\n{self.logs()}"
            assert time.monotonic() < deadline, f"job {job} is {facts['JobState']} ({facts['Reason']})\n{self.logs()}"
            waits = facts["JobState"] == "PENDING" and facts["Reason"] == "BeginTime"
            requeued = (requeued or time.monotonic()) if waits else None
            # a node refuses a job that it ended within the same seconds
            if hurry and requeued and time.monotonic() - requeued > 3:
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now", cwd=self.folder)
            time.sleep(0.3)

    def logs(self) -> str:
        return "\n".join(f"{path}\n{path.read_text()[-1500:]}" for path in sorted(self.folder.glob("*.log")))


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """Slurm with two nodes, until the end of the context; nothing of it is left."""
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, cpus=CPUS), encoding="ascii")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    with hosts(("login", *NODES), folder) as made:
        one = Slurm(folder, made)
        munged = ["munged", "--force", "--foreground", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key"]
        munged += [f"--{name}-file={folder}/munge.{name}" for name in ("log", "pid", "seed")]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": one.environment}
        started = [one.login.start(*munged, **quiet)]
        try:
            _until((folder / "munge.socket").exists, "munged", one)
            started.append(one.login.start("slurmctld", "-D", **quiet))
            started += [made[name].start("slurmd", "-D", "-N", name, **quiet) for name in NODES]
            _until(lambda: one.run("sinfo", "-h", "-o", "%T", cwd=folder).stdout.split() == ["idle"], "slurm", one)
            yield one
        finally:
            for process in started:
                process.kill()
                process.wait()


def _until(ready: object, what: str, one: Slurm, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not ready():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"{what} has not started\n{one.logs()}"
        time.sleep(0.1)


def told(folder: Path, job: int) -> str:
    """All that a job has said."""
    logs = [*folder.glob(f"*-{job}.out"), *sorted(folder.glob(f"logs/*-{job}/*.log"))]
    return "\n".join(f"{path.name}: {path.read_text()[-3000:]}" for path in logs)


def until_step(cluster: Slurm, folder: Path, job: int, step: int, timeout: float = 240) -> None:
    """Waits until the run of a job has logged a step of stage 1."""
    deadline = time.monotonic() + timeout
    while max(steps_logged(folder / "runs/bert/wide"), default=0) < step:
        assert cluster.facts(job)["JobState"] in ("PENDING", "RUNNING", "CONFIGURING"), told(folder, job)
        assert time.monotonic() < deadline, told(folder, job)
        time.sleep(0.1)
