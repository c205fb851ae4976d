"""The connections of a watch: every rank to rank 0, which hears all, judges and speaks (see `watch`)."""

import contextlib
import json
import os
import secrets
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch.distributed

from wtn_pretrain.errors import UserError
from wtn_pretrain.parallel.launch import another_failed, wait_for_rank
from wtn_pretrain.parallel.verdict import Beat, Ledger, Process, Verdict, of_lost_link, of_silence, stuck_sentence

INQUEST = 0.5  # seconds in which a lost connection turns out to be a death
ANSWER = 5.0  # seconds that rank 0 has to end the run over a rank that accuses itself
BACKLOG = 1 << 16  # bytes kept for a rank that does not read


class Link:
    """Lines of JSON over a socket, which never blocks."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self.closed = sock, False
        self._in, self._out = b"", bytearray()

    def say(self, **message: Any) -> None:
        """Sends a message, or keeps it for `flush` while the other side does not read."""
        if len(self._out) < BACKLOG:
            self._out += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Sends what was kept, as far as it goes."""
        try:
            while self._out and not self.closed:
                del self._out[: self.socket.send(self._out)]
        except BlockingIOError:
            pass
        except OSError:
            self._out.clear()  # what came before the end is still to be read

    def hear(self) -> list[dict[str, Any]]:
        """The messages that have come; the other side has gone once the link is `closed`."""
        while not self.closed:
            try:
                part = self.socket.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError:
                part = b""
            if not part:
                self.drop()
            self._in += part
        *lines, self._in = self._in.split(b"\n")
        messages = []
        for line in lines:
            with contextlib.suppress(ValueError):
                message = json.loads(line)
                if isinstance(message, dict):
                    messages.append(message)
        return messages

    def drop(self) -> None:
        self.closed = True
        self.socket.close()


class Seat(NamedTuple):
    """What a rank brings to the circle, and what it wants to be called for."""

    rank: int
    names: Sequence[str]
    patience: float
    together: float
    """Seconds that ranks may wait for one another."""
    process: Process
    leave: Callable[[Verdict, bool], object]
    """Ends this process over a verdict; the flag says that this rank is the one to speak."""
    heard: Callable[[int, str, int], object]
    """A rank (this one too) has ended: how (`done`, `failed`, `told` by SIGTERM) and with which exit code."""


class Circle(ABC):
    """One rank's part. Everything but the construction happens on the watch's thread, and nothing blocks."""

    def __init__(self, seat: Seat) -> None:
        self._seat = seat
        self.ended: dict[int, tuple[str, int]] = {}
        """How ranks have ended, in the order in which rank 0 heard it."""

    @abstractmethod
    def sockets(self) -> list[socket.socket]:
        """What to wait on."""

    @abstractmethod
    def drop(self) -> None:
        """Closes everything without a word."""

    @abstractmethod
    def listen(self) -> None:
        """Takes in what has come."""

    @abstractmethod
    def beat(self, beat: Beat) -> None:
        """Tells how this rank stands."""

    @abstractmethod
    def end(self, how: str, code: int) -> None:
        """Tells that this rank ends; `ended` has it once that is known to rank 0."""

    @abstractmethod
    def over(self) -> bool:
        """Whether this rank, having ended, is needed no longer; drops the connections then."""

    @abstractmethod
    def accuse(self, verdict: Verdict) -> None:
        """Ends the run over a verdict."""

    @abstractmethod
    def inquest(self, final: bool = False) -> None:
        """Ends the run if a connection was lost by a death; `final`: there is no more time to find out."""

    @abstractmethod
    def judge(self, seconds: float) -> None:
        """Ends the run if a rank has been silent or stuck for too long; `seconds` have passed since the last call."""

    @abstractmethod
    def finish(self) -> None:
        """Sees to it that the others get what was said last, within a second, before this process ends."""


def join(seat: Seat, key: str) -> Circle:
    """Takes a seat in the circle that is named `key` in the process group's store; rank 0 is met at `MASTER_ADDR`.

    Raises:
        UserError: rank 0 cannot be reached.
    """
    store = torch.distributed.distributed_c10d._get_default_store()
    address = os.environ.get("MASTER_ADDR", "localhost")
    local = address in ("localhost", "127.0.0.1", "::1")
    if seat.rank == 0:
        listener = socket.create_server(("127.0.0.1", 0), backlog=4096) if local else _listen_everywhere()
        token = secrets.token_hex(16)
        store.set(key, json.dumps([listener.getsockname()[1], token]))
        return Hub(seat, listener, token)
    wait_for_rank(lambda: store.check([key]))
    port, token = json.loads(store.get(key))
    try:
        link = Link(socket.create_connection(("127.0.0.1" if local else address, port), timeout=seat.patience))
    except OSError as error:
        raise UserError(
            f"rank {seat.rank} cannot reach rank 0 at {address}, port {port} ({error}); let the hosts of a run connect to one another"
        ) from None
    link.say(hello=seat.rank, token=token, process=seat.process)
    return Spoke(seat, link)


MISTAKE = 2
"""Exit code of a rank that has given up over a user's mistake."""


class Hub(Circle):
    """Rank 0's part: hears all, judges, speaks."""

    def __init__(self, seat: Seat, listener: socket.socket, token: str) -> None:
        super().__init__(seat)
        listener.setblocking(False)
        self._listener, self._token = listener, token
        self._strangers: list[Link] = []
        self._links: dict[int, Link] = {}
        self._processes: dict[int, Process] = {}
        self._lost: dict[int, float] = {}
        self._early: list[tuple[int, Link, list[dict[str, Any]]]] = []
        self._ledger = Ledger(len(seat.names), seat.patience, seat.together)

    def sockets(self) -> list[socket.socket]:
        return [self._listener, *(link.socket for link in (*self._strangers, *self._links.values()) if not link.closed)]

    def drop(self) -> None:
        self._listener.close()
        for link in (*self._strangers, *self._links.values()):
            link.drop()

    def listen(self) -> None:
        self._welcome()
        heard = [*self._early, *((rank, link, link.hear()) for rank, link in self._links.items() if not link.closed)]
        self._early = []
        ends = [(rank, *message["end"]) for rank, _, messages in heard for message in messages if "end" in message]
        for rank, how, code in ends:
            self.ended.setdefault(rank, (how, code))
            self._ledger.gone.add(rank)
        for rank, link, messages in heard:
            if link.closed and rank not in self.ended:
                self._lost[rank] = time.monotonic() + INQUEST
            for message in messages:
                if "beat" in message:
                    self._ledger.heard(rank, Beat(*message["beat"]))
                elif "accuse" in message:
                    self.accuse(Verdict(rank, message["accuse"]))
        for rank, how, code in ends:
            if how == "told":
                self.inquest(final=True)  # when one has died, a launcher tells the others to end
            self._tell(ended=[rank, how, code])
            self._seat.heard(rank, how, code)

    def _welcome(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            while True:
                self._strangers.append(Link(self._listener.accept()[0]))
        for link in list(self._strangers):
            messages = link.hear()
            if not messages and not link.closed:
                continue
            self._strangers.remove(link)
            if not messages or messages[0].get("token") != self._token:
                link.drop()
                continue
            rank = int(messages[0]["hello"])
            self._links[rank], self._processes[rank] = link, Process(*messages[0]["process"])
            self._ledger.heard(rank, Beat())
            link.say(hub=self._seat.process)
            for other, end in self.ended.items():
                link.say(ended=[other, *end])
            # what came together with the greeting
            self._early.append((rank, link, messages[1:]))

    def _tell(self, **message: Any) -> None:
        for link in self._links.values():
            if not link.closed:
                link.say(**message)

    def beat(self, beat: Beat) -> None:
        self._ledger.heard(0, beat)
        self._tell(beat=1)

    def end(self, how: str, code: int) -> None:
        self.ended.setdefault(0, (how, code))
        self._ledger.gone.add(0)
        self._tell(ended=[0, how, code])
        self._seat.heard(0, how, code)

    def over(self) -> bool:
        if len(self.ended) < len(self._seat.names):
            return False
        self.drop()
        return True

    def accuse(self, verdict: Verdict) -> None:
        self._tell(verdict=verdict)
        self._seat.leave(verdict, True)

    def inquest(self, final: bool = False) -> None:
        for rank, deadline in self._lost.items():
            process = self._processes[rank]
            line = of_lost_link(self._seat.names[rank], process, self._seat.process, final or time.monotonic() > deadline)
            if line:
                self.accuse(Verdict(rank, line, process))

    def judge(self, seconds: float) -> None:
        for link in self._links.values():
            link.flush()
        self.inquest()
        self._ledger.tick(seconds)
        silent = self._ledger.silent()
        if silent is not None and silent not in self._processes and another_failed():
            # it has never come, and has said why itself
            self.ended.setdefault(silent, ("failed", MISTAKE))
            self._ledger.gone.add(silent)
            self._tell(ended=[silent, "failed", MISTAKE])
            self._seat.heard(silent, "failed", MISTAKE)
        elif silent is not None:
            process = self._processes.get(silent)
            line = of_silence(self._seat.names[silent], process, self._seat.process, self._seat.patience)
            self.accuse(Verdict(silent, line, process))
        stuck = self._ledger.stuck()
        if stuck:
            self.accuse(Verdict(-1, stuck_sentence(self._seat.names, self._ledger, stuck)))

    def finish(self) -> None:
        # the others leave at what was said last, and so close their ends
        deadline = time.monotonic() + 1
        while any(not link.closed for link in self._links.values()) and time.monotonic() < deadline:
            for link in self._links.values():
                link.flush()
                link.hear()
            time.sleep(0.01)


class Spoke(Circle):
    """The part of every other rank: tells rank 0, and judges nobody but rank 0."""

    def __init__(self, seat: Seat, link: Link) -> None:
        super().__init__(seat)
        self._link = link
        self._hub: Process | None = None
        self._silence = 0.0
        self._lost: float | None = None
        self._accused: tuple[float, Verdict] | None = None
        self._ending: tuple[str, int] | None = None

    def sockets(self) -> list[socket.socket]:
        return [] if self._link.closed else [self._link.socket]

    def drop(self) -> None:
        self._link.drop()

    def listen(self) -> None:
        if self._link.closed:
            return
        for message in self._link.hear():
            self._silence = 0.0
            if "hub" in message:
                self._hub = Process(*message["hub"])
            elif "verdict" in message:
                rank, line, process = message["verdict"]
                self._seat.leave(Verdict(rank, line, Process(*process) if process else None), False)
            elif "ended" in message:
                rank, how, code = message["ended"]
                self.ended.setdefault(rank, (how, code))
                self._seat.heard(rank, how, code)
        if self._link.closed:
            self._without_hub()

    def _without_hub(self) -> None:
        if 0 not in self.ended:
            self._lost = time.monotonic() + INQUEST
        elif self._ending is not None:
            self.ended.setdefault(self._seat.rank, self._ending)

    def beat(self, beat: Beat) -> None:
        self._link.say(beat=beat)

    def end(self, how: str, code: int) -> None:
        self._ending = how, code
        self._link.say(end=self._ending)
        if self._link.closed:
            self._without_hub()

    def over(self) -> bool:
        self._link.drop()
        return True

    def accuse(self, verdict: Verdict) -> None:
        if self._accused is None:
            self._accused = time.monotonic() + ANSWER, verdict
            self._link.say(accuse=verdict.line)

    def inquest(self, final: bool = False) -> None:
        if self._lost is not None:
            line = of_lost_link(self._seat.names[0], self._hub, self._seat.process, final or time.monotonic() > self._lost)
            if line:
                self._leave_without_hub(Verdict(0, line, self._hub))

    def judge(self, seconds: float) -> None:
        self._link.flush()
        self.inquest()
        if self._accused is not None and time.monotonic() > self._accused[0]:
            self._leave_without_hub(self._accused[1])
        if 0 not in self.ended:
            self._silence += seconds
        if self._silence > self._seat.patience:
            line = of_silence(self._seat.names[0], self._hub, self._seat.process, self._seat.patience)
            self._leave_without_hub(Verdict(0, line, self._hub))

    def _leave_without_hub(self, verdict: Verdict) -> None:
        """The lowest rank that is left speaks; the others give it the time to, since their end makes a launcher end all."""
        lowest = min((rank for rank in range(1, len(self._seat.names)) if rank not in self.ended), default=self._seat.rank)
        if lowest < self._seat.rank:
            time.sleep(3)
        self._seat.leave(verdict, lowest >= self._seat.rank)

    def finish(self) -> None:
        # a connection that is closed over unread data may lose what was said last
        self._link.hear()


class Solo(Circle):
    """The part of a rank that has no others: it accuses itself, and speaks."""

    def sockets(self) -> list[socket.socket]:
        return []

    def drop(self) -> None:
        pass

    def listen(self) -> None:
        pass

    def beat(self, beat: Beat) -> None:
        pass

    def end(self, how: str, code: int) -> None:
        self.ended[self._seat.rank] = how, code

    def over(self) -> bool:
        return True

    def accuse(self, verdict: Verdict) -> None:
        self._seat.leave(verdict, True)

    def inquest(self, final: bool = False) -> None:
        pass

    def judge(self, seconds: float) -> None:
        pass

    def finish(self) -> None:
        pass


def _listen_everywhere() -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", 0), backlog=4096)
