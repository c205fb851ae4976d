"""Kernels of others: found or not, and what that costs."""

from importlib import metadata
from importlib.util import find_spec

import torch

from wtn_pretrain.doctor.finding import Finding
from wtn_pretrain.kernels import jit
from wtn_pretrain.kernels.attention import why_no_flash_attn
from wtn_pretrain.kernels.select import why_no_apex, why_no_liger


def check_kernels(device: torch.device) -> list[Finding]:
    """apex, Liger, flash-attn and Triton: none is needed on a CPU, and a wrong apex is a fault anywhere."""
    found = [_apex(device)]
    if device.type == "cpu":
        return [
            *found,
            Finding("kernels", "ok", "on a CPU torch computes, and this package's dropout; Liger, flash-attn and Triton are not used"),
        ]
    if reason := jit.why_not(device):
        text = f"Triton: {reason}; bias, GELU, dropout and LayerNorm then take a pass over memory each"
        found.append(Finding("kernels", "warning", text, "install the Triton that belongs to your torch, and a C compiler"))
    else:
        found.append(Finding("kernels", "ok", "Triton's fused kernels compute rightly here"))
    reason = why_no_liger(device)
    cost = "the loss then comes from this package's Triton kernel, in chunks as well: as much memory, a little more time"
    found.append(Finding("kernels", "ok", f"{reason}; {cost}" if reason else "Liger Kernel computes the loss"))
    reason = why_no_flash_attn(device)
    cost = "attention runs in torch's fused kernels; rows of packed documents with dropout then compute and mask every pair of them"
    found.append(Finding("kernels", "ok", f"{reason}; {cost}" if reason else "flash-attn is live for packed rows"))
    return found


def _apex(device: torch.device) -> Finding:
    if find_spec("apex") is None:
        return Finding("kernels", "ok", "no apex, and nothing needs it: optimizers and norms are torch's or this package's")
    reason = why_no_apex(device)
    if reason and "package of that name" in reason:
        text = f"a wrong apex{_named()}: {reason}. The package apex of PyPI has nothing to do with NVIDIA's"
        return Finding("kernels", "fault", text, "pip uninstall apex; NVIDIA's is built from source, and nothing here needs it")
    return Finding("kernels", "ok", f"NVIDIA's apex: {reason or 'its LayerNorm computes rightly here, used under run.kernels=apex'}")


def _named() -> str:
    """Whose it says that it is."""
    try:
        about = metadata.metadata("apex")
    except metadata.PackageNotFoundError:
        return ""
    words = [str(about[key]) for key in ("Summary", "Home-page") if about[key] and about[key] != "UNKNOWN"]
    return f" (version {about['Version']}{': ' + '; '.join(words) if words else ''})"
