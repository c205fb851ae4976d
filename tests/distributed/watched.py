"""A small pipeline of ranks under a watch, one of which does what it is told to: the program of `test_watch`.

Every rank writes its process number into FOLDER/turned-N before that and into FOLDER/rank-N when it is at work after it.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from wtn_pretrain.errors import UserError
from wtn_pretrain.files import write_text
from wtn_pretrain.parallel.launch import Place, another_failed, first_to_fail, stop_ranks
from wtn_pretrain.parallel.watch import Watch

EVERYONE = -1
TURN = 15
"""The step at which a rank turns to what it is told to do."""


def misbehave(how: str, watch: Watch, step: int, tensor: torch.Tensor) -> None:
    if how == "sleep":
        time.sleep(1000)
    elif how == "spin":
        while True:
            pass
    elif how == "slow":
        for _ in range(1000):
            watch.at("data", step)
            time.sleep(0.1)
    elif how == "save":
        with watch.allow(60, "saves a checkpoint"):
            time.sleep(4)
    elif how == "raise":
        raise ValueError("a mistake of this program")
    elif how == "user":
        raise UserError("wrong.png: no image")
    elif how == "leave":
        os._exit(3)
    elif how == "abandon":
        with watch.waiting(dist.get_rank() - 1):
            dist.recv(tensor, dist.get_rank() - 1, tag=9)  # which nobody sends
    elif how == "fork":
        child = os.fork()
        if child == 0:
            time.sleep(1000)
        time.sleep(1)
        os.kill(child, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
    elif how == "orphan" and os.fork() == 0:
        time.sleep(20)  # as a data loader's worker lives on for a while
        os._exit(0)


def work(options: argparse.Namespace) -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    names = [f"rank {other} (units {3 * other}-{3 * other + 2})" for other in range(ranks)]
    tensor = torch.zeros(1000)
    with Watch(Place(rank, ranks), names, options.patience, stacks=options.stacks) as watch:
        for step in range(1, options.steps + 1):
            watch.at("teacher", step)
            if step == TURN:
                write_text(options.folder / f"turned-{rank}", str(os.getpid()))
            if step == TURN and options.culprit in (rank, EVERYONE):
                misbehave(options.how, watch, step, tensor)
            if step == TURN + 5:
                write_text(options.folder / f"rank-{rank}", str(os.getpid()))
            time.sleep(0.01)
            if rank > 0:
                with watch.waiting(rank - 1):
                    dist.recv(tensor, rank - 1)
            watch.at("student", step)
            if rank < ranks - 1:
                with watch.waiting(rank + 1):
                    dist.send(tensor, rank + 1)
        if options.how == "late" and rank == options.culprit:
            watch.at("evaluation", options.steps)
            with watch.allow(30, "evaluation"):
                time.sleep(5)
    # rank 0 may leave with the store while others are at work
    os._exit(0)


def run(options: argparse.Namespace) -> None:
    """`work`, with a mistake of the user told as `cli.main` tells it."""
    try:
        work(options)
    except UserError as error:
        if first_to_fail():
            print(f"error: {error}", file=sys.stderr)
    except Exception:
        if not another_failed():
            raise
    stop_ranks()
    sys.exit(2)


def fork(options: argparse.Namespace, ranks: int) -> None:
    """Starts the ranks as a batch system does, that ends none when another dies, and writes their exit codes into FOLDER/codes."""
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
            code = 0
            try:
                run(options)
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                code = 1
            os._exit(code)
        children.append(child)
    # who has died is buried at the end only, as by a launcher that has not looked yet
    while any(os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None for child in children):
        time.sleep(0.05)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    (options.folder / "codes").write_text(json.dumps(codes))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--how", default="")
    parser.add_argument("--culprit", type=int, default=-2)
    parser.add_argument("--patience", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--stacks", type=Path)
    parser.add_argument("--ranks", type=int, help="start as many, without a launcher")
    options, _ = parser.parse_known_args()
    if options.ranks:
        fork(options, options.ranks)
        return
    run(options)


if __name__ == "__main__":
    main()
