"""Jobs of Slurm: submitting them, and following them from the queue to their end."""

import contextlib
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from wtn_pretrain.errors import UserError

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "DEADLINE", "BOOT_FAIL", "REVOKED"}
PAUSE = 2.0
"""Seconds between two looks at a job."""


def call(command: Sequence[str]) -> str:
    """What a command of Slurm prints.

    Raises:
        UserError: it is not installed, or refuses.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not installed here; submit from a login node of the cluster, or see --dry-run") from None
    if done.returncode:
        said = [re.sub(r"^\w+: (error|fatal): ", "", line) for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"{command[0]} refuses: {said[-1] if said else f'exit code {done.returncode}'}")
    return done.stdout


def submit(script: Path, arguments: Sequence[str], *, after: int | None = None) -> int:
    """The number of the job that runs `script` with `arguments`, `after` another has succeeded."""
    command = ["sbatch", "--parsable"]
    if after is not None:
        command += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    return int(call([*command, str(script), *arguments]).split(";")[0])


def cancel(jobs: Sequence[int]) -> None:
    """Takes jobs out of the queue again; one that has ended meanwhile is left alone."""
    with contextlib.suppress(UserError):
        call(["scancel", *map(str, jobs)])


def state(job: int) -> dict[str, str]:
    """What Slurm says of a job, of an array of each element's worst; empty where it has been forgotten."""
    try:
        told = call(["scontrol", "-o", "show", "job", str(job)])
    except UserError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    records = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in told.splitlines() if line.strip()]
    # what still runs, then what went wrong, then what is done
    return min(records, key=lambda record: (record["JobState"] in ENDED, record["JobState"] == "COMPLETED"))


def follow(job: int, folder: Path, say: Callable[[str], None]) -> bool:
    """Tells every change of a job's state and the first rank's log until it ends; whether it has succeeded.

    Args:
        folder: from where it was submitted.
    """
    before, log = "", Log(say)
    while True:
        try:
            facts = state(job)
        except UserError as error:
            # a controller that is busy or being restarted does not end jobs
            if (line := f"job {job}: {error}; still asking") != before:
                say(line)
                before = line
            time.sleep(PAUSE)
            continue
        if not facts:
            say(f"job {job}: forgotten by Slurm; see its logs in {folder / 'logs'}")
            return False
        now = facts["JobState"]
        restarts = int(facts.get("Restarts") or 0)
        where = f" on {facts['NodeList']}" if facts.get("NodeList", "(null)") not in ("", "(null)") and now == "RUNNING" else ""
        why = f" ({facts['Reason']})" if facts.get("Reason", "None") not in ("", "None") else ""
        line = f"job {job}: {now.lower()}{where}{why}{f', start {restarts + 1}' if restarts else ''}"
        if line != before:
            say(line)
            before = line
        log.tell(folder / "logs" / f"{facts['JobName']}-{facts['JobId']}" / "0-0.log")
        if now in ENDED:
            code = facts.get("ExitCode", "0:0").split(":")[0]
            if now != "COMPLETED":
                say(f"job {job}: exit code {code}; {folder / facts['StdOut']} and the logs that it names say more")
            return now == "COMPLETED"
        time.sleep(PAUSE)


class Log:
    """Files that grow, told line by line, each from where it was left; of a progress that is drawn over, the last state."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._read: dict[Path, int] = {}

    def tell(self, path: Path) -> None:
        """Says the whole lines that have come since the last call."""
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            file.seek(self._read.get(path, 0))
            whole, newline, _ = file.read().rpartition(b"\n")
            self._read[path] = self._read.get(path, 0) + len(whole) + len(newline)
            for line in whole.decode(errors="replace").splitlines():
                if line.strip():
                    self._say(f"  {line}")
