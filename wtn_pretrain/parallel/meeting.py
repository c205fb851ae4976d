"""The ranks' first meeting: the store that rank 0 keeps and all others find, or one line on why they do not."""

import atexit
import errno
import os
import queue
import socket
import sys
import threading
import time
from datetime import timedelta

import torch.distributed
from torch.distributed.rendezvous import rendezvous

from wtn_pretrain.errors import UserError
from wtn_pretrain.parallel.launchers import Start, host_name

PORTS = "--master_port (deepspeed), --master-port (torchrun), MASTER_PORT (srun)"


def join_seconds() -> float:
    """How long ranks wait for one another at the start; containers and file systems can be slow on some hosts."""
    text = os.environ.get("WTN_JOIN_SECONDS", "600")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise UserError(f"WTN_JOIN_SECONDS: {text!r} is not a number above 0")
    return seconds


def meet(start: Start, seconds: float) -> torch.distributed.Store:
    """The store that all ranks of `start` share, once every one of them has come.

    Raises:
        UserError: one line that says which rank misses whom, and the remedy.
    """
    # torchrun keeps the store itself
    keeps = start.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    began = time.monotonic()
    if keeps:
        _require_free(start.port)
    else:
        _await(start, seconds)
    left = timedelta(seconds=max(5.0, seconds - (time.monotonic() - began)))
    try:
        store = _within(left.total_seconds() + 5, left)
        if store is None:
            # what answers there is no store
            raise _missed(start, seconds, "another program has the port") if not keeps else _taken(start.port)
        # two ranks of the same number would take each other's messages
        if store.add(f"came-{start.rank}", 1) > 1:
            raise UserError(f"rank {start.rank} at {start.master} is there twice: another run has this port; give each its own: {PORTS}")
    except torch.distributed.DistError as error:
        if _in_use(error):
            raise _taken(start.port) from None
        if keeps:
            raise UserError(
                f"not all of the {start.world_size} ranks have come to {start.master} within {seconds:g} s ({_first_line(error)}); "
                "see what the others say, and whether this host accepts connections"
            ) from None
        raise _missed(start, seconds, _first_line(error)) from None
    return store


def _within(seconds: float, timeout: timedelta) -> torch.distributed.Store | None:
    """torch's store; None after so many seconds, since it waits for ever for who takes its connection and says nothing."""
    ended: queue.SimpleQueue[torch.distributed.Store | Exception] = queue.SimpleQueue()

    def make() -> None:
        try:
            ended.put(next(rendezvous("env://", timeout=timeout))[0])
        except Exception as error:
            ended.put(error)

    threading.Thread(target=make, name="rendezvous", daemon=True).start()
    try:
        found = ended.get(timeout=seconds)
    except queue.Empty:
        # torch's thread would abort the process if it came back while the interpreter ends
        atexit.register(_leave)
        return None
    if isinstance(found, Exception):
        raise found
    return found


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2)


def _require_free(port: int) -> None:
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise _taken(port) from None
        raise UserError(f"port {port} of {host_name()}: {error.strerror}; give another: {PORTS}") from None


def _await(start: Start, seconds: float) -> None:
    """Returns when rank 0 can be reached. torch waits too, but says a line for every try."""
    deadline, pause = time.monotonic() + seconds, 0.05
    while True:
        try:
            socket.create_connection((start.address, start.port), timeout=max(1.0, min(10.0, deadline - time.monotonic()))).close()
            return
        except OSError as error:
            # a name server may be late, like a host
            if time.monotonic() >= deadline:
                raise _missed(start, seconds, error.strerror or str(error)) from None
        time.sleep(pause)
        pause = min(1.5 * pause, 1.0)


def _missed(start: Start, seconds: float, reason: str) -> UserError:
    return UserError(
        f"rank {start.rank} on {host_name()} has not reached rank 0 at {start.master} within {seconds:g} s ({reason}); "
        "see what rank 0 says, and whether MASTER_ADDR and MASTER_PORT name its host and an open port"
    )


def _taken(port: int) -> UserError:
    return UserError(f"port {port} of {host_name()}, where the ranks are to meet, is taken by another process; give another: {PORTS}")


def _in_use(error: BaseException) -> bool:
    return "EADDRINUSE" in str(error) or "address already in use" in str(error).lower()


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].removeprefix("[enforce fail at ").strip()[:160]
