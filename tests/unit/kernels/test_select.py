"""What the key `kernels` makes live, and what it refuses."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from wtn_pretrain.errors import UserError
from wtn_pretrain.kernels import jit
from wtn_pretrain.kernels.live import OPERATIONS, Choice, Implementation, active, live, use, using
from wtn_pretrain.kernels.select import activate, choose, why_no_liger

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = active()
    yield
    use(before)


@pytest.mark.parametrize(("kernels", "own"), [("auto", {"dropout": "sfc64", "linear": "onednn"}), ("torch", {})])
def test_on_the_cpu_torch_is_live(kernels: str, own: dict[str, str]) -> None:
    choice = choose(kernels, CPU)
    assert list(choice.operations) == list(OPERATIONS)
    assert {implementation.name for operation, implementation in choice.operations.items() if operation not in own} == {"torch", "sdpa"}
    assert {operation: choice.operations[operation].name for operation in own} == own
    line = choice.describe()
    assert line.startswith(f"kernels {kernels} on cpu: linear ") and "\n" not in line
    assert all(operation in line for operation in OPERATIONS)
    assert all(f"{operation} " in choice.explain() for operation in OPERATIONS)
    assert all(implementation.why for implementation in choice.operations.values())


@pytest.mark.skipif(jit.INTERPRETED, reason="Triton's interpreter is on")
def test_triton_is_refused_where_it_cannot_run() -> None:
    with pytest.raises(UserError, match=r"^run.kernels: triton: Triton .*set run.kernels to auto or torch") as refused:
        choose("triton", CPU)
    assert "\n" not in str(refused.value)


def test_apex_is_refused_where_there_is_none() -> None:
    with pytest.raises(UserError, match=r"^run.kernels: apex: .*set run.kernels to auto or torch") as refused:
        choose("apex", CPU)
    assert "\n" not in str(refused.value)


def test_a_package_named_apex_that_is_not_nvidias_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('must not be imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    with pytest.raises(UserError, match="has no fused_layer_norm_cuda and no amp_C: another project's"):
        choose("apex", CPU)
    # beside a choice that does not need it, it is said as well
    assert "apex: the installed package of that name has no fused_layer_norm_cuda" in choose("auto", CPU).describe()


def test_a_broken_package_is_not_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "liger_kernel").mkdir()
    (tmp_path / "liger_kernel" / "__init__.py").write_text("raise ImportError('built for\\nanother Triton')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert why_no_liger(CPU) == "Liger Kernel does not run here (built for another Triton)"


def test_choosing_leaves_random_numbers_as_they_were() -> None:
    state = torch.get_rng_state()
    activate("auto")
    why_no_liger(CPU)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_live_depends_on_the_tensor() -> None:
    assert live("bias_gelu", torch.empty(1)) == "torch"
    choice = Choice("triton", "cpu", {operation: Implementation("triton", "") for operation in OPERATIONS})
    with using(choice):
        assert active() is choice
        assert live("bias_gelu", torch.empty(1)) == live("bias_gelu", torch.empty(1, dtype=torch.bfloat16)) == "triton"
        # arithmetic of kernels is in fp32; tensors elsewhere, and those without data, are not theirs
        assert live("bias_gelu", torch.empty(1, dtype=torch.float64)) == "torch"
        assert live("bias_gelu", torch.empty(1, device="meta")) == "torch"
    assert active() is not choice


def test_activate_holds_for_the_process() -> None:
    assert activate("torch") is active()
    use(None)
    assert active() is None
