"""torch.compile gives the same losses."""

from pathlib import Path
from typing import Any

import pytest

from tests.running import BERT, RESNET, Forge, losses, recipe, succeed, write_recipe

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("base", "changes", "compiled", "ranks"),
    [
        (BERT, {}, {"wide.checkpoint_activations": 2}, 1),
        (BERT, {"wide.tensor_parallel": 2, "wide.sequence_parallel": True, "wide.deepspeed": "ds_configs/zero1.json"}, {}, 2),
        (RESNET, {}, {}, 1),
    ],
    ids=["bert", "bert over two ranks", "resnet"],
)
def test_compiled_blocks_give_the_same_losses(
    base: dict[str, Any], changes: dict[str, Any], compiled: dict[str, Any], ranks: int, forge: Forge, tmp_path: Path
) -> None:
    config = write_recipe(tmp_path / "recipe.yaml", recipe(base, {"wide.steps": 8, **changes}))
    own = [f"--{key}={value}" for key, value in compiled.items()]
    forge.start("train_wide.py", config, "--run.name=plain", ranks=ranks).succeed()
    told = succeed("train_wide.py", config, "--run.name=compiled", "--wide.compile=true", *own, ranks=ranks, timeout=600)
    assert "compiling the blocks" in told.stderr
    plain, quick = (losses(tmp_path / "runs" / name / "wide") for name in ("plain", "compiled"))
    apart = max(abs(mine - other) / other for mine, other in zip(quick, plain, strict=True))
    print(f"compiled: {apart:.1e}")
    # the same sums in another order
    assert 0 < apart < 1e-5
