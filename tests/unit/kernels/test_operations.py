"""Every operation as the CPU runs it, forward and backward, against fp64; and what holds for it whatever computes it."""

import pytest
import torch
import torch.nn.functional as F

from tests.unit.kernels.comparing import CASES, TOLERANCE, drawn
from wtn_pretrain.imitation.losses import energy_mse
from wtn_pretrain.kernels import bridge_energy as bridge_module
from wtn_pretrain.kernels import linear_cross_entropy as entropy_module
from wtn_pretrain.kernels.bias_gelu import bias_gelu
from wtn_pretrain.kernels.bridge_energy import bridge_energy
from wtn_pretrain.kernels.dropout_add_norm import dropout_add_norm, kept_by
from wtn_pretrain.kernels.linear_cross_entropy import linear_cross_entropy, reference
from wtn_pretrain.planning.footprint import LiveStorages


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few rows, so that small inputs have several and the last one is not full."""
    monkeypatch.setattr(entropy_module, "CHUNK", (500, 500))
    monkeypatch.setattr(bridge_module, "CHUNK", (50, 50))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("small_chunks")
def test_against_fp64(case: str, dtype: str) -> None:
    errors = CASES[case](dtype)
    assert errors
    assert max(errors.values()) <= TOLERANCE[dtype], errors


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.usefixtures("small_chunks")
def test_gradients_by_finite_differences(smoothing: float) -> None:
    targets = torch.tensor([1, -100, 4, 0])
    leaves = [drawn(*shape, seed=seed).requires_grad_() for seed, shape in enumerate([(4, 3), (5, 3), (5,)])]
    assert torch.autograd.gradcheck(lambda *given: linear_cross_entropy(*given, targets, label_smoothing=smoothing)[0], leaves)
    target, mask = drawn(4, 2, 6, seed=9), torch.tensor([[True, False]])
    leaves = [drawn(4, 2, 3).requires_grad_(), drawn(6, 3, seed=1).requires_grad_()]
    assert torch.autograd.gradcheck(lambda hidden, expand: bridge_energy(hidden, expand, target, mask), leaves)


def test_the_loss_is_torchs_and_the_count_is_whole() -> None:
    hidden, weight, bias = drawn(6, 4).float(), drawn(9, 4, seed=1).float(), drawn(9, seed=2).float()
    targets = torch.tensor([3, -1, 0, 8, -1, 2])
    loss, count = linear_cross_entropy(hidden, weight, bias, targets, ignore=-1, label_smoothing=0.1)
    logits = hidden @ weight.T + bias
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum", label_smoothing=0.1))
    assert count.dtype is torch.int64 and count.item() == 4
    assert loss.dtype is torch.float32


def test_logits_far_from_zero_neither_overflow_nor_vanish() -> None:
    hidden, weight = torch.tensor([[1e4, -1e4]], requires_grad=True), torch.eye(2)
    for target, expected in ((0, 0.0), (1, 2e4)):
        loss, _ = linear_cross_entropy(hidden, weight, None, torch.tensor([target]))
        assert loss.item() == expected
        (gradient,) = torch.autograd.grad(loss, hidden)
        assert gradient.tolist() == ([[0.0, 0.0]] if target == 0 else [[1.0, -1.0]])


def test_impossible_targets_are_refused() -> None:
    for target in (5, -2):
        with pytest.raises((IndexError, RuntimeError)):
            linear_cross_entropy(torch.zeros(1, 2), torch.zeros(5, 2), None, torch.tensor([target]))


@pytest.mark.parametrize("operation", ["cross-entropy", "bridge"])
def test_scaling_a_loss_scales_its_gradients_and_a_graph_can_be_kept(operation: str) -> None:
    hidden, matrix = drawn(7, 4).float().requires_grad_(), drawn(9, 4, seed=1).float().requires_grad_()
    if operation == "bridge":
        loss, _ = bridge_energy(hidden, matrix, drawn(7, 9, seed=2).float())
    else:
        loss, _ = linear_cross_entropy(hidden, matrix, None, torch.arange(7))
    plain = torch.autograd.grad(loss, (hidden, matrix), retain_graph=True)
    scaled = torch.autograd.grad(loss * 2.0**16, (hidden, matrix), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, matrix))
    assert all(torch.equal(2.0**16 * a, b) and torch.equal(a, c) for a, b, c in zip(plain, scaled, again, strict=True))


@pytest.mark.parametrize("operation", ["cross-entropy", "bridge"])
def test_without_gradients_none_are_made(operation: str) -> None:
    hidden, matrix = drawn(64, 16).float().requires_grad_(), drawn(256, 16, seed=1).float().requires_grad_()
    target, targets = drawn(64, 256, seed=2).float(), torch.arange(64)

    def call() -> torch.Tensor:
        return bridge_energy(hidden, matrix, target)[0] if operation == "bridge" else linear_cross_entropy(hidden, matrix, None, targets)[0]

    learned = call()
    with torch.no_grad(), LiveStorages() as made:
        measured = call()
    assert not measured.requires_grad and torch.equal(measured, learned)
    with LiveStorages() as with_gradients:
        call()
    assert made.peak < with_gradients.peak
    # what is frozen gets none
    matrix.requires_grad_(False)
    call().backward()
    assert hidden.grad is not None and matrix.grad is None


@pytest.mark.parametrize("operation", ["cross-entropy", "bridge"])
def test_autocast_reaches_the_products_and_gradients_keep_their_dtypes(operation: str) -> None:
    """The plain form under autocast is as far from fp64 as bf16 is; the fused one may be no further."""
    grads: dict[str, list[torch.Tensor]] = {}
    for arm in ("fused", "plain", "fp64"):
        dtype = torch.float64 if arm == "fp64" else torch.float32
        hidden, matrix = (x.to(dtype).requires_grad_() for x in (drawn(40, 32), drawn(60, 32, seed=1, scale=0.3)))
        target, targets = drawn(40, 60, seed=2).to(dtype), torch.arange(40)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=arm != "fp64"):
            if operation == "bridge":
                loss, _ = (bridge_energy if arm == "fused" else bridge_module.reference)(hidden, matrix, target)
            else:
                loss, _ = (linear_cross_entropy if arm == "fused" else reference)(hidden, matrix, None, targets)
        assert loss.dtype is dtype
        loss.backward()
        assert hidden.grad is not None and matrix.grad is not None and hidden.grad.dtype is matrix.grad.dtype is dtype
        grads[arm] = [loss.detach(), hidden.grad, matrix.grad]
    for number, (fused, plain, exact) in enumerate(zip(*grads.values(), strict=True)):
        error, usual = ((x - exact).norm() / exact.norm() for x in (fused, plain))
        if number:
            assert 1e-4 < usual < 2e-2, "autocast changes nothing, so that the comparison says nothing"
            assert error < 1.5 * usual
        else:
            # errors of single terms average out in the loss
            assert error < 2e-3


def test_the_distance_survives_in_bf16_where_its_expansion_cancels() -> None:
    """|E h - t|^2 of a student that has learned, against fp64 from the same bf16 product."""
    hidden, expand = drawn(200, 16).bfloat16(), drawn(64, 16, seed=1).bfloat16()
    answer = hidden @ expand.T
    target = (answer.double() * (1 + 0.002 * drawn(200, 64, seed=2))).float()
    exact = (answer.double() - target.double()).square().sum().item()
    top, bottom = bridge_energy(hidden, expand, target)
    assert top.item() == pytest.approx(exact, rel=1e-4)  # of a target in fp32
    gram = (hidden @ (expand.T @ expand) * hidden).float().sum() - 2 * (hidden @ expand.T * target.bfloat16()).float().sum() + bottom
    assert abs(gram.item() - exact) > exact, "the expansion would have done, so that this says nothing"


def test_energy_mse_through_a_bridge_is_what_it_says() -> None:
    student, expand, teacher = drawn(2, 5, 3).float(), drawn(7, 3, seed=1).float(), drawn(2, 5, 7, seed=2).float()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    expected = (student @ expand.T - teacher)[mask].square().sum() / teacher[mask].square().sum()
    torch.testing.assert_close(energy_mse(student, teacher, mask, expand).value(), expected)
    images = [x.permute(0, 2, 1).unflatten(-1, (5, 1)) for x in (student, teacher)]
    torch.testing.assert_close(
        energy_mse(*images, None, expand, channel_axis=1).value(), (student @ expand.T - teacher).square().sum() / teacher.square().sum()
    )
    # nothing counts: no division by zero
    assert energy_mse(student, teacher, torch.zeros_like(mask), expand).value() == 0


def test_a_teacher_of_another_dtype_is_compared_in_fp32() -> None:
    student, teacher = drawn(4, 6).float(), drawn(4, 6, seed=1).bfloat16()
    top, bottom = bridge_energy(student, None, teacher)
    torch.testing.assert_close(top, (student - teacher.float()).square().sum())
    torch.testing.assert_close(bottom, teacher.float().square().sum())


def test_neither_logits_nor_the_bridge_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that operators hold at once, forward and backward, against the plain form; chunks are small as inputs are."""
    monkeypatch.setattr(bridge_module, "CHUNK", (2**17, 2**17))
    monkeypatch.setattr(entropy_module, "CHUNK", (2**18, 2**18))
    hidden, weight = torch.randn(1024, 32, requires_grad=True), torch.randn(4096, 32, requires_grad=True)
    peaks = {}
    for name, function in (("fused", linear_cross_entropy), ("plain", reference)):
        with LiveStorages() as made:
            function(hidden, weight, None, torch.arange(1024))[0].backward()
        peaks["cross-entropy", name], hidden.grad, weight.grad = made.peak, None, None
    hidden, expand = torch.randn(8, 512, 64, requires_grad=True), torch.randn(256, 64, requires_grad=True)
    target = torch.randn(8, 512, 256)
    for name, energy in (("fused", bridge_energy), ("plain", bridge_module.reference)):
        with LiveStorages() as made:
            energy(hidden, expand, target)[0].backward()
        peaks["bridge", name], hidden.grad, expand.grad = made.peak, None, None
    assert peaks["cross-entropy", "plain"] > 2 * 1024 * 4096 * 4 and peaks["bridge", "plain"] > 2 * target.numel() * 4
    assert peaks["cross-entropy", "fused"] <= peaks["cross-entropy", "plain"] / 3
    assert peaks["bridge", "fused"] <= peaks["bridge", "plain"] / 3


@pytest.mark.parametrize("operation", ["gelu", "norm", "cross-entropy", "bridge"])
def test_on_tensors_without_data(operation: str) -> None:
    """What plans are predicted from."""
    x = torch.empty(3, 8, device="meta", requires_grad=True)
    if operation == "gelu":
        loss = bias_gelu(x, torch.empty(8, device="meta")).sum()
    elif operation == "norm":
        loss = dropout_add_norm(x, None, x, torch.empty(8, device="meta"), torch.empty(8, device="meta"), 1e-5, 0.1, True)[0].sum()
    elif operation == "bridge":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = bridge_energy(x, torch.empty(32, 8, device="meta"), torch.empty(3, 32, device="meta"))[0]
    else:
        loss = linear_cross_entropy(x, torch.empty(32, 8, device="meta"), None, torch.empty(3, dtype=torch.int64, device="meta"))[0]
    loss.backward()
    assert x.grad is not None and x.grad.shape == x.shape


def test_sums_have_the_wider_dtype() -> None:
    x, residual = drawn(3, 8).bfloat16(), drawn(3, 8, seed=1).float()
    weight, shift = torch.ones(8), torch.zeros(8)
    for mixed in (x, x.float()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            normed, total = dropout_add_norm(mixed, None, residual, weight, shift, 1e-5, 0.0, True)
        assert normed.dtype is total.dtype is torch.float32
        torch.testing.assert_close(normed, F.layer_norm(total, (8,)))
    normed, total = dropout_add_norm(x, None, x, weight, shift, 1e-5, 0.0, True)
    assert normed.dtype is total.dtype is torch.bfloat16


def test_dropout_masks_follow_the_generator_and_have_the_right_share() -> None:
    def drop(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        x = torch.ones(50, 40)
        return dropout_add_norm(x, None, torch.zeros_like(x), torch.ones(40), torch.zeros(40), 1e-5, 0.25, True)[1]

    assert torch.equal(drop(1), drop(1)) and not torch.equal(drop(1), drop(2))
    torch.testing.assert_close(drop(1).unique(), torch.tensor([0.0, 1 / 0.75]))
    # the same for the masks that Triton draws: 200000 of them, a share of p within five standard deviations
    kept = kept_by(2**40 + 12345, 500, 400, 0.25)
    assert abs(kept.float().mean().item() - 0.75) < 5 * (0.25 * 0.75 / 200000) ** 0.5
    assert not torch.equal(kept, kept_by(2**40 + 12346, 500, 400, 0.25))
    # rows and columns do not repeat each other
    assert len({tuple(row) for row in kept.tolist()}) == 500


def test_the_generator_of_masks_gives_the_published_numbers() -> None:
    """Random123's known answer for Philox 4x32-10 at counter and key of zeros: 6627e8d5 e169c58d bc57ac4c 9b00dbd8."""
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    for column, word in enumerate(words):
        share = (word >> 8) * 2.0**-24
        assert kept_by(0, 1, 4, share)[0, column] and not kept_by(0, 1, 4, share + 2.0**-24)[0, column]
