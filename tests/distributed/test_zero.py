"""Stage 1 on several ranks, at every ZeRO stage, against a plain torch loop on one process.

The runs are real: `scripts/train_wide.py` on ranks that meet over gloo, once under DeepSpeed's launcher, and what is compared is what it
leaves in the run's folder. The reference knows nothing of DeepSpeed nor of the package's optimizers, schedules and loop.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.running import BERT, RESNET, ROOT, Forge, compiled, error_lines, losses, recipe, records, succeed, weights, write_recipe
from wtn_pretrain.data.stream import BatchStream
from wtn_pretrain.recipe import Recipe, load_recipe
from wtn_pretrain.stages import open_task

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Case:
    """A recipe and the changes that its run makes to it; `changes` enter the reference too, `launch` does not."""

    base: dict[str, Any]
    launch: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)
    ranks: int = 2
    loss: float = 1e-5
    """Largest relative difference of the loss over all steps."""
    weight: float = 1e-4
    """Largest absolute difference of a weight at the end."""


def zero(stage: int) -> dict[str, Any]:
    return {"wide.deepspeed": f"ds_configs/zero{stage}.json"}


LAMB = {"wide.optimizer.name": "lamb", "wide.optimizer.lr": 0.1}
LARS = {"wide.optimizer.name": "lars", "wide.optimizer.lr": 0.5, "wide.optimizer.trust": 0.1}
MILD = {**LARS, "wide.optimizer.lr": 0.2, "wide.optimizer.trust": 0.05}
THREE = {"wide.batch_size": 18}
"""What three ranks divide."""
UNDECAYED = {"wide.optimizer.weight_decay": 0.0}
AVERAGED = {"wide.ema": 0.8}
PACKED = {"data.packing": "documents"}
OFFLOADED = {"wide.deepspeed": "ds_configs/zero2_offload.json"}
CASES = {
    "bert, ZeRO 0": Case(BERT, zero(0)),
    "bert, ZeRO 1": Case(BERT, zero(1)),
    "bert, ZeRO 2": Case(BERT, zero(2)),
    "bert, ZeRO 3": Case(BERT, zero(3)),
    "bert, ZeRO 2, accumulated twice": Case(BERT, {**zero(2), "wide.micro_batch_size": 4}),
    "resnet, ZeRO 0": Case(RESNET, zero(0)),
    "resnet, ZeRO 1": Case(RESNET, zero(1)),
    "resnet, ZeRO 2": Case(RESNET, zero(2)),
    "bert, ZeRO 2, optimizer offloaded": Case(BERT, OFFLOADED),
    "bert, ZeRO 3, optimizer and parameters offloaded": Case(BERT, {"wide.deepspeed": "ds_configs/zero3_offload.json"}),
    "bert, LAMB, ZeRO 0": Case(BERT, zero(0), LAMB),
    "bert, LAMB, ZeRO 1": Case(BERT, zero(1), LAMB),
    "bert, LAMB, ZeRO 2": Case(BERT, zero(2), LAMB),
    "bert, LAMB, ZeRO 3": Case(BERT, zero(3), LAMB),
    "bert, LAMB, ZeRO 1, three ranks": Case(BERT, zero(1), {**LAMB, **THREE}, ranks=3),
    "bert, LAMB, ZeRO 2, three ranks, accumulated thrice": Case(BERT, {**zero(2), "wide.micro_batch_size": 2}, {**LAMB, **THREE}, ranks=3),
    "bert, LAMB, ZeRO 3, three ranks": Case(BERT, zero(3), {**LAMB, **THREE}, ranks=3),
    "bert, LAMB, ZeRO 2, offloaded": Case(BERT, OFFLOADED, LAMB),
    "bert, LAMB without decay, ZeRO 2": Case(BERT, zero(2), {**LAMB, **UNDECAYED}),
    # not the recipe's seed, with which round-off at the fourth step turns a ReLU at its kink, and LARS makes 1e-2 of that
    "resnet, LARS, ZeRO 0": Case(RESNET, zero(0), {**MILD, "run.seed": 6}),
    # smooth, as to that
    "bert, LARS, ZeRO 1": Case(BERT, zero(1), LARS),
    "bert, LARS, ZeRO 2": Case(BERT, zero(2), LARS),
    "bert, LARS without decay, ZeRO 3": Case(BERT, zero(3), {**LARS, **UNDECAYED}),
    "resnet, LARS, ZeRO 2, three ranks": Case(RESNET, zero(2), {**MILD, **THREE}, ranks=3),
    # rows have unequal numbers of masked tokens
    "bert, packed documents, ZeRO 1": Case(BERT, {**zero(1), "wide.micro_batch_size": 2}, PACKED),
    "bert, averaged, ZeRO 2": Case(BERT, zero(2), AVERAGED),
    "resnet, averaged, ZeRO 1": Case(RESNET, zero(1), AVERAGED),
    "bert, ZeRO 3, activations computed anew": Case(BERT, {**zero(3), "wide.checkpoint_activations": True}),
    "resnet, ZeRO 2, activations computed anew": Case(RESNET, {**zero(2), "wide.checkpoint_activations": 2}),
}


class Curve(NamedTuple):
    """What a run leaves."""

    losses: list[float]
    weights: dict[str, Tensor]
    """Their average, where the recipe asks for one."""
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
                scaled = weight.dim() > 1 and weight.norm() > 0 and update.norm() > 0
                trust = weight.norm() / update.norm() if scaled else 1.0
                weight -= group["lr"] * trust * update


class PlainLars:
    """LARS as You et al. 2017 have it, with the decay in the norm and momentum after the scaling; biases and norms are not scaled."""

    def __init__(self, groups: list[dict[str, Any]], momentum: float, trust: float) -> None:
        self.param_groups, self.momentum, self.trust = groups, momentum, trust
        self.buffers = {weight: torch.zeros_like(weight) for group in groups for weight in group["params"]}

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                update = weight.grad + group["weight_decay"] * weight
                if weight.dim() > 1:
                    update *= self.trust * weight.norm() / update.norm()
                self.buffers[weight] = self.momentum * self.buffers[weight] + update
                weight -= group["lr"] * self.buffers[weight]


def plain_optimizer(settings: Recipe, parameters: Iterable[nn.Parameter]) -> Any:
    chosen = settings.wide.optimizer
    parameters = list(parameters)
    groups: list[dict[str, Any]] = [
        {"params": [weight for weight in parameters if weight.dim() > 1], "weight_decay": chosen.weight_decay},
        {"params": [weight for weight in parameters if weight.dim() == 1], "weight_decay": 0.0},
    ]
    if chosen.name == "lamb":
        return PlainLamb(groups, chosen.betas, chosen.eps)
    if chosen.name == "lars":
        return PlainLars(groups, chosen.momentum, chosen.trust)
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
    averages = {name: value.double() for name, value in network.state_dict().items()}
    for step in range(section.steps):
        for group in optimizer.param_groups:
            group["lr"] = plain_rate(settings, step)
        loss = task.loss(network, stream.micro_batch(step, 0))["loss"]
        network.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(network.parameters(), section.clip)))
        optimizer.step()
        found.append(loss.item())
        kept = min(section.ema, (1 + step) / (10 + step))
        for name, value in network.state_dict().items():
            averages[name] = kept * averages[name] + (1 - kept) * value.double() if value.is_floating_point() else value.double()
    return Curve(found, averages, norms)


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


def several_ranks(forge: Forge, folder: Path, tree: dict[str, Any], ranks: int = 2) -> Path:
    """Trains the wide network of a recipe; the folder that the stage leaves."""
    forge.start("train_wide.py", write_recipe(folder / "recipe.yaml", tree), ranks=ranks).succeed()
    return folder / "runs" / tree["run"]["name"] / "wide"


def relative(ours: list[float], theirs: list[float]) -> float:
    return max(abs(mine - other) / abs(other) for mine, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_ranks_follow_the_plain_loop(
    name: str, tmp_path: Path, forge: Forge, reference: Reference, record_property: Callable[[str, object], None]
) -> None:
    case = CASES[name]
    stage = several_ranks(forge, tmp_path, recipe(case.base, {**case.changes, **case.launch}), case.ranks)
    compare(name, case, reference(recipe(case.base, case.changes)), stage, record_property)


def test_under_deepspeeds_launcher_too(tmp_path: Path, reference: Reference, record_property: Callable[[str, object], None]) -> None:
    case = CASES["bert, ZeRO 2"]
    succeed("train_wide.py", write_recipe(tmp_path / "recipe.yaml", recipe(case.base, case.launch)), ranks=2)
    compare("launched", case, reference(recipe(case.base)), tmp_path / "runs" / "bert" / "wide", record_property)


@pytest.mark.skipif(not compiled("cpu_adam"), reason="DeepSpeed's CPUAdam is not compiled here, which takes two minutes")
def test_deepspeeds_kernel_follows_the_plain_loop(
    tmp_path: Path, forge: Forge, reference: Reference, record_property: Callable[[str, object], None]
) -> None:
    case = Case(BERT, {**OFFLOADED, "wide.optimizer.cpu_kernel": "deepspeed"})
    stage = several_ranks(forge, tmp_path, recipe(case.base, case.launch))
    compare("CPUAdam", case, reference(recipe(case.base)), stage, record_property)


LARGE = {"model.hidden_size": 128, "model.intermediate_size": 2048, "model.layers": 2}
"""Of which two ranks have shares of 1 MiB, the least that DeepSpeed swaps: the wide network's feed-forward is 128 x 4096."""


@pytest.mark.skipif(not compiled("async_io"), reason="DeepSpeed's async_io is not compiled here, which needs libaio-dev and two minutes")
def test_an_optimizer_on_nvme_follows_the_plain_loop(
    tmp_path: Path, forge: Forge, reference: Reference, record_property: Callable[[str, object], None]
) -> None:
    # the file that is shipped, with a disk here
    settings = json.loads((ROOT / "ds_configs" / "zero3_nvme.json").read_text())
    settings["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    (tmp_path / "mine.json").write_text(json.dumps(settings))
    case = Case(BERT, {"wide.deepspeed": "mine.json"}, LARGE)
    stage = several_ranks(forge, tmp_path, recipe(case.base, {**case.changes, **case.launch}))
    compare("NVMe", case, reference(recipe(case.base, case.changes)), stage, record_property)


def compare(name: str, case: Case, expected: Curve, stage: Path, record_property: Callable[[str, object], None]) -> None:
    """What a run has left against the plain loop."""
    curve, state = losses(stage), weights(stage)
    # the comparison says something only if the loss moves and clipping acts
    assert expected.losses[0] - min(expected.losses) > 0.05 * expected.losses[0]
    assert max(expected.norms) > 1.1 * case.base["wide"]["clip"]
    difference = relative(curve, expected.losses)
    apart = max(float((state[key].double() - expected.weights[key].double()).abs().max()) for key in state)
    record_property("relative difference of the loss", difference)
    record_property("largest difference of a weight", apart)
    print(f"{name}: loss {difference:.1e}, weights {apart:.1e}")
    assert len(curve) == 20
    assert difference <= case.loss
    assert apart <= case.weight
    # what clipping compared is what a record tells
    told = [record["grad_norm"] for record in records(stage)]
    assert relative(told, expected.norms) <= 1e-4


@pytest.mark.parametrize(
    ("base", "stage"), [(BERT, 0), (BERT, 1), (BERT, 2), (BERT, 3), (RESNET, 0)], ids=["bert-0", "bert-1", "bert-2", "bert-3", "resnet-0"]
)
def test_bf16_stays_near_fp32(base: dict[str, Any], stage: int, tmp_path: Path, forge: Forge, reference: Reference) -> None:
    curve = losses(several_ranks(forge, tmp_path, recipe(base, {**zero(stage), "wide.precision": "bf16"})))
    expected = reference(recipe(base)).losses
    print(f"bf16, {base['model']['family']}, ZeRO {stage}: {relative(curve, expected):.1e}")
    assert all(map(math.isfinite, curve))
    # 8 bits of mantissa: not equal, and not far
    assert 0 < relative(curve, expected) < 0.02


@pytest.mark.parametrize("changes", [{}, LAMB], ids=["adamw", "lamb"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_weights_have_fp32_masters(stage: int, changes: dict[str, Any], tmp_path: Path, forge: Forge, reference: Reference) -> None:
    tree = recipe(BERT, {**changes, **zero(stage), "wide.precision": "bf16_weights", "wide.micro_batch_size": 4})
    folder = several_ranks(forge, tmp_path, tree)
    curve, state = losses(folder), weights(folder)
    expected = reference(recipe(BERT, changes))
    apart = max(float((state[key].double() - expected.weights[key].double()).abs().max()) for key in state)
    print(f"bf16 weights, ZeRO {stage}, {changes}: loss {relative(curve, expected.losses):.1e}, weights {apart:.1e}")
    # every weight and activation rounded to 8 bits: a little further off than autocast
    assert 0 < relative(curve, expected.losses) < 0.05
    # what is kept are the masters: fp32, and not on the grid of bf16
    assert all(value.dtype == torch.float32 for value in state.values())
    matrices = [value for value in state.values() if value.dim() > 1]
    assert all((value.bfloat16().float() != value).float().mean() > 0.5 for value in matrices)


def refusal(forge: Forge, folder: Path, tree: dict[str, Any]) -> str:
    """The one line by which two ranks refuse a recipe."""
    started = forge.start("train_wide.py", write_recipe(folder / "recipe.yaml", tree), ranks=2)
    assert started.codes() == [2, 2], started.stderr()
    lines = error_lines(started.stderr())
    assert len(lines) == 1, started.stderr()
    assert not (folder / "runs" / tree["run"]["name"] / "wide" / "metrics.jsonl").exists()
    return lines[0]


def test_a_deepspeed_file_that_contradicts_is_refused(tmp_path: Path, forge: Forge) -> None:
    (tmp_path / "mine.json").write_text('{"gradient_clipping": 0.25, "zero_optimization": {"stage": 1}}')
    line = refusal(forge, tmp_path, recipe(BERT, {"wide.deepspeed": "mine.json"}))
    assert line.startswith("error: mine.json: gradient_clipping 0.25 contradicts wide.clip, which gives 0.5")


def test_rounded_batch_norms_are_refused(tmp_path: Path, forge: Forge) -> None:
    line = refusal(forge, tmp_path, recipe(RESNET, {**zero(1), "wide.precision": "bf16_weights"}))
    assert line == "error: wide.precision: bf16_weights would round the statistics of a resnet's batch norms; use bf16"
