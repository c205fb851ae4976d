"""One report of all ranks: a step is reported when every span has done it."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist

from wtn_pretrain.imitation.wiring import Wiring
from wtn_pretrain.training.monitor import Monitor

EVERY = 0.5
"""Seconds between looks at the others."""


class Told(NamedTuple):
    """What a span says of a step that is logged."""

    losses: Mapping[Any, float]
    """Unit -> loss."""
    skipped: int
    """Steps that its units have left out so far."""


class Progress:
    """Collects what the leaders of the spans report, on rank 0, for one bar and one `metrics.jsonl`."""

    def __init__(self, monitor: Monitor, wiring: Wiring, store: dist.Store, start: int, total: int, samples: int, log_every: int) -> None:
        self._monitor, self._wiring, self._store = monitor, wiring, store
        self._reported, self._total, self._samples, self._log_every = start, total, samples, log_every
        self._told = self._start = start
        self._looked = time.monotonic()
        self._details: dict[int, dict[str, Any]] = {}
        self._spans = len(wiring.plan.spans)
        self._heard = 0
        """Of what spans have said that their units left out, how much stands in the records."""

    def logs(self, step: int) -> bool:
        """Whether the losses of a step are to be reported."""
        return step % self._log_every == 0 or step == self._total

    def done(self, step: int, details: Mapping[str, Any], told: Told | None, left_out: Sequence[int] = (), now: bool = False) -> None:
        """This rank has done `step` (from 1, over all phases). `told`: at the steps that are logged. `left_out`: the units that have left
        it out. `now`: others hear of it at once."""
        if not self._wiring.leads:
            return
        if told is not None:
            self._store.set(f"told-{step}-{self._wiring.seat.span}", json.dumps(told))
        if left_out:
            # with its step, logged or not: a checkpoint may count whose steps have been reported
            self._store.set(f"left-out-{step}-{self._wiring.seat.span}", json.dumps(list(left_out)))
            self._store.add("left-out", 1)
        if self._wiring.seat.span == 0:
            self._details[step] = dict(details)
        moment = time.monotonic()
        if self._spans > 1 and told is None and step < self._total and not now and moment - self._looked < EVERY:
            return
        self._looked = moment
        self._store.add(f"at-{self._wiring.seat.span}", step - self._told)
        self._told = step
        if self._wiring.seat.span == 0:
            self._report()

    @property
    def reported(self) -> int:
        """The last step that rank 0 has written down; elsewhere all of them."""
        return self._reported if self._wiring.place.rank == 0 else self._total

    def finish(self, step: int) -> bool:
        """Reports what has come in since; whether all spans have done `step`."""
        if self._wiring.place.rank == 0:
            self._report()
        return self._wiring.place.rank != 0 or self._reported >= step

    def _report(self) -> None:
        through = self._start + min(self._store.add(f"at-{span}", 0) for span in range(self._spans))
        said = self._store.add("left-out", 0)
        for step in range(self._reported + 1, through + 1):
            values = self._details.pop(step)
            if self.logs(step):
                losses: dict[int, float] = {}
                skipped = 0
                for span in range(self._spans):
                    key = f"told-{step}-{span}"
                    told = Told(*json.loads(self._store.get(key)))
                    self._store.delete_key(key)
                    losses |= {int(unit): value for unit, value in told.losses.items()}
                    skipped += told.skipped
                values = {**_shown(losses, self._wiring.plan.units), **values, **({"skipped": skipped} if skipped else {})}
            self._monitor.step(step, values, samples=self._samples)
            if said > self._heard and (units := self._left_out(step)):
                self._monitor.event("skipped", step=step, units=sorted(units))
        self._reported = max(self._reported, through)

    def _left_out(self, step: int) -> list[int]:
        """The units of all spans that have left out a step, asked once."""
        units: list[int] = []
        for span in range(self._spans):
            key = f"left-out-{step}-{span}"
            if self._store.check([key]):
                units += json.loads(self._store.get(key))
                self._store.delete_key(key)
                self._heard += 1
        return units


def _shown(losses: Mapping[int, float], units: int) -> dict[str, Any]:
    values: Sequence[float | None] = [losses.get(unit) for unit in range(units)]
    return {"loss": sum(losses.values()) / len(losses), "units": list(values)}
