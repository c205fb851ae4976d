"""Leaving a training stage early and whole: on SIGTERM or SIGUSR1, as batch systems send ahead of their limits, or at a limit of its own.

All ranks leave after the same step. The first one names it, far enough ahead that no collective is missed: within a step of it come those
that train together, and never before it those that it feeds. A rank that depends on nobody may have gone past; it moves the step on.
Once the first rank has done all its steps nobody leaves any more: the others catch up and the stage ends.
"""

import os
import signal
import threading
import time
import weakref
from types import FrameType
from typing import Any

from torch.distributed import Store

from wtn_pretrain.parallel.launch import Place, shared_store, wait_for_rank

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
AHEAD = 5
"""Steps from where the first rank stands to the one after which all leave."""

_notices: "weakref.WeakSet[Notice]" = weakref.WeakSet()


class Notice:
    """Whether this process has been told to end soon. Takes the signals from construction to `close`, on the main thread."""

    def __init__(self, seconds: float = 0.0) -> None:
        """`seconds`: from now on, after which it is to end by itself; 0: none."""
        self._until = time.monotonic() + seconds if seconds else None
        self._limit = seconds
        self._signal: int | None = None
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in SIGNALS}
            _notices.add(self)

    @property
    def why(self) -> str | None:
        """What has told it; None: nothing."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if self._until is not None and time.monotonic() >= self._until:
            return f"the time limit of {self._limit / 60:g} minutes"
        return None

    def close(self) -> None:
        """Gives the signals back."""
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}

    def _take(self, number: int, frame: FrameType | None) -> None:
        # told again, it goes on leaving: batch systems and launchers both pass a signal on
        self._signal = number


class Departure:
    """After which step of a stage all ranks leave it. Made by every rank at the same place in its work."""

    def __init__(self, notice: Notice, place: Place) -> None:
        self._notice, self._place = notice, place
        self._store: Store = shared_store(place)
        self._step: int | None = None
        self._last = -1
        self.why = ""

    def due(self, step: int) -> bool:
        """Whether this rank leaves after `step` steps; to be asked by every rank wherever it could, with rising steps."""
        if self._place.world_size == 1:
            self.why = self._notice.why or ""
            return bool(self.why)
        why = self._notice.why
        if why and not self._store.check(["why"]):
            self._store.set("why", why)
        if self._step is None and self._place.rank == 0 and self._store.check(["why"]):
            self._move(step + AHEAD)
        self._look()
        if self._step is not None and self._last >= self._step:
            # it could have left there, and did not know
            self._move(step + AHEAD)
        self._last = step
        return self._step is not None and step >= self._step

    def together(self, step: int) -> bool:
        """Waits, where `step` was due, for the others; whether all have come. If not, a rank was past it: go on until it is due again."""
        if self._place.world_size == 1:
            return True
        here = f"here-{step}"
        self._store.add(here, 1)
        known = self._step

        def settled() -> bool:
            self._look()
            return self._step != known or self._store.add(here, 0) == self._place.world_size

        wait_for_rank(settled)
        self.why = self._store.get("why").decode()
        return self._step == known

    def finish(self) -> None:
        """Waits until all ranks have kept what they have: a launcher ends the others once one has left."""
        if self._place.world_size > 1:
            self._store.add("kept", 1)
            wait_for_rank(lambda: self._store.add("kept", 0) == self._place.world_size)

    def _look(self) -> None:
        if self._store.check(["step"]):
            self._step = int(self._store.get("step"))

    def _move(self, step: int) -> None:
        """Names a later step; of several ranks that do so the latest step stays."""
        known = self._store.get("step").decode() if self._store.check(["step"]) else ""
        while not known or int(known) < step:
            found = self._store.compare_set("step", known, str(step)).decode()
            if found == str(step):
                break
            known = found


def heed_parent_alone(worker: int = 0) -> None:
    """Makes a data loader's worker (number `worker`) end on these signals only if its parent sends them.

    Batch systems send them to every process of a job, and the rank needs its workers until it has left. Blocks them in this process, so
    that it works beside torch's own handlers.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    parent = os.getppid()

    def heed() -> None:
        while signal.sigwaitinfo(SIGNALS).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=heed, name="signals", daemon=True).start()


def _drop_after_fork() -> None:
    # a process of its own making does not leave by steps
    for notice in list(_notices):
        notice.close()
    _notices.clear()


os.register_at_fork(after_in_child=_drop_after_fork)
