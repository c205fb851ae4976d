"""A checkpoint in the middle of a training on several ranks, exported by one process, is the network that the ranks gather there."""

from pathlib import Path
from typing import Any

import pytest

import wtn_pretrain
from tests.running import BERT, Forge, equal_bits, recipe, weights, write_recipe

pytestmark = pytest.mark.slow

LAYOUTS = {"ZeRO 3": {"wide.deepspeed": "ds_configs/zero3.json"}, "2 tensor": {"wide.tensor_parallel": 2}}
# wider outside, which Hugging Face has an architecture for; a rate that does not depend on where the training ends
WIDE = {"widen": {"inner": 1, "outer": 2}, "wide.schedule": {"name": "constant", "warmup": 1}, "wide.checkpoint_every": 3}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_under_any_layout(name: str, forge: Forge, tmp_path: Path) -> None:
    changes: dict[str, Any] = {**WIDE, **LAYOUTS[name], "data.limit_mb": 0.03}
    config = write_recipe(tmp_path / "recipe.yaml", recipe(BERT, changes))
    started = [forge.start("train_wide.py", config, f"--run.name=to{last}", f"--wide.steps={last}", ranks=2) for last in (3, 4)]
    for ranks in started:
        ranks.succeed()
    ended, longer = (tmp_path / "runs" / f"to{last}" for last in (3, 4))
    step = longer / "wide" / "checkpoints" / "step3"
    written = wtn_pretrain.export(longer, "hf", stage="wide", checkpoint=step, out=tmp_path / "out", samples=16)
    assert written["hf"]["network"]["step"] == 3
    found = wtn_pretrain.load(tmp_path / "out" / "hf").state_dict()
    gathered = weights(ended / "wide")
    assert equal_bits(gathered, {key: found[key] for key in gathered})
    assert not equal_bits(gathered, weights(longer / "wide"))
