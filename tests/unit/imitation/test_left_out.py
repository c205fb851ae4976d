"""Steps of imitation that must not be taken are left out, by the units that cannot take them and bit for bit; too many end the run."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.running import equal_bits, records
from tests.unit.imitation.test_engine import Rows, section, setup
from wtn_pretrain.errors import UserError
from wtn_pretrain.imitation.checkpoint.manifest import Stored
from wtn_pretrain.imitation.config import ImitateSection
from wtn_pretrain.imitation.engine import Run, open_stream
from wtn_pretrain.imitation.imitator import Imitator
from wtn_pretrain.imitation.learner import Learner
from wtn_pretrain.training.monitor import METRICS, read_metrics

pytestmark = pytest.mark.usefixtures("one_rank")

STEPS = 8
Seen = dict[int, list[tuple[dict[str, Tensor], dict[str, Any]]]]
"""Unit -> after every step: what it holds (buffers too), and its optimizer's state."""


def copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {str(key): copied(one) for key, one in value.items()}
    return [copied(one) for one in value] if isinstance(value, list) else value


def settings(**values: Any) -> ImitateSection:
    return section(**{"schedule": "parallel", "steps": STEPS, "micro_batch_size": 2, "init": "random", **values})


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Filled while a run goes on."""
    found: Seen = {}
    step = Learner.step

    def watched(self: Learner, *arguments: Any) -> bool:
        ends = self.ends_step
        left_out = step(self, *arguments)
        if ends:
            for unit in self.units:
                found.setdefault(unit.index, []).append((copied(unit.own_state()), copied(self._optimizer.state_dict()["state"])))
        return left_out

    monkeypatch.setattr(Learner, "step", watched)
    return found


def poison_gradient(imitator: Imitator, unit: int, passes: set[int]) -> None:
    """Makes a gradient of one unit no number in some backward passes (from 0)."""
    counted = iter(range(10**6))
    parameter = next(iter(imitator.units[unit].student.parameters()))
    parameter.register_hook(lambda gradient: gradient * torch.nan if next(counted) in passes else gradient)


def poison_rows(run: Run, steps: list[int]) -> list[list[int]]:
    """Makes one image of each step's batch no number; the samples of those batches."""
    batches = [run.stream.sample_ids(step)[0].tolist() for step in steps]
    rows = run.stream.dataset
    assert isinstance(rows, Rows)
    for batch in batches:
        rows.inputs["pixels"][batch[-1]] = torch.nan
    return batches


def opened(folder: Path, chosen: ImitateSection, name: str = "resnet inner") -> Run:
    imitator, stream, order = setup(name, chosen)
    return Run(imitator, order, open_stream(stream.dataset, chosen, stream.seed), folder)


def skipped(folder: Path) -> list[tuple[int, list[int]]]:
    """The steps that were left out, and by which units."""
    return [(event["step"], event["units"]) for event in records(folder, "event") if event["name"] == "skipped"]


def same(left: Any, right: Any) -> bool:
    """Bit for bit, whatever is nested in what."""
    if isinstance(left, Tensor):
        return equal_bits({"": left}, {"": right})
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(value, right[key]) for key, value in left.items())
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


@pytest.mark.parametrize("clip", [1.0, 0.0], ids=["clipped", "not clipped"])
@pytest.mark.parametrize("name", ["resnet inner", "bert inner"])
def test_a_gradient_that_is_no_number_holds_up_its_unit_alone(name: str, clip: float, tmp_path: Path, seen: Seen) -> None:
    chosen = settings(clip=clip)
    opened(tmp_path / "whole", chosen, name).go()
    whole = dict(seen)
    seen.clear()
    run = opened(tmp_path / "poisoned", chosen, name)
    # the second micro-batch of step 3
    poison_gradient(run.imitator, 2, {7})
    run.go()
    for unit, states in seen.items():
        if unit != 2:
            assert same(states, whole[unit])
            continue
        assert same(states[:3], whole[unit][:3])
        assert same(states[3], states[2])
        for step in (4, 5, 6, 7):
            assert not same(states[step], states[step - 1])
    told = records(run.folder)
    assert [record.get("skipped") for record in told] == [None] * 3 + [1] * 5
    assert skipped(run.folder) == [(4, [2])]
    # its loss was a number
    assert all(record["units"][2] is not None for record in told)
    assert run.imitator.work.skipped == 1


@pytest.mark.parametrize("schedule", ["parallel", "hybrid", "joint", "bottom_up"])
def test_an_image_that_is_no_number_holds_up_all_units(schedule: str, tmp_path: Path, seen: Seen) -> None:
    run = opened(tmp_path, settings(schedule=schedule))
    ((*_, poisoned),) = poison_rows(run, [4])
    run.go()
    left_out = {step for step in range(STEPS) if poisoned in run.stream.sample_ids(step)[0]}
    assert 4 in left_out and len(left_out) < STEPS
    phases = 3 if schedule == "bottom_up" else 1
    # the stem is the teacher's
    for states in (seen[unit] for unit in (1, 2, 3)):
        assert len(states) == STEPS
        for step in range(1, STEPS):
            assert same(states[step][0], states[step - 1][0]) == (step in left_out)
        assert all(value.isfinite().all() for value in states[-1][0].values() if value.is_floating_point())
    told = records(run.folder)
    assert [record["step"] for record in told if record["loss"] is None] == [
        phase * STEPS + step + 1 for phase in range(phases) for step in sorted(left_out)
    ]
    units = 1 if schedule in ("joint", "bottom_up") else 3
    assert told[-1]["skipped"] == len(left_out) * phases * units


def test_units_that_come_and_go_tell_of_each_step_when_all_have_passed_it(tmp_path: Path) -> None:
    """The first step that is left out is the second one of a visit of three."""
    left = []
    for name in ("at once", "one by one"):
        run = opened(tmp_path / name, settings(offload_batches=3, checkpoint_every=100))
        run.imitator.residence.students_move = name == "one by one"
        poison_rows(run, [4])
        run.go()
        left.append(run)
    mine, other = left
    for field in ("step", "loss", "skipped"):
        assert [record.get(field) for record in records(mine.folder)] == [record.get(field) for record in records(other.folder)]
    assert skipped(mine.folder) == skipped(other.folder) and (5, [1, 2, 3]) in skipped(mine.folder)
    # an event never stands before its step
    told = [(record["step"], record["kind"]) for record in read_metrics(other.folder / METRICS)]
    assert [step for step, _ in told] == sorted(step for step, _ in told)
    assert all(equal_bits(one.own_state(), two.own_state()) for one, two in zip(mine.imitator.units, other.imitator.units, strict=True))


def test_the_weights_after_a_step_that_is_left_out_are_saved(tmp_path: Path) -> None:
    run = opened(tmp_path, settings(checkpoint_every=5, checkpoint_keep=9))
    poison_rows(run, [4])
    run.go()
    for name in ("phase0-step5", "phase0-step8"):
        stored = Stored(tmp_path / "checkpoints" / name)
        stored.check()
        assert all(value.isfinite().all() for unit in (1, 2, 3) for value in stored.unit(unit).values() if value.is_floating_point())


@pytest.mark.parametrize(
    ("changes", "steps", "batches"),
    [
        ({}, [4, 5], [3, 4]),
        # the batches of step 1 and 2 again
        ({"schedule": "bottom_up", "cache_batches": 5}, [6, 7], [0, 1]),
        ({"schedule": "joint", "log_every": 100}, [4, 5], [3, 4]),
    ],
    ids=["parallel", "bottom up", "joint"],
)
def test_too_many_in_a_row_end_the_run(changes: dict[str, Any], steps: list[int], batches: list[int], tmp_path: Path) -> None:
    run = opened(tmp_path, settings(max_skipped=1, **changes))
    if steps == [4, 5]:
        samples = poison_rows(run, batches)
    else:
        samples = [run.stream.sample_ids(batch)[0].tolist() for batch in batches]
        # each step has two backward passes
        poison_gradient(run.imitator, 1, {10, 12})
    unit = "all units" if changes.get("schedule") == "joint" else "unit 1"
    with pytest.raises(UserError) as raised:
        run.go()
    match = re.fullmatch(
        rf"narrow: the loss or the gradient of {unit} is not finite at step {steps[-1]}, after 1 steps in a row that were left out "
        r"for that; the samples are named in (.*); look at them, or lower narrow\.optimizer\.lr or narrow\.clip under another --run\.name",
        str(raised.value),
    )
    assert match, str(raised.value)
    told = json.loads(Path(match[1]).read_text())
    assert [(batch["step"], batch["batch"], batch["indices"]) for batch in told["batches"]] == list(
        zip(steps, batches, samples, strict=True)
    )
    run.checkpoints.wait()
    run.monitor.close()


class Killed(Exception):
    """Of a run, in the midst of a row of steps that are left out."""


@pytest.mark.parametrize(("allowed", "log_every"), [(2, 1), (3, 1), (3, 100)])
def test_a_start_goes_on_within_a_row(allowed: int, log_every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three in a row, the run killed after the second: the row is as long as if it had not been, and all of it stands in the records."""

    def start(name: str, before: Callable[[Run], object] = lambda run: None) -> Run:
        run = opened(tmp_path / name, settings(max_skipped=allowed, checkpoint_every=1, checkpoint_keep=9, log_every=log_every))
        poison_rows(run, [2, 3, 4])
        before(run)
        return run

    def killed(run: Run) -> None:
        update = Imitator.update

        def dying(self: Imitator, phase: Any, step: int) -> float:
            if step == 4:
                raise Killed
            return update(self, phase, step)

        monkeypatch.setattr(run.imitator, "update", dying.__get__(run.imitator))

    run = start("killed", killed)
    with pytest.raises(Killed):
        run.go()
    run.checkpoints.settle(4)
    run.checkpoints.wait()
    run.monitor.close()
    again, whole = start("killed"), start("whole")
    assert again.first_step == 4
    ends = []
    for one in (again, whole):
        try:
            one.go()
            ends.append("")
        except UserError as error:
            ends.append(str(error).replace(str(one.folder), ""))
    assert ends[0] == ends[1]
    assert skipped(again.folder) == skipped(whole.folder) and skipped(whole.folder)[:2] == [(3, [1, 2, 3]), (4, [1, 2, 3])]
    assert ("at step 5, after 2 steps in a row" in ends[0]) == (allowed == 2)
    if allowed == 3:
        assert all(
            equal_bits(mine.own_state(), other.own_state()) for mine, other in zip(again.imitator.units, whole.imitator.units, strict=True)
        )
        assert [record.get("skipped") for record in records(again.folder)] == [record.get("skipped") for record in records(whole.folder)]
        assert records(whole.folder)[-1]["skipped"] >= 9
