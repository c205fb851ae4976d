"""How a stage says where it stands: a progress bar or plain lines, TensorBoard events and `metrics.jsonl`."""

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from tqdm import tqdm

from wtn_pretrain.errors import UserError
from wtn_pretrain.files import write_text
from wtn_pretrain.training.passing import open_monitors

METRICS = "metrics.jsonl"
SETTLE = 5  # steps left out of the rate: they pay for compilation, allocation and cold caches
ROLLBACK = "rollback"
"""The event that a stage has gone back to the step under which it stands."""
RESERVED = {"time", "stage", "step", "kind"}


class Work(NamedTuple):
    """What a stage's pace is told in, beside samples a second."""

    ranks: int = 1
    peak: float | None = None
    """FLOP/s that the device of a rank promises; None: not known."""
    memory: Callable[[], int] | None = None
    """Bytes: the most that this rank has held."""


class Monitor:
    """Where a stage says how it is doing. Does nothing on ranks other than 0.

    `folder` receives `metrics.jsonl` and `events/`; records of `stage` beyond step `start` are dropped from both, so that a
    resumed stage reads as one uninterrupted run (`start=0` drops all of them). `steps` is the last step of the stage.
    Raises `UserError` when an existing `metrics.jsonl` is corrupt.
    """

    def __init__(
        self,
        folder: Path,
        stage: str,
        steps: int,
        *,
        start: int = 0,
        log_every: int = 20,
        rank: int = 0,
        tensorboard: bool = True,
        title: str | None = None,
        work: Work | None = None,
    ) -> None:
        if log_every < 1:
            raise UserError(f"log_every {log_every}: give a number of steps of at least 1")
        self._active = rank == 0
        if not self._active:
            return
        self._stage, self._steps, self._log_every = stage, steps, log_every
        # of several seeds, the further ones run in folders of their own
        seed = Path(folder).parent.name
        self._title = title or (f"{stage} {seed}" if seed.startswith("seed-") else stage)
        self._step = self._start = start
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _drop_beyond(folder / METRICS, stage, start, steps, resumed=True)
        self._folder = folder
        self._file = (folder / METRICS).open("ab", buffering=0)
        self._unwritten, self._warned = b"", False
        self._events: Any = None
        if tensorboard:
            self._events = self._open_events(start)
        self._passing = open_monitors()
        self._bar: tqdm[Any] | None = None
        # some terminals do not know their width: a bar on them would be empty
        if sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns:
            shape = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left{postfix}]"
            self._bar = tqdm(total=steps, initial=start, desc=self._title, bar_format=shape, dynamic_ncols=True, file=sys.stderr)
        self._work = work or Work()
        self._settled = False
        self._samples = 0  # since `_begin`, as are `_tokens`, `_flops`, `_counted` steps and `_paused` seconds of validation
        self._tokens = 0
        self._flops = 0.0
        self._counted = 0
        self._paused = 0.0
        self._begin = self._last = time.perf_counter()

    def step(self, step: int, scalars: Mapping[str, Any], samples: int, flops: float = 0.0, tokens: int = 0) -> None:
        """Report training step `step` (from 1), which took `samples` samples, of `tokens` each, and `flops` of the model over all ranks.

        `scalars` holds numbers, 0-dim tensors, strings such as `phase`, and `units`: the imitation error of each block, a
        list or a 1-dim tensor. Tensors are read only at the steps that are written, so other steps do not wait for the device.
        """
        if not self._active:
            return
        self._step, self._last = step, time.perf_counter()
        self._samples += samples
        self._tokens += samples * tokens
        self._flops += flops
        self._counted += 1
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        if step % self._log_every == 0 or step == self._steps:
            self._log(step, {name: _plain(value) for name, value in scalars.items()})
        if step == self._start + SETTLE:
            self._settled, self._begin = True, time.perf_counter()
            self._samples, self._tokens, self._flops, self._counted, self._paused = 0, 0, 0.0, 0, 0.0

    def evaluated(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Report a validation result after training step `step`; the time it took is left out of the training rate."""
        if not self._active:
            return
        values = {name: _plain(value) for name, value in scalars.items()}
        self._write("valid", step, values)
        self._chart("valid/", step, values)
        figures = ", ".join(f"{name} {_short(value)}" for name, value in values.items() if isinstance(value, int | float))
        self._tell(f"{self._title} {step}/{self._steps} validation: {figures}")
        now = time.perf_counter()
        self._paused += now - self._last
        self._last = now

    def event(self, name: str, **values: Any) -> None:
        """Record anything else in `metrics.jsonl`; `step` may be among `values`, else the last reported step is taken."""
        if not self._active:
            return
        step = int(values.pop("step", self._step))
        self._write("event", step, {"name": name, **{key: _plain(value) for key, value in values.items()}})

    def rewind(self, start: int) -> None:
        """Go back to step `start`: records beyond it are dropped, as if the stage were resumed there."""
        if not self._active:
            return
        self._flush(last=True)
        self._file.close()
        _drop_beyond(self._folder / METRICS, self._stage, start, self._steps)
        self._file = (self._folder / METRICS).open("ab", buffering=0)
        if self._events is not None:
            self._events.close()
            self._events = self._open_events(start)
        if self._bar is not None:
            self._bar.update(start - self._bar.n)
        self._step = start

    def close(self) -> None:
        """Flush and close what is open; a second call does nothing.

        Raises:
            UserError: records could not be written, now or before.
        """
        if not self._active:
            return
        self._active = False
        if self._bar is not None:
            self._bar.close()
        if self._events is not None:
            try:
                self._events.close()
            except OSError as error:
                self._uncharted(error)
        if self._passing is not None:
            self._passing.close()
        try:
            self._flush(last=True)
        finally:
            self._file.close()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _log(self, step: int, values: dict[str, Any]) -> None:
        elapsed = time.perf_counter() - self._begin
        if self._counted and elapsed > self._paused:
            values |= self._pace(elapsed - self._paused)
        if self._work.memory is not None:
            values["memory"] = self._work.memory()
        self._write("train", step, values)
        self._chart("", step, values)
        told = ", ".join(part for part in (_headline(values), *_figures(values)) if part)
        if self._bar is not None:
            self._bar.set_postfix_str(told)
            return
        left = elapsed / self._counted * (self._steps - step) if self._counted else math.nan
        ending = f", {tqdm.format_interval(left)} left" if math.isfinite(left) else ""
        self._tell(f"{self._title} {step}/{self._steps} {told}{ending}")

    def _pace(self, seconds: float) -> dict[str, float]:
        """Figures of the steps since `_begin`, which took so many seconds; what the first steps do says nothing of FLOPs."""
        pace = {"rate": round(self._samples / seconds, 3)}
        if self._tokens:
            pace["tokens_rate"] = round(self._tokens / seconds, 1)
        if self._flops and self._settled:
            # of the model alone: what is computed twice counts once
            pace["flops_rate"] = self._flops / seconds / self._work.ranks
            if self._work.peak:
                pace["mfu"] = round(pace["flops_rate"] / self._work.peak, 4)
        return pace

    def _write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        taken = RESERVED & values.keys()
        if taken:
            raise ValueError(f"metric name {min(taken)} is taken by the record itself; choose another")
        now = datetime.now().astimezone().isoformat(timespec="milliseconds")
        record = {"time": now, "stage": self._stage, "step": step, "kind": kind, **_finite(values)}
        self._unwritten += json.dumps(record, allow_nan=False).encode() + b"\n"
        self._flush()

    def _flush(self, last: bool = False) -> None:
        """Write what waits. A disk that is full or broken holds up no training: records wait for the next one, but not at the `last`."""
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
            self._warned = False
        except OSError as error:
            place = f"{self._folder / METRICS}: cannot be written ({error.strerror})"
            if last:
                raise UserError(f"{place}; free the place or choose another folder") from None
            if not self._warned:
                self._warned = True
                self._tell(f"{place}; its records wait in memory, and the training goes on")

    def _open_events(self, start: int) -> Any:
        # slow to import, and not needed by those who only read metrics
        from torch.utils.tensorboard import SummaryWriter

        _hush_writers()
        # TensorBoard purges from the given step on, and steps count from 1
        try:
            return SummaryWriter(self._folder / "events", purge_step=start + 1 if start else 0, flush_secs=30)
        except OSError as error:
            self._uncharted(error)
            return None

    def _uncharted(self, error: OSError) -> None:
        self._tell(f"{self._folder / 'events'}: cannot be written ({error.strerror}); TensorBoard gets no more of this start")

    def _chart(self, group: str, step: int, values: Mapping[str, Any]) -> None:
        charted: list[tuple[str, float]] = []
        for name, value in values.items():
            parts = {f"{name}/{i:02d}": part for i, part in enumerate(value)} if isinstance(value, list) else {name: value}
            charted += [
                (f"{group}{tag}", part) for tag, part in parts.items() if isinstance(part, int | float) and not isinstance(part, bool)
            ]
        if self._events is not None:
            try:
                for tag, part in charted:
                    self._events.add_scalar(f"{self._stage}/{tag}", part, step)
            except OSError as error:
                # its thread has ended with this
                self._events = None
                self._uncharted(error)
        if self._passing is not None:
            # under the title: seeds, which have folders of their own, share these places
            self._passing.write([(f"{self._title}/{tag}", part, step) for tag, part in charted])

    def _tell(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr)


def _hush_writers() -> None:
    """Keeps the traceback of a thread back in which TensorBoard writes: whoever adds to it next says in one line what has ended it."""
    shown = threading.excepthook
    if getattr(shown, "hushed", False):
        return

    def hook(told: threading.ExceptHookArgs) -> None:
        if not (isinstance(told.exc_value, OSError) and type(told.thread).__module__.startswith("tensorboard")):
            shown(told)

    hook.hushed = True  # type: ignore[attr-defined]
    threading.excepthook = hook


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, oldest first; an unreadable last line, left by a crash, is ignored.

    Raises `UserError` naming file and line for any other line that is not a record.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"metrics {path}: {error.strerror}") from None
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record["step"], int) or not record.keys() >= RESERVED:
                raise ValueError("no record of a stage")
        except (ValueError, KeyError) as error:
            if number == len(lines):
                break
            raise UserError(f"{path}:{number}: not a metrics record ({error}); remove the line and try again") from None
        records.append(record)
    return records


def _drop_beyond(path: Path, stage: str, start: int, steps: int, resumed: bool = False) -> None:
    """Rewrite `path` without the records of `stage` beyond `start`, its validation after the last of `steps`, which follows every start,
    and a line cut short by a crash.

    `resumed`: what a start says that goes on from there; it has yet to go back there itself, if one did before it.
    """
    if not path.exists():
        return

    def stays(record: Mapping[str, Any]) -> bool:
        if record["stage"] != stage or record["step"] < start:
            return True
        again = (record["kind"] == "valid" and record["step"] == steps) or (resumed and record.get("name") == ROLLBACK)
        return bool(start) and record["step"] == start and not again

    write_text(path, "".join(json.dumps(record) + "\n" for record in read_metrics(path) if stays(record)))


def _plain(value: Any) -> Any:
    """`value` as JSON has it: tensors and numpy scalars become numbers, 1-dim tensors and tuples lists, paths strings."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if hasattr(value, "tolist"):  # one transfer for a whole tensor
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return float(value)


def _finite(value: Any) -> Any:
    """`value` with null for NaN and infinities, which JSON does not know."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list) else value


def _headline(values: Mapping[str, Any]) -> str:
    """The loss; while imitating without one, the mean error of the blocks."""
    if isinstance(values.get("loss"), int | float):
        return f"loss {_short(values['loss'])}"
    units = [unit for unit in values.get("units") or [] if isinstance(unit, int | float) and math.isfinite(unit)]
    return f"error {_short(sum(units) / len(units))}" if units else ""


def _figures(values: Mapping[str, Any]) -> list[str]:
    """How it learns and how fast, as far as it is known."""
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float) and math.isfinite(value)}
    told = [
        f"{name} {_short(numbers[key])}" for name, key in (("lr", "lr"), ("norm", "grad_norm"), ("scale", "loss_scale")) if key in numbers
    ]
    if numbers.get("skipped"):
        told.append(f"{numbers['skipped']:.0f} skipped")
    if numbers.get("overflows"):
        told.append(f"{numbers['overflows']:.0f} overflows")
    if "rate" in numbers:
        told.append(f"{_short(numbers['rate'])} samples/s")
    if "tokens_rate" in numbers:
        told.append(f"{_short(numbers['tokens_rate'])} tokens/s")
    if "flops_rate" in numbers:
        told.append(f"{_short(numbers['flops_rate'] / 1e12)} TFLOP/s" + (f" (MFU {numbers['mfu']:.2f})" if "mfu" in numbers else ""))
    if "memory" in numbers:
        told.append(f"{numbers['memory'] / 2**30:.2f} GiB")
    return told


def _short(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 or not math.isfinite(value) else f"{value:,.0f}"
