"""Plans of stages 1 and 3: what is counted, what is searched, what is printed."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from wtn_pretrain.errors import UserError
from wtn_pretrain.models import BertConfig, ResNetConfig
from wtn_pretrain.models.base import parameter_count
from wtn_pretrain.planning.cluster import Cluster, Link
from wtn_pretrain.planning.dispatch import run
from wtn_pretrain.planning.training.counted import _deep, _run, count
from wtn_pretrain.planning.training.devices import Rates, accelerator, cluster, rates
from wtn_pretrain.planning.training.layout import Layout, layout_of
from wtn_pretrain.planning.training.memory import memory
from wtn_pretrain.planning.training.pace import Passes, declared, pace
from wtn_pretrain.planning.training.search import best, counts
from wtn_pretrain.planning.training.work import Work
from wtn_pretrain.training.config import TrainSection

ROOT = Path(__file__).resolve().parents[3]
CLUSTER = ROOT / "configs/cluster/bert-base-from-large.yaml"
BERT = BertConfig(vocab_size=1024, hidden_size=64, layers=8, heads=4, max_positions=32)
RESNET = ResNetConfig(block="basic", depths=(2, 2), channels=(16, 32), stem_channels=16, image_channels=3, image_size=16, classes=10)


def work(config: BertConfig | ResNetConfig = BERT, **section: object) -> Work:
    masked = (32, 5) if isinstance(config, BertConfig) else (0, 0)
    return Work(config, TrainSection.model_validate({"batch_size": 64, **section}), *masked)


@pytest.mark.parametrize(("tensor", "sequence", "checkpoint"), [(1, False, 0), (1, False, 1), (2, False, 0), (4, True, 1)])
def test_deep_networks_are_counted_from_shallow_ones(tensor: int, sequence: bool, checkpoint: int) -> None:
    for rows in (2, 16):
        rest = rows, tensor, sequence, checkpoint, "cpu"
        assert _deep(work(), *rest) == _run(work(), *rest)


def test_counting_leaves_attention_as_it_was_and_grows_with_the_rows() -> None:
    plain = F.scaled_dot_product_attention
    exact, drawn = (count(work(), 24, exact=exact) for exact in (True, False))
    assert F.scaled_dot_product_attention is plain
    assert drawn.kept == pytest.approx(exact.kept, rel=0.02)
    assert drawn.lean == pytest.approx(exact.lean, rel=0.02)
    assert exact.parameters == parameter_count(BERT.build())


def test_activations_against_what_autograd_saves() -> None:
    """The most that is held is at least what autograd has saved after a forward pass, and little more."""
    from wtn_pretrain.tasks.base import TaskModule

    job = work(RESNET)
    module = TaskModule(RESNET.build(), job.task()).train()
    saved: dict[int, int] = {}
    keep = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        keep.append(tensor)
        return tensor

    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(job.batch(32, "cpu"))
    total = sum(size for place, size in saved.items() if place not in own)
    assert total <= count(job, 32, on="cpu").lean <= 1.35 * total


def test_tensor_ranks_exchange_what_megatron_counts() -> None:
    """Two all-reduces of a hidden state each way in every layer (Shoeybi et al. 2019, section 3), and those of stem and head."""
    one, two = (count(work(BERT.model_copy(update={"layers": layers})), 4, tensor=2) for layers in (3, 4))
    hidden = 4 * 32 * 64 * 4
    assert two.messages - one.messages == 4
    assert two.message_bytes - one.message_bytes == 4 * 2 * hidden
    assert two.parameters < 0.6 * count(work(BERT.model_copy(update={"layers": 4})), 4).parameters
    # recomputation repeats the forward pass's
    again = [count(work(BERT.model_copy(update={"layers": layers})), 4, tensor=2, checkpoint=1).messages for layers in (3, 4)]
    assert again[1] - again[0] == 6


def test_zero_divides_what_the_paper_says() -> None:
    """Rajbhandari et al. 2020, figure 1: 4 bytes of weights, 4 of gradients, 8 of Adam's states; here fp32, masters on top from stage 1."""
    job, ranks = work(), 8
    size = 4 * parameter_count(BERT.build())
    held = [memory(job, Layout(ranks, zero, micro=1, bucket=1, prefetch=1), "gpu") for zero in range(4)]
    assert held[0].weights == pytest.approx(size)
    assert held[0].optimizer == pytest.approx(2 * size)
    for zero in (1, 2, 3):
        assert held[zero].optimizer == pytest.approx(2 * size / ranks, rel=1e-3)
    assert held[1].weights == held[2].weights == pytest.approx(size + size / ranks, rel=1e-3)
    assert held[3].weights == pytest.approx(2 * size / ranks, rel=1e-3)
    moved = memory(job, Layout(ranks, 2, micro=1, offload="optimizer"), "gpu")
    assert moved.optimizer == 0
    assert moved.host > 2 * size / ranks


def test_time_of_a_step() -> None:
    job, machines = work(), Cluster(2, 8, Link(1e9, 1e-3), Link(1e8, 1e-2))
    passes = Passes(1.0, 0.5)
    size = 4 * parameter_count(BERT.build())
    alone = pace(job, Layout(1, micro=8, accumulation=8), passes, machines, "cpu")
    assert alone == (8.0, 0.0, 0.0, 0.5)
    # a ring moves (n - 1) / n of the bytes twice
    two = pace(job, Layout(2, micro=8, accumulation=4), passes, machines, "cpu")
    assert two.data == pytest.approx(size / 1e9 + 2e-3)
    zero = pace(job, Layout(2, 1, micro=8, accumulation=4), passes, machines, "cpu")
    assert zero.data == pytest.approx(1.5 * size / 1e9 + 3e-3)
    assert zero.optimizer == 0.25
    # ZeRO 2 averages after every pass, ZeRO 1 once a step
    each = pace(job, Layout(2, 2, micro=8, accumulation=4), passes, machines, "cpu")
    assert each.data == pytest.approx(4 * (size / 1e9 + 2e-3) + 0.5 * size / 1e9 + 1e-3)
    far = pace(job, Layout(16, micro=4), passes, machines.sized(16), "cpu")
    assert far.data == pytest.approx(2 * 15 / 16 * size / 1e8 + 2 * 4e-2)
    # accelerators of a node send over all of its adapters at once
    rings = pace(job, Layout(16, micro=4), passes, machines.sized(16), "gpu")
    assert rings.data == pytest.approx(2 * 15 / 16 * size / 8e8 + 2 * 4e-2)
    divided = pace(job, Layout(16, tensor=4, micro=4), passes, machines.sized(16), "gpu")
    assert divided.data == pytest.approx(2 * 3 / 4 * count(job, 4, tensor=4).parameters * 4 / 2e8 + 2 * 2e-2)


def test_recomputation_costs_a_forward_pass() -> None:
    plain, again = (declared(work(), Layout(1, micro=64, checkpoint=every), Rates(1e9, 1e12)).forward_backward for every in (0, 1))
    counts_ = work().flops()
    assert again - plain == pytest.approx(64 * sum(counts_.blocks) / 1e9)


def test_layout_of_a_section() -> None:
    section = TrainSection(batch_size=64, micro_batch_size=4, deepspeed="ds_configs/zero2.json", tensor_parallel=2)
    assert layout_of(section, "wide", 8)[:7] == (8, 2, 2, False, 4, 4, 0)
    assert layout_of(section, "wide", 8).buffers == 2
    with pytest.raises(ValueError, match=r"wide.batch_size 64 is not a multiple of 4 samples on 3 data ranks"):
        layout_of(section, "wide", 6)


def test_search_takes_what_fits_and_the_simplest_of_the_fastest() -> None:
    job = work(precision="bf16", batch_size=256)
    machines = cluster(accelerator("h100"), 8)
    reached = rates(accelerator("h100"), "bf16", 0.4)

    def timed(job: Work, layout: Layout) -> Passes:
        return declared(job, layout, reached)

    roomy = best(job, 8, timed, machines, "gpu")
    assert (roomy[0].layout.zero, roomy[0].layout.tensor, roomy[0].layout.checkpoint) == (0, 1, 0)
    need = memory(job, roomy[0].layout, "gpu").total
    limit = machines.base + 0.9 * need
    tight = best(job, 8, timed, machines._replace(memory=limit), "gpu")
    assert limit < machines.base + need
    assert tight[0].memory.total <= limit
    assert best(job, 8, timed, machines._replace(memory=1e6), "gpu") == []
    assert counts(8, 64, 4096) == [1, 2, 4, 8, 16, 32, 64]


def plan(*arguments: str) -> str:
    return run("A plan.", ["--config", str(CLUSTER), "--stage", "wide", *arguments])


def test_what_bert_large_needs_in_a_day() -> None:
    text = plan("--within", "24h", "--device", "h100", "--price", "2.5")
    assert "335 million parameters" in text
    line = next(line for line in text.splitlines() if line.startswith("within 24 h: "))
    ranks = int(line.split(" devices")[0].split(": ")[1])
    # 1.024 billion sequences at 0.24 TFLOP each, at 0.4 of 989 TFLOP/s: 7.2 device days, and the messages
    assert 8 <= ranks <= 16
    assert "run it with --wide.deepspeed=ds_configs/zero" in text
    assert all(len(line) <= 140 and line.isascii() for line in text.splitlines())


def test_512_devices_and_what_does_not_fit() -> None:
    text = plan("--ranks", "512", "--wide.micro_batch_size=8", "--device", "a100")
    assert "as the recipe has it: ZeRO 1, 8 x 1" in text
    assert "best of" in text
    assert "does not fit" in plan("--ranks", "8", "--memory", "8e9")
    assert "not on up to 8 devices" in plan("--within", "1h", "--most", "8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--ranks", "8", "--device", "abacus"), r"--device abacus: not known; there are b200,"),
        (("--ranks", "8", "--device", "v100"), r"--device V100: has no units for bf16"),
        (("--within", "soon"), r"--within: 'soon' is no time such as 24h"),
        ((), r"argument --ranks: how many devices\? or --within 24h"),
        (("--ranks", "7"), r"wide.batch_size: 4096 cannot be split into equal micro-batches over 7 data ranks; 4 ranks would fit"),
        (("--ranks", "8", "--use", "2"), r"--use 2: is a share of the peak"),
        (("--ranks", "8", "--wide.teacher=/nowhere"), r"/nowhere"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        plan(*arguments)


def test_stage_two_is_planned_as_before() -> None:
    same = ["--config", str(CLUSTER), "--ranks", "4", "--data.vocab_size=30522"]
    assert run("A plan.", same) == run("A plan.", [*same, "--stage", "narrow"])
    with pytest.raises(UserError, match="--stage"):
        run("A plan.", ["--config", str(CLUSTER), "--stage", "wider"])
