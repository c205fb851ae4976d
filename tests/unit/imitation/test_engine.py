"""The engine: local gradients, schedules that must agree with one another, and what is and is not computed."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from wtn_pretrain.data.stream import BatchStream
from wtn_pretrain.errors import UserError
from wtn_pretrain.imitation.bridges import make_bridges
from wtn_pretrain.imitation.config import ImitateSection
from wtn_pretrain.imitation.engine import Run
from wtn_pretrain.imitation.imitator import Entry, Imitator
from wtn_pretrain.imitation.pairing import pair
from wtn_pretrain.imitation.schedules import SLOW, Phase, phases
from wtn_pretrain.imitation.units import make_units
from wtn_pretrain.models import BertConfig, BlockConfig, ResNetConfig
from wtn_pretrain.models.base import flops
from wtn_pretrain.parallel.replicas import Replicas
from wtn_pretrain.training.config import OptimizerSection, ScheduleSection

pytestmark = pytest.mark.usefixtures("one_rank")

BERT = BertConfig(vocab_size=29, hidden_size=8, heads=2, layers=3, max_positions=10, norm="pre", dropout=0.1, initializer_range=0.3)
RESNET = ResNetConfig(
    block="basic", stem="cifar", stem_channels=4, channels=(4, 8), depths=(2, 1), image_channels=1, image_size=8, classes=3
)
PAIRS = {
    "bert inner": (BERT, BERT.widen(2, 1, None)),
    "bert outer": (BERT, BERT.widen(1, 2, None)),
    "bert deeper teacher": (BERT, BERT.widen(2, 1, (6,))),
    "resnet inner": (RESNET, RESNET.widen(3, 1, None)),
    "resnet outer": (RESNET, RESNET.widen(1, 2, None)),
}
STEPS, BATCH = 5, 4


class Rows:
    """A data set of random rows; a sample is a function of its index."""

    def __init__(self, config: BlockConfig) -> None:
        generator = torch.Generator().manual_seed(1)
        if isinstance(config, BertConfig):
            self.inputs = {"input_ids": torch.randint(0, 29, (24, 10), generator=generator), "attention_mask": torch.ones(24, 10).long()}
            self.inputs["attention_mask"][::3, 7:] = 0
        else:
            self.inputs = {"pixels": torch.randn(24, 1, 8, 8, generator=generator)}

    def __len__(self) -> int:
        return 24

    def fetch(self, indices: np.ndarray, seeds: np.ndarray | None) -> dict[str, Tensor]:
        return {name: value[torch.from_numpy(indices)] for name, value in self.inputs.items()}


def section(**values: object) -> ImitateSection:
    base = {
        "steps": STEPS,
        "batch_size": BATCH,
        "optimizer": OptimizerSection(lr=0.01, weight_decay=0.01),
        "schedule_lr": ScheduleSection(name="cosine", warmup=0.2),
        "log_every": 1,
    }
    return ImitateSection(**{**base, **values})


def setup(name: str, settings: ImitateSection) -> tuple[Imitator, BatchStream, list[Phase]]:
    thin_config, wide_config = PAIRS[name]
    torch.manual_seed(0)
    wide, thin = wide_config.build().eval(), thin_config.build()
    data = Rows(thin_config)
    stream = BatchStream(data, settings.batch_size, seed=3)
    pairing = pair(thin_config, wide_config)
    bridges = make_bridges(thin, wide, pairing, settings.bridge, [stream.micro_batch(0, 0)], rows=64)
    entry = bridges.get(0)
    thin.start_stem_from(wide, entry.reduce().detach() if entry else None)
    units = make_units(thin, wide, pairing, bridges, settings, (flops(thin_config), flops(wide_config)))
    return Imitator(units, settings, Replicas.alone(0)), stream, phases(settings, pairing.units, learns_stem=0 in bridges)


def run(name: str, folder: Path, settings: ImitateSection, plan: Callable[[list[Phase]], list[Phase]] = list) -> Imitator:
    imitator, stream, order = setup(name, settings)
    Run(imitator, plan(order), stream, folder).go()
    return imitator


def weights(imitator: Imitator) -> list[dict[str, Tensor]]:
    return [copy.deepcopy(unit.state_dict()) for unit in imitator.units]


def assert_equal(left: Imitator, right: Imitator, tolerance: float = 0.0) -> None:
    for mine, theirs in zip(weights(left), weights(right), strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine:
            torch.testing.assert_close(mine[key], theirs[key], atol=tolerance, rtol=tolerance, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", PAIRS)
def test_bottom_up_on_stored_activations_equals_running_from_the_bottom(name: str, tmp_path: Path) -> None:
    """Bitwise: the stored activations are what the frozen units below would compute again."""
    stored = run(name, tmp_path / "a", section(schedule="bottom_up"))

    def from_the_bottom(order: list[Phase]) -> list[Phase]:
        return [Phase(phase.name, phase.steps, phase.losses, phase.rates, phase.fed, cached=False) for phase in order]

    # every unit sees the same batches as the stored run: those of steps 0 to STEPS
    imitator, stream, order = setup(name, section(schedule="bottom_up"))
    for phase in from_the_bottom(order):
        Run(imitator, [phase], stream, tmp_path / f"b-{phase.name}").go()
    assert_equal(stored, imitator)
    assert imitator.work.teacher_flops > stored.work.teacher_flops


@pytest.mark.parametrize("name", ["bert inner", "bert deeper teacher", "resnet inner"])
def test_teacher_fed_blocks_do_not_depend_on_the_order(name: str, tmp_path: Path) -> None:
    """Block after block or all at once: teacher-fed blocks are independent, so the weights agree bitwise."""
    assert_equal(
        run(name, tmp_path / "a", section(schedule="bottom_up", feed="teacher")), run(name, tmp_path / "b", section(schedule="parallel"))
    )


@pytest.mark.parametrize("schedule", ["parallel", "bottom_up", "hybrid"])
@pytest.mark.parametrize("name", PAIRS)
def test_the_teacher_runs_once_a_batch(name: str, schedule: str, tmp_path: Path) -> None:
    imitator = run(name, tmp_path, section(schedule=schedule))
    once = sum(unit.teacher_flops for unit in imitator.units) * BATCH * STEPS
    assert imitator.work.teacher_flops == once


def test_a_short_store_is_gone_through_again(tmp_path: Path) -> None:
    imitator = run("bert inner", tmp_path, section(schedule="bottom_up", cache_batches=2))
    assert imitator.work.teacher_flops == sum(unit.teacher_flops for unit in imitator.units) * BATCH * 2
    assert not (tmp_path / "activations").exists(), "stored activations are removed when the schedule is done"


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_of_a_unit_are_its_own(name: str) -> None:
    """A unit's gradient is that of its own loss with its input held fixed, computed here in one graph by torch."""
    settings = section(schedule="parallel")
    imitator, stream, (phase,) = setup(name, settings)
    imitator.begin(phase)
    inputs = stream.micro_batch(0, 0)
    reference = copy.deepcopy(imitator.units)
    imitator.step(phase, Entry(inputs, inputs))
    teacher = inputs
    for unit, twin in zip(imitator.units, reference, strict=True):
        target, _ = twin.teach(teacher)
        if unit.index in phase.losses:
            answer, _ = twin.answer(twin.enter(teacher, teacher, "teacher", local=True))
            own = twin.own_parameters()
            gradients = torch.autograd.grad(twin.loss(answer, {}, target, {}).value(), own, allow_unused=True)
            for mine, expected in zip(unit.own_parameters(), gradients, strict=True):
                torch.testing.assert_close(mine.grad, expected, atol=1e-7, rtol=1e-5)
        teacher = target


def test_joint_is_end_to_end_and_local_is_not() -> None:
    imitator, stream, _ = setup("bert inner", section())
    inputs = stream.micro_batch(0, 0)
    top = Phase("top", 1, (3,), {1: 1.0, 2: 1.0, 3: 1.0}, local=False)
    imitator.begin(top)
    imitator.step(top, Entry(inputs, inputs))
    assert all(parameter.grad is not None for unit in imitator.units[1:] for parameter in unit.own_parameters())
    imitator, stream, _ = setup("bert inner", section())
    local = Phase("top", 1, (3,), {3: 1.0})
    imitator.begin(local)
    imitator.step(local, Entry(inputs, inputs))
    assert all(parameter.grad is None for unit in imitator.units[:3] for parameter in unit.own_parameters())
    assert all(parameter.grad is not None for parameter in imitator.units[3].own_parameters())


def test_the_teacher_never_changes(tmp_path: Path) -> None:
    imitator, stream, order = setup("resnet inner", section(schedule="hybrid"))
    before = [copy.deepcopy(module.state_dict()) for unit in imitator.units for module in unit.teacher]
    Run(imitator, order, stream, tmp_path).go()
    after = [module.state_dict() for unit in imitator.units for module in unit.teacher]
    assert all(torch.equal(old[key], new[key]) for old, new in zip(before, after, strict=True) for key in old)
    assert not any(key.startswith("teacher") for unit in imitator.units for key in unit.state_dict())


@pytest.mark.parametrize("below", ["slow", "joint"])
def test_bottom_up_moves_what_it_says(below: str, tmp_path: Path) -> None:
    imitator, stream, order = setup("bert inner", section(schedule="bottom_up", below=below))
    last = order[-1]
    first_two, rest = order[:2], order[2:]
    Run(imitator, first_two, stream, tmp_path / "a").go()
    middle = weights(imitator)
    Run(imitator, rest, stream, tmp_path / "b").go()
    moved = [any(not torch.equal(old[key], new[key]) for key in old) for old, new in zip(middle, weights(imitator), strict=True)]
    assert moved == [False, True, True, True]
    assert last.rates == {1: SLOW if below == "slow" else 1.0, 2: SLOW if below == "slow" else 1.0, 3: 1.0}


@pytest.mark.parametrize("loss", ["energy_mse", "mobilebert"])
@pytest.mark.parametrize("schedule", ["parallel", "bottom_up", "hybrid", "joint"])
def test_every_schedule_learns(schedule: str, loss: str, tmp_path: Path) -> None:
    settings = section(schedule=schedule, loss=loss, steps=60, log_every=60, clip=0.0, optimizer=OptimizerSection(lr=0.01))
    imitator, stream, order = setup("bert inner", settings)
    batches = [stream.micro_batch(step, 0) for step in range(3)]
    before = imitator.errors(Entry(batch, batch) for batch in batches)
    Run(imitator, order, stream, tmp_path).go()
    after = imitator.errors(Entry(batch, batch) for batch in batches)
    # MobileBERT's terms compare normalised states, so the energy error falls more slowly under them
    assert sum(after) < (0.7 if loss == "energy_mse" else 0.8) * sum(before)


def test_hybrid_is_a_teacher_fed_pass_and_a_student_fed_one() -> None:
    order = phases(section(steps=10, teacher_fed_share=0.3), units=4, learns_stem=True)
    assert [(phase.fed, phase.steps, phase.losses) for phase in order] == [("teacher", 3, (0, 1, 2, 3, 4)), ("student", 7, (0, 1, 2, 3, 4))]
    assert [phase.fed for phase in phases(section(teacher_fed_share=0.0), 2, False)] == ["student"]


def test_one_sample_whose_last_block_has_one_pixel_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"block": "basic", "stem": "cifar", "stem_channels": 4, "image_channels": 1, "image_size": 8, "classes": 3}
    config = ResNetConfig(**shape, channels=(4, 4, 4, 4), depths=(1, 1, 1, 1))
    monkeypatch.setitem(PAIRS, "resnet to a pixel", (config, config.widen(2, 1, None)))
    imitator, stream, (phase, *_) = setup("resnet to a pixel", section(schedule="joint", batch_size=1))
    imitator.begin(phase)
    batch = stream.micro_batch(0, 0)
    with pytest.raises(UserError, match=r"^narrow.micro_batch_size: a rank's pass is one sample.*take more samples$"):
        imitator.step(phase, Entry(batch, batch))
