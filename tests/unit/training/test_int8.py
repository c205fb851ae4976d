"""Training for int8: rounding as the int8 formats round, gradients through it, names and checkpoints as without it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.running import BERT as TEXT
from tests.running import RESNET, equal_bits, losses, recipe, stages_here, weights
from wtn_pretrain.config import validate
from wtn_pretrain.errors import UserError
from wtn_pretrain.models import BertConfig, BlockNetwork, ResNetConfig
from wtn_pretrain.models.store import load_network, save_network
from wtn_pretrain.recipe import Recipe
from wtn_pretrain.stages import Stages
from wtn_pretrain.tasks.base import evaluate
from wtn_pretrain.training.int8 import MARK, fake_quantise, rounded, without_ranges

BERT = BertConfig(vocab_size=50, hidden_size=16, heads=2, layers=2, max_positions=16, dropout=0, attention_dropout=0)
RESNET_SHAPE = ResNetConfig(
    block="basic", stem="cifar", channels=(4, 8), depths=(1, 1), stem_channels=4, image_channels=1, image_size=8, classes=3
)
INPUTS: dict[str, dict[str, Any]] = {
    "bert": {"input_ids": torch.arange(24).reshape(3, 8)},
    "resnet": {"pixels": torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))},
}


def made(name: str) -> BlockNetwork:
    torch.manual_seed(0)
    return (BERT if name == "bert" else RESNET_SHAPE).build()


def test_weights_are_rounded_to_255_steps_of_each_channel() -> None:
    weight = torch.randn(6, 5, 3, 3) * torch.logspace(-3, 2, 6)[:, None, None, None]
    steps = rounded(weight).flatten(1) / (weight.flatten(1).abs().amax(1, keepdim=True) / 127)
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    assert steps.abs().max() <= 127.001
    assert torch.equal(rounded(torch.zeros(2, 3)), torch.zeros(2, 3))
    # a norm that scales output channels changes scales and no integer
    gain = torch.rand(6) + 0.5
    torch.testing.assert_close(rounded(weight * gain[:, None, None, None]), rounded(weight) * gain[:, None, None, None])


@pytest.mark.parametrize("name", INPUTS)
def test_a_rounding_network_is_near_the_plain_one_and_learns(name: str) -> None:
    plain, network = made(name), made(name)
    names = dict(plain.named_parameters()).keys()
    fake_quantise(network)
    assert dict(network.named_parameters()).keys() == names
    assert without_ranges(network.state_dict()).keys() == plain.state_dict().keys()
    ours, theirs = network(INPUTS[name]), plain(INPUTS[name])
    assert 0 < float((ours - theirs).detach().abs().max()) < 0.1 * float(theirs.detach().abs().max())
    for logits in (ours, theirs):
        logits.square().mean().backward()
    for (key, mine), other in zip(network.named_parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        # rounding is passed through: the gradient is that of the plain network up to the rounding of what it meets
        cosine = torch.nn.functional.cosine_similarity(mine.grad.flatten(), other.grad.flatten(), 0)  # type: ignore[union-attr]
        assert cosine > 0.9 or float(other.grad.abs().max()) < 1e-6, key  # type: ignore[union-attr]
    layer = next(module for module in network.modules() if hasattr(module, MARK))
    kept = layer.get_buffer(f"{MARK}.activation_post_process.max_val").clone()
    network.eval()(  # a range does not move while the network is measured
        {key: value * 3 if value.is_floating_point() else value for key, value in INPUTS[name].items()}
    )
    assert torch.equal(layer.get_buffer(f"{MARK}.activation_post_process.max_val"), kept)


def test_stage_3_leaves_a_plain_network_and_resumes_bit_by_bit(tmp_path: Path, one_rank: None) -> None:
    def stages(name: str) -> Stages:
        changes = {
            "run.folder": str(tmp_path), "run.name": name, "finetune.int8": True, "finetune.steps": 6, "finetune.batch_size": 32,
            "finetune.checkpoint_every": 3, "compare.scratch": False,
        }  # fmt: skip
        run = stages_here(recipe(RESNET, changes))
        torch.manual_seed(1)
        network = run.thin.build()
        save_network(run.folder.stage("narrow"), run.thin, network.state_dict())
        return run

    whole = stages("whole")
    result = whole.finetune(0)
    left = load_network(whole.folder.stage("finetune"))
    assert left.config == whole.thin
    # what is left is plain and so is its score; that of the rounding network stands beside it
    plain = evaluate(left, whole.task)
    assert (result["loss"], result["metric"]) == (pytest.approx(plain["loss"], rel=1e-5), pytest.approx(plain["metric"]))
    assert 0 < abs(result["int8_loss"] - result["loss"]) < 0.2 * result["loss"]
    assert 0 <= result["int8_metric"] <= 100
    # as after a crash behind the checkpoint of step 3
    again = stages("again")
    again.finetune(0)
    folder = again.folder.stage("finetune")
    for file in ("done.json", "model.json", "model.safetensors"):
        (folder / file).unlink()
    shutil.rmtree(folder / "checkpoints" / "step6")
    assert (folder / "checkpoints" / "step3").exists()
    again.finetune(0)
    assert equal_bits(weights(whole.folder.stage("finetune")), weights(folder))


@pytest.mark.parametrize("base", [TEXT, RESNET], ids=["bert", "resnet"])
def test_zero_and_recomputing_change_nothing(base: dict[str, Any], tmp_path: Path, one_rank: None) -> None:
    ran = []
    for name, changes in {
        "plain": {},
        "recomputed": {"finetune.checkpoint_activations": True},
        "divided-as-well": {"finetune.deepspeed": "ds_configs/zero3.json", "finetune.checkpoint_activations": True},
    }.items():
        few = {"run.folder": str(tmp_path), "run.name": name, "finetune.int8": True, "finetune.steps": 4, "narrow.steps": 4}
        run = stages_here(recipe(base, {**few, **changes}))
        torch.manual_seed(1)
        save_network(run.folder.stage("narrow"), run.thin, run.thin.build().state_dict())
        score = run.finetune(0)
        ran.append([*losses(run.folder.stage("finetune")), score["loss"]])
    # a value at the edge between two steps of a range may fall to the other one by round-off alone
    assert all(abs(ours - plain) < 1e-5 for other in ran[1:] for ours, plain in zip(other, ran[0], strict=True)), ran


def test_what_cannot_be_rounded_is_refused() -> None:
    for key, value, said in (
        ("tensor_parallel", 2, "finetune: int8 rounds whole layers, which tensor_parallel divides"),
        ("precision", "bf16_weights", "finetune: int8 rounds fp32 weights, which there are not under precision bf16_weights"),
    ):
        with pytest.raises(UserError, match=said):
            validate(Recipe, recipe(RESNET, {"finetune.int8": True, f"finetune.{key}": value}))
