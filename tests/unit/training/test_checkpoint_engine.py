"""Saving an engine and resuming it in one process: nothing is lost, nothing of another run is taken."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from torch import Tensor, nn

from tests.unit.training.test_checkpoint_files import no_room
from wtn_pretrain.errors import UserError
from wtn_pretrain.parallel.launch import Place
from wtn_pretrain.training.checkpoint.checkpoints import Checkpoints
from wtn_pretrain.training.checkpoint.manifest import read_manifest
from wtn_pretrain.training.checkpoint.masters import counters, set_counters
from wtn_pretrain.training.config import OptimizerSection
from wtn_pretrain.training.ema import Average
from wtn_pretrain.training.optimizers import decay_groups, make_optimizer

pytestmark = pytest.mark.usefixtures("one_rank")

IDENTITY: dict[str, int | str] = {"stage": "wide", "seed": 1}


class Network(nn.Module):
    """With running statistics, a tied weight, a buffer that is not kept, and a parameter that nothing uses."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.classify = nn.Linear(width, width, bias=False)
        self.again = nn.Linear(width, width)
        self.again.weight = self.classify.weight
        self.idle = nn.Parameter(torch.randn(5))
        self.register_buffer("passing", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.convolution(x)).relu().mean((2, 3))
        return self.again(self.classify(hidden)).square().mean()


class Run:
    """An engine around a network, and its checkpoints."""

    def __init__(
        self, folder: Path, seed: int, *, optimizer: str = "adamw", zero: int = 0, width: int = 4, ema: bool = False, **identity: int | str
    ) -> None:
        import deepspeed

        torch.manual_seed(seed)
        self.network = Network(width)
        chosen = make_optimizer(OptimizerSection(name=optimizer, lr=0.01), decay_groups(self.network.parameters(), 0.1))
        config = {
            "train_batch_size": 8,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": zero},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        self.engine, *_ = deepspeed.initialize(model=self.network, optimizer=chosen, config=config)
        self.average = Average(self.network, 0.9) if ema else None
        beside = {"average": self.average} if self.average else {}
        self.checkpoints = Checkpoints(folder, self.engine, self.network, Place(0, 1), identity={**IDENTITY, **identity}, beside=beside)

    def steps(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            loss = self.engine(torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(step)))
            self.engine.backward(loss)
            self.engine.step()
            losses.append(float(loss.detach()))
            if self.average:
                self.average.update()
        return losses

    def state(self) -> dict[str, Tensor]:
        kept = {name: value.clone() for name, value in self.network.state_dict().items()}
        if self.average:
            kept |= {f"average {name}": value.clone() for name, value in self.average.state_dict().items()}
        return kept


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(("optimizer", "ema"), [("adamw", True), ("sgd", False), ("lamb", False), ("lars", False)])
def test_a_run_continues_bit_for_bit(optimizer: str, ema: bool, tmp_path: Path) -> None:
    one = Run(tmp_path, 1, optimizer=optimizer, ema=ema)
    assert one.checkpoints.resume() == (0, 0.0)
    assert not any(tmp_path.iterdir())
    one.steps(0, 3)
    stored = one.state()
    saved = one.checkpoints.save(3, 12.5)
    # the copy is taken: what comes after is not written
    rest = one.steps(3, 6)
    one.checkpoints.close()
    assert 0 < saved.seconds < 5
    weights = sum(value.numel() for value in one.network.parameters())
    assert saved.bytes >= 4 * (2 if optimizer in ("sgd", "lars") else 3) * (weights - 5)

    other = Run(tmp_path, 2, optimizer=optimizer, ema=ema)
    assert not equal(other.state(), stored)
    assert other.checkpoints.resume() == (3, 12.5)
    assert equal(other.state(), stored)
    assert other.engine.global_steps == 3
    assert other.steps(3, 6) == rest
    assert equal(other.state(), one.state())


def test_what_is_not_stepped_has_no_state(tmp_path: Path) -> None:
    one = Run(tmp_path, 1)
    one.steps(0, 2)
    # as an optimizer leaves a parameter that never had a gradient
    del one.engine.optimizer.state[one.network.idle]
    one.checkpoints.save(2, 0.0)
    one.checkpoints.close()
    kept = read_manifest(tmp_path / "step2").parameters
    assert (kept["idle"].states, kept["idle"].updates) == ((), None)
    assert (kept["classify.weight"].states, kept["classify.weight"].updates) == (("exp_avg", "exp_avg_sq"), 2)
    # tied, and stored once
    assert "again.weight" not in kept
    other = Run(tmp_path, 2)
    other.checkpoints.resume()
    assert other.network.idle not in other.engine.optimizer.state
    assert torch.equal(other.network.idle, one.network.idle)
    assert all(parameter.grad is None for parameter in other.network.parameters())


# not ZeRO 3, with which DeepSpeed changes torch's linear layers for good
@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 2), (2, 0)])
def test_another_zero_stage_continues_in_one_process(before: int, after: int, tmp_path: Path) -> None:
    one = Run(tmp_path, 1, zero=before)
    one.steps(0, 3)
    one.checkpoints.save(3, 0.0)
    rest = one.steps(3, 5)
    one.checkpoints.close()
    other = Run(tmp_path, 2, zero=after)
    assert other.checkpoints.resume() == (3, 0.0)
    # one rank sums nothing in another order; the optimizer's kernels go through partitions in other strides
    assert other.steps(3, 5) == pytest.approx(rest, rel=1e-6)
    one.engine.destroy()
    other.engine.destroy()


def test_nothing_of_another_run_is_taken(tmp_path: Path) -> None:
    one = Run(tmp_path, 1)
    one.steps(0, 2)
    one.checkpoints.save(2, 0.0)
    one.checkpoints.close()
    for changes, said in (
        ({"seed": 2}, r"belongs to another run \(seed 1, and here 2\)"),
        ({"samples": 7}, r"belongs to another run \(samples None, and here 7\)"),
        ({"width": 6}, r"belongs to another network \(again.bias \(4,\), and here \(6,\)\)"),
        ({"ema": True}, r"holds no average/updates"),
    ):
        arguments: dict[str, Any] = {"seed": 2, **{key: value for key, value in changes.items() if key != "seed"}}
        run = Run(tmp_path, **arguments)
        if "seed" in changes:
            run.checkpoints._identity["seed"] = 2
        before = run.state()
        with pytest.raises(UserError, match=rf"step2: {said}; there is no other checkpoint: remove .* to start wide again"):
            run.checkpoints.resume()
        assert equal(run.state(), before)


def test_the_newest_that_is_whole_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = Run(tmp_path, 1)
    one.steps(0, 1)
    one.checkpoints.save(1, 0.0)
    first = one.state()
    one.steps(1, 2)
    one.checkpoints.save(2, 0.0)
    one.checkpoints.close()
    (tmp_path / "step2" / "manifest.json").write_bytes(b"{}")
    # a folder under another step's name, a save that was cut short, and what is no checkpoint
    shutil.copytree(tmp_path / "step1", tmp_path / "step10")
    (tmp_path / ".step4.part").mkdir()
    (tmp_path / "stepping").mkdir()
    other = Run(tmp_path, 2)
    assert other.checkpoints.resume() == (1, 0.0)
    assert equal(other.state(), first)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "step10: is the checkpoint of step 1; the checkpoint before it is used" in said[0]
    assert "step2/manifest.json: is not as it was written; the checkpoint before it is used" in said[1]
    assert not (tmp_path / ".step4.part").exists()
    # the damaged one is replaced when the training has come to it again, and the newest whole ones are kept
    other.steps(1, 2)
    other.checkpoints.save(2, 0.0)
    other.checkpoints.close()
    assert read_manifest(tmp_path / "step2").step == 2
    assert read_manifest(tmp_path / "step1").step == 1


def test_a_full_disk_is_said_at_the_next_save(tmp_path: Path) -> None:
    one = Run(tmp_path, 1)
    one.steps(0, 1)
    one.checkpoints.save(1, 0.0)
    one.checkpoints._writer.wait()
    stored = one.state()
    one.steps(1, 2)
    with no_room(500):
        one.checkpoints.save(2, 0.0)
        with pytest.raises(UserError, match=r"part-00000.safetensors: cannot be written \(.*the checkpoint before it is kept"):
            one.checkpoints.close()
    other = Run(tmp_path, 2)
    assert other.checkpoints.resume() == (1, 0.0)
    assert equal(other.state(), stored)


def test_the_loss_scaler_goes_on_where_it_was() -> None:
    def scaler() -> DynamicLossScaler:
        return DynamicLossScaler(2.0**16, 3, 1.0, 2, False)

    def engine(scaler: Any) -> Any:
        return SimpleNamespace(skipped_steps=0, global_steps=0, optimizer=SimpleNamespace(loss_scaler=scaler))

    flows = [True, True, False, False, False, False, True, False, True, False, False, False, False, False, False, True]
    alone = scaler()
    for overflow in flows[:8]:
        alone.update_scale(overflow)
    before = engine(alone)
    before.skipped_steps = 3
    kept = json.loads(json.dumps(counters(before)))
    after = engine(scaler())
    set_counters(after, kept, 8)
    assert (after.skipped_steps, after.global_steps) == (3, 8)
    for overflow in flows[8:]:
        alone.update_scale(overflow)
        after.optimizer.loss_scaler.update_scale(overflow)
        assert after.optimizer.loss_scaler.cur_scale == alone.cur_scale
    # DeepSpeed's plain fp16 optimizer keeps the same in its settings
    settings = SimpleNamespace(dynamic_loss_scale=True, cur_scale=8.0, cur_iter=5, last_overflow_iter=2)
    plain = SimpleNamespace(skipped_steps=1, global_steps=5, optimizer=SimpleNamespace(loss_scale_config=settings))
    assert counters(plain) == {"skipped_steps": 1, "cur_scale": 8.0, "cur_iter": 5, "last_overflow_iter": 2}
    # without one there is nothing to keep, and nothing is taken over
    still = engine(SimpleNamespace(dynamic=False, cur_scale=1.0))
    assert counters(still) == {"skipped_steps": 0}
    set_counters(still, kept, 8)
    assert still.optimizer.loss_scaler.cur_scale == 1.0
