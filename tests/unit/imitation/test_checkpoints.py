"""Checkpoints of stage 2: every kind of damage is found and the one before is used, to the same weights bit for bit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.running import equal_bits, no_room, records
from tests.unit.imitation.test_engine import section, setup
from tests.unit.training.test_checkpoint_files import truncate
from wtn_pretrain.checkpoint.files import MANIFEST, DamagedError, part_of, sealed
from wtn_pretrain.errors import UserError
from wtn_pretrain.imitation.checkpoint.contents import contents, shown
from wtn_pretrain.imitation.checkpoint.manifest import Stored, checkpoints_in, read_manifest
from wtn_pretrain.imitation.checkpoint.nested import flatten, restore
from wtn_pretrain.imitation.config import ImitateSection
from wtn_pretrain.imitation.engine import Run
from wtn_pretrain.imitation.imitator import Imitator
from wtn_pretrain.parallel.launch import Place
from wtn_pretrain.parallel.preemption import Notice
from wtn_pretrain.training.config import OptimizerSection
from wtn_pretrain.verify import main as verify

pytestmark = pytest.mark.usefixtures("one_rank")

PART = "part-00000.safetensors"
HYBRID = section(schedule="hybrid", steps=6, checkpoint_every=2, checkpoint_keep=9)
"""Three teacher-fed steps and three student-fed ones."""


class Left(NamedTuple):
    """A run of stage 2: its folder and what came of it."""

    folder: Path
    weights: dict[str, Tensor]
    records: list[object]


def opened(folder: Path, settings: ImitateSection = HYBRID, name: str = "bert inner", seed: int = 3, **identity: int | str) -> Run:
    """A start of a run in a folder."""
    imitator, stream, order = setup(name, settings)
    stream.seed = seed
    return Run(imitator, order, stream, folder, identity=identity)


def left(run: Run) -> Left:
    """Runs what is left of it."""
    run.go()
    weights = {f"{unit.index}.{name}": value.clone() for unit in run.imitator.units for name, value in unit.own_state().items()}
    kept = [(record["step"], record["loss"], record["units"], record["lr"]) for record in records(run.folder)]
    return Left(run.folder, weights, kept)


def names(folder: Path) -> list[str]:
    return [path.name for _, path in checkpoints_in(folder / "checkpoints")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, one_rank: None) -> Left:
    """A run that nothing interrupted, with all of its checkpoints."""
    found = left(opened(tmp_path_factory.mktemp("whole")))
    assert names(found.folder) == ["phase1-step3", "phase1-step1", "phase0-step2"]
    return found


@pytest.fixture
def stopped(whole: Left, tmp_path: Path) -> Path:
    """The folder of the same run as a kill after its second checkpoint leaves it."""
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    shutil.rmtree(folder / "checkpoints" / "phase1-step3")
    return folder


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)


def rendered(folder: Path, change: Callable[[dict], object]) -> None:
    """Changes a manifest as somebody would who knows how its checksum is made."""
    body = json.loads((folder / MANIFEST).read_text())["manifest"]
    change(body)
    (folder / MANIFEST).write_text(sealed(body))


def swap(folder: Path, tmp_path: Path) -> None:
    """A part of another run of the same networks, as long to the byte."""
    left(opened(tmp_path / "other", HYBRID.model_copy(update={"steps": 2, "teacher_fed_share": 1.0}), seed=8))
    other = tmp_path / "other" / "checkpoints" / "phase0-step2" / PART
    assert other.stat().st_size == (folder / PART).stat().st_size
    shutil.copy(other, folder / PART)


DAMAGES: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "the header's length": (lambda folder, _: flip(folder / PART, 0), f"{PART}: is not as it was written"),
    "the header": (lambda folder, _: flip(folder / PART, 20), f"{PART}: is not as it was written"),
    "a tensor": (lambda folder, _: flip(folder / PART, -50), f"{PART}: is not as it was written"),
    "the last byte": (lambda folder, _: flip(folder / PART, -1), f"{PART}: is not as it was written"),
    "a part cut short": (lambda folder, _: truncate(folder / PART), "bytes of"),
    "a part emptied": (lambda folder, _: (folder / PART).write_bytes(b""), f"{PART}: holds 0 bytes of"),
    "a part missing": (lambda folder, _: (folder / PART).unlink(), f"{PART}: cannot be read (No such file"),
    "a part of another run": (swap, f"{PART}: is not as it was written"),
    "the manifest": (lambda folder, _: flip(folder / MANIFEST, 60), f"{MANIFEST}: is not as it was written"),
    "the manifest cut short": (lambda folder, _: truncate(folder / MANIFEST), f"{MANIFEST}: is not as it was written"),
    "the manifest emptied": (lambda folder, _: (folder / MANIFEST).write_bytes(b""), f"{MANIFEST}: is not as it was written"),
    "the manifest missing": (lambda folder, _: (folder / MANIFEST).unlink(), f"{MANIFEST}: cannot be read (No such file"),
    "another's manifest": (
        lambda folder, _: shutil.copy(folder.with_name("phase0-step2") / MANIFEST, folder / MANIFEST),
        "phase1-step1: is the checkpoint phase0-step2",
    ),
    "another format": (lambda folder, _: rendered(folder, lambda body: body.update(format=9)), "has format 9, this version reads 1"),
    "a part elsewhere": (
        lambda folder, _: rendered(folder, lambda body: body["parts"].update({"../x": body["parts"][PART]})),
        "names a part '../x'",
    ),
    "tensors that are not there": (
        lambda folder, _: rendered(folder, lambda body: body["tensors"].update(more=next(iter(body["tensors"].values())))),
        f"{PART}: holds other tensors than its manifest says",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_the_one_before_is_used(name: str, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, said = DAMAGES[name]
    damage(stopped / "checkpoints" / "phase1-step1", tmp_path)
    capsys.readouterr()
    run = opened(stopped)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("narrow: ")]
    assert said in line
    assert line.endswith("; the checkpoint before it is used")
    assert (run.first_phase, run.first_step) == (0, 2)
    # what is loaded is that of the one before
    stored = Stored(stopped / "checkpoints" / "phase0-step2")
    assert all(equal_bits(unit.own_state(), stored.unit(unit.index)) for unit in run.imitator.units)


def test_a_start_that_goes_back_ends_as_the_others(stopped: Path, whole: Left) -> None:
    # what is whole is continued, and what was damaged is written again when the run has come to it
    for damaged, first in ((None, (1, 1)), ("phase1-step1", (0, 2))):
        if damaged:
            shutil.rmtree(stopped / "checkpoints" / "phase1-step3")
            flip(stopped / "checkpoints" / damaged / PART, -50)
        run = opened(stopped)
        assert (run.first_phase, run.first_step) == first
        again = left(run)
        assert equal_bits(again.weights, whole.weights)
        assert again.records == whole.records
        assert names(stopped) == names(whole.folder)
        for _, folder in checkpoints_in(stopped / "checkpoints"):
            Stored(folder).check()
    assert run.imitator.work.teacher_flops == Stored(whole.folder / "checkpoints" / "phase1-step3").spent.teacher_flops


def test_without_a_whole_one_nothing_is_started(stopped: Path) -> None:
    for manifest in (stopped / "checkpoints").rglob(MANIFEST):
        manifest.write_bytes(b"")
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"phase1-step1/manifest.json: is not as .*; there is no other checkpoint: remove .* again"):
        opened(stopped)
    assert before == {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 8}, r"belongs to another run \(data_seed 3, and here 8\)"),
        ({"settings": HYBRID.model_copy(update={"batch_size": 2})}, r"belongs to another run \(batch_size 4, and here 2\)"),
        ({"settings": HYBRID.model_copy(update={"steps": 8})}, r"belongs to another run \(steps 6, and here 8\)"),
        ({"settings": section(schedule="parallel", steps=6)}, r"belongs to another run \(phases 2, and here 1\)"),
        ({"settings": HYBRID.model_copy(update={"optimizer": OptimizerSection(name="sgd")})}, r"\(optimizer adamw, and here sgd\)"),
        ({"seed_of_the_student": 4}, r"belongs to another run \(seed_of_the_student None, and here 4\)"),
        ({"name": "bert outer"}, r"belongs to another network \(unit-0000/exit.expand None, and here \(16, 8\)\)"),
        ({"name": "resnet inner"}, r"belongs to another network \(unit-0000/student.0"),
    ],
)  # fmt: skip
def test_nothing_of_another_run_is_taken(changes: dict, said: str, stopped: Path) -> None:
    with pytest.raises(UserError, match=rf"phase1-step1: .*{said}.*there is no other checkpoint"):
        opened(stopped, **changes)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an update leaves them that is too large, though its gradient is finite."""
    update = Imitator.update
    taken = 0

    def poisoned(self: Imitator, *arguments: object) -> float:
        nonlocal taken
        taken += 1
        rate = update(self, *arguments)  # type: ignore[arg-type]
        if taken == 4:
            with torch.no_grad():
                next(self.units[2].student.parameters()).view(-1)[0] = torch.nan
        return rate

    monkeypatch.setattr(Imitator, "update", poisoned)
    run = opened(tmp_path)
    with pytest.raises(UserError, match=r"narrow: weights of unit 2 are not finite after step 4, though its gradients were; .*is kept in"):
        run.go()
    run.checkpoints.wait()
    run.monitor.close()
    assert names(tmp_path) == ["phase0-step2"]
    Stored(tmp_path / "checkpoints" / "phase0-step2").check()


class Killed(Exception):
    """Of a run, in the midst of a step."""


def killed_at(run: Run, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs until a step over all phases begins, and leaves what a kill would."""
    update = Imitator.update
    taken = 0

    def dying(self: Imitator, *arguments: object) -> float:
        nonlocal taken
        taken += 1
        if taken == step:
            raise Killed
        return update(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Imitator, "update", dying)
        with pytest.raises(Killed):
            run.go()
    run.checkpoints.wait()
    run.monitor.close()


@pytest.mark.parametrize(
    ("name", "more"),
    [("bert inner", {}), ("bert outer", {"cache_batches": 2}), ("resnet inner", {"feed": "teacher"})],
    ids=["stored once", "a short store, the stem learns", "teacher-fed"],
)
def test_stored_activations_are_made_anew_where_a_start_goes_back(
    name: str, more: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = section(schedule="bottom_up", steps=4, checkpoint_every=3, checkpoint_keep=99, **more)
    expected = left(opened(tmp_path / "whole", settings, name))
    folder = tmp_path / "killed"
    run = opened(folder, settings, name)
    killed_at(run, len(run.phases) * 4 - 1, monkeypatch)
    last = len(run.phases) - 1
    found = names(folder)
    assert found[0] == f"phase{last}-step{(last * 4 + 2) // 3 * 3 - last * 4}"
    stores = {path.name for path in (folder / "activations").rglob("*-*") if path.parent.name.startswith("rows")}
    # what the unit before the last started from is gone
    assert f"teacher-{last - 2 + run.phases[0].losses[0]}" not in stores
    back = [name for name in found if name.startswith("phase0")]
    for target in (found[2], back[-1]):
        assert target.partition("-")[0] != f"phase{last}"
        copied = shutil.copytree(folder, tmp_path / target)
        for name_ in found[: found.index(target)]:
            flip(copied / "checkpoints" / name_ / PART, -1)
        again = left(opened(copied, settings, name))
        assert equal_bits(again.weights, expected.weights)
        assert again.records == expected.records
        assert not (copied / "activations").exists()


def test_a_refill_that_was_cut_short_is_begun_again(tmp_path: Path) -> None:
    from wtn_pretrain.imitation.store import ActivationStore
    from wtn_pretrain.models.base import Carry

    def carry(index: int) -> Carry:
        if index == 3:
            raise Killed
        return Carry(torch.full((2,), float(index)), ())

    store = ActivationStore(tmp_path / "store", 5)
    with pytest.raises(Killed):
        store.refill(5, carry)
    assert (tmp_path / "store" / "layout.json").exists()
    again = ActivationStore(tmp_path / "store", 5)
    assert not again.begun
    again.refill(3, carry)
    assert ActivationStore(tmp_path / "store", 5).begun
    assert float(again.read(2).hidden[0]) == 2.0


def test_which_ones_stay(tmp_path: Path) -> None:
    settings = section(schedule="hybrid", steps=12, teacher_fed_share=0.5, checkpoint_every=2, checkpoint_keep=1, checkpoint_keep_every=3)
    left(opened(tmp_path, settings))
    # steps 3, 6, 9 and 12: the last one is also a multiple
    assert names(tmp_path) == ["phase1-step6", "phase1-step3", "phase0-step6", "phase0-step3"]
    assert json.loads((tmp_path / "checkpoints" / "latest.json").read_text()) == {"phase": 1, "step": 6, "plan": "0-3x1", "zero": 0}
    left(opened(tmp_path / "two", section(schedule="parallel", steps=9, checkpoint_every=4)))
    assert names(tmp_path / "two") == ["phase0-step9", "phase0-step8"]
    assert not list(tmp_path.rglob(".*.part"))


def test_what_a_start_left_that_ended_while_it_wrote_is_cleared(stopped: Path, whole: Left) -> None:
    (stopped / "checkpoints" / ".phase1-step3.part").mkdir()
    (stopped / "checkpoints" / ".phase1-step3.part" / "part-00007.safetensors").write_bytes(b"of a rank that is no more")
    again = left(opened(stopped))
    assert equal_bits(again.weights, whole.weights)
    assert sorted(path.name for path in (stopped / "checkpoints" / "phase1-step3").iterdir()) == [MANIFEST, PART]


@pytest.mark.parametrize("size", [0, 3000], ids=["nothing", "half a part"])
def test_a_full_disk_leaves_the_old_one(size: int, stopped: Path, whole: Left) -> None:
    run = opened(stopped)
    assert (stopped / "checkpoints" / "phase1-step1" / PART).stat().st_size > 3000
    run.monitor.close()
    with no_room(size), pytest.raises(UserError, match=r"part-00000.safetensors: cannot be written \(.*the checkpoint before it is kept"):
        run.checkpoints.save(1, 3)
        run.checkpoints.settle(6)
        run.checkpoints.close()
    assert names(stopped) == ["phase1-step1", "phase0-step2"]
    # once there is room it goes on
    assert equal_bits(left(opened(stopped)).weights, whole.weights)


def test_told_to_leave_it_saves_and_goes_on(tmp_path: Path, whole: Left) -> None:
    from wtn_pretrain.errors import Preempted

    run = opened(tmp_path, HYBRID.model_copy(update={"checkpoint_every": 100}))
    notice = Notice(1e-9)
    from wtn_pretrain.parallel.preemption import Departure

    run._departure = Departure(notice, Place(0, 1))
    with pytest.raises(Preempted):
        run.go()
    notice.close()
    assert names(tmp_path) == ["phase0-step1"]
    assert equal_bits(left(opened(tmp_path)).weights, whole.weights)


def test_the_tool_says_what_is_there(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = stopped / "checkpoints" / "phase1-step1"
    manifest, kinds = contents(newest)
    assert (manifest.phase, manifest.step, manifest.done) == (1, 1, 4)
    table = shown(newest, manifest, kinds)
    assert "step       4: 1 of phase 1, after" in table
    assert "written by plan 0-3x1, ZeRO 0" in table
    assert "holds      4 units, the state of 3 optimizers" in table
    assert [kind.name for kind in kinds] == [f"unit-000{unit}" for unit in range(4)] + [f"optimizer-000{unit}" for unit in (1, 2, 3)]
    assert verify([str(newest)], "usage") == 0
    assert capsys.readouterr().out == table + "\n"
    flip(newest / PART, -1)
    assert verify([str(stopped)], "usage") == 1
    said = capsys.readouterr()
    assert "phase0-step2: whole" in said.out
    assert f"{newest / PART}: is not as it was written; the checkpoint is damaged" in said.err


def test_a_state_is_the_same_after_json(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    state = {
        "state": {0: {"step": torch.tensor(3.0), "momentum": torch.arange(4)}, 7: {}},
        "param_groups": [{"betas": (0.9, 0.999), "lr": 1e-3, "fused": None, "nesterov": False, "params": [0, 7]}],
    }
    tree = json.loads(json.dumps(flatten(state, "optimizer", tensors.__setitem__)))
    back = restore(tree, tensors.__getitem__)
    assert str(back) == str(state)
    assert list(back["state"]) == [0, 7]
    assert set(tensors) == {"optimizer/state/0/step", "optimizer/state/0/momentum"}
    for nonsense in ({"dict": 3}, {"code": "x"}, {"tensor": 3}, {"dict": [["a"]]}, [1]):
        with pytest.raises(DamagedError, match="is no state of an optimizer"):
            restore(nonsense, tensors.__getitem__)
    with pytest.raises(AssertionError, match="function has no place in a checkpoint"):
        flatten({"a": restore}, "optimizer", tensors.__setitem__)


def test_a_state_comes_back_as_it_lay_in_memory(tmp_path: Path) -> None:
    """Kernels go through a weight and its state in the order of memory, and convolutions lie channels-last."""
    run = opened(tmp_path, section(schedule="parallel", steps=2), "resnet inner")
    run.go()
    (learner, *_) = run.imitator.learning
    states = learner._optimizer.state
    for state in states.values():
        state.update({key: value.to(memory_format=torch.channels_last) for key, value in state.items() if value.dim() == 4})
    again = opened(tmp_path / "again", section(schedule="parallel", steps=2), "resnet inner")
    again.imitator._learning = [learner]
    again.checkpoints.save(0, 1)
    again.checkpoints.settle(1)
    again.checkpoints.close()
    found = Stored(tmp_path / "again" / "checkpoints" / "phase0-step1").optimizer(f"optimizer-{learner.units[0].index:04d}")["state"]
    seen = 0
    for mine, back in zip(states.values(), found.values(), strict=True):
        for key, value in mine.items():
            assert torch.equal(back[key], value)
            if value.dim() == 4 and min(value.shape[:2]) > 1:
                assert back[key].stride() == value.stride() != value.contiguous().stride()
                seen += 1
    assert seen


def test_a_manifest_vouches_for_its_parts(stopped: Path) -> None:
    folder = stopped / "checkpoints" / "phase0-step2"
    manifest = read_manifest(folder)
    assert manifest.parts == {PART: part_of(folder / PART)}
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, PART]
