"""Faults on purpose, and what comes of them: kills, disks that fail, a clock that jumps, ranks that freeze.

python -m tests.faults                      # all of it
python -m tests.faults --kills 20 --only "wide, ZeRO 2" --seed 7
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.faults.broken import CASES, broken, build, compiler, frozen, jumping, shimmed, twice
from tests.faults.kills import Trial, trial
from tests.faults.layouts import LAYOUTS, Runs
from tests.running import ROOT, Forge

sys.path.insert(0, str(ROOT / "benchmarks"))
from common import record, table

SIGNALS = {"SIGKILL": 9, "SIGSTOP": 19}
FROZEN = ("wide, ZeRO 0", "narrow, 2 spans", "narrow, 2 replicas, ZeRO 1", "finetune, ZeRO 2")
CLOCKED = ("wide, ZeRO 2", "narrow, 2 spans", "finetune, alone")


def campaign(runs: Runs, names: Sequence[str], kills: int, seed: int) -> list[Trial]:
    """Trials of one layout after the other until ranks have been killed so many times in all."""
    choose = random.Random(seed)
    trials: list[Trial] = []
    while (done := sum(len(one.kills) for one in trials)) < kills:
        name, own = names[len(trials) % len(names)], choose.randrange(10**6)
        # said before, so that a trial that never ends can be repeated
        print(f"{done}/{kills} kills; {name}, trial seed {own}", end="", flush=True)
        made = trial(runs, name, own, choose.randrange(1, 6))
        trials.append(made)
        moments = ", ".join(f"{kill.moment}{' in a save' if kill.in_save else ''}" for kill in made.kills)
        print(f": {len(made.kills)} kills ({moments}), {made.starts} starts, {'; '.join(made.problems) or 'bit for bit'}", flush=True)
        if len(trials) > 20 * len(names) and not done:
            raise SystemExit("no rank could be killed: every run ends before the moment comes")
    return trials


def summary(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """A row a layout."""
    rows = []
    for name in dict.fromkeys(one.layout for one in trials):
        mine = [one for one in trials if one.layout == name]
        kills = [kill for one in mine for kill in one.kills]
        noticed = [kill.seconds for kill in kills if kill.at_work and LAYOUTS[name].ranks > 1]
        rows.append(
            {
                "layout": name,
                "ranks": LAYOUTS[name].ranks,
                "trials": len(mine),
                "kills": len(kills),
                "in_save": sum(kill.in_save for kill in kills),
                "before_first_step": sum(not kill.at_work for kill in kills),
                "noticed_median": statistics.median(noticed) if noticed else None,
                "noticed_most": max(noticed, default=None),
                "lost": sum("stood there" in problem or "damaged" in problem for one in mine for problem in one.problems),
                "problems": [problem for one in mine for problem in one.problems],
            }
        )
    return rows


def show(figures: dict[str, Any]) -> str:
    """What was found, for people."""

    def seconds(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    rows = [
        [
            row["layout"],
            *map(str, (row["trials"], row["kills"], row["in_save"], row["before_first_step"])),
            seconds(row["noticed_median"]),
            seconds(row["noticed_most"]),
            str(row["lost"]),
            "no" if row["problems"] else "yes",
        ]
        for row in figures["kills"]
    ]
    total = [sum(row[key] for row in figures["kills"]) for key in ("trials", "kills", "in_save", "before_first_step", "lost")]
    rows.append(["all", *map(str, total[:4]), "", "", str(total[4]), "no" if any(row["problems"] for row in figures["kills"]) else "yes"])
    head = ["layout", "trials", "kills", "in a save", "before step 1", "noticed s", "most s", "lost", "bit for bit"]
    found = [table(head, rows)]
    for title in ("disks", "clocks", "signals", "folders"):
        if figures[title]:
            lines = [[row["name"], str(row["code"]), seconds(row["seconds"]), "no" if row["problems"] else "yes"] for row in figures[title]]
            found.append(table([title, "exit code", "seconds", "as it must"], lines))
    return "\n\n".join(found)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="ranks to kill in all (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="from which the trials' seeds follow (default 0)")
    parser.add_argument("--only", action="append", choices=list(LAYOUTS), metavar="LAYOUT", help=f"one of {', '.join(LAYOUTS)}")
    parser.add_argument("--trial-seed", type=int, help="repeat one trial, of --only LAYOUT")
    parser.add_argument("--no-disks", action="store_true", help="leave out disks, clocks and signals")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE as well")
    options = parser.parse_args()
    names = options.only or list(LAYOUTS)
    began = datetime.now(UTC)
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        folder = Path(temporary)
        (folder / "forge").mkdir()
        shim = build(folder) if compiler() else None
        if shim is None:
            print("no C compiler: disks and clocks are left out", file=sys.stderr)
        forge = Forge(folder / "forge", shimmed(shim) if shim else None)
        try:
            runs = Runs(forge, folder)
            if options.trial_seed is not None:
                trials = [trial(runs, names[0], options.trial_seed, 5)]
            else:
                trials = campaign(runs, names, options.kills, options.seed)
            outcomes: dict[str, list[Any]] = {"disks": [], "clocks": [], "signals": [], "folders": []}
            if not options.no_disks:
                work = [("disks", lambda name=name: broken(runs, name)) for name in CASES if shim]
                work += [("clocks", lambda name=name: jumping(runs, name)) for name in CLOCKED if shim]
                work += [("signals", lambda name=name, by=by: frozen(runs, name, by)) for by in SIGNALS.values() for name in FROZEN]
                work += [("folders", lambda name=name: twice(runs, name)) for name in ("wide, ZeRO 2", "narrow, 2 spans")]
                for title, do in work:
                    outcomes[title].append(do())
                    done = outcomes[title][-1]
                    print(f"{title}: {done.name}: {'; '.join(done.problems) or 'as it must'}", flush=True)
        finally:
            forge.close()
    figures = {
        **record(),
        "command": "python -m tests.faults " + " ".join(sys.argv[1:]),
        "minutes": round((datetime.now(UTC) - began).total_seconds() / 60, 1),
        "kills": summary(trials),
        **{title: [one._asdict() for one in found] for title, found in outcomes.items()},
        "trials": [{**one._asdict(), "kills": [kill._asdict() for kill in one.kills]} for one in trials],
    }
    print("", *(f"{key + ':':10}{figures[key]}" for key in ("date", "commit", "hardware", "command", "minutes")), "", sep="\n")
    print(show(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    bad = [problem for row in figures["kills"] for problem in row["problems"]]
    bad += [problem for title in outcomes for row in figures[title] for problem in row["problems"]]
    for problem in bad:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
