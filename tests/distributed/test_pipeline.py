"""Stage 2 on several ranks, under whatever plan, against one process.

The strict comparisons train by SGD with momentum. What differs between plans is the order in which fp32 sums are taken (rows of a
micro-batch on one replica or on three): 1e-7 of a gradient, and after 30 steps 1e-6 of the largest weight of a tensor. A loss that has
become small differs by up to 1e-5, and a bias of a ResNet by up to 1e-4 once an activation at the kink of a ReLU falls on its other
side. The tolerances leave room for other machines; a row given twice, replicas weighed by number instead of rows, or batch norms that
are not synchronised make losses differ by 1e-2 and weights by 3e-3 and more. Under AdamW an element whose gradient is zero in exact
arithmetic, such as a key bias of BERT, takes whole steps along its round-off; that case says what it leaves out. Spans of one replica
each compute what one process does, bit for bit.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.imitating import OUTER, SGD, Imitations, Left, apart, losses_apart, teacher_once
from tests.running import BERT, RESNET, equal_bits, succeed, weights
from wtn_pretrain.imitation.plan import parse
from wtn_pretrain.models.store import load_network

pytestmark = pytest.mark.slow

ROUND_OFF = 5e-5
KINKS = 5e-4
"""Tolerance of a ResNet's weights."""
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bert inner": (BERT, {}),
    "bert outer": (BERT, OUTER),
    "resnet inner": (RESNET, {}),
    "resnet outer": (RESNET, OUTER),
}
PARALLEL = {**SGD, "narrow.schedule": "parallel"}
HYBRID = {**SGD, "narrow.schedule": "hybrid"}
REPLICAS = ("0-0,1-3x3", "0-1x2,2-3x2", "0-2x3,3-3")
"""16 rows of text are 6, 5 and 5 on three replicas, 32 images are 11, 11 and 10."""
Record = Callable[[str, object], None]


def compare(ran: Left, alone: Left, record: Record, teacher: int | None = None) -> None:
    """Losses of every unit at every step, weights, and the teacher's work (None: its stem and blocks on every micro-batch once)."""
    loss, (weight, name) = losses_apart(ran, alone), apart(ran.weights, alone.weights)
    record("relative difference of a loss", loss)
    record("relative difference of a weight", weight)
    print(f"{ran.done['plan']}: losses {loss:.1e}, weights {weight:.1e} ({name})")
    totals = [step["loss"] for step in alone.records]
    assert min(totals) < 0.9 * totals[0], "nothing is learned, so that equality says nothing"
    assert loss <= ROUND_OFF
    assert weight <= (KINKS if "stem.conv.weight" in ran.weights else ROUND_OFF), name
    assert ran.done["teacher_flops"] == alone.done["teacher_flops"] == (teacher_once(ran) if teacher is None else teacher)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(("plan", "changes"), [("0-1,2-3", HYBRID), ("0-0,1-1,2-2,3-3", PARALLEL)], ids=["2 ranks", "4 ranks"])
def test_spans_are_bitwise_one_process(plan: str, changes: dict[str, Any], pair: str, imitations: Imitations) -> None:
    base, widen = PAIRS[pair]
    ran, alone = imitations.under(plan, base, {**changes, **widen}), imitations.alone(base, {**changes, **widen})
    assert equal_bits(ran.weights, alone.weights)
    assert losses_apart(ran, alone) == 0
    assert ran.done["teacher_flops"] == teacher_once(ran)
    assert ran.done["imitation_error"] == alone.done["imitation_error"]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("plan", REPLICAS)
def test_replicas_are_one_process_up_to_round_off(plan: str, pair: str, imitations: Imitations, record_property: Record) -> None:
    base, widen = PAIRS[pair]
    compare(imitations.under(plan, base, {**PARALLEL, **widen}), imitations.alone(base, {**PARALLEL, **widen}), record_property)


@pytest.mark.parametrize(("pair", "plan"), [("bert inner", "0-1x2,2-3x2"), ("resnet outer", "0-0,1-3x3"), ("bert outer", "0-2x3,3-3")])
def test_the_student_fed_pass_on_replicas(pair: str, plan: str, imitations: Imitations, record_property: Record) -> None:
    base, widen = PAIRS[pair]
    # at the rate of the others round-off turns a ReLU of this pair at its kink
    changes = {**HYBRID, **widen, **({"narrow.optimizer.lr": 0.05} if base is RESNET else {})}
    compare(imitations.under(plan, base, changes), imitations.alone(base, changes), record_property)


ZERO = {stage: {"narrow.deepspeed": f"ds_configs/zero{stage}.json"} for stage in (1, 2)}
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # name: plan, base, changes of both runs, changes of the run on ranks alone
    "accumulated, in spans": ("0-1,2-3", BERT, {**HYBRID, "narrow.micro_batch_size": 4}, {}),
    "accumulated, on replicas": ("0-3x2", BERT, {**HYBRID, "narrow.micro_batch_size": 8}, {}),
    "accumulated, ZeRO 2": ("0-3x2", BERT, {**PARALLEL, "narrow.micro_batch_size": 8}, ZERO[2]),
    "ZeRO 1": ("0-3x2", BERT, HYBRID, ZERO[1]),
    "ZeRO 2, three replicas": ("0-0,1-3x3", BERT, {**PARALLEL, **OUTER}, ZERO[2]),
    "ZeRO 1, images": ("0-1x2,2-3", RESNET, HYBRID, ZERO[1]),
    "MobileBERT's loss": ("0-1,2-3x2", BERT, {**HYBRID, "narrow.loss": "mobilebert", "narrow.optimizer.lr": 0.01}, {}),
    "stages as units": ("0-1,2-2x2", RESNET, {**HYBRID, **OUTER, "narrow.unit": "stage"}, {}),
    "a deeper teacher": ("0-1,2-3x2", BERT, {**HYBRID, "widen.blocks": [5]}, {}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str, imitations: Imitations, record_property: Record) -> None:
    plan, base, both, ranks = VARIANTS[name]
    compare(imitations.under(plan, base, {**both, **ranks}), imitations.alone(base, both), record_property)


SPLIT = {
    "bottom_up, text": (BERT, {**SGD, **OUTER, "narrow.schedule": "bottom_up"}),
    "bottom_up, images": (RESNET, {**SGD, "narrow.schedule": "bottom_up", "narrow.cache_batches": 20}),
    "joint": (BERT, {**SGD, "narrow.schedule": "joint"}),
}


@pytest.mark.parametrize("name", SPLIT)
def test_schedules_that_split_every_batch(name: str, imitations: Imitations, record_property: Record) -> None:
    base, changes = SPLIT[name]
    ran, alone = imitations.on(2, base, changes), imitations.alone(base, changes)
    assert ran.done["plan"].endswith("x2")
    teacher = teacher_once(ran)
    if "narrow.cache_batches" in changes:
        teacher = teacher * changes["narrow.cache_batches"] // 30
    compare(ran, alone, record_property, teacher)
    assert not (ran.folder / "activations").exists()


def test_adamw(imitations: Imitations, record_property: Record) -> None:
    """All weights but the key biases, which change no output; the losses; and what the merged network computes."""
    changes = {"narrow.optimizer.lr": 2e-3}
    ran, alone = imitations.under("0-1,2-3x3", BERT, changes), imitations.alone(BERT, changes)
    inputs = {"input_ids": torch.arange(3 * 24).view(3, 24) * 7 % 256}
    with torch.no_grad():
        ours, theirs = load_network(ran.folder)(inputs), load_network(alone.folder)(inputs)
    logits = float((ours - theirs).abs().max() / theirs.abs().max())
    loss, (weight, name) = losses_apart(ran, alone), apart(ran.weights, alone.weights, but="key.bias")
    record_property("relative difference of a weight", weight)
    print(f"adamw: losses {loss:.1e}, logits {logits:.1e}, weights {weight:.1e} ({name})")
    # a gradient near eps times its moments' round-off moves by more than its own round-off
    assert loss <= 1e-4
    assert logits <= 1e-4
    assert weight <= 1e-3, name


def test_bf16_on_the_wire_rounds_what_comes_from_below_and_nothing_else(imitations: Imitations) -> None:
    exact = imitations.alone(BERT, {**PARALLEL, **OUTER})
    rounded = imitations.under("0-1,2-3", BERT, {**PARALLEL, **OUTER, "narrow.wire": "bf16"})
    for mine, theirs in zip(rounded.records, exact.records, strict=True):
        assert mine["units"][:2] == theirs["units"][:2]
    assert 0 < losses_apart(rounded, exact) < 1e-2
    assert rounded.weights.keys() == exact.weights.keys()


def test_padded_rows_and_what_each_rank_loads(imitations: Imitations, record_property: Record) -> None:
    program = Path(__file__).with_name("padded.py")
    left = []
    for plan in ("0-3", "0-0,1-2x2,3-3"):
        config = imitations.config(BERT, {**HYBRID, **OUTER, "narrow.plan": plan})
        started = imitations.forge.program(program, "--config", str(config), cwd=config.parent, ranks=parse(plan).ranks)
        started.succeed()
        left.append((config, imitations.left(config)))
    (_, alone), (config, ran) = left
    compare(ran, alone, record_property)
    # padding matters: the same run on full rows is another
    assert losses_apart(alone, imitations.alone(BERT, {**HYBRID, **OUTER})) > 1e-2
    loaded = [json.loads((config.parent / f"rank-{rank}.json").read_text()) for rank in range(4)]
    middle = ["block 1", "block 2"]
    assert loaded == [{"teacher": part, "student": part} for part in (["stem"], middle, middle, ["block 3"])]


def test_progress_and_trace_of_all_ranks(imitations: Imitations) -> None:
    changes = {**HYBRID, **OUTER, "narrow.log_every": 7, "narrow.trace": True, "narrow.batch_size": 32}
    ran = imitations.under("0-0,1-1,2-3x2", BERT, changes)
    assert [record["step"] for record in ran.records] == [7, 14, 21, 28, 30]
    assert [record["phase"] for record in ran.records] == ["teacher-fed"] * 2 + ["student-fed"] * 3
    for record in ran.records:
        assert len(record["units"]) == 4 and all(loss is not None for loss in record["units"])
    uses = json.loads((ran.folder / "utilisation.json").read_text())
    assert [rank["rank"] for rank in uses["ranks"]] == [0, 1, 2, 3]
    events = json.loads((ran.folder / "trace.json").read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {
        0: "rank 0 (unit 0)",
        1: "rank 1 (unit 1)",
        2: "rank 2 (units 2-3, replica 1 of 2)",
        3: "rank 3 (units 2-3, replica 2 of 2)",
    }
    spans = [event for event in events if event["ph"] == "X"]
    lanes = {(event["pid"], event["cat"]) for event in spans}
    assert lanes == {
        (0, "compute"),
        (0, "send"),
        (1, "compute"),
        (1, "send"),
        (1, "receive"),
        *((r, lane) for r in (2, 3) for lane in ("compute", "receive")),
    }
    for rank in range(4):
        own = [event for event in spans if event["pid"] == rank and event["cat"] == "compute"]
        assert {event["args"]["unit"] for event in own if event["name"] == "teacher"} == set([[0], [1], [2, 3], [2, 3]][rank])
        assert sum(event["name"] == "optimizer" for event in own) == 30
    # sends run beside the computation of the same rank
    for rank in (0, 1):
        work = [event for event in spans if event["pid"] == rank and event["name"] in ("teacher", "student", "optimizer")]
        sends = [event for event in spans if event["pid"] == rank and event["name"] == "send"]
        assert len(sends) == 30
        beside = sum(
            any(event["ts"] < send["ts"] + send["dur"] and send["ts"] < event["ts"] + event["dur"] for event in work) for send in sends
        )
        print(f"rank {rank}: {beside} of 30 sends beside computation")
        assert beside > 15


def test_several_seeds(imitations: Imitations) -> None:
    """One after the other in the same processes, each as if it were the only one."""
    changes = {**HYBRID, "compare.seeds": [3, 4]}
    ran, alone = imitations.under("0-1,2-3", BERT, changes), imitations.alone(BERT, changes)
    first, second = ((left.folder, left.folder.parent / "seed-4" / "narrow") for left in (ran, alone))
    for mine, theirs in zip(first, second, strict=True):
        assert equal_bits(weights(mine), weights(theirs))
    assert not equal_bits(weights(first[0]), weights(first[1]))
    # and the first of them as if there were no second
    assert equal_bits(ran.weights, imitations.alone(BERT, {**HYBRID, "compare.seeds": [3]}).weights)


def test_under_the_launcher(imitations: Imitations) -> None:
    """As a user starts it; nothing stays behind in shared memory."""
    shared = Path("/dev/shm")
    before = set(shared.glob("deepspeed_*")) if shared.exists() else set()
    config = imitations.config(BERT, {**HYBRID, "narrow.plan": "0-1,2-3"})
    succeed("imitate.py", config, ranks=2)
    assert equal_bits(imitations.left(config).weights, imitations.alone(BERT, HYBRID).weights)
    assert (set(shared.glob("deepspeed_*")) if shared.exists() else set()) == before


def test_the_plan_of_its_own_choice(imitations: Imitations, record_property: Record) -> None:
    ran = imitations.on(3, BERT, PARALLEL)
    assert parse(ran.done["plan"]).ranks == 3
    compare(ran, imitations.alone(BERT, PARALLEL), record_property)
