"""How the ranks of a pipeline spend their time, from what they have recorded (see `trace`)."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from wtn_pretrain.errors import UserError
from wtn_pretrain.files import write_text
from wtn_pretrain.training.trace import COMPUTE, GAP, INPUT, OUTPUT

UTILISATION = "utilisation.json"


class Use(NamedTuple):
    """Shares of a rank's time in the steady part of a run; `busy`, `input`, `output` and `idle` add up to 1."""

    rank: int
    name: str
    seconds: float
    """Length of the steady part, without what was not recorded."""
    busy: float
    input: float
    """Waiting for what others send."""
    output: float
    """Waiting for others to take what this rank sends."""
    idle: float
    """The rest: between spans, or at work that is not recorded."""
    work: dict[str, float]
    """`busy` by the names of the spans, the largest first; the time of a span is that outside the spans in it."""


def utilisation(events: Sequence[Mapping[str, Any]], settle: int = 0) -> list[Use]:
    """What each rank of a merged trace does on its compute lane while all ranks are at work.

    The steady part begins when the last rank has begun its first work (so the filling of the pipeline is left out) and ends when
    the first rank has ended its last (so is the draining); `settle` leaves out each rank's work of that many first steps too, which
    pay for compilation and cold caches. Ranks without any work, or without a common part, give an empty list.
    """
    names = {int(event["pid"]): str(event["args"]["name"]) for event in events if event.get("name") == "process_name"}
    lanes: dict[int, list[tuple[float, float, str]]] = {}
    steps: dict[int, dict[int, float]] = {}
    for event in events:
        if event.get("ph") != "X" or event.get("cat") != COMPUTE:
            continue
        rank, begin = int(event["pid"]), float(event["ts"])
        lanes.setdefault(rank, []).append((begin, begin + float(event["dur"]), str(event["name"])))
        step = event.get("args", {}).get("step")
        if isinstance(step, int) and event["name"] not in (INPUT, OUTPUT, GAP):
            found = steps.setdefault(rank, {})
            found[step] = min(found.get(step, begin), begin)
    begins, ends = [], []
    for rank, spans in lanes.items():
        work = [span for span in spans if span[2] not in (INPUT, OUTPUT, GAP)]
        if not work:
            return []
        starts = [begin for _, begin in sorted(steps.get(rank, {}).items())]
        begins.append(starts[min(settle, len(starts) - 1)] if starts else min(begin for begin, _, _ in work))
        ends.append(max(end for _, end, _ in work))
    if not begins or max(begins) >= min(ends):
        return []
    return [_use(rank, names.get(rank, f"rank {rank}"), spans, max(begins), min(ends)) for rank, spans in sorted(lanes.items())]


def bubble(uses: Sequence[Use]) -> float:
    """The share of all ranks' time in which they do not work."""
    seconds = sum(use.seconds for use in uses)
    return sum((1 - use.busy) * use.seconds for use in uses) / seconds if seconds else 0.0


def write_utilisation(folder: Path, uses: Sequence[Use]) -> None:
    """Writes `utilisation.json` into a stage's folder, where the report finds it."""
    ranks = [use._asdict() for use in uses]
    write_text(folder / UTILISATION, json.dumps({"bubble": bubble(uses), "ranks": ranks}, indent=1) + "\n")


def read_utilisation(path: Path) -> list[Use]:
    """What `write_utilisation` has written.

    Raises:
        UserError: the file cannot be read or holds something else.
    """
    try:
        uses = [Use(**rank) for rank in json.loads(path.read_text(encoding="utf-8"))["ranks"]]
        for use in uses:
            sum([use.seconds, use.busy, use.input, use.output, use.idle, *use.work.values()])
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: holds no utilisation of ranks; remove it and try again") from None
    return uses


def _use(rank: int, name: str, spans: Sequence[tuple[float, float, str]], begin: float, end: float) -> Use:
    times: dict[str, float] = {}
    for what, seconds in _own_times(spans, begin, end):
        times[what] = times.get(what, 0.0) + seconds
    whole = end - begin - times.pop(GAP, 0.0)
    shares = {what: seconds / whole for what, seconds in times.items()} if whole > 0 else {}
    waits_in, waits_out = shares.pop(INPUT, 0.0), shares.pop(OUTPUT, 0.0)
    busy = sum(shares.values())
    work = dict(sorted(shares.items(), key=lambda item: -item[1]))
    return Use(rank, name, whole / 1e6, busy, waits_in, waits_out, max(0.0, 1 - busy - waits_in - waits_out), work)


def _own_times(spans: Sequence[tuple[float, float, str]], begin: float, end: float) -> list[tuple[str, float]]:
    """The time between `begin` and `end` for which each span is the innermost, one that starts later being inside."""
    edges = sorted({begin, end, *(edge for first, last, _ in spans for edge in (first, last) if begin < edge < end)})
    ordered = sorted(spans, key=lambda span: (span[0], -span[1]))
    open_spans: list[tuple[float, float, str]] = []
    found, following = [], 0
    for low, high in pairwise(edges):
        while following < len(ordered) and ordered[following][0] <= low:
            open_spans.append(ordered[following])
            following += 1
        open_spans = [span for span in open_spans if span[1] > low]
        if open_spans:
            found.append((open_spans[-1][2], high - low))
    return found
