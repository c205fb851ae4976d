"""Stage 1 on two ranks, at every ZeRO stage, against a plain torch loop on one process.

The runs are real: DeepSpeed's launcher starts `scripts/train_wide.py`, and what is compared is what it leaves in the run's folder.
The reference knows nothing of DeepSpeed nor of the package's optimizers, schedules and loop.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.running import BERT, RESNET, error_lines, losses, recipe, start, succeed, weights, write_recipe
from wtn_pretrain.data.stream import BatchStream
from wtn_pretrain.recipe import Recipe, load_recipe
from wtn_pretrain.stages import open_task

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Case:
    """A recipe and the changes that its two-rank run makes to it; `changes` enter the reference too, `launch` does not."""

    base: dict[str, Any]
    launch: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)
    loss: float = 1e-5
    """Largest relative difference of the loss over all steps."""
    weight: float = 1e-4
    """Largest absolute difference of a weight at the end."""


def zero(stage: int) -> dict[str, Any]:
    return {"wide.deepspeed": f"ds_configs/zero{stage}.json"}


LAMB = {"wide.optimizer.name": "lamb", "wide.optimizer.lr": 0.1}
CASES = {
    "bert, ZeRO 0": Case(BERT, zero(0)),
    "bert, ZeRO 1": Case(BERT, zero(1)),
    "bert, ZeRO 2": Case(BERT, zero(2)),
    "bert, ZeRO 3": Case(BERT, zero(3)),
    "bert, ZeRO 2, accumulated twice": Case(BERT, {**zero(2), "wide.micro_batch_size": 4}),
    "bert, LAMB": Case(BERT, zero(0), LAMB),
    "resnet, ZeRO 0": Case(RESNET, zero(0)),
    "resnet, ZeRO 2": Case(RESNET, zero(2)),
    "bert, ZeRO 2, optimizer offloaded": Case(BERT, {"wide.deepspeed": "ds_configs/zero2_offload.json"}),
    "bert, ZeRO 3, optimizer and parameters offloaded": Case(BERT, {"wide.deepspeed": "ds_configs/zero3_offload.json"}),
}


class Curve(NamedTuple):
    """What a run leaves."""

    losses: list[float]
    weights: dict[str, Tensor]
    norms: list[float]
    """Gradient norms before clipping."""


class PlainLamb:
    """LAMB as algorithm 2 of You et al. 2020 has it, with bias correction, in the plainest form; biases and norms are not scaled."""

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        self.param_groups, self.betas, self.eps, self.count = groups, betas, eps, 0
        self.moments = {weight: (torch.zeros_like(weight), torch.zeros_like(weight)) for group in groups for weight in group["params"]}

    @torch.no_grad()
    def step(self) -> None:
        self.count += 1
        first, second = self.betas
        for group in self.param_groups:
            for weight in group["params"]:
                mean, square = self.moments[weight]
                mean.mul_(first).add_((1 - first) * weight.grad)
                square.mul_(second).add_((1 - second) * weight.grad**2)
                ratio = mean / (1 - first**self.count) / ((square / (1 - second**self.count)).sqrt() + self.eps)
                update = ratio + group["weight_decay"] * weight
                scaled = group["weight_decay"] > 0 and weight.norm() > 0 and update.norm() > 0
                trust = weight.norm() / update.norm() if scaled else 1.0
                weight -= group["lr"] * trust * update


def plain_optimizer(settings: Recipe, parameters: Iterable[nn.Parameter]) -> Any:
    chosen = settings.wide.optimizer
    parameters = list(parameters)
    groups: list[dict[str, Any]] = [
        {"params": [weight for weight in parameters if weight.dim() > 1], "weight_decay": chosen.weight_decay},
        {"params": [weight for weight in parameters if weight.dim() == 1], "weight_decay": 0.0},
    ]
    if chosen.name == "lamb":
        return PlainLamb(groups, chosen.betas, chosen.eps)
    if chosen.name == "sgd":
        return torch.optim.SGD(groups, lr=chosen.lr, momentum=chosen.momentum)
    return torch.optim.AdamW(groups, lr=chosen.lr, betas=chosen.betas, eps=chosen.eps)


def plain_rate(settings: Recipe, step: int) -> float:
    """The rate of update number `step` from 0: a linear warm-up that does not start at 0, then linear or cosine down to 0."""
    section = settings.wide
    warmup = section.schedule.warmup
    if step < warmup:
        return section.optimizer.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / (section.steps - warmup)
    return section.optimizer.lr * (1 - done if section.schedule.name == "linear" else (1 + math.cos(math.pi * done)) / 2)


def plain_training(path: Path, cache: Path) -> Curve:
    """Stage 1 of a recipe in plain torch."""
    settings = load_recipe(path)
    section = settings.wide
    task = open_task(settings, cache)
    stream = BatchStream(task.train, section.batch_size, seed=settings.run.seed)
    torch.manual_seed(settings.run.seed)
    network = task.complete(settings.wide_model()).build().train()
    optimizer = plain_optimizer(settings, network.parameters())
    found, norms = [], []
    for step in range(section.steps):
        for group in optimizer.param_groups:
            group["lr"] = plain_rate(settings, step)
        loss = task.loss(network, stream.micro_batch(step, 0))["loss"]
        network.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(network.parameters(), section.clip)))
        optimizer.step()
        found.append(loss.item())
    return Curve(found, {name: value.clone() for name, value in network.state_dict().items()}, norms)


Reference = Callable[[dict[str, Any]], Curve]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The plain run of a recipe, made once."""
    made: dict[str, Curve] = {}

    def find(tree: dict[str, Any]) -> Curve:
        if str(tree) not in made:
            folder = tmp_path_factory.mktemp("reference")
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            made[str(tree)] = plain_training(write_recipe(folder / "recipe.yaml", tree), folder / "data")
            torch.set_num_threads(threads)
        return made[str(tree)]

    return find


def two_rank_run(folder: Path, tree: dict[str, Any]) -> Path:
    """Trains the wide network of a recipe on two ranks; the folder that the stage leaves."""
    succeed("train_wide.py", write_recipe(folder / "recipe.yaml", tree), ranks=2)
    return folder / "runs" / tree["run"]["name"] / "wide"


def relative(ours: list[float], theirs: list[float]) -> float:
    return max(abs(mine - other) / abs(other) for mine, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_follow_the_plain_loop(
    name: str, tmp_path: Path, reference: Reference, record_property: Callable[[str, object], None]
) -> None:
    case = CASES[name]
    expected = reference(recipe(case.base, case.changes))
    stage = two_rank_run(tmp_path, recipe(case.base, {**case.changes, **case.launch}))
    curve, state = losses(stage), weights(stage)
    # the comparison says something only if the loss moves and clipping acts
    assert expected.losses[0] - min(expected.losses) > 0.05 * expected.losses[0]
    assert max(expected.norms) > 1.1 * load_recipe(tmp_path / "recipe.yaml").wide.clip
    difference = relative(curve, expected.losses)
    apart = max(float((state[key].double() - expected.weights[key].double()).abs().max()) for key in state)
    record_property("relative difference of the loss", difference)
    record_property("largest difference of a weight", apart)
    print(f"{name}: loss {difference:.1e}, weights {apart:.1e}")
    assert len(curve) == 20
    assert difference <= case.loss
    assert apart <= case.weight


@pytest.mark.parametrize(
    ("base", "stage"), [(BERT, 0), (BERT, 1), (BERT, 2), (BERT, 3), (RESNET, 0)], ids=["bert-0", "bert-1", "bert-2", "bert-3", "resnet-0"]
)
def test_bf16_stays_near_fp32(base: dict[str, Any], stage: int, tmp_path: Path, reference: Reference) -> None:
    curve = losses(two_rank_run(tmp_path, recipe(base, {**zero(stage), "wide.precision": "bf16"})))
    expected = reference(recipe(base)).losses
    print(f"bf16, {base['model']['family']}, ZeRO {stage}: {relative(curve, expected):.1e}")
    assert all(map(math.isfinite, curve))
    # 8 bits of mantissa: not equal, and not far
    assert 0 < relative(curve, expected) < 0.02


def refusal(folder: Path, tree: dict[str, Any]) -> str:
    """The one line by which two ranks refuse a recipe."""
    done = start("train_wide.py", write_recipe(folder / "recipe.yaml", tree), ranks=2)
    lines = error_lines(done.stderr, launched=True)
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert not (folder / "runs" / tree["run"]["name"] / "wide" / "metrics.jsonl").exists()
    return lines[0]


def test_lamb_is_refused_where_zero_partitions_layers(tmp_path: Path) -> None:
    line = refusal(tmp_path, recipe(BERT, {**LAMB, **zero(2)}))
    assert line.startswith("error: wide.optimizer.name: lamb")
    assert "ZeRO 2" in line
    assert "ds_configs/zero0.json" in line


def test_a_deepspeed_file_that_contradicts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{"gradient_clipping": 0.25, "zero_optimization": {"stage": 1}}')
    line = refusal(tmp_path, recipe(BERT, {"wide.deepspeed": "mine.json"}))
    assert line.startswith("error: mine.json: gradient_clipping 0.25 contradicts wide.clip, which gives 0.5")
