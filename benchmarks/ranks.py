"""Rank processes for benchmarks: one thread each, pinned to a core each unless told, that run functions when asked to."""

import contextlib
import gc
import os
import shutil
import socket
import tempfile
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from wtn_pretrain.parallel.launch import Place, shared_store, start_ranks, stop_ranks, wait_for_all


class Crew:
    """`count` ranks of one process group, each one thread on a core of its own (of a machine with fewer, cores are shared).

    They keep what they build between calls, and wait without using a core. Those that feed an accelerator, or are to have threads
    of their own, are not `pinned`.
    """

    def __init__(self, count: int, pinned: bool = True) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"  # read when a rank imports torch
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        context = get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        port = _free_port()
        cores = sorted(os.sched_getaffinity(0)) if pinned and hasattr(os, "sched_getaffinity") else []
        for rank in range(count):
            ours, theirs = context.Pipe()
            core = cores[rank % len(cores)] if cores else None
            process = context.Process(target=_serve, args=(theirs, Place(rank, count), port, core), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def call(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`function(place, *arguments)` on every rank at once; what each returns.

        Raises:
            RuntimeError: a rank failed; holds its traceback.
        """
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            try:
                failed, answer = pipe.recv()
            except EOFError:
                raise RuntimeError(f"rank {rank} of {len(self._pipes)} has ended") from None
            if failed:
                raise RuntimeError(f"rank {rank} of {len(self._pipes)}:\n{answer}")
            answers.append(answer)
        return answers

    def folder(self) -> Path:
        """A fresh folder that all ranks see."""
        return Path(tempfile.mkdtemp(dir=self._folder.name))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for pipe in self._pipes:
            # a rank that waits for one that failed would wait for long
            if kind is None:
                pipe.send(None)
        for process in self._processes:
            process.join(20 if kind is None else 0)
            if process.is_alive():
                process.terminate()
                process.join()
        self._folder.cleanup()


@contextlib.contextmanager
def folder_of_all(place: Place, inside: str | None = None) -> Iterator[Path]:
    """A temporary folder that all ranks share, as a run's folder is; every rank must enter and leave it."""
    store = shared_store(place)
    if place.rank == 0:
        store.set("folder", tempfile.mkdtemp(dir=inside))
    folder = Path(store.get("folder").decode())
    try:
        yield folder
        wait_for_all(place)
    finally:
        if place.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _serve(pipe: Connection, place: Place, port: int, core: int | None) -> None:
    """What a rank does: joins its group, then whatever is asked of it."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    rank, count = map(str, place)
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    start_ranks()
    while (asked := pipe.recv()) is not None:
        function, arguments = asked
        try:
            pipe.send((False, function(place, *arguments)))
        except BaseException:
            pipe.send((True, traceback.format_exc()))
        gc.collect()
    stop_ranks()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
