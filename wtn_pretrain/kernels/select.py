"""The key `run.kernels`: which implementations may be used, what is installed and works here, and what is live as a result."""

import sys
from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from wtn_pretrain.device import device as own_device
from wtn_pretrain.errors import UserError
from wtn_pretrain.kernels import attention, jit
from wtn_pretrain.kernels import linear_cross_entropy as cross_entropy
from wtn_pretrain.kernels.dropout_add_norm import apex_norm
from wtn_pretrain.kernels.linear import why_no_onednn
from wtn_pretrain.kernels.live import Choice, Implementation, use

Kernels = Literal["auto", "torch", "triton", "apex"]
"""`auto`: the best that works here, op by op (on CPUs torch, oneDNN, fast dropout); `torch`: nothing else; `triton`: this package's own
kernels; `apex`: NVIDIA's LayerNorm, and torch for the rest."""

APEX = ("fused_layer_norm_cuda", "amp_C")
"""Modules that NVIDIA's apex compiles."""
FUSED = {
    "bias_gelu": "bias, GELU and their gradients in one pass each",
    "dropout_add_norm": "bias, dropout, addition and LayerNorm in one pass, no mask stored",
    "linear_cross_entropy": "softmax and its gradient in two passes over a chunk of logits",
    "bridge_energy": "both energies and the gradient in one pass over a chunk of the bridge's output",
}
"""What there are Triton kernels for."""


def choose(kernels: Kernels, on: torch.device | None = None) -> Choice:
    """What is live for each operation under the key `run.kernels`, and why. What runs on an accelerator is tried out there first.

    Args:
        on: the device; None: that of this rank.

    Raises:
        UserError: the set is not installed or does not run on the device.
    """
    device = on or own_device()
    operations, notes = _plain(), []
    no_apex = why_no_apex(device)
    if find_spec("apex") is not None and _not_nvidias():
        notes.append(f"apex: {no_apex}")
    if kernels == "apex":
        if no_apex:
            raise UserError(
                f"run.kernels: apex: {no_apex}; build NVIDIA's from source with its compiled modules, or set run.kernels to auto or torch"
            )
        operations["dropout_add_norm"] = Implementation("apex", "asked for: NVIDIA's LayerNorm after torch's bias, dropout and addition")
    elif kernels == "triton":
        if reason := jit.why_not(device):
            raise UserError(
                f"run.kernels: triton: {reason} (device {device.type}); set run.kernels to auto or torch, or use a device that has it"
            )
        operations |= {name: Implementation("triton", f"asked for: {what}") for name, what in FUSED.items()}
    elif kernels == "auto" and device.type != "cpu":
        operations |= _best(device, no_apex)
    elif kernels == "auto":
        operations["dropout"] = Implementation("sfc64", "a random word for four elements, drawn again in the backward pass")
        if (no_onednn := why_no_onednn(device)) is None:
            operations["linear"] = Implementation("onednn", "oneDNN where a layer is large")
        else:
            operations["linear"] = Implementation("torch", f"no oneDNN: {no_onednn}")
    if device.type != "cpu":
        operations["documents"] = _documents(device, others=kernels == "auto")
    return Choice(kernels, device.type, operations, tuple(notes))


def activate(kernels: Kernels) -> Choice:
    """`choose` for the device of this rank, made that of this process."""
    choice = choose(kernels)
    use(choice)
    return choice


def why_no_apex(device: torch.device) -> str | None:
    """None where NVIDIA's apex is installed and its LayerNorm computes rightly on `device`, else what stands against it."""
    if find_spec("apex") is None:
        return "it is not installed"
    if missing := _not_nvidias():
        return f"the installed package of that name has no {' and no '.join(missing)}: another project's, or built without its kernels"
    if device.type == "cpu":
        return "it has no CPU kernels"
    x, weight, bias = _drawn(device, (5, 64), (64,), (64,))
    try:
        wrong = bool((apex_norm(x, weight, bias, 1e-5) - F.layer_norm(x, (64,), weight, bias, 1e-5)).abs().max() > 1e-4)
    except Exception as error:  # compiled for another torch or another device: each has errors of its own
        return f"it does not run here ({_one_line(error)})"
    return "it computes wrongly here" if wrong else None


def why_no_liger(device: torch.device) -> str | None:
    """None where Liger Kernel is installed and its loss and gradients are right on `device`, else what stands against it."""
    if find_spec("liger_kernel") is None:
        return "Liger Kernel is not installed"
    hidden, weight, bias = (x.requires_grad_() for x in _drawn(device, (9, 16), (40, 16), (40,)))
    targets = torch.arange(9, device=device) * 4
    targets[3] = -100
    try:
        with torch.enable_grad():
            loss = cross_entropy.by_liger(hidden, weight, bias, targets, -100, 0.1)
            plain, _ = cross_entropy.reference(hidden, weight, bias, targets, -100, 0.1)
            pairs = [torch.autograd.grad(3 * value, (hidden, weight, bias)) for value in (loss, plain)]
        apart = max(float((mine - theirs).abs().max()) for mine, theirs in zip(*pairs, strict=True))
        wrong = abs(float(loss - plain)) > 1e-2 or apart > 1e-2  # room for products in TF32
    except Exception as error:  # another Triton, another signature, another device: each has errors of its own
        return f"Liger Kernel does not run here ({_one_line(error)})"
    return "Liger Kernel computes wrongly here" if wrong else None


def _plain() -> dict[str, Implementation]:
    """torch for everything, chunks included."""
    why = "torch's own operations"
    return {
        "linear": Implementation("torch", why),
        "bias_gelu": Implementation("torch", why),
        "dropout": Implementation("torch", why),
        "dropout_add_norm": Implementation("torch", why),
        "attention": Implementation("sdpa", "torch's fused attention: no scores are stored"),
        "documents": Implementation("sdpa", "a block-diagonal mask"),
        "linear_cross_entropy": Implementation("torch", "in chunks of rows: logits are never whole"),
        "bridge_energy": Implementation("torch", "in chunks of rows: the bridge's output is never whole"),
        "convolution": Implementation("torch", "channels-last; frozen batch norms fold into their convolutions"),
    }


def _best(device: torch.device, no_apex: str | None) -> dict[str, Implementation]:
    """The best that works on an accelerator."""
    found: dict[str, Implementation] = {}
    if (no_triton := jit.why_not(device)) is None:
        found |= {name: Implementation("triton", what) for name, what in FUSED.items()}
    else:
        found |= {name: Implementation("torch", no_triton) for name in ("bias_gelu", "dropout_add_norm")}
        if no_apex is None:
            # apex does the norm alone, so that it comes after what does all of it
            found["dropout_add_norm"] = Implementation("apex", f"NVIDIA's LayerNorm; {no_triton}")
    if why_no_liger(device) is None:
        found["linear_cross_entropy"] = Implementation("liger", "Liger Kernel, tried out here: in chunks of rows")
    return found


def _documents(device: torch.device, others: bool) -> Implementation:
    reasons = []
    if others:
        if (reason := attention.why_no_flash_attn(device)) is None:
            return Implementation("flash_attn", "flash-attn's kernel of variable length, with dropout")
        reasons.append(reason)
    if (reason := attention.why_no_varlen(device)) is None:
        return Implementation("varlen", "torch's kernel of variable length; with dropout or in fp32 a block-diagonal mask")
    return Implementation("sdpa", "; ".join(["a block-diagonal mask", *reasons, reason]))


def _not_nvidias() -> list[str]:
    """The compiled modules that the installed apex lacks."""
    return [module for module in APEX if module not in sys.modules and find_spec(module) is None]


def _drawn(device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Random tensors that leave the run's own generators as they are."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
