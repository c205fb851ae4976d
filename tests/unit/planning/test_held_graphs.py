"""The memory of schedules whose gradients run through all units, planned against what a step of the engine makes."""

import pytest
import torch

from wtn_pretrain.imitation.bridges import make_bridges
from wtn_pretrain.imitation.config import ImitateSection
from wtn_pretrain.imitation.imitator import Entry, Imitator
from wtn_pretrain.imitation.pairing import pair
from wtn_pretrain.imitation.schedules import phases
from wtn_pretrain.imitation.units import make_units
from wtn_pretrain.models import BertConfig, BlockConfig, ResNetConfig
from wtn_pretrain.models.base import flops
from wtn_pretrain.parallel.replicas import Replicas
from wtn_pretrain.planning.cluster import Cluster, Link
from wtn_pretrain.planning.costs import CORE, declared
from wtn_pretrain.planning.footprint import LiveStorages
from wtn_pretrain.planning.spans import SpanCosts, flow

pytestmark = pytest.mark.usefixtures("one_rank")

BERT = BertConfig(vocab_size=128, hidden_size=64, layers=6, heads=4, max_positions=32)
RESNET = ResNetConfig(stem="cifar", depths=(3, 3), channels=(32, 64), stem_channels=16, image_channels=3, image_size=16, classes=5)
PAIRS = {
    "bert inner": (BERT, BERT.widen(2, 1, None)),
    "bert outer": (BERT, BERT.widen(1, 2, None)),
    "resnet inner": (RESNET, RESNET.widen(2, 1, None)),
    "resnet outer": (RESNET, RESNET.widen(1, 2, None)),
}
ROWS = 16
PLACE = Cluster(1, 1, Link(1e9, 0), Link(1e9, 0))


def bytes_planned(thin: BlockConfig, wide: BlockConfig, section: ImitateSection) -> float:
    """Of what a step makes: gradients, the teacher's outputs, activations."""
    pairing, moving = pair(thin, wide), flow(section)
    costs = declared(thin, wide, pairing, (flops(thin), flops(wide)), section, ROWS, target=CORE)
    memory = SpanCosts(costs, PLACE, moving).memory(0)
    return float((memory.gradients + memory.targets + memory.work)[-1, 0])


def bytes_made(thin_config: BlockConfig, wide_config: BlockConfig, section: ImitateSection) -> int:
    """The most that the first step of the last phase makes at once."""
    torch.manual_seed(0)
    wide, thin = wide_config.build().eval(), thin_config.build()
    batch = thin_config.example_inputs(ROWS, "cpu", None)
    pairing = pair(thin_config, wide_config)
    bridges = make_bridges(thin, wide, pairing, section.bridge, [batch], rows=64)
    units = make_units(thin, wide, pairing, bridges, section, (flops(thin_config), flops(wide_config)))
    imitator = Imitator(units, section, Replicas.alone(0))
    phase = phases(section, pairing.units, learns_stem=0 in bridges)[-1]
    imitator.begin(phase)
    with LiveStorages() as made:
        losses = imitator.step(phase, Entry(batch, batch))
    assert len(losses) == len(phase.losses)
    return made.peak


@pytest.mark.parametrize("schedule", ["joint", "bottom_up"])
@pytest.mark.parametrize("name", PAIRS)
def test_memory_of_a_step_through_all_units_is_as_planned(name: str, schedule: str) -> None:
    section = ImitateSection.model_validate({"schedule": schedule, "below": "joint", "batch_size": ROWS})
    planned = bytes_planned(*PAIRS[name], section)
    # what passes between units is counted for the unit at work alone
    assert planned == pytest.approx(bytes_made(*PAIRS[name], section), rel=0.1)
    assert planned > 1.2 * bytes_planned(*PAIRS[name], ImitateSection.model_validate({"schedule": "hybrid", "batch_size": ROWS}))


def test_a_loss_that_holds_more_is_planned_with_it() -> None:
    section = ImitateSection.model_validate({"schedule": "joint", "loss": "mobilebert", "batch_size": ROWS})
    assert bytes_planned(*PAIRS["bert inner"], section) == pytest.approx(bytes_made(*PAIRS["bert inner"], section), rel=0.1)


def test_buckets_of_zero_are_no_larger_than_what_they_take() -> None:
    section = ImitateSection.model_validate({"schedule": "joint", "deepspeed": "ds_configs/zero2.json", "batch_size": ROWS})
    # two of them, which were 400 MB: 50 million numbers of 4 bytes each
    plain = section.model_copy(update={"deepspeed": "ds_configs/zero0.json"})
    parameters = sum(parameter.numel() for parameter in BERT.build().parameters())
    assert bytes_made(*PAIRS["bert inner"], section) <= bytes_made(*PAIRS["bert inner"], plain) + 2 * 4 * parameters
