"""torch.compile gives the same losses."""

from pathlib import Path

import pytest

from tests.running import BERT, losses, recipe, succeed, write_recipe

pytestmark = pytest.mark.slow


def test_compiled_blocks_give_the_same_losses(tmp_path: Path) -> None:
    config = write_recipe(tmp_path / "recipe.yaml", recipe(BERT, {"wide.steps": 8}))
    succeed("train_wide.py", config, "--run.name=plain")
    told = succeed("train_wide.py", config, "--run.name=compiled", "--wide.compile=true", "--wide.checkpoint_activations=2", timeout=600)
    assert "compiling the blocks" in told.stderr
    plain, compiled = (losses(tmp_path / "runs" / name / "wide") for name in ("plain", "compiled"))
    apart = max(abs(mine - other) / other for mine, other in zip(compiled, plain, strict=True))
    print(f"compiled: {apart:.1e}")
    # the same sums in another order
    assert 0 < apart < 1e-5
