"""Starts ranks as forks of one process that has imported everything: real processes that meet over gloo, seconds earlier.

Reads a job a line from standard input. Nobody ends the ranks of a job when one of them dies, as under a plain batch system.
"""

import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

# what a run imports, some of it in functions
import deepspeed  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch
import torch.utils.tensorboard
from transformers import AutoTokenizer, BertTokenizer  # noqa: F401

import wtn_pretrain.cli
import wtn_pretrain.stages  # noqa: F401


def be_rank(job: dict[str, Any], rank: int) -> int:
    """Runs the job's script as one of its ranks, as the interpreter would."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(f"{job['folder']}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    os.environ.update(job["environment"], RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["ranks"]))
    os.chdir(job["cwd"])
    sys.argv = [job["script"], *job["arguments"], *job["each"][rank]]
    try:
        runpy.run_path(job["script"], run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def lead(job: dict[str, Any]) -> None:
    """Forks the ranks of a job; writes their process numbers and, when all have ended, their exit codes."""
    forge = os.getppid()
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    children = []
    for rank in range(job["ranks"]):
        child = os.fork()
        if child == 0:
            code = be_rank(job, rank)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    folder = Path(job["folder"])
    for name, content in (("pids", lambda: children), ("codes", lambda: bury(children, forge))):
        (folder / f".{name}").write_text(json.dumps(content()))
        (folder / f".{name}").rename(folder / name)


def bury(children: list[int], forge: int) -> list[int]:
    """Waits until all have ended; nobody is buried before that. Without the forge nobody wants to know, and all end."""
    while any(os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None for child in children):
        if os.getppid() != forge:
            os.killpg(0, signal.SIGKILL)
        time.sleep(0.02)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    # the first weights on the meta device import a compiler
    torch.nn.Embedding(1, 1, device="meta")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if os.fork() == 0:
            lead(json.loads(line))
            os._exit(0)
