"""A teacher from elsewhere over ranks: the first puts it into the run, all imitate it, and the plan does not matter."""

from pathlib import Path

import torch

from tests.running import RESNET, Forge, recipe, weights, write_recipe
from wtn_pretrain.models import ResNetConfig
from wtn_pretrain.models.store import save_network

TEACHER = ResNetConfig(
    block="basic", stem="cifar", shortcut="padding", stem_channels=8, channels=(8, 16), depths=(2, 2), image_channels=1, image_size=8,
    classes=10,
)  # fmt: skip


def test_two_ranks_imitate_a_teacher_as_one_does(tmp_path: Path, forge: Forge) -> None:
    torch.manual_seed(0)
    save_network(tmp_path / "teacher", TEACHER, TEACHER.build().state_dict())
    # every unit learns from the teacher's activations, so spans need nothing of each other
    config = write_recipe(tmp_path / "recipe.yaml", recipe(RESNET, {"widen": None, "narrow.steps": 5, "narrow.schedule": "parallel"}))
    started = [
        forge.start("imitate.py", config, "--teacher", "teacher", f"--run.name=ranks{ranks}", ranks=ranks) for ranks in (1, 2)
    ]  # fmt: skip
    for ranks in started:
        ranks.succeed()
    one, two = (tmp_path / "runs" / f"ranks{ranks}" for ranks in (1, 2))
    assert weights(one / "wide").keys() == weights(two / "wide").keys()
    mine, theirs = weights(one / "narrow"), weights(two / "narrow")
    assert mine.keys() == theirs.keys()
    # fp32 round-off of batch norms and losses summed over ranks
    assert all(torch.allclose(value.float(), theirs[name].float(), atol=1e-4) for name, value in mine.items())
