"""Ends a run in bounded time, with one line that names the culprit, when a rank dies, hangs, is stopped or falls behind.

A thread on every rank holds a connection to that of rank 0, which hears everybody's beats and is the one to judge and to speak; the
connection of a process that dies ends with it, so that a death is known at once and on any host. Without rank 0 the lowest rank
that is left speaks. The thread runs while the main thread is stuck in a collective, and leaves through `os._exit`.
"""

import contextlib
import faulthandler
import os
import re
import select
import signal
import socket
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch.distributed

from wtn_pretrain.again import AGAIN
from wtn_pretrain.errors import Preempted, UserError
from wtn_pretrain.parallel.circle import Seat, join
from wtn_pretrain.parallel.launch import Place
from wtn_pretrain.parallel.verdict import ALL, Beat, Pace, Verdict, state_of, this_process

MISTAKE_EXIT = 2
INTERRUPT_EXIT = 128 + signal.SIGINT
TERM_EXIT = 128 + signal.SIGTERM
CONTINUES = "the same command continues from the newest checkpoint"

TICK = 0.2  # seconds between two looks
CAP = 1.0  # the most that one look counts: where the machine was suspended nobody is to blame
STUCK = 10.0  # seconds without a mark after which a second SIGTERM ends a rank that handles it
GRACE = 5.0  # seconds in which a rank leaves by itself after another has failed with a message of its own

_watches: "weakref.WeakSet[Watch]" = weakref.WeakSet()
_made = 0


class Watch:
    """Watches over the ranks from construction to `close`; a context manager.

    Made by every rank at the same place in its work, on its main thread, within `patience` seconds of one another. `names[r]` is how
    rank r is called: 'rank 1 (units 4-6)'. A rank hangs or has fallen behind after `patience` seconds (see `verdict.Pace`), and is
    given up `patience` seconds after it was last heard. Then every rank exits with `AGAIN`, and one line on standard error says
    why. Ranks may wait for one another, as in a long collective, for `together` seconds (None: `patience`). With `stacks`, a folder, every
    rank leaves the stacks of its threads there; without, the one that hangs shows its own.

    Leaving the context by an exception looks for a culprit first: where a broken connection follows from another rank's end, the run
    ends as above, without a traceback. Of several ranks that fail by themselves only the first raises. SIGTERM, where nobody handles
    it, ends the run at once and without a word (`TERM_EXIT`), also while the main thread is stuck.

    With one rank it does nothing.
    """

    def __init__(
        self, place: Place, names: Sequence[str], patience: float = 30.0, *, together: float | None = None, stacks: Path | None = None
    ) -> None:
        global _made
        if len(names) != place.world_size or patience < 5 * TICK:
            raise ValueError("one name a rank, and a patience of at least a second")
        self._what, self._step, self._marks = "start", 0, 0
        self._waits: tuple[int, ...] = ()
        self._allowed = 0.0
        self._alone = place.world_size == 1
        if self._alone:
            return
        self._rank, self._name, self._stacks = place.rank, names[place.rank], stacks
        # beside the beats of thousands of ranks, rank 0 has its own work to do
        self._every = min(patience / 6, max(1.0, place.world_size / 512))
        self._leaving = self._closing = self._dumped = False
        self._order: tuple[str, int] | None = None  # the end that the main thread wants said
        self._told = threading.Event()  # that it is said
        self._failed_at: float | None = None
        self._first_told: tuple[float, int] | None = None  # when SIGTERM came, and the marks then
        self._pace = Pace(patience)
        self._process = this_process(socket.gethostname())
        _made += 1
        self._circle = join(
            Seat(place.rank, names, patience, together or patience, self._process, self._convict, self._heard), f"watch/{_made}"
        )
        self._signals, self._bell = socket.socketpair()
        for end in (self._signals, self._bell):
            end.setblocking(False)
        self._take_signals()
        _watches.add(self)
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def at(self, what: str, step: int) -> None:
        """Says what the main thread begins now ('teacher', 'student', 'data') and at which step; costs three assignments."""
        self._what, self._step = what, step
        self._marks += 1

    def waiting(self, *ranks: int) -> "Wait":
        """A context in which the main thread waits for all of `ranks` (none given: for all others) and is not itself to blame."""
        return Wait(self, ranks or (ALL,))

    @contextlib.contextmanager
    def allow(self, seconds: float, what: str) -> Iterator[None]:
        """A context that may take as long as this without a mark: a save, a validation, a first step that compiles."""
        before, self._allowed = self._allowed, seconds
        self.at(what, self._step)
        try:
            yield
        finally:
            self._marks += 1
            self._allowed = before

    def blame(self, seconds: float = GRACE) -> int | None:
        """For who has caught a broken connection: does not return where a rank's death explains it, since the run ends then.

        Returns the rank that has failed with a message of its own, or None when nobody is to blame within `seconds`.
        """
        deadline = time.monotonic() + seconds
        while not self._alone and (self._leaving or time.monotonic() < deadline):
            failed = self._failed()
            if failed is not None and failed != self._rank and not self._leaving:
                return failed
            time.sleep(0.02)
        return None

    def close(self) -> None:
        """Says that this rank is done, so that no other calls it dead. Later calls do nothing."""
        self._end("done", 0)

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._alone or self._closing:
            return
        code = exit_code(error)
        if error is None or code == 0 or isinstance(error, Preempted):
            self.close()
            return
        if is_of_a_connection(error):
            self.blame()
        failed = self._failed()
        self._end("failed", code if failed is None else self._circle.ended[failed][1])
        first = self._failed()
        # a mistake that all ranks meet is said once by the command line, an error of this program by who is first
        if first is not None and first != self._rank and self._circle.ended[first][1] != MISTAKE_EXIT:
            _exit(self._circle.ended[first][1])

    def _failed(self) -> int | None:
        """The first rank to have failed by itself."""
        return next((rank for rank, (how, _) in list(self._circle.ended.items()) if how == "failed"), None)

    def _end(self, how: str, code: int) -> None:
        """Has the thread say how this rank ends, and gives the signals back."""
        if self._alone or self._closing:
            return
        self._closing = True
        self._order = how, code
        with contextlib.suppress(OSError):
            self._bell.send(b"\0")
        self._told.wait(2)
        while self._leaving:
            time.sleep(1)  # the thread ends the process
        self._give_signals_back()

    def _take_signals(self) -> None:
        self._terminable = False
        self._signals_before: tuple[Any, int] | None = None
        if threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGTERM)
            self._terminable = before == signal.SIG_DFL
            if self._terminable:
                # what Python handles reaches the thread through the file descriptor, wherever the main thread is stuck
                signal.signal(signal.SIGTERM, _nothing)
            self._signals_before = before, signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)

    def _give_signals_back(self) -> None:
        if self._signals_before is not None and threading.current_thread() is threading.main_thread():
            before, descriptor = self._signals_before
            signal.set_wakeup_fd(descriptor)
            if self._terminable:
                signal.signal(signal.SIGTERM, before)
            self._signals_before = None

    def _after_fork(self) -> None:
        """In a child, such as a data loader's worker: it must neither hold this rank's connections nor take its signals."""
        self._closing = self._alone = True
        self._give_signals_back()
        self._circle.drop()
        self._signals.close()
        self._bell.close()

    # what follows runs on the watch's thread

    def _run(self) -> None:
        try:
            last = due = time.monotonic()
            said = False
            while True:
                ready, _, _ = select.select([self._signals, *self._circle.sockets()], [], [], TICK)
                rung = self._signals.recv(4096) if self._signals in ready else b""
                now = time.monotonic()
                seconds, last = min(now - last, CAP), now
                self._circle.listen()
                if self._order is not None and not said:
                    said = True
                    self._circle.end(*self._order)
                if said and self._rank in self._circle.ended:
                    self._told.set()
                    if self._circle.over():
                        return
                elif not said and self._terminable and signal.SIGTERM in rung:
                    self._circle.inquest(final=True)
                    self._circle.end("told", TERM_EXIT)
                    self._leave(TERM_EXIT)
                elif not said and self._told_while_stuck(signal.SIGTERM in rung, now):
                    self._leave(TERM_EXIT)
                elif not said:
                    self._look_at_itself(seconds)
                if now >= due:
                    due = now + self._every
                    self._circle.beat(Beat(self._marks, self._step, self._what, self._waits))
                self._circle.judge(seconds)
                if self._failed_at is not None and not said and now > self._failed_at + GRACE:
                    self._leave(next(code for how, code in self._circle.ended.values() if how == "failed"))
        except Exception:
            # a watch that fails must not hang who waits for it
            traceback.print_exc()
            self._told.set()

    def _told_while_stuck(self, told: bool, now: float) -> bool:
        """Whether SIGTERM, which somebody handles, has come again after `STUCK` seconds in which the main thread did nothing."""
        if not told:
            return False
        if self._first_told is None or self._first_told[1] != self._marks:
            self._first_told = now, self._marks
            return False
        return now - self._first_told[0] > STUCK

    def _look_at_itself(self, seconds: float) -> None:
        finding = self._pace.tick(seconds, Beat(self._marks, self._step, self._what, self._waits), self._allowed)
        if finding:
            line = f"{self._name} {finding}, {_where_main_is()}"
            self._dump(shown=True)
            self._circle.accuse(Verdict(self._rank, line))

    def _heard(self, rank: int, how: str, code: int) -> None:
        if rank == self._rank:
            return
        if how == "told" and self._terminable and not self._closing:
            self._leave(TERM_EXIT)
        if how == "failed" and self._failed_at is None:
            self._failed_at = time.monotonic()

    def _convict(self, verdict: Verdict, speak: bool) -> None:
        """Ends this process, after the line, if it is this rank's to say it."""
        self._leaving = True
        self._dump(shown=False)
        if speak:
            where = f"; stacks in {self._stacks}" if self._stacks is not None else ""
            line = f"error: {verdict.line}{where}; {CONTINUES}\n"
            # past Python's streams, whose locks a stuck thread may hold
            os.write(2, (("\n" if os.isatty(2) else "") + line).encode())
        process = verdict.process
        if process is not None and verdict.rank != self._rank and process.place == self._process.place and state_of(process) is not None:
            # a stopped process would hold up its launcher for half a minute
            with contextlib.suppress(OSError):
                os.kill(process.pid, signal.SIGKILL)
        self._leave(AGAIN)

    def _leave(self, code: int) -> None:
        self._leaving = True
        self._circle.finish()
        _exit(code)

    def _dump(self, shown: bool) -> None:
        """Writes the stacks of all threads into the folder for them, or to standard error where they are to be `shown`."""
        if self._dumped or (self._stacks is None and not shown):
            return
        self._dumped = True
        with contextlib.suppress(OSError):
            if self._stacks is None:
                faulthandler.dump_traceback(2, all_threads=True)
                return
            self._stacks.mkdir(parents=True, exist_ok=True)
            with (self._stacks / f"rank-{self._rank}.txt").open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)


class Wait:
    """See `Watch.waiting`."""

    __slots__ = ("_before", "_ranks", "_watch")

    def __init__(self, watch: Watch, ranks: tuple[int, ...]) -> None:
        self._watch, self._ranks = watch, ranks

    def __enter__(self) -> None:
        watch = self._watch
        self._before = watch._waits
        watch._waits = self._ranks
        watch._marks += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        watch = self._watch
        watch._waits = self._before
        watch._marks += 1


def exit_code(error: BaseException | None) -> int:
    """The exit code with which an exception ends a process here."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPT_EXIT
    return MISTAKE_EXIT if isinstance(error, UserError) else int(error is not None)


def is_of_a_connection(error: BaseException | None) -> bool:
    """Whether an exception, or one that it follows from, may come from the end of another rank."""
    while error is not None:
        if isinstance(error, torch.distributed.DistError | ConnectionError | TimeoutError | EOFError):
            return True
        if isinstance(error, RuntimeError) and _CONNECTION.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


_CONNECTION = re.compile(r"connect|gloo|nccl|by peer|socket|broken pipe|timed? ?out|remote process", re.IGNORECASE)


def _where_main_is() -> str:
    """The function of this package, or else of any, in which the main thread is."""
    innermost = frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and "wtn_pretrain" not in Path(frame.f_code.co_filename).parts:
        frame = frame.f_back
    found = frame or innermost
    return f"in {found.f_code.co_name} ({Path(found.f_code.co_filename).name}:{found.f_lineno})" if found is not None else "nowhere"


def _exit(code: int) -> None:
    """Ends the process now: the main thread may be stuck, and what is on disk was switched in whole."""

    def flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()

    flushing = threading.Thread(target=flush, daemon=True)
    flushing.start()
    flushing.join(1)  # a stuck thread may hold a stream's lock
    os._exit(code)


def _nothing(number: int, frame: FrameType | None) -> None:
    """Handles SIGTERM in name, so that Python reports it to the file descriptor instead of the system ending the process."""


def _drop_after_fork() -> None:
    for watch in list(_watches):
        if not watch._alone:
            watch._after_fork()
    _watches.clear()


os.register_at_fork(after_in_child=_drop_after_fork)
