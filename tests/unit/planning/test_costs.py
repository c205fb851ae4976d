"""Costs by shape against what real units hold and make; profiles; the declared link's measured counterpart."""

import copy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from wtn_pretrain.errors import UserError
from wtn_pretrain.imitation.config import ImitateSection
from wtn_pretrain.imitation.pairing import Pairing, pair
from wtn_pretrain.models import BertConfig, BlockConfig, ResNetConfig
from wtn_pretrain.models.base import flops, parameter_count
from wtn_pretrain.planning import profile as profiling
from wtn_pretrain.planning.cluster import Cluster, Link, measure_link
from wtn_pretrain.planning.costs import CORE, Curve, UnitCost, declared, working_sets
from wtn_pretrain.planning.footprint import teaching_peak, training_peak
from wtn_pretrain.planning.pieces import Piece, autocast, batch, cut, materialise
from wtn_pretrain.planning.profile import profile

BERT = BertConfig(vocab_size=128, hidden_size=32, layers=4, heads=2, max_positions=16)
RESNET = ResNetConfig(stem="cifar", depths=(3, 1), channels=(32, 64), stem_channels=8, image_channels=3, image_size=8, classes=5)
PAIRS = {
    "bert inner": (BERT, BERT.widen(4, 1, None)),
    "bert outer": (BERT, BERT.widen(1, 2, None)),
    "bert deeper": (BERT, BERT.widen(1, 1, (8,))),
    "resnet inner": (RESNET, RESNET.widen(4, 1, None)),
    "resnet outer": (RESNET, RESNET.widen(1, 2, None)),
}
ROWS = 8


def networks(name: str) -> tuple[BlockConfig, BlockConfig, Pairing, tuple]:
    thin, wide = PAIRS[name]
    return thin, wide, pair(thin, wide), (flops(thin), flops(wide))


def pieces(name: str, section: ImitateSection) -> list[Piece]:
    return cut(*networks(name), section)


def test_a_curve_goes_through_its_points_and_is_never_cheaper_a_row_below_them() -> None:
    curve = Curve.through([(8, 5.0), (4, 3.0), (16, 4.0)])
    assert curve.at(np.array([4, 6, 8, 16])).tolist() == [3, 4, 5, 5]
    assert curve.at(np.array([2]))[0] == 2 and curve.at(np.array([1]))[0] == 1.5
    assert curve.at(np.array([32]))[0] == 5
    # extrapolated below zero, but work needs time
    assert Curve.through([(4, 1.0), (8, 9.0)]).at(np.array([1]))[0] == 0.25


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("fed", ["teacher", "student"])
@pytest.mark.parametrize("name", PAIRS)
def test_memory_at_work_counted_without_data_is_what_real_work_makes(name: str, fed: str, precision: str) -> None:
    section = ImitateSection.model_validate({"precision": precision})
    cast = autocast(section, "cpu")
    for piece in pieces(name, section):
        unit = materialise(piece.unit, "cpu")
        unit.learn(piece.learns)
        teacher, student = batch(piece.teacher_in, ROWS, "cpu"), batch(piece.student_in, ROWS, "cpu")
        teaching, target, taps = teaching_peak(unit, teacher, cast)
        ((_, counted, *learned),) = working_sets(piece, section, [ROWS], fed)
        # kernels of a device may keep a few small tensors that operators without data do not
        assert counted == pytest.approx(teaching, rel=0.02)
        assert target.hidden.shape[1:] == piece.teacher_out.hidden.shape[1:] and target.hidden.dtype is piece.teacher_out.hidden.dtype
        if piece.learns:
            assert learned == pytest.approx([*training_peak(unit, teacher, student, fed, target, taps, cast)], rel=0.02)
            assert all(parameter.grad is None for parameter in unit.own_parameters())


@pytest.mark.parametrize("name", PAIRS)
def test_units_add_up_to_the_networks(name: str) -> None:
    section = ImitateSection()
    thin, wide, pairing, counts = networks(name)
    costs = declared(thin, wide, pairing, counts, section, ROWS, target=CORE)
    assert len(costs) == pairing.units + 1
    with torch.device("meta"):
        small, large = thin.build(), wide.build()
    body = [parameter for part in (large.stem, large.blocks) for parameter in [*part.parameters(), *part.buffers()]]
    assert sum(cost.teacher_weights for cost in costs) == sum(tensor.numel() * tensor.element_size() for tensor in body)
    outer = "outer" in name
    learned = parameter_count(small.blocks) + (parameter_count(small.stem) if outer else 0)
    widths = [mine * theirs for mine, theirs in zip(small.widths(), large.widths(), strict=True)] if outer else []
    # free bridges train R as well, at boundaries that projections follow
    free = sum(cost.trained for cost in costs) // 4 - learned - sum(widths)
    assert free >= 0 and free in ([0] if not outer or name == "bert outer" else [widths[0] + widths[3]])
    assert [cost.learns for cost in costs] == [outer, *[True] * pairing.units]
    assert all(cost.bridge == (4 * width if outer else 0) for cost, width in zip(costs, widths or [0] * len(costs), strict=True))
    assert all(cost.states == 2 * cost.trained for cost in costs)


def test_declared_seconds_are_flops_traffic_and_overhead() -> None:
    thin, wide, pairing, counts = networks("bert inner")
    section = ImitateSection()
    rates = CORE._replace(flops=1e9, bandwidth=1e30, overhead=0.0)
    costs = declared(thin, wide, pairing, counts, section, ROWS, target=rates, fed="teacher")
    rows = np.array([3, ROWS])
    for cost, small, large in zip(costs[1:], counts[0].blocks, counts[1].blocks, strict=True):
        np.testing.assert_allclose(cost.teacher.at(rows), large * rows / 1e9, rtol=1e-6)
        np.testing.assert_allclose(cost.student.at(rows), 3 * small * rows / 1e9, rtol=1e-6)
    slower = declared(thin, wide, pairing, counts, section, ROWS, target=rates._replace(bandwidth=1e9, overhead=1.0))
    assert all(after.teacher.at(rows)[0] > 1 + before.teacher.at(rows)[0] for before, after in zip(costs, slower, strict=True))


def test_bridges_cost_flops() -> None:
    thin, wide, pairing, counts = networks("bert outer")
    rates = CORE._replace(flops=1.0, bandwidth=1e40, overhead=0.0)
    cost = declared(thin, wide, pairing, counts, ImitateSection(), ROWS, target=rates, fed="teacher")[1]
    # E forward and twice backward, R (constrained, detached) forward only; 16 positions, 32 -> 64
    assert cost.student.at(np.array([1]))[0] == pytest.approx(3 * counts[0].blocks[0] + (3 + 1) * 2 * 16 * 32 * 64)


@pytest.mark.parametrize("name", ["bert outer", "resnet inner"])
def test_a_profile_builds_one_unit_of_each_shape(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def counting(unit, device):
        built.append(unit.index)
        return materialise(unit, device)

    monkeypatch.setattr(profiling, "materialise", counting)
    section = ImitateSection(batch_size=ROWS)
    measured = profile(*networks(name), section, ROWS, repeats=1)
    keys = [piece.key for piece in pieces(name, section)]
    assert built == [number for number, key in enumerate(keys) if key not in keys[:number]]
    assert len(built) < len(keys)
    counted = declared(*networks(name), section, ROWS, target=CORE)
    rows = np.array([1, ROWS])
    for mine, theirs in zip(measured.costs, counted, strict=True):
        timeless = {"teacher": theirs.teacher, "student": theirs.student, "step": theirs.step}
        kept = {field: getattr(theirs, field) for field in ("teacher_work", "student_work", "student_held", "student_graph")}
        assert mine._replace(**timeless, **kept) == theirs
        assert (mine.teacher.at(rows) > 0).all() and (mine.student.at(rows) > 0).all()
        assert (mine.step > 0) == mine.learns
    assert measured.base > 50e6


def test_pieces_hold_no_memory_and_leave_the_networks_alone() -> None:
    for piece in pieces("bert outer", ImitateSection()):
        held = [*piece.unit.parameters(), *(tensor for module in piece.unit.teacher for tensor in module.parameters())]
        assert held and all(tensor.is_meta for tensor in held)
        made = materialise(copy.deepcopy(piece.unit), "cpu")
        assert not any(parameter.is_meta for parameter in made.parameters())
        assert all(torch.isfinite(parameter).all() for parameter in made.parameters())


def test_the_all_reduce_of_a_ring() -> None:
    cluster = Cluster(8, 4, Link(100.0, 0.5), Link(10.0, 1.0), reduce=0.5)
    replicas = np.array([1, 2, 4])
    np.testing.assert_allclose(cluster.all_reduce(50, replicas, False), [0, 50 / 50 + 1, 1.5 * 50 / 50 + 3])
    np.testing.assert_allclose(cluster.all_reduce(50, replicas, True), [0, 50 / 5 + 2, 1.5 * 50 / 5 + 6])


def _measure(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = measure_link(1 << 24, repeats=3)
    Path(folder, f"{rank}").write_text(f"{found.link.bandwidth} {found.link.latency} {found.reduce} {found.meeting}")
    dist.destroy_process_group()


def test_a_measured_link_is_the_same_to_all_ranks(tmp_path: Path) -> None:
    spawn(_measure, args=(str(tmp_path),), nprocs=2)
    first, second = ((tmp_path / str(rank)).read_text() for rank in range(2))
    bandwidth, latency, share, meeting = map(float, first.split())
    assert first == second
    # any machine: 1 MB/s to 1 TB/s, under a second
    assert 1e6 < bandwidth < 1e12 and 0 < latency < 1 and share > 0 and 0 <= meeting < 1


def test_unit_costs_are_hashable_values() -> None:
    costs: list[UnitCost] = declared(*networks("bert inner"), ImitateSection(), ROWS, target=CORE)
    assert len(set(costs)) == 2  # the stem, and four equal layers


def test_a_network_that_ends_in_one_pixel_can_be_planned_and_one_sample_of_it_cannot(one_rank: None) -> None:
    thin = ResNetConfig(**{**RESNET.model_dump(), "depths": (1, 1, 1, 1), "channels": (8,) * 4, "inner_channels": None})
    of_pair = thin, thin.widen(2, 1, None)
    known = *of_pair, pair(*of_pair), (flops(of_pair[0]), flops(of_pair[1]))
    for rows in (4, 2):
        section = ImitateSection(batch_size=rows)
        for found in (declared(*known, section, rows, target=CORE), profile(*known, section, rows, repeats=1).costs):
            # one row a replica is what several replicas may have
            assert all((cost.student.at(np.array([1, rows])) > 0).all() for cost in found)
    for costs in (partial(declared, target=CORE), partial(profile, repeats=1)):
        with pytest.raises(UserError, match=r"^narrow.micro_batch_size: a rank's pass is one sample"):
            costs(*known, ImitateSection(batch_size=1), 1)
